"""Hoyer-Square: squared L1 over squared L2, a differentiable, scale-free count of what is large.

Source: H. Yang, W. Wen, H. Li, DeepHoyer: learning sparser neural network with differentiable
scale-invariant sparsity measures, ICLR 2020.
R(w) = (sum|w|)^2 / sum w^2, between 1 and n. With t = sum w^2 / sum|w|, the derivative is
(2/t) * (sign(w) - w/t): entries below t shrink, entries above it grow.
"""

from torch import Tensor, nn

from secateur.core.penalty import Formula, Penalty, l1_l2, ratio
from secateur.core.settings import Strict


class Settings(Strict):
    """What it covers."""

    biases: bool = False
    """Cover biases beside the weights."""


def build(settings: Settings, model: nn.Module) -> Penalty:
    """Hoyer-Square of every covered tensor, summed."""
    return Formula(model, value, gradient, settings.biases)


def value(w: Tensor) -> Tensor:
    """(L1 / L2)^2; 0 for a tensor of zeros."""
    l1, l2 = l1_l2(w)
    return ratio(l1, l2).square()


def gradient(w: Tensor) -> Tensor:
    """2 * s * (sign(w) - s * w) with s = sum|w| / sum w^2."""
    l1, l2 = l1_l2(w)
    s = ratio(ratio(l1, l2), l2)
    return w.sign().addcmul_(w, s, value=-1).mul_(2 * s)
