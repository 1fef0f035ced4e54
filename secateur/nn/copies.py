"""Copies of networks."""

import copy
from typing import TypeVar

from torch import nn

from secateur.base.errors import PruningError, SecateurError, cut

M = TypeVar("M", bound=nn.Module)


def copied(model: M, argument: str = "model", kind: type[SecateurError] = PruningError) -> M:
    """A deep copy of a network.

    If it cannot be copied, raises an error of this kind that names the argument of the caller and
    the attribute at fault, such as activations that a hook has stored, a lock or an open file.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of any type: it is the attribute's code that fails
        reason = cut(str(error) or type(error).__name__, 120)
        raise kind(
            f"{argument}: {_not_copied(model)} cannot be copied ({reason}); delete it first, and "
            "remove the hook or code that sets it"
        ) from None


def _not_copied(model: nn.Module) -> str:
    """Path of the first attribute that cannot be copied; the network's type if there is none."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key != "_modules":
                try:
                    copy.deepcopy(value)
                except Exception:
                    return f"{path}.{key}".lstrip(".")
    return type(model).__name__
