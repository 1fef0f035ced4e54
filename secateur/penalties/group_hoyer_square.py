"""Group-Hoyer-Square over channels and filters: a scale-free count of large groups.

Source: Group-HS of H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
With A the sum of channel norms, B the sum of filter norms: R(W) = (A^2 + B^2) / sum w^2, between 2
and channels + filters; gradient 2w (A/a_c + B/b_n - R) / sum w^2, and 0 in a group of zeros.
With grouping `group`, a_c is the norm of all weights that are coupled to a channel in any layer.
Each channel group has its own formula, R = A^2 / S^2, and these are summed.
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
    """Group-Hoyer-Square of every covered tensor, summed, times `decay`."""
    return group_penalty(
        settings,
        model,
        decay,
        shape,
        value,
        gradient,
        lambda norms, whole: ratio(norms, whole).square(),
    )


def value(w: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """(A^2 + B^2) / S^2; 0 for a tensor of zeros."""
    s = torch.linalg.vector_norm(w)
    return (
        ratio(channel_norms(w, by_position, groups).sum(), s).square()
        + ratio(filter_norms(w, by_position).sum(), s).square()
    )


def gradient(w: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """2 w (A/a_c + B/b_n - R) / S^2, computed without overflow or division by zero."""
    a, b, s = (
        channel_norms(w, by_position, groups),
        filter_norms(w, by_position),
        torch.linalg.vector_norm(w),
    )
    over_a, over_b, scale = ratio(a.sum(), s), ratio(b.sum(), s), 2 * inverse(s)
    whole = (over_a.square() + over_b.square()) * inverse(s)
    return scale_groups(
        w, (over_a * inverse(a) - whole) * scale, over_b * inverse(b) * scale, by_position, groups
    )
