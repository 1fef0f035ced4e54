"""Data sets in the file formats of MNIST and CIFAR; torchvision downloads them and reads CIFAR."""

import hashlib
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.base.errors import DataError
from secateur.base.files import file_size, read_bytes
from secateur.base.torchvision_import import import_torchvision
from secateur.data.augment import Augment
from secateur.data.dataset import Images, InMemoryImages
from secateur.datasets._normalisation import Normalisation, normalisation

IMAGES, LABELS = 0x803, 0x801
"""First four bytes of an idx file: unsigned bytes with three axes, or with one."""
MAX_BYTES = 2**28
"""Limit for a file of CIFAR; the largest has 155 MB."""
SIDE = 28
"""Height and width of the images of all data sets in this format."""


def idx_images(
    name: str, root: Path, classes: Sequence[str], mean: float, std: float, normalise: bool
) -> Images:
    """MNIST or a data set in its format, downloaded by torchvision's class of that name.

    Raises DataError naming a file that is damaged, or labels that do not fit their images.
    """
    where = root / name / "raw"
    kinds = ("images-idx3", "labels-idx1")
    paths = [where / f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]
    if not all(os.path.lexists(path) for path in paths):
        make = getattr(import_torchvision().datasets, name)
        for path in paths:
            _refuse_special(path, path.with_name(f"{path.name}.gz"))
        _download(lambda: make(str(root), download=True), name, root, where)
    train, test = (_idx_split(name, *pair) for pair in (paths[:2], paths[2:]))
    return Images(train, test, classes, (mean if normalise else 0.0,), (std if normalise else 1.0,))


def _idx_split(name: str, images: Path, labels: Path) -> InMemoryImages:
    """The images of one file with the labels of another; DataError if they do not fit."""
    pixels, targets = _idx_tensor(name, images, IMAGES, 3), _idx_tensor(name, labels, LABELS, 1)
    count, height, width = pixels.shape
    if (height, width) != (SIDE, SIDE):
        raise DataError(
            f"{name}: {images}: images of {height}x{width} pixels; they must be {SIDE}x{SIDE}"
        )
    if len(targets) != count:
        raise DataError(
            f"{name}: {labels}: {len(targets):,} labels, where {images.name} has {count:,} images"
        )
    return InMemoryImages(pixels.unsqueeze(1), targets.long())


def _idx_tensor(name: str, path: Path, magic: int, axes: int) -> torch.Tensor:
    """Content of an idx file: magic number and lengths (big-endian, 32 bits), then bytes."""
    size, header = file_size(path, DataError), 4 + 4 * axes
    try:
        with path.open("rb") as file:
            beginning = file.read(header)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    found, *shape = struct.unpack(f">{1 + axes}I", beginning.ljust(header, b"\0"))
    if found != magic or len(beginning) < header:
        raise DataError(f"{name}: {path}: damaged: it does not begin as an idx file of its kind")
    if math.prod(shape) != size - header or not shape[0]:
        raise DataError(
            f"{name}: {path}: damaged: {size - header:,} bytes of data, where "
            f"{'x'.join(map(str, shape))} are declared"
        )
    content = bytearray(read_bytes(path, DataError))
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(shape)


def cifar_images(name: str, root: Path, normalise: Normalisation, augment: Augment) -> Images:
    """CIFAR-10 or CIFAR-100, read by torchvision's class of that name; class names from its files.

    Raises DataError naming a file that is missing although the folder exists, or that is not the
    published file.
    """
    make = getattr(import_torchvision().datasets, name)
    folder = root / make.base_folder
    if not os.path.lexists(folder):
        _refuse_special(root / make.filename)
        _download(lambda: make(str(root), download=True), name, root, folder)
    about = (make.meta["filename"], make.meta["md5"])
    for file, md5 in [*make.train_list, *make.test_list, about]:
        _check_file(name, folder / file, md5)
    try:
        parts = [make(str(root), train=train) for train in (True, False)]
    except Exception as error:  # if files were changed in the meantime
        raise DataError(f"{name}: the files under {folder} are damaged: {_short(error)}") from None
    train, test = (
        InMemoryImages.from_pixels(torch.from_numpy(part.data), torch.tensor(part.targets))
        for part in parts
    )
    return Images(train, test, parts[0].classes, *normalisation(normalise), augment)


def _check_file(name: str, path: Path, md5: str) -> None:
    """Raise DataError unless the file exists and has this checksum."""
    if not os.path.lexists(path):
        raise DataError(
            f"{name}: {path}: missing; delete {path.parent} to have it unpacked or downloaded again"
        )
    if file_size(path, DataError) > MAX_BYTES:
        raise DataError(f"{name}: {path}: damaged: not the published file (by its size)")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if digest.hexdigest() != md5:
        raise DataError(f"{name}: {path}: damaged: not the published file (by its md5)")


def _refuse_special(*paths: Path) -> None:
    """Raise DataError for a FIFO or the like in place of a file: a download would hang."""
    for path in paths:
        if os.path.lexists(path):
            file_size(path, DataError)


def _download(make: Callable[[], Any], name: str, root: Path, where: Path) -> Any:
    """Download by calling `make`; if that fails, a DataError says what to do instead.

    `where` is the folder of the files, inside `root`.
    """
    try:
        print(f"{name}: not under {root}, downloading", flush=True)
        return make()
    except Exception as error:
        raise DataError(
            f"{name}: not found under {root} and not downloaded ({_short(error)}). Put the "
            f"files under {where}, or set SECATEUR_DATA to the folder that holds "
            f"{where.relative_to(root)}/"
        ) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
