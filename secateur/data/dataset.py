"""Prepared data sets: split into train, val and test, hashed, saved and loaded.

Images of small data sets are held in memory (`InMemoryImages`), images of large data sets stay in
their files (`image_files.ImageFileList`). Both give the same batches for the same seed.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from secateur.base import files, tensor_files
from secateur.base.documents import read_json, validated
from secateur.base.errors import DataError, cut
from secateur.base.tensor_files import MAX_PIXELS, ClassName, Finite, Positive, Shape
from secateur.data import image_files
from secateur.data.augment import Augment, FileAugment
from secateur.data.image_files import ImageFileList

FILE, ABOUT = "images.safetensors", "about.json"
SPLITS = ("train", "val", "test")


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

    The result is in PyTorch's channels-last memory format; with one channel, contiguous.
    """
    count, height, width, channels = pixels.shape
    if channels == 1:
        return pixels.view(count, 1, height, width)
    return pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Images:
    """A data set as it was read, before it is split."""

    train: Split
    test: Split
    classes: Sequence[str]
    """Names of the classes, in the order of the labels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Mean and standard deviation of each channel, which normalise pixels in [0, 1]."""
    augment: Augment = field(default_factory=Augment)
    val: Split | None = None
    """Validation images, if the data set has its own."""


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a prepared data set. Its annotations are the schema of the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    classes: Annotated[list[ClassName], Field(min_length=1)]
    shape: Annotated[Shape, Field(min_length=3, max_length=3)]
    """Channels, height and width of an image."""
    mean: list[Finite]
    std: list[Positive]
    hash: str
    """sha256 of images, labels and splits."""
    counts: dict[str, Annotated[int, Field(ge=0, strict=True)]]
    """Number of images in each split."""
    augment: FileAugment = field(default_factory=FileAugment)

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return asdict(self) | {"augment": self.augment.model_dump()}


@dataclass(frozen=True)
class _Header:
    """Header of the file of a prepared data set."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    about: DatasetInfo
    listing: image_files.FileListHeader | None = None
    """Present if the images stay in their files."""


_HEADER = TypeAdapter(_Header)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set with its three splits."""

    info: DatasetInfo
    train: Split
    val: Split
    test: Split


def prepare(name: str, images: Images, validation: float, seed: int) -> Dataset:
    """Split the training images into train and val, stratified by class.

    `validation` is the fraction of the training images in val; with 0, val is empty. A data set
    that has validation images keeps them and all its training images. Raises DataError if a class
    has no training image, or too few for val, or if a label has no class name.
    """
    classes, labels = list(images.classes), images.train.labels.numpy()
    _check_images(name, images)
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


def _check_images(name: str, images: Images) -> None:
    """DataError if a split is empty, has another image shape or a label that is missing or has no
    class name, or if augmentation would hide whole images."""
    shape, classes = images.train.shape, len(images.classes)
    if (side := images.augment.cutout) >= min(shape[1:]):
        raise DataError(
            f"datasets.{name}.augment.cutout = {side} hides whole images of {shape[1]}x{shape[2]}; "
            f"allowed: less than {min(shape[1:])}"
        )
    for key, split in (("train", images.train), ("test", images.test), ("val", images.val)):
        if split is None:
            continue
        if not len(split):
            raise DataError(f"{name}: no images in {key}")
        if isinstance(split, InMemoryImages) and len(split.images) != len(split.labels):
            raise DataError(
                f"{name}: {key} has {len(split.images):,} images and {len(split.labels):,} labels"
            )
        if split.shape != shape:
            sizes = ("x".join(map(str, s)) for s in (split.shape, shape))
            raise DataError(
                f"{name}: images of {key} are {' where those of train are '.join(sizes)}"
            )
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < classes:
            raise DataError(f"{name}: labels beyond the {classes} classes in {key}")


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
        if isinstance(split, ImageFileList):
            header["listing"] = split.header()
        tensors |= {f"{key}.{name}": tensor for name, tensor in _tensors(split).items()}
    files.write(folder / FILE, lambda path: _write(path, tensors, header))
    files.write_text(folder / ABOUT, json.dumps(dataset.info.to_dict(), indent=2) + "\n")


