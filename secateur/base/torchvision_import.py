"""Import torchvision, even if the installed torch does not match its compiled operators."""

import sys
from typing import Any

from torch import library as operators

_KEEP: list[operators.Library] = []  # collecting the library would remove the operators


def import_torchvision() -> Any:
    """Import torchvision, even if its operators do not match the installed torch.

    On import, torchvision registers shape functions for its compiled operators, and fails if these
    are missing, as when its build from PyPI is combined with a CPU-only torch. It is enough to
    declare the two operators that it looks for, since nothing here calls them. They are declared
    only after a failed import, because torch ends the process if an operator is declared twice.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # left by the failed import
        if not _KEEP:
            library = operators.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEEP.append(library)
        import torchvision

    return torchvision
