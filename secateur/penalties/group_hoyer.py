"""Group-Hoyer over channels and filters: group lasso over the L2 norm, scale-free.

Source: the group form of Hoyer in H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
With A the sum of channel norms, B the sum of filter norms, S = sqrt(sum w^2): R(W) = (A + B) / S;
gradient (w/a_c + w/b_n) / S - w (A + B) / S^3, and 0 in a group of zeros.
"""

import torch
from torch import Tensor, nn

from secateur.penalties._formula import (
    ClosedFormPenalty,
    GroupSettings,
    channel_norms,
    filter_norms,
    inverse,
    ratio,
    scale_groups,
)
from secateur.training.penalty import Penalty


class Settings(GroupSettings):
    """Whether biases are covered too."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """Group-Hoyer of every covered tensor, summed, times `decay`."""
    return ClosedFormPenalty(model, value, gradient, settings.biases, decay)


def value(w: Tensor) -> Tensor:
    """(A + B) / S; 0 for a tensor of zeros."""
    return ratio(channel_norms(w).sum() + filter_norms(w).sum(), torch.linalg.vector_norm(w))


def gradient(w: Tensor) -> Tensor:
    """w * (1/a_c + 1/b_n - (A + B)/S^2) / S."""
    a, b, s = channel_norms(w), filter_norms(w), torch.linalg.vector_norm(w)
    scale, whole = inverse(s), ratio(ratio(a.sum() + b.sum(), s), s)
    return scale_groups(w, (inverse(a) - whole) * scale, inverse(b) * scale)
