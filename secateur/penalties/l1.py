"""L1 (lasso): the sum of absolute values.

Source: R. Tibshirani, Regression shrinkage and selection via the lasso, JRSS B, 1996.
R(w) = sum_i |w_i|; derivative sign(w_i).
"""

from torch import Tensor, nn

from secateur.core.penalty import Formula, Penalty
from secateur.core.settings import Strict


class Settings(Strict):
    """What it covers."""

    biases: bool = False
    """Cover biases beside the weights."""


def build(settings: Settings, model: nn.Module) -> Penalty:
    """L1 of every covered tensor, summed."""
    return Formula(model, value, gradient, settings.biases)


def value(w: Tensor) -> Tensor:
    """Sum of |w|."""
    return w.abs().sum()


def gradient(w: Tensor) -> Tensor:
    """sign(w)."""
    return w.sign()
