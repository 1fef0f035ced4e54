"""Transformed L1: between counting non-zeros (small a) and L1 (large a).

Source: S. Zhang, J. Xin, Minimization of transformed L1 penalty, Mathematical Programming, 2018.
R(w) = sum_i (a+1)|w_i| / (a + |w_i|); gradient sign(w) * a(a+1) / (a + |w|)^2.
"""

from torch import Tensor, nn

from secateur.base.sections import Positive, Strict
from secateur.penalties._shared.formula import ClosedFormPenalty
from secateur.training.penalty import Penalty


class Settings(Strict):
    """The shape of the function, and whether biases are covered too."""

    a: Positive = 1.0
    """Shape: towards 0 it counts non-zeros, towards infinity it is L1."""
    biases: bool = False
    """Cover the biases of layers, not only their weights."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """Transformed L1 of every covered tensor, summed, times `decay`."""
    a = settings.a
    return ClosedFormPenalty(
        model, lambda w: value(w, a), lambda w: gradient(w, a), settings.biases, decay
    )


def value(w: Tensor, a: float = 1.0) -> Tensor:
    """Sum of (a+1)|w| / (a+|w|)."""
    size = w.abs()
    return (size / (size + a)).sum() * (a + 1)


def gradient(w: Tensor, a: float = 1.0) -> Tensor:
    """sign(w) * a(a+1) / (a+|w|)^2."""
    return w.abs().add_(a).pow_(-2).mul_(w.sign()).mul_(a * (a + 1))
