"""Group-Hoyer-Square over channels and filters: a scale-free count of the groups that are large.

Source: Group-HS of H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
With A the sum of channel norms, B the sum of filter norms: R(W) = (A^2 + B^2) / sum w^2, between 2
and channels + filters; gradient 2w (A/a_c + B/b_n - R) / sum w^2, and 0 in a group of zeros.
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
    """Group-Hoyer-Square of every covered tensor, summed, times `decay`."""
    return ClosedFormPenalty(model, value, gradient, settings.biases, decay)


def value(w: Tensor) -> Tensor:
    """(A^2 + B^2) / S^2; 0 for a tensor of zeros."""
    s = torch.linalg.vector_norm(w)
    return ratio(channel_norms(w).sum(), s).square() + ratio(filter_norms(w).sum(), s).square()


def gradient(w: Tensor) -> Tensor:
    """2 w (A/a_c + B/b_n - R) / S^2, through ratios that neither overflow nor divide by zero."""
    a, b, s = channel_norms(w), filter_norms(w), torch.linalg.vector_norm(w)
    over_a, over_b, scale = ratio(a.sum(), s), ratio(b.sum(), s), 2 * inverse(s)
    whole = (over_a.square() + over_b.square()) * inverse(s)
    return scale_groups(w, (over_a * inverse(a) - whole) * scale, over_b * inverse(b) * scale)
