"""Import torchvision, also beside a torch whose build lacks its compiled operators."""

from typing import Any

import torch
from torch import library as operators

_KEEP: list[operators.Library] = []  # the operators go when it is collected


def import_torchvision() -> Any:
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
