"""Hoyer: L1 norm over L2 norm; scale-free, between 1 (one non-zero entry) and sqrt(n).

Source: H. Yang, W. Wen, H. Li, DeepHoyer: learning sparser neural network with differentiable
scale-invariant sparsity measures, ICLR 2020 (after P. Hoyer, JMLR, 2004).
R(w) = sum|w| / sqrt(sum w^2); gradient sign(w)/S - w * sum|w| / S^3 with S = sqrt(sum w^2).
"""

from torch import Tensor, nn

from secateur.base.sections import Strict
from secateur.penalties._shared.formula import NormPenalty, inverse, l1_l2, norm_gradient, ratio
from secateur.training.penalty import Penalty


class Settings(Strict):
    """Whether biases are covered too."""

    biases: bool = False
    """Cover the biases of layers, not only their weights."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """Hoyer of every covered tensor, summed, times `decay`."""
    return NormPenalty(model, by_norms, settings.biases, decay)


def by_norms(l1: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 over L2 (0 for zeros); gradient sign(w) / L2 - w * L1 / L2^3."""
    scale = inverse(l2)
    return ratio(l1, l2), scale, -ratio(ratio(l1, l2), l2) * scale


def value(w: Tensor) -> Tensor:
    """L1 over L2; 0 for a tensor of zeros."""
    return by_norms(*l1_l2(w))[0]


def gradient(w: Tensor) -> Tensor:
    """(sign(w) - w * sum|w| / sum w^2) / L2."""
    return norm_gradient(by_norms, w)
