"""Hoyer-Square: squared L1 over squared L2, a differentiable, scale-free count of what is large.

Source: H. Yang, W. Wen, H. Li, DeepHoyer: learning sparser neural network with differentiable
scale-invariant sparsity measures, ICLR 2020.
R(w) = (sum|w|)^2 / sum w^2, between 1 and n. With t = sum w^2 / sum|w|, the derivative is
(2/t) * (sign(w) - w/t): entries below t shrink, entries above it grow.
"""

import torch
from torch import Tensor, nn

from secateur.core.penalty import Formula, Penalty, ratio
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
    return ratio(torch.linalg.vector_norm(w, 1), torch.linalg.vector_norm(w)).square()


def gradient(w: Tensor) -> Tensor:
    """2 * s * (sign(w) - s * w) with s = sum|w| / sum w^2."""
    l2 = torch.linalg.vector_norm(w)
    s = ratio(ratio(torch.linalg.vector_norm(w, 1), l2), l2)
    return w.sign().sub_(w * s).mul_(2 * s)
