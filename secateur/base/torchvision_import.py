"""Import torchvision, also beside a torch whose build lacks its compiled operators."""

import sys
from typing import Any

from torch import library as operators

_KEEP: list[operators.Library] = []  # the operators go when it is collected


def import_torchvision() -> Any:
    """Import torchvision, also where its operators do not match the torch that is installed.

    torchvision registers shape functions for its compiled operators on import and fails if those
    operators are missing, as they are when its registry build stands beside a CPU-only torch.
    Declaring the two that it looks for is enough: nothing here calls them. They are declared only
    after a failed import, since torch ends the process if an operator is declared twice.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import has left
        if not _KEEP:
            library = operators.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEEP.append(library)
        import torchvision

    return torchvision
