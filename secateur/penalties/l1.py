"""L1 (lasso): the sum of absolute values.

Source: R. Tibshirani, Regression shrinkage and selection via the lasso, JRSS B, 1996.
R(w) = sum_i |w_i|; derivative sign(w_i).
"""

import torch
from torch import Tensor, nn

from secateur.core.penalty import NormFormula, Penalty, l1_l2, norm_gradient
from secateur.core.settings import Strict


class Settings(Strict):
    """What it covers."""

    biases: bool = False
    """Cover biases beside the weights."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """L1 of every covered tensor, summed, times `decay`."""
    return NormFormula(model, by_norms, settings.biases, decay)


def by_norms(l1: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum|w|; derivative sign(w)."""
    return l1, torch.ones_like(l1), torch.zeros_like(l1)


def value(w: Tensor) -> Tensor:
    """Sum of |w|."""
    return by_norms(*l1_l2(w))[0]


def gradient(w: Tensor) -> Tensor:
    """sign(w)."""
    return norm_gradient(by_norms, w)
