"""L1 (lasso): the sum of absolute values.

Source: R. Tibshirani, Regression shrinkage and selection via the lasso, JRSS B, 1996.
R(w) = sum_i |w_i|; gradient sign(w_i).
"""

from torch import Tensor, nn

from secateur.base.sections import Strict
from secateur.penalties._shared.formula import NormPenalty, l1_l2, lasso, norm_gradient
from secateur.training.penalty import Penalty


class Settings(Strict):
    """Whether biases are covered too."""

    biases: bool = False
    """Cover the biases of layers, not only their weights."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """L1 of every covered tensor, summed, times `decay`."""
    return NormPenalty(model, lasso, settings.biases, decay)


def value(w: Tensor) -> Tensor:
    """Sum of |w|."""
    return lasso(*l1_l2(w))[0]


def gradient(w: Tensor) -> Tensor:
    """sign(w)."""
    return norm_gradient(lasso, w)
