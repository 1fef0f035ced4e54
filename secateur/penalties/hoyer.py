"""Hoyer: L1 norm over L2 norm, between 1 (one entry left) and sqrt(n), whatever the scale.

Source: H. Yang, W. Wen, H. Li, DeepHoyer: learning sparser neural network with differentiable
scale-invariant sparsity measures, ICLR 2020 (after P. Hoyer, JMLR, 2004).
R(w) = sum|w| / sqrt(sum w^2); derivative sign(w)/S - w * sum|w| / S^3 with S = sqrt(sum w^2).
"""

import torch
from torch import Tensor, nn

from secateur.core.penalty import Formula, Penalty, inverse, ratio
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
    return ratio(torch.linalg.vector_norm(w, 1), torch.linalg.vector_norm(w))


def gradient(w: Tensor) -> Tensor:
    """(sign(w) - w * sum|w| / sum w^2) / L2."""
    l1, l2 = torch.linalg.vector_norm(w, 1), torch.linalg.vector_norm(w)
    return w.sign().sub_(w * ratio(ratio(l1, l2), l2)).mul_(inverse(l2))
