"""Prepared data sets: split, hashed, saved, and handed out in batches.

Images of a small data set are held in memory (`Split`), those of a large one stay in their files
(`data.image_files.Listing`). Both give the same batches for the same seed.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from secateur.base import allocator, files
from secateur.base.errors import DataError
from secateur.data import augment
from secateur.data import image_files as listing
from secateur.data.augment import Augment, Draw, FileAugment
from secateur.data.image_files import ImageFileList

FILE = "images.safetensors"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class InMemoryImages:
    """Some images in memory, with their labels."""

    images: Tensor
    """uint8, (count, channels, height, width)."""
    labels: Tensor
    """int64, (count,), indices into the class names."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> list[int]:
        """Channels, height and width of every image."""
        return list(self.images.shape[1:])

    @property
    def pixels(self) -> Tensor:
        """The images as they lie in memory and in files: (count, height, width, channels)."""
        return self.images.permute(0, 2, 3, 1).contiguous()

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor) -> "InMemoryImages":
        """From images as `pixels` gives them."""
        return cls(_channels_first(pixels), labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> "InMemoryImages":
        """The images at these positions, in this order."""
        index = torch.as_tensor(np.asarray(indices))
        return InMemoryImages.of(self.pixels[index], self.labels[index])


Split = InMemoryImages | ImageFileList
"""One of train, val and test."""


@dataclass(frozen=True)
class Images:
    """A data set as it was found, before any division of ours."""

    train: Split
    test: Split
    classes: Sequence[str]
    """Names in the order of the labels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Normalisation by channel, of pixels in [0, 1]."""
    augment: Augment = field(default_factory=Augment)
    val: Split | None = None
    """Images that the data set itself sets aside for validation, if it does."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a prepared data set beside its images."""

    name: str
    classes: list[str]
    shape: list[int]
    mean: list[float]
    std: list[float]
    hash: str
    """sha256 over images, labels and division."""
    counts: dict[str, int]
    augment: FileAugment = field(default_factory=FileAugment)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"augment": self.augment.model_dump()}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "DatasetInfo":
        """From what `plain` gave."""
        return cls(**plain | {"augment": FileAugment(**plain["augment"])})


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: three splits, fixed."""

    info: DatasetInfo
    train: Split
    val: Split
    test: Split


def prepare(name: str, images: Images, validation: float, seed: int) -> Dataset:
    """Divide the training images into train and val, by class in equal shares.

    `validation` is the fraction of the training images that goes to val; with 0 there is no val.
    A data set that has its own val keeps it, and all its training images.
    Raises DataError if a class has no image to give, or a label has no name.
    """
    classes, labels = list(images.classes), images.train.labels.numpy()
    found = [part.labels.numpy() for part in (images.train, images.test, images.val) if part]
    everything = np.concatenate(found)
    if everything.min() < 0 or everything.max() >= len(classes):
        raise DataError(f"{name}: labels beyond the {len(classes)} classes")
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [c for c, n in zip(classes, counts, strict=True) if n == 0]:
        raise DataError(f"{name}: no training image of class {empty[0]!r}")
    if images.val is not None:
        splits = {"train": images.train, "val": images.val, "test": images.test}
    else:
        train, val = _divided(name, labels, validation, seed)
        splits = {
            "train": images.train if validation == 0 else images.train.take(train),
            "val": images.train.take(val),
            "test": images.test,
        }
    info = DatasetInfo(
        name=name,
        classes=classes,
        shape=images.train.shape,
        mean=list(images.mean),
        std=list(images.std),
        hash=_hash(splits),
        counts={key: len(split) for key, split in splits.items()},
        augment=FileAugment(**images.augment.model_dump()),
    )
    return Dataset(info, **splits)


def _divided(
    name: str, labels: np.ndarray, validation: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation images, each in ascending order."""
    everything = np.arange(len(labels))
    if validation == 0:
        return everything, everything[:0]
    from sklearn.model_selection import train_test_split

    try:
        train, val = train_test_split(
            everything, test_size=validation, random_state=seed, stratify=labels
        )
    except ValueError as error:
        few = "too few for one of every class in val; raise it, or set 0 for none"
        reason = few if "should be greater" in str(error) else error
        raise DataError(f"{name}: data.validation = {validation}: {reason}") from None
    return np.sort(train), np.sort(val)


