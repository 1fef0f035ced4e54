"""Prepared data sets: divided into train, val and test, hashed, saved and loaded.

Images of a small data set are held in memory (`InMemoryImages`), those of a large one stay in their
files (`image_files.ImageFileList`). Both give the same batches for the same seed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from secateur.base import files
from secateur.base.errors import DataError
from secateur.data import image_files
from secateur.data.augment import Augment, FileAugment
from secateur.data.image_files import ImageFileList

FILE = "images.safetensors"


@dataclass(frozen=True)
class InMemoryImages:
    """Labelled images in memory."""

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
        """The images in the layout of memory and files: (count, height, width, channels)."""
        return self.images.permute(0, 2, 3, 1).contiguous()

    @classmethod
    def from_pixels(cls, pixels: Tensor, labels: Tensor) -> "InMemoryImages":
        """Images from pixels (count, height, width, channels)."""
        return cls(channels_first(pixels), labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> "InMemoryImages":
        """The images at these positions, in this order."""
        index = torch.as_tensor(np.asarray(indices))
        return InMemoryImages.from_pixels(self.pixels[index], self.labels[index])


Split = InMemoryImages | ImageFileList
"""One of train, val and test."""


def channels_first(pixels: Tensor) -> Tensor:
    """View of (count, height, width, channels) as (count, channels, height, width).

    That is PyTorch's channels-last memory format; with one channel, its contiguous one.
    """
    count, height, width, channels = pixels.shape
    if channels == 1:
        return pixels.view(count, 1, height, width)
    return pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Images:
    """A data set as it was read, before it is divided."""

    train: Split
    test: Split
    classes: Sequence[str]
    """Names in the order of the labels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Mean and standard deviation by channel that normalise pixels in [0, 1]."""
    augment: Augment = field(default_factory=Augment)
    val: Split | None = None
    """Validation images, if the data set has its own."""


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a prepared data set."""

    name: str
    classes: list[str]
    shape: list[int]
    """Channels, height and width of an image."""
    mean: list[float]
    std: list[float]
    hash: str
    """sha256 of images, labels and their division."""
    counts: dict[str, int]
    """Images of each split."""
    augment: FileAugment = field(default_factory=FileAugment)

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return asdict(self) | {"augment": self.augment.model_dump()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetInfo":
        """The description from what `to_dict` returned."""
        return cls(**values | {"augment": FileAugment(**values["augment"])})


@dataclass(frozen=True)
class Dataset:
    """A prepared data set with its three splits."""

    info: DatasetInfo
    train: Split
    val: Split
    test: Split


def prepare(name: str, images: Images, validation: float, seed: int) -> Dataset:
    """Divide the training images into train and val, stratified by class.

    `validation` is the fraction of the training images in val; with 0, val is empty. A data set
    with a val of its own keeps it, and all its training images. Raises DataError if a class has no
    training image or too few for val, or a label has no name.
    """
    classes, labels = list(images.classes), images.train.labels.numpy()
    labels_of_splits = [
        part.labels.numpy() for part in (images.train, images.test, images.val) if part
    ]
    everything = np.concatenate(labels_of_splits)
    if everything.min() < 0 or everything.max() >= len(classes):
        raise DataError(f"{name}: labels beyond the {len(classes)} classes")
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [c for c, n in zip(classes, counts, strict=True) if n == 0]:
        raise DataError(f"{name}: no training image of class {empty[0]!r}")
    if images.val is not None:
        splits = {"train": images.train, "val": images.val, "test": images.test}
    else:
        train, val = _stratified_split(name, labels, validation, seed)
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


def _stratified_split(
    name: str, labels: np.ndarray, validation: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation images, each in ascending order."""
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
    header: dict[str, Any] = {"about": dataset.info.to_dict()}
    for key, split in splits.items():
        if isinstance(split, InMemoryImages):
            part = {"images": split.pixels, "labels": split.labels.contiguous()}
        else:
            part = split.tensors()
            header["listing"] = split.header()
        tensors |= {f"{key}.{name}": tensor for name, tensor in part.items()}
    files.write(folder / FILE, lambda path: _write(path, tensors, header))
    files.write_text(folder / "about.json", json.dumps(dataset.info.to_dict(), indent=2) + "\n")


def load(folder: Path) -> Dataset:
    """Read a prepared data set, whether its images are in memory or in files.

    Raises DataError if it is missing, damaged or was not written by `save`, or if the folder of its
    files does not exist.
    """
    path = folder / FILE
    if not path.exists():
        raise DataError(f"{path}: missing; run `dvc repro prepare` to make it")
    parts: dict[str, dict[str, Tensor]] = {"train": {}, "val": {}, "test": {}}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["secateur"])
            info = DatasetInfo.from_dict(header["about"])
            for key in file.keys():  # noqa: SIM118
                split, name = key.split(".")
                parts[split][name] = file.get_tensor(key)
        if "listing" in header:
            listed = header["listing"]
            splits: dict[str, Split] = {
                k: image_files.from_tensors(listed, p) for k, p in parts.items()
            }
        else:
            splits = {
                k: InMemoryImages.from_pixels(p["images"], p["labels"]) for k, p in parts.items()
            }
    except Exception as error:  # safetensors' own exception types differ between versions
        raise DataError(f"{path}: not a prepared data set: {error}") from None
    dataset = Dataset(info, **splits)
    if isinstance(dataset.train, ImageFileList):
        dataset.train.check_folder()
    return dataset


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # one key of metadata: safetensors writes several in an order that changes
    metadata = {"secateur": json.dumps(header, sort_keys=True)}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from None


def _hash(splits: dict[str, Split]) -> str:
    """sha256 of names, shapes, images and labels of all splits, in order."""
    digest = hashlib.sha256()
    for key, split in splits.items():
        digest.update(f"{key} {(len(split), *split.shape)}".encode())
        if isinstance(split, InMemoryImages):
            digest.update(split.pixels.numpy().data)
            digest.update(split.labels.contiguous().numpy().data)
        else:
            split.update_hash(digest)
    return digest.hexdigest()