def load(folder: Path) -> Dataset:
    """Read a prepared data set, with its images in memory or in files.

    Raises DataError if it is missing, damaged, incomplete or not written by `save`, or if the
    folder of its image files does not exist.
    """
    path, cure = folder / FILE, "; run `dvc repro prepare` to make it"
    stored = tensor_files.map_file(
        path, DataError, cure=cure, otherwise="not a prepared data set: "
    )
    if not isinstance(stored.header, dict):
        raise DataError(
            f"{path}: not a prepared data set: safetensors, but not written by Secateur"
        )
    header = validated(_HEADER, stored.header, f"{path}: not a prepared data set", DataError)
    if read_json(folder / ABOUT, DataError, cure) != stored.header["about"]:
        raise DataError(
            f"{folder / ABOUT}: does not describe {FILE} beside it: one of them is from another "
            "run; run `dvc repro -f prepare`"
        )
    try:
        _check_info(header.about)
        splits = {key: _restore(header, stored.tensors, key) for key in SPLITS}
        if len(stored.tensors) != sum(len(_tensors(split)) for split in splits.values()):
            raise ValueError("it has unexpected tensors")
        for key, split in splits.items():
            _check_split(header.about, key, split)
    except (ValueError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not a prepared data set: {cut(reason, 300)}") from None
    dataset = Dataset(header.about, **splits)
    if isinstance(dataset.train, ImageFileList):
        dataset.train.check_folder()
    return dataset


def _check_info(info: DatasetInfo) -> None:
    """ValueError if fields that are valid on their own do not fit each other."""
    channels, means, deviations = info.shape[0], len(info.mean), len(info.std)
    if means not in (1, channels) or deviations != means:
        raise ValueError(f"{means} values in mean and {deviations} in std for {channels} channels")
    if math.prod(info.shape) > MAX_PIXELS:
        raise ValueError(f"shape = {info.shape}: images of more than {MAX_PIXELS:,} values")
    if set(info.counts) != set(SPLITS) or not info.counts["train"] or not info.counts["test"]:
        raise ValueError(f"counts = {info.counts}: train and test need images")


def _tensors(split: Split) -> dict[str, Tensor]:
    """The tensors that are stored for a split."""
    if isinstance(split, InMemoryImages):
        return {"images": split.pixels, "labels": split.labels.contiguous()}
    return split.tensors()


def _restore(header: "_Header", tensors: dict[str, Tensor], key: str) -> Split:
    """A split from its tensors; ValueError or KeyError if they do not form one."""
    prefix = f"{key}."
    part = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if header.listing is not None:
        return image_files.from_tensors(header.listing, part)
    pixels, labels = part["images"], part["labels"]
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise ValueError(f"{key}: images are not uint8 with four axes")
    return InMemoryImages.from_pixels(pixels, labels)


def _check_split(info: DatasetInfo, key: str, split: Split) -> None:
    """ValueError if images, labels and description do not fit each other."""
    count, labels = info.counts[key], split.labels
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(f"{key}: {count:,} images are declared; labels {tuple(labels.shape)}")
    if isinstance(split, InMemoryImages) and len(split.images) != count:
        raise ValueError(f"{key}: {len(split.images):,} images, {count:,} labels")
    if split.shape != info.shape:
        raise ValueError(f"{key}: images of {split.shape}, {info.shape} are declared")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(info.classes):
        wrong = labels[(labels < 0) | (labels >= len(info.classes))][0]
        raise ValueError(f"{key}: label {wrong} of {len(info.classes)} classes")


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # a single key of metadata: safetensors writes several in varying order
    metadata = {"secateur": json.dumps(header, sort_keys=True)}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # raised for a full disk, among others
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