def save(folder: Path, dataset: Dataset) -> None:
    """Write a prepared data set into `folder`: the images, or the list of their files."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"about": dataset.info.plain()}
    for key, split in splits.items():
        if isinstance(split, InMemoryImages):
            part = {"images": split.pixels, "labels": split.labels.contiguous()}
        else:
            part = split.tensors()
            header["listing"] = split.header()
        tensors |= {f"{key}.{name}": tensor for name, tensor in part.items()}
    files.write(folder / FILE, lambda path: _write(path, tensors, header))
    files.write_text(folder / "about.json", json.dumps(dataset.info.plain(), indent=2) + "\n")


def load(folder: Path) -> Dataset:
    """Read a prepared data set, of either kind.

    Raises DataError if it is missing, damaged or was not written by `save`, or if it lists files
    of a folder that is not there.
    """
    path = folder / FILE
    if not path.exists():
        raise DataError(f"{path}: missing; run `dvc repro prepare` to make it")
    parts: dict[str, dict[str, Tensor]] = {"train": {}, "val": {}, "test": {}}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["secateur"])
            info = DatasetInfo.of(header["about"])
            for key in file.keys():  # noqa: SIM118
                split, name = key.split(".")
                parts[split][name] = file.get_tensor(key)
        if "listing" in header:
            listed = header["listing"]
            splits: dict[str, Split] = {k: listing.restored(listed, p) for k, p in parts.items()}
        else:
            splits = {k: InMemoryImages.of(p["images"], p["labels"]) for k, p in parts.items()}
    except Exception as error:  # safetensors' own exception types differ between versions
        raise DataError(f"{path}: not a prepared data set: {error}") from None
    dataset = Dataset(info, **splits)
    if isinstance(dataset.train, ImageFileList):
        dataset.train.find()
    return dataset


class Batches:
    """Shuffled mini-batches of training images, augmented and normalised.

    Order and augmentation depend on seed and epoch alone, so that training can go on at any epoch;
    number of workers, memory or files, one process or `world` of them make no difference.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        seed: int,
        *,
        device: torch.device = _CPU,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`batch_size` counts the images of all ranks together."""
        self.split, self.info, self.batch_size, self.seed = split, info, batch_size, seed
        self.device, self.rank, self.world = device, rank, world
        self.normalise = Normalise(info.mean, info.std, device)
        self.source: _Memory | listing.ImageFileLoader
        if isinstance(split, InMemoryImages):
            self.source = _Memory(split, info.augment, device)
        else:
            self.source = listing.ImageFileLoader(split, info.augment, seed, device, world)

    def __len__(self) -> int:
        """Steps an epoch, the same for every rank."""
        return -(-len(self.split) // self.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once: (batch, channels, height, width) as float32, and labels.

        With several ranks this one's part: every `world`-th image of the global batch, from the
        `rank`-th on. Of a last batch smaller than `world`, late ranks get no image: (0, ...).
        Raises DataError naming the file if a picture cannot be decoded.
        """
        draw = augment.draw(len(self.split), self.seed, number, self.info.augment)
        labels = self.split.labels[draw.image].to(self.device)
        parts = _parts(len(self.split), self.batch_size, self.rank, self.world)
        for pixels, part in zip(self.source.batches(draw, parts), parts, strict=True):
            allocator.trim()
            yield self.normalise(_channels_first(pixels)), labels[part]

    def close(self) -> None:
        """End the workers, if there are any."""
        self.source.close()


