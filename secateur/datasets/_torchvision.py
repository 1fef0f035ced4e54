"""Data sets in the file formats of MNIST and CIFAR, read by torchvision."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.base.errors import DataError
from secateur.base.torchvision_import import import_torchvision
from secateur.data.augment import Augment
from secateur.data.dataset import Images, InMemoryImages
from secateur.datasets._normalisation import Normalisation, normalisation


def idx_images(
    name: str, root: Path, classes: Sequence[str], mean: float, std: float, normalise: bool
) -> Images:
    """MNIST or a data set in its format, read by torchvision's class of that name."""
    make = getattr(import_torchvision().datasets, name)

    def read(download: bool) -> list[Any]:
        return [make(str(root), train=train, download=download) for train in (True, False)]

    where = root / name / "raw"
    parts = read_or_download(read, name, root, where)
    train, test = (InMemoryImages(part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return Images(train, test, classes, (mean if normalise else 0.0,), (std if normalise else 1.0,))


def cifar_images(name: str, root: Path, normalise: Normalisation, augment: Augment) -> Images:
    """CIFAR-10 or CIFAR-100, read by torchvision's class of that name; class names from its files.

    Raises DataError naming the file if one is missing beside others, or is not the published one.
    """
    make = getattr(import_torchvision().datasets, name)
    folder = root / make.base_folder
    if folder.is_dir():
        for file, md5 in [
            *make.train_list,
            *make.test_list,
            (make.meta["filename"], make.meta["md5"]),
        ]:
            _check_file(name, folder / file, md5)

    def read(download: bool) -> list[Any]:
        return [make(str(root), train=train, download=download) for train in (True, False)]

    parts = read_or_download(read, name, root, folder)
    train, test = (
        InMemoryImages.from_pixels(torch.from_numpy(part.data), torch.tensor(part.targets))
        for part in parts
    )
    return Images(train, test, parts[0].classes, *normalisation(normalise), augment)


def _check_file(name: str, path: Path, md5: str) -> None:
    """Raise DataError unless the file exists and has this checksum."""
    if not path.is_file():
        raise DataError(f"{name}: {path}: missing; delete {path.parent} to have it made anew")
    with path.open("rb") as file:
        if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != md5:
            raise DataError(f"{name}: {path}: damaged: not the published file (by its md5)")


def read_or_download(make: Callable[[bool], Any], name: str, root: Path, where: Path) -> Any:
    """`make(False)`, which reads from disk; if there are no files, `make(True)`, which downloads.

    `where` is the folder of the files, below `root`. Raises DataError if neither works, or if the
    files there cannot be read.
    """
    try:
        return make(False)
    except Exception as error:
        if "not found" not in str(error):  # torchvision's way of saying that nothing is there
            reason = _short(error)
            raise DataError(f"{name}: the files under {root} are damaged: {reason}") from None
    try:
        print(f"{name}: not under {root}, downloading", flush=True)
        return make(True)
    except Exception as error:
        raise DataError(
            f"{name}: not found under {root} and not downloaded ({_short(error)}). Put the "
            f"files under {where}, or set SECATEUR_DATA to the folder that holds "
            f"{where.relative_to(root)}/"
        ) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
