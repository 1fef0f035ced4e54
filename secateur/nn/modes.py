"""Training and eval mode of networks."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def in_eval_mode(model: M) -> M:
    """The network itself, set to eval mode; also if its own `train` or `eval` returns nothing."""
    model.eval()
    return model
