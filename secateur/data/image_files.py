"""Images that stay in their files: a list of them, and how one of them is decoded."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from secateur.base.errors import DataError
from secateur.base.stage import raw_folder
from secateur.data.augment import random_resized_crop

GREY_MODES = {"1", "L", "LA"}
"""Pillow's modes of images without colour."""
DEEP_MODES = {"I", "F"}
"""First letters of Pillow's modes of more than 8 bits per channel."""


class PackedNames:
    """Many file names in two tensors, which worker processes share instead of copying."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Sequence[bytes]) -> "PackedNames":
        """Pack names into a tensor of their bytes (uint8) and one of their ends (int64)."""
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

    channels: int
    """1: converted to grey; 3: to red, green and blue. Transparency is dropped."""
    height: int
    width: int
    resize: int | None
    """Pixels of the shorter side before the centre is cropped; None: neither resize nor crop."""

    @property
    def bytes(self) -> int:
        """Size of one decoded image."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class ImageFileList:
    """Labelled images by file name."""

    base: Path
    """The folder of raw data; not saved, since it differs between machines."""
    folder: str
    """Name of the data set's folder in `base`."""
    names: PackedNames
    """Paths below that folder, in the bytes of the file system."""
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

        `crop` is the smallest area, the seed and the epoch of a random crop; without it, the image
        is resized and cropped as for evaluation. Raises DataError naming the file if it is missing,
        has changed or is damaged.
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
        """Feed names, labels, sizes, contents and view to a hash."""
        digest.update(json.dumps([self.folder, asdict(self.view)]).encode())
        for tensor in self.tensors().values():
            digest.update(f" {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().data)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved, beside `header`."""
        names = {"names": self.names.text, "ends": self.names.ends}
        return names | {"labels": self.labels, "sizes": self.sizes, "digests": self.digests}

    def header(self) -> dict[str, Any]:
        """Plain values that are saved; `from_tensors` restores the list from both."""
        return {"folder": self.folder, "view": asdict(self.view)}


def from_tensors(header: dict[str, Any], part: dict[str, Tensor]) -> ImageFileList:
    """The list from its `header` and `tensors`; ValueError if they do not fit each other."""
    view = ImageView(**header["view"])
    names = PackedNames(part["names"], part["ends"])
    count = len(names)
    if {len(part[key]) for key in ("labels", "sizes", "digests")} != {count}:
        raise ValueError("its lists differ in length")
    if count and int(names.ends[-1]) != len(names.text):
        raise ValueError("its file names are incomplete")
    return ImageFileList(
        raw_folder(),
        header["folder"],
        names,
        part["labels"],
        part["sizes"],
        part["digests"],
        view,
    )


@contextlib.contextmanager
def open_image(path: Path, size: int | None = None) -> Iterator[Image.Image]:
    """Open an image file; `size` is the number of bytes that it must have.

    Any error, also while the image is decoded inside the context, becomes a DataError of one line.
    """
    try:
        with path.open("rb") as file:
            if size is not None and os.fstat(file.fileno()).st_size != size:
                raise DataError(f"{path}: changed since `prepare`; run `dvc repro -f prepare`")
            with Image.open(file) as image:
                yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: missing; SECATEUR_DATA names the folder it is under") from None
    except Exception as error:  # Pillow's readers raise many types, SyntaxError among them
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown format"
        raise DataError(f"{path}: not a readable image: {reason}") from None


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """The image in grey (1 channel) or in red, green and blue (3)."""
    if image.mode[:1] in DEEP_MODES:
        raise ValueError(f"more than 8 bits per channel ({image.mode}); convert it to 8")
    return image.convert("L" if channels == 1 else "RGB")


def _resize_and_crop(image: Image.Image, view: ImageView) -> Image.Image:
    """Resize and crop the centre as the view demands, equal to torchvision's Resize, CenterCrop."""
    if view.resize is None:
        return image
    width, height = image.size
    shape = (view.resize, view.resize * height // width)
    if height < width:
        shape = (view.resize * width // height, view.resize)
    image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = round((shape[0] - view.width) / 2), round((shape[1] - view.height) / 2)
    return image.crop((left, top, left + view.width, top + view.height))
