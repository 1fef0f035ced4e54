"""Pictures that stay in their files: a list of them, and workers that decode them in batches."""

import contextlib
import hashlib
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from secateur.base import machine
from secateur.base.errors import DataError
from secateur.base.stage import raw_folder
from secateur.data.augment import Draw, FileAugment

GREY = {"1", "L", "LA"}
"""Pillow's names for pictures without colour."""
DEEP = {"I", "F"}
"""Beginnings of its names for pictures of more than 8 bits a pixel."""


class PackedNames:
    """Many file names in two tensors: little memory, also with many workers."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Sequence[bytes]) -> "PackedNames":
        """The names one after the other (uint8), and where each ends (int64)."""
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
    """1: turned to grey; 3: to red, green and blue, whatever it was. Transparency is dropped."""
    height: int
    width: int
    resize: int | None
    """The shorter side is brought to so many pixels, then the middle is cut out; None: as is."""

    @property
    def bytes(self) -> int:
        """Of one decoded image."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class ImageFileList:
    """Some pictures by file name, with their labels."""

    base: Path
    """The raw folder; not saved, since it differs between machines."""
    folder: str
    """Name of the data set's folder in it."""
    names: PackedNames
    """Names in that folder, in the file system's own bytes."""
    labels: Tensor
    """int64, (count,), indices into the class names."""
    sizes: Tensor
    """int64, (count,): bytes of each file, so that a file that has changed is noticed."""
    digests: Tensor
    """uint8, (count, 32): sha256 of each file, or (count, 0) where contents are not read."""
    view: ImageView

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> list[int]:
        """Channels, height and width of every image."""
        return [self.view.channels, self.view.height, self.view.width]

    def find(self) -> None:
        """Raise DataError if the folder is not there."""
        if not (self.base / self.folder).is_dir():
            raise DataError(
                f"{self.base / self.folder}: no such folder; set SECATEUR_DATA to the folder that "
                f"holds {self.folder}/"
            )

    def path(self, index: int) -> Path:
        """File of an image."""
        return self.base / self.folder / os.fsdecode(self.names[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageFileList":
        """The pictures at these positions, in this order."""
        index = torch.as_tensor(np.asarray(indices))
        return replace(
            self,
            names=PackedNames.pack([self.names[i] for i in index.tolist()]),
            labels=self.labels[index],
            sizes=self.sizes[index],
            digests=self.digests[index],
        )

    def image(self, index: int, box: tuple[float, int, int] | None = None) -> np.ndarray:
        """Decode one picture: uint8, (height, width, channels).

        `box` gives the smallest area, seed and epoch of a random crop; without, it is the view of
        evaluation. Raises DataError naming the file if it is missing, has changed or is damaged.
        """
        with opened(self.path(index), int(self.sizes[index])) as picture:
            if box is not None:
                corners = random_box(picture.size, *box, index)
                flat = _flat(picture, self.view.channels).crop(corners)
                flat = flat.resize((self.view.width, self.view.height), Image.Resampling.BILINEAR)
            else:
                flat = _framed(_flat(picture, self.view.channels), self.view)
            pixels = np.asarray(flat)
        if pixels.shape[:2] != (self.view.height, self.view.width):
            raise DataError(f"{self.path(index)}: changed since `prepare`: another size")
        return pixels.reshape(self.view.height, self.view.width, self.view.channels)

    def update(self, digest: "hashlib._Hash") -> None:
        """Add names, labels, sizes, contents and view to a hash."""
        digest.update(json.dumps([self.folder, asdict(self.view)]).encode())
        for tensor in self.tensors().values():
            digest.update(f" {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().data)

    def tensors(self) -> dict[str, Tensor]:
        """All that is saved, beside `header`."""
        names = {"names": self.names.text, "ends": self.names.ends}
        return names | {"labels": self.labels, "sizes": self.sizes, "digests": self.digests}

    def header(self) -> dict[str, Any]:
        """What `restored` needs beside the tensors, as plain values."""
        return {"folder": self.folder, "view": asdict(self.view)}


def restored(header: dict[str, Any], part: dict[str, Tensor]) -> ImageFileList:
    """Take up what `header` and `tensors` gave; ValueError if the parts do not fit together."""
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
def opened(path: Path, size: int | None = None) -> Iterator[Image.Image]:
    """A picture; whatever is wrong with it becomes a DataError of one line.

    `size` is the number of bytes that the file must have.
    """
    try:
        with path.open("rb") as file:
            if size is not None and os.fstat(file.fileno()).st_size != size:
                raise DataError(f"{path}: changed since `prepare`; run `dvc repro -f prepare`")
            with Image.open(file) as picture:
                yield picture
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: missing; SECATEUR_DATA names the folder it is under") from None
    except Exception as error:  # Pillow's readers raise many types, SyntaxError among them
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no kind that is known"
        raise DataError(f"{path}: not a readable picture: {reason}") from None


def random_box(
    shape: tuple[int, int], smallest: float, seed: int, epoch: int, index: int
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop that holds `smallest` to all of (width, height).

    The usual crop for ImageNet (C. Szegedy et al., Going deeper with convolutions, CVPR 2015): area
    uniform, ratio of the sides between 3:4 and 4:3, uniform in its logarithm. Ten tries; if none
    fits, the middle with the nearest ratio. Depends on the arguments alone.
    """
    width, height = shape
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, index]))
    widest = math.log(4 / 3)
    for share, slant, down, across in chance.random((10, 4)).tolist():
        area = width * height * (smallest + share * (1 - smallest))
        ratio = math.exp(widest * (2 * slant - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h


class ImageFileLoader:
    """Decodes the pictures of a listing, in workers that live until `close`.

    How many there are (`machine.workers`) changes nothing but the speed.
    """

    def __init__(
        self,
        listing: ImageFileList,
        augment: FileAugment | None,
        seed: int,
        device: torch.device,
        world: int,
    ) -> None:
        """`augment` is None where pictures are wanted as evaluation sees them."""
        workers = machine.workers(world)
        self.device = device
        self.steps = _Steps()
        self.loader: DataLoader[Tensor | str] | None = DataLoader(
            _Decoder(listing, augment, seed),
            sampler=self.steps,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_quiet if workers else None,
            generator=torch.Generator(),  # its own: the global one belongs to the training
        )

    def batches(self, draw: Draw, parts: list[slice]) -> Iterator[Tensor]:
        """One batch a part of the epoch, uint8, (count, height, width, channels)."""
        assert self.loader is not None, "closed"
        self.steps.steps = [draw.part(part) for part in parts]
        for batch in self.loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch.to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the workers."""
        self.loader = None


class _Steps(torch.utils.data.Sampler[Draw]):
    """The steps that a loader is given for the epoch at hand."""

    def __init__(self) -> None:
        self.steps: list[Draw] = []

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.steps)


class _Decoder(TorchDataset[Tensor | str]):
    """What a worker does: a step's pictures, or the line that says why there are none."""

    def __init__(self, listing: ImageFileList, augment: FileAugment | None, seed: int) -> None:
        self.listing, self.augment, self.seed = listing, augment, seed

    def __getitem__(self, step: Draw) -> Tensor | str:
        channels, height, width = self.listing.shape
        batch = np.zeros((len(step.image), height, width, channels), dtype=np.uint8)
        pad, box = 0, None
        if self.augment is not None:
            pad, area = self.augment.pad, self.augment.area
            box = (area, self.seed, step.epoch) if area < 1 else None
        framed = np.zeros((height + 2 * pad, width + 2 * pad, channels), dtype=np.uint8)
        inside = framed[pad : pad + height, pad : pad + width]
        moves = (step.image, step.top, step.left, step.flip)
        for place, index, top, left, flip in zip(batch, *(m.tolist() for m in moves), strict=True):
            try:
                inside[:] = self.listing.image(index, box)
            except DataError as error:  # raised here, it would come out with a worker's traceback
                return str(error)
            found = framed[top : top + height, left : left + width]
            place[:] = found[:, ::-1] if flip else found
        return torch.from_numpy(batch)


def _quiet(_worker: int) -> None:
    """Leave Ctrl-C to the main process, and end on SIGTERM at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _flat(picture: Image.Image, channels: int) -> Image.Image:
    """In grey, or in red, green and blue."""
    if picture.mode[:1] in DEEP:
        raise ValueError(f"more than 8 bits a pixel ({picture.mode}); convert it to 8")
    return picture.convert("L" if channels == 1 else "RGB")


def _framed(picture: Image.Image, view: ImageView) -> Image.Image:
    """Resized and cut as the view says, to the pixel as torchvision's Resize and CenterCrop."""
    if view.resize is None:
        return picture
    width, height = picture.size
    shape = (view.resize, view.resize * height // width)
    if height < width:
        shape = (view.resize * width // height, view.resize)
    picture = picture.resize(shape, Image.Resampling.BILINEAR)
    left, top = round((shape[0] - view.width) / 2), round((shape[1] - view.height) / 2)
    return picture.crop((left, top, left + view.width, top + view.height))
