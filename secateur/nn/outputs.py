"""What a network returns: one tensor, or several in tuples, lists and dictionaries."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.base.errors import PruningError


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a result, which may be nested, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, list | tuple) else []


def class_scores(value: Any, labels: Tensor, purpose: str) -> Tensor:
    """A network's result for images with these labels, if it is one tensor (N, classes).

    Otherwise raises PruningError naming the `purpose`; also for a label that is not a class.
    """
    if not (isinstance(value, Tensor) and value.dim() == 2 and len(value) == len(labels)):
        found = f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise PruningError(
            f"{purpose} needs the loss of a classifier, whose output is one tensor (N, classes); "
            f"this network returns a {found or type(value).__name__}"
        )
    classes = value.shape[1]
    if len(wrong := labels[(labels < 0) | (labels >= classes)]):
        raise PruningError(f"labels: {int(wrong[0])}, but the network has {classes} outputs")
    return value