def in_order(
    split: Split,
    info: DatasetInfo,
    *,
    device: torch.device,
    size: int = 1000,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in their order and unmoved: batches and labels as `Batches` gives them.

    `size` images at a time (of all ranks together), fewer where they are large: 64 MiB of float32.
    The last may be small, and empty for a late rank.
    """
    size = max(1, min(size, 2**24 // math.prod(info.shape)))
    normalise = Normalise(info.mean, info.std, device)
    parts = _parts(len(split), size, rank, world)
    labels = split.labels.to(device)
    if isinstance(split, InMemoryImages):
        images = split.pixels
        batches: Iterator[Tensor] = (images[part].to(device) for part in parts)
    else:
        batches = listing.ImageFileLoader(split, None, 0, device, world).batches(
            augment.still(len(split)), parts
        )
    for pixels, part in zip(batches, parts, strict=True):
        allocator.trim()
        yield normalise(_channels_first(pixels)), labels[part]


def sample(split: Split, info: DatasetInfo, count: int) -> Tensor:
    """The first `count` images, or all if there are fewer, normalised, in this process."""
    if isinstance(split, InMemoryImages):
        pixels = split.pixels[:count]
    else:
        few = [split.image(index) for index in range(min(count, len(split)))]
        pixels = torch.from_numpy(np.stack(few))
    return Normalise(info.mean, info.std, _CPU)(_channels_first(pixels))


def few(split: Split, info: DatasetInfo) -> tuple[Tensor, Tensor]:
    """The first images, normalised, and their labels: 256 of 32x32 pixels, fewer of larger ones.

    At least 8, if there are so many.
    """
    _, height, width = info.shape
    images = sample(split, info, max(8, min(256, 256 * 32 * 32 // (height * width))))
    return images, split.labels[: len(images)]


class Normalise:
    """uint8 pixels -> float32, mean taken off and divided by standard deviation, by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        spread = torch.tensor(std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        centre = torch.tensor(mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.scale = 1 / (255 * spread)
        self.shift = -centre / spread
        self.plain = not any(mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch (count, channels, height, width); its memory layout stays."""
        batch = pixels * self.scale
        return batch if self.plain else batch.add_(self.shift)


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # one key of metadata: safetensors writes several in an order that changes
    metadata = {"secateur": json.dumps(header, sort_keys=True)}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from None


class _Memory:
    """Batches from images that lie on the device, padded once and for all."""

    def __init__(self, split: InMemoryImages, wanted: Augment, device: torch.device) -> None:
        self.wanted = wanted
        self.pixels = augment.padded(split.pixels.to(device), wanted.pad)

    def batches(self, draw: Draw, parts: list[slice]) -> Iterator[Tensor]:
        """One batch a part of the epoch, uint8, (count, height, width, channels)."""
        draw = draw.to(self.pixels.device)
        moving = self.wanted.pad or self.wanted.flip
        for step in map(draw.part, parts):
            if moving:
                yield augment.moved(self.pixels, step, self.wanted.pad)
            else:
                yield self.pixels.index_select(0, step.image)  # a tenth of [image]'s time

    def close(self) -> None:
        """Nothing to end."""


def _parts(count: int, size: int, rank: int, world: int) -> list[slice]:
    """A rank's positions in each global batch of `size` images."""
    firsts = range(0, count, size)
    return [slice(first + rank, min(first + size, count), world) for first in firsts]


def _channels_first(pixels: Tensor) -> Tensor:
    """(count, height, width, channels) seen as (count, channels, height, width), not copied.

    That is PyTorch's channels-last memory format; with one channel, its ordinary one.
    """
    count, height, width, channels = pixels.shape
    if channels == 1:
        return pixels.view(count, 1, height, width)
    return pixels.permute(0, 3, 1, 2)


def _hash(splits: dict[str, Split]) -> str:
    """sha256 over names, shapes, images and labels of all splits, in order."""
    digest = hashlib.sha256()
    for key, split in splits.items():
        digest.update(f"{key} {(len(split), *split.shape)}".encode())
        if isinstance(split, InMemoryImages):
            digest.update(split.pixels.numpy().data)
            digest.update(split.labels.contiguous().numpy().data)
        else:
            split.update(digest)
    return digest.hexdigest()
