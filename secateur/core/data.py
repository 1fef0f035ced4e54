"""Images in memory: split, hashed, saved, and handed out in shuffled batches."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from secateur.core import files
from secateur.core.errors import DataError

FILE = "images.safetensors"


@dataclass(frozen=True)
class Split:
    """Some images with their labels."""

    images: Tensor
    """uint8, (count, channels, height, width)."""
    labels: Tensor
    """int64, (count,), indices into the class names."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Sequence[int] | np.ndarray) -> "Split":
        """The images at these positions, in this order."""
        index = torch.as_tensor(np.asarray(indices))
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Images:
    """A data set as it was found: training and test images, before any division of ours."""

    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Normalisation by channel, of pixels in [0, 1]."""


@dataclass(frozen=True)
class About:
    """What is known of a prepared data set beside its images."""

    name: str
    classes: list[str]
    shape: list[int]
    mean: list[float]
    std: list[float]
    hash: str
    """sha256 over images, labels and division."""
    counts: dict[str, int]


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: three splits, fixed."""

    about: About
    train: Split
    val: Split
    test: Split


def prepare(
    name: str, classes: Sequence[str], images: Images, validation: float, seed: int
) -> Dataset:
    """Divide the training images into train and val, by class in equal shares.

    `validation` is the fraction of the training images that goes to val; with 0 there is no val.
    Raises DataError if a class has no image to give, or a label has no name.
    """
    labels = images.train.labels.numpy()
    everything = np.concatenate([labels, images.test.labels.numpy()])
    if everything.min() < 0 or everything.max() >= len(classes):
        raise DataError(f"{name}: labels beyond the {len(classes)} classes")
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [c for c, n in zip(classes, counts, strict=True) if n == 0]:
        raise DataError(f"{name}: no training image of class {empty[0]!r}")
    train, val = np.arange(len(labels)), np.arange(0)
    if validation > 0:
        from sklearn.model_selection import train_test_split

        try:
            train, val = train_test_split(
                train, test_size=validation, random_state=seed, stratify=labels
            )
        except ValueError as error:
            raise DataError(f"{name}: data.validation = {validation}: {error}") from None
    splits = {
        "train": images.train.take(np.sort(train)),
        "val": images.train.take(np.sort(val)),
        "test": images.test,
    }
    about = About(
        name=name,
        classes=list(classes),
        shape=list(images.train.images.shape[1:]),
        mean=list(images.mean),
        std=list(images.std),
        hash=_hash(splits),
        counts={key: len(split) for key, split in splits.items()},
    )
    return Dataset(about, **splits)


def save(folder: Path, dataset: Dataset) -> None:
    """Write a prepared data set into `folder`."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    tensors = {f"{key}.images": s.images.contiguous() for key, s in splits.items()}
    tensors |= {f"{key}.labels": s.labels.contiguous() for key, s in splits.items()}
    header = json.dumps(asdict(dataset.about), sort_keys=True)
    files.write_bytes(folder / FILE, safetensors.torch.save(tensors, {"secateur": header}))
    files.write_text(folder / "about.json", json.dumps(asdict(dataset.about), indent=2) + "\n")


def load(folder: Path) -> Dataset:
    """Read a prepared data set.

    Raises DataError if it is missing, damaged or was not written by `save`.
    """
    path = folder / FILE
    if not path.exists():
        raise DataError(f"{path}: missing; run `dvc repro prepare` to make it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = About(**json.loads(file.metadata()["secateur"]))
            part = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own exception types differ between versions
        raise DataError(f"{path}: not a prepared data set: {error}") from None
    splits = {
        key: Split(part[f"{key}.images"], part[f"{key}.labels"]) for key in ("train", "val", "test")
    }
    return Dataset(about, **splits)


class Batches:
    """Shuffled mini-batches of a split held in memory, normalised on the fly.

    The order depends on seed and epoch alone, so that training can go on at any epoch.
    """

    def __init__(
        self,
        split: Split,
        about: About,
        batch_size: int,
        seed: int,
        *,
        device=torch.device("cpu"),
        rank=0,
        world=1,
    ) -> None:
        split = split.to(device)
        self.rank, self.world = rank, world
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.normalise = Normalise(about.mean, about.std, split.images.device)

    def close(self) -> None:
        """x"""

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once: (batch, channels, height, width) as float32, and labels."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.split), generator=generator)
        for index in order.to(self.split.labels.device).split(self.batch_size):
            index = index[self.rank :: self.world]
            yield self.normalise(self.split.images[index]), self.split.labels[index]


def in_order(split, about, *, device, size=1000, rank=0, world=1):
    n = Normalise(about.mean, about.std, device)
    split = split.to(device)
    split = Split(split.images[rank::world], split.labels[rank::world])
    for i, l in zip(split.images.split(size), split.labels.split(size)):
        yield n(i), l


class Normalise:
    """uint8 pixels -> float32, mean taken off and divided by standard deviation, by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        spread = torch.tensor(std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        centre = torch.tensor(mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.scale = 1 / (255 * spread)
        self.shift = -centre / spread
        self.plain = not any(mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch (count, channels, height, width)."""
        batch = pixels * self.scale
        return batch if self.plain else batch.add_(self.shift)


def _hash(splits: dict[str, Split]) -> str:
    """sha256 over names, shapes, pixels and labels of all splits, in order."""
    digest = hashlib.sha256()
    for key, split in splits.items():
        digest.update(f"{key} {tuple(split.images.shape)}".encode())
        digest.update(split.images.contiguous().numpy().data)
        digest.update(split.labels.contiguous().numpy().data)
    return digest.hexdigest()
