"""Images that stay in their files: lists of files, and how a file is decoded."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import ConfigDict, Field
from torch import Tensor

from secateur.base import files
from secateur.base.errors import DataError, shorten
from secateur.base.stage import raw_folder
from secateur.data.augment import random_resized_crop

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Suffixes of image files, in lower case."""
GREY_MODES = {"1", "L", "LA"}
"""Pillow's modes of images without colour."""
DEEP_MODES = {"I", "F"}
"""First letters of Pillow's modes with more than 8 bits per channel."""


Extent = Annotated[int, Field(ge=1, le=2**16, strict=True)]
"""Channels, height or width of an image."""


class PackedNames:
    """Many file names, packed into two tensors that worker processes share instead of copying."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Sequence[bytes]) -> "PackedNames":
        """Pack names into a tensor of their bytes (uint8) and a tensor of their ends (int64)."""
        text = np.frombuffer(b"".join(names), dtype=np.uint8).copy()
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(torch.from_numpy(text), torch.from_numpy(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        first = int(self.ends[index - 1]) if index else 0
        return self.text[first : int(self.ends[index])].numpy().tobytes()


@dataclass(frozen=True)
class ImageView:
    """How a file becomes an image of a fixed shape."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    channels: Extent
    """1: converted to greyscale; 3: to RGB. Transparency is dropped."""
    height: Extent
    width: Extent
    resize: Extent | None
    """Pixels of the shorter side before the centre crop; None: neither resized nor cropped."""

    @property
    def bytes(self) -> int:
        """Size of one decoded image."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class ImageFileList:
    """Labelled images that stay in their files."""

    base: Path
    """The folder of raw data; not saved, since it differs between machines."""
    folder: str
    """Name of the data set's folder in `base`."""
    names: PackedNames
    """Paths relative to that folder, as bytes of the file system."""
    labels: Tensor
    """int64, (count,), indices into the class names."""
    sizes: Tensor
    """int64, (count,): bytes of each file, to detect files that have changed."""
    digests: Tensor
    """uint8, (count, 32): sha256 of each file, or (count, 0) if contents were not read."""
    view: ImageView

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> list[int]:
        """Channels, height and width of every image."""
        return [self.view.channels, self.view.height, self.view.width]

    def check_folder(self) -> None:
        """Raise DataError if the folder does not exist."""
        if not (self.base / self.folder).is_dir():
            raise DataError(
                f"{self.base / self.folder}: no such folder; set SECATEUR_DATA to the folder that "
                f"holds {self.folder}/"
            )

    def path(self, index: int) -> Path:
        """Path of an image's file."""
        return self.base / self.folder / os.fsdecode(self.names[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageFileList":
        """The images at these positions, in this order."""
        index = torch.as_tensor(np.asarray(indices))
        return replace(
            self,
            names=PackedNames.pack([self.names[i] for i in index.tolist()]),
            labels=self.labels[index],
            sizes=self.sizes[index],
            digests=self.digests[index],
        )

    def decode(self, index: int, crop: tuple[float, int, int] | None = None) -> np.ndarray:
        """Decode one image: uint8, (height, width, channels).

        `crop` has the smallest area, the seed and the epoch of a random crop; without it, the image
        is resized and centre-cropped as for evaluation. Raises DataError naming the file if it is
        missing, has changed or is damaged.
        """
        with open_image(self.path(index), int(self.sizes[index])) as image:
            converted = _convert(image, self.view.channels)
            if crop is not None:
                box = random_resized_crop(image.size, *crop, index)
                size = (self.view.width, self.view.height)
                converted = converted.crop(box).resize(size, Image.Resampling.BILINEAR)
            else:
                converted = _resize_and_crop(converted, self.view)
            pixels = np.asarray(converted)
        if pixels.shape[:2] != (self.view.height, self.view.width):
            raise DataError(f"{self.path(index)}: changed since `prepare`: another size")
        return pixels.reshape(self.view.height, self.view.width, self.view.channels)

    def update_hash(self, digest: "hashlib._Hash") -> None:
        """Update a hash with names, labels, sizes, digests and view."""
        digest.update(json.dumps([self.folder, asdict(self.view)]).encode())
        for tensor in self.tensors().values():
            digest.update(f" {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().data)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved, in addition to `header`."""
        names = {"names": self.names.text, "ends": self.names.ends}
        return names | {"labels": self.labels, "sizes": self.sizes, "digests": self.digests}

    def header(self) -> dict[str, Any]:
        """The plain values that are saved; `from_tensors` restores the list from both."""
        return {"folder": self.folder, "view": asdict(self.view)}


@dataclass(frozen=True)
class FileListHeader:
    """What `ImageFileList.header` returns; its annotations are the schema of the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    folder: str
    view: ImageView


def from_tensors(header: FileListHeader, part: dict[str, Tensor]) -> ImageFileList:
    """The list from its `header` and `tensors`; ValueError if they do not fit each other."""
    types = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in part.items()}
    if types != TYPES:
        raise ValueError(f"its lists are {types}, must be {TYPES}")
    names = PackedNames(part["names"], part["ends"])
    count = len(part["labels"]) if part["labels"].dim() == 1 else -1
    digest = part["digests"].shape[1:]
    if any(part[key].shape != (count,) for key in ("ends", "sizes")) or names.text.dim() != 1:
        raise ValueError("its lists differ in length")
    if part["digests"].shape[:1] != (count,) or digest not in ((0,), (32,)):
        raise ValueError("its hashes are not one for each file")
    _check_names(names)
    if header.view.channels not in (1, 3):
        raise ValueError(f"channels = {header.view.channels}: must be 1 or 3")
    if Path(header.folder).is_absolute() or {"..", ""} & set(header.folder.split("/")):
        raise ValueError(f"folder = {shorten(header.folder)}: must be a path below the raw data")
    if count and int(part["sizes"].min()) < 0:
        raise ValueError("a file has a negative size")
    return ImageFileList(
        raw_folder(),
        header.folder,
        names,
        part["labels"],
        part["sizes"],
        part["digests"],
        header.view,
    )


TYPES = {
    "names": "uint8",
    "ends": "int64",
    "labels": "int64",
    "sizes": "int64",
    "digests": "uint8",
}
"""Types of the tensors of a list of files."""


def _check_names(names: PackedNames) -> None:
    """ValueError if names are empty or lead out of their folder; fast even for a million names."""
    text, ends = names.text.numpy(), names.ends.numpy()
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    if np.any(ends <= starts) or np.any(ends < 0) or (ends[-1] if len(ends) else 0) != len(text):
        raise ValueError("its file names are incomplete")
    content = text.tobytes()
    absolute = bool(len(text)) and bool(np.any(text[starts] == ord("/")))
    if absolute or b"\0" in content:
        raise ValueError("it has a file name that is no path in its folder")
    if b".." in content:
        bounds = zip(starts.tolist(), ends.tolist(), strict=True)
        if any(b".." in content[a:b].split(b"/") for a, b in bounds):
            raise ValueError("it has a file name that leads out of its folder")


@contextlib.contextmanager
def open_image(path: Path, size: int | None = None) -> Iterator[Image.Image]:
    """Open an image file; `size` is the number of bytes that it must have.

    Any error, including those of decoding inside the context, becomes a DataError of one line.
    """
    found = files.file_size(path, DataError, "; SECATEUR_DATA names the folder it is under")
    if size is not None and found != size:
        raise DataError(f"{path}: changed since `prepare`; run `dvc repro -f prepare`")
    try:
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise many types, SyntaxError among them
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown format"
        raise DataError(f"{path}: not a readable image: {reason}") from None


def decode_file(path: Path, view: ImageView) -> np.ndarray:
    """Decode an image of any size: uint8, (height, width, channels).

    It is resized and cropped as for evaluation; but one that has the view's size already is not
    changed if the view resizes to no more than that. Raises DataError naming the file if it is
    missing or not a readable image.
    """
    with open_image(path) as image:
        converted = _convert(image, view.channels)
        larger = view.resize is not None and view.resize > max(view.width, view.height)
        if larger or image.size != (view.width, view.height):
            converted = _resize_and_crop(converted, view)
        pixels = np.asarray(converted)
    return pixels.reshape(view.height, view.width, view.channels)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """The image in greyscale (1 channel) or RGB (3 channels)."""
    if image.mode[:1] in DEEP_MODES:
        raise ValueError(f"more than 8 bits per channel ({image.mode}); convert it to 8")
    return image.convert("L" if channels == 1 else "RGB")


def _resize_and_crop(image: Image.Image, view: ImageView) -> Image.Image:
    """Resize and centre-crop according to the view, as torchvision's Resize and CenterCrop do."""
    if view.resize is None:
        return image
    width, height = image.size
    shape = (view.resize, view.resize * height // width)
    if height < width:
        shape = (view.resize * width // height, view.resize)
    image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = round((shape[0] - view.width) / 2), round((shape[1] - view.height) / 2)
    return image.crop((left, top, left + view.width, top + view.height))
