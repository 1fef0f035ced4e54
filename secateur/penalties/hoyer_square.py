"""Hoyer-Square: squared L1 over squared L2, a differentiable, scale-free count of large entries.

Source: H. Yang, W. Wen, H. Li, DeepHoyer: learning sparser neural network with differentiable
scale-invariant sparsity measures, ICLR 2020.
R(w) = (sum|w|)^2 / sum w^2, between 1 and n. With t = sum w^2 / sum|w|, the gradient is
(2/t) * (sign(w) - w/t): entries below t shrink, entries above it grow.
"""

from torch import Tensor, nn

from secateur.base.sections import Strict
from secateur.penalties._shared.formula import NormPenalty, l1_l2, norm_gradient, ratio
from secateur.training.penalty import Penalty


class Settings(Strict):
    """Whether biases are covered too."""

    biases: bool = False
    """Cover the biases of layers, not only their weights."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """Hoyer-Square of every covered tensor, summed, times `decay`."""
    return NormPenalty(model, by_norms, settings.biases, decay)


def by_norms(l1: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L1 / L2)^2 (0 for zeros); gradient 2s * (sign(w) - s * w), s = sum|w| / sum w^2."""
    s = ratio(ratio(l1, l2), l2)
    return ratio(l1, l2).square(), 2 * s, -2 * s * s


def value(w: Tensor) -> Tensor:
    """(L1 / L2)^2; 0 for a tensor of zeros."""
    return by_norms(*l1_l2(w))[0]


def gradient(w: Tensor) -> Tensor:
    """2 * s * (sign(w) - s * w) with s = sum|w| / sum w^2."""
    return norm_gradient(by_norms, w)
