"""Data sets in torchvision's files, and torchvision without its compiled operators."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import library as operators

from secateur.core.augment import Augment
from secateur.core.data import Images, Split
from secateur.core.errors import DataError

Normalisation = Literal["cifar10", "cifar100", "imagenet", "none"]
"""Whose mean and deviation are used; with none, pixels stay in [0, 1]."""
_NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0,) * 3, (1.0,) * 3),
}


def normalisation(
    name: Normalisation, channels: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation by channel, of pixels in [0, 1], as they are in common use.

    With one channel, the averages over the three. cifar10's deviations are the mean of those of
    single images (over all pixels at once they are near 0.25), and most code has them.
    """
    mean, std = _NORMALISATIONS[name]
    if channels == 1:
        return (sum(mean) / 3,), (sum(std) / 3,)
    return mean, std


def torchvision() -> Any:
    """Import torchvision, also where its operators do not match the torch that is installed.

    torchvision registers shape functions for its compiled operators on import and fails if those
    operators are missing, as they are when its registry build stands beside a CPU-only torch.
    Declaring the two that it looks for is enough: nothing here calls them.
    """
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except (AttributeError, RuntimeError):
        try:
            library = operators.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEEP.append(library)
        except RuntimeError:
            pass  # declared by someone else in the meantime
    import torchvision

    return torchvision


def idx_images(
    name: str, root: Path, classes: Sequence[str], mean: float, std: float, normalise: bool
) -> Images:
    """MNIST or a data set in its format, read by torchvision's class of that name."""
    make = getattr(torchvision().datasets, name)

    def both(download: bool) -> list[Any]:
        return [make(str(root), train=train, download=download) for train in (True, False)]

    where = root / name / "raw"
    parts = found_or_downloaded(both, name, root, where)
    train, test = (Split(part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return Images(train, test, classes, (mean if normalise else 0.0,), (std if normalise else 1.0,))


def cifar_images(name: str, root: Path, normalise: Normalisation, augment: Augment) -> Images:
    """CIFAR-10 or CIFAR-100, read by torchvision's class of that name; class names from its files.

    Raises DataError naming the file if one is missing beside others, or is not the published one.
    """
    make = getattr(torchvision().datasets, name)
    folder = root / make.base_folder
    if folder.is_dir():
        for file, md5 in [
            *make.train_list,
            *make.test_list,
            (make.meta["filename"], make.meta["md5"]),
        ]:
            _refuse_other(name, folder / file, md5)

    def both(download: bool) -> list[Any]:
        return [make(str(root), train=train, download=download) for train in (True, False)]

    parts = found_or_downloaded(both, name, root, folder)
    train, test = (
        Split.of(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts
    )
    return Images(train, test, parts[0].classes, *normalisation(normalise), augment)


def _refuse_other(name: str, path: Path, md5: str) -> None:
    """Raise DataError unless the file is there and has this checksum."""
    if not path.is_file():
        raise DataError(f"{name}: {path}: missing; delete {path.parent} to have it made anew")
    with path.open("rb") as file:
        if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != md5:
            raise DataError(f"{name}: {path}: damaged: not the published file (by its md5)")


def found_or_downloaded(make: Callable[[bool], Any], name: str, root: Path, where: Path) -> Any:
    """`make(False)`, which reads from disk; if nothing is there, `make(True)`, which downloads.

    `where` is the folder that the files belong into, below `root`. Raises DataError saying where it
    looked and what to do if neither works, and naming the folder if what is there cannot be read.
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


_KEEP: list[operators.Library] = []  # the operators go when it is collected
