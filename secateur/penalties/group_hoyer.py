"""Group-Hoyer over channels and filters: group lasso over the L2 norm, scale-free.

Source: the group form of Hoyer in H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
With A the sum of channel norms, B the sum of filter norms, S = sqrt(sum w^2): R(W) = (A + B) / S;
gradient (w/a_c + w/b_n) / S - w (A + B) / S^3, and 0 in a group of zeros.
With grouping `group`, a_c is the norm of all weights that are coupled to a channel in any layer.
Each channel group has its own formula, R = A / S, and these are summed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.penalties._shared.coupled import group_penalty
from secateur.penalties._shared.formula import (
    GroupSettings,
    channel_norms,
    filter_norms,
    inverse,
    ratio,
    scale_groups,
)
from secateur.training.penalty import Penalty


class Settings(GroupSettings):
    """What the groups are, and whether biases are covered too."""


def build(
    settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty:
    """Group-Hoyer of every covered tensor, summed, times `decay`."""
    return group_penalty(settings, model, decay, shape, value, gradient, ratio)


def value(w: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """(A + B) / S; 0 for a tensor of zeros."""
    return ratio(
        channel_norms(w, by_position, groups).sum() + filter_norms(w, by_position).sum(),
        torch.linalg.vector_norm(w),
    )


def gradient(w: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """w * (1/a_c + 1/b_n - (A + B)/S^2) / S."""
    a, b, s = (
        channel_norms(w, by_position, groups),
        filter_norms(w, by_position),
        torch.linalg.vector_norm(w),
    )
    scale, whole = inverse(s), ratio(ratio(a.sum() + b.sum(), s), s)
    return scale_groups(w, (inverse(a) - whole) * scale, inverse(b) * scale, by_position, groups)
