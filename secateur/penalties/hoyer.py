"""Hoyer: L1 norm over L2 norm, between 1 (one entry left) and sqrt(n), whatever the scale.

Source: H. Yang, W. Wen, H. Li, DeepHoyer: learning sparser neural network with differentiable
scale-invariant sparsity measures, ICLR 2020 (after P. Hoyer, JMLR, 2004).
R(w) = sum|w| / sqrt(sum w^2); derivative sign(w)/S - w * sum|w| / S^3 with S = sqrt(sum w^2).
"""

from torch import Tensor, nn

from secateur.core.penalty import Formula, Penalty, inverse, l1_l2, ratio
from secateur.core.settings import Strict


class Settings(Strict):
    """What it covers."""

    biases: bool = False
    """Cover biases beside the weights."""


def build(settings: Settings, model: nn.Module) -> Penalty:
    """Hoyer of every covered tensor, summed."""
    return Formula(model, value, gradient, settings.biases)


def value(w: Tensor) -> Tensor:
    """L1 over L2; 0 for a tensor of zeros."""
    return ratio(*l1_l2(w))


def gradient(w: Tensor) -> Tensor:
    """(sign(w) - w * sum|w| / sum w^2) / L2."""
    l1, l2 = l1_l2(w)
    return w.sign().addcmul_(w, ratio(ratio(l1, l2), l2), value=-1).mul_(inverse(l2))
