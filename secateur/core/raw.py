"""Where raw data sets are looked for, and torchvision without its compiled operators."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur.core.data import Images, Split
from secateur.core.errors import DataError
from secateur.core.stage import project_root


def folder() -> Path:
    """The folder named by SECATEUR_DATA, by default data/raw; relative ones from the project."""
    return project_root() / os.environ.get("SECATEUR_DATA", "data/raw")


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
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEEP.append(library)
        except RuntimeError:
            pass  # declared by someone else in the meantime
    import torchvision

    return torchvision


def idx_images(name: str, root: Path, mean: float, std: float, normalise: bool) -> Images:
    """MNIST or a data set in its format, read by torchvision's class of that name."""
    make = getattr(torchvision().datasets, name)

    def both(download: bool) -> list[Any]:
        return [make(str(root), train=train, download=download) for train in (True, False)]

    parts = found_or_downloaded(both, name, root)
    train, test = (Split(part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return Images(train, test, (mean if normalise else 0.0,), (std if normalise else 1.0,))


def found_or_downloaded(make: Callable[[bool], Any], name: str, root: Path) -> Any:
    """`make(False)`, which reads from disk; if nothing is there, `make(True)`, which downloads.

    Raises DataError saying where it looked and what to do if neither works, and naming the folder
    if what is there cannot be read.
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
            f"files under {root / name}/raw, or set SECATEUR_DATA to the folder that holds {name}/"
        ) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


_KEEP: list[torch.library.Library] = []  # a library's operators go when it is collected
