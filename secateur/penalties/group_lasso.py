"""Group lasso over channels and filters: the sum of their Euclidean norms.

Source: M. Yuan, Y. Lin, Model selection and estimation in regression with grouped variables,
JRSS B, 2006; for networks, W. Wen et al., Learning structured sparsity, NeurIPS 2016.
With a_c the norm of input channel c and b_n the norm of filter n: R(W) = sum_c a_c + sum_n b_n;
gradient w/a_c + w/b_n, and 0 in a group of zeros.
With grouping `group`, a_c is the norm of all weights that are coupled to a channel in any layer.
Each channel group has its own formula, R = sum_c a_c, and these are summed.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from secateur.penalties._shared.coupled import group_penalty
from secateur.penalties._shared.formula import (
    GroupSettings,
    channel_norms,
    filter_norms,
    inverse,
    scale_groups,
)
from secateur.training.penalty import Penalty


class Settings(GroupSettings):
    """What the groups are, and whether biases are covered too."""


def build(
    settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty:
    """Group lasso of every covered tensor, summed, times `decay`."""
    return group_penalty(settings, model, decay, shape, value, gradient, lambda norms, whole: norms)


def value(w: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """Sum of channel norms plus sum of filter norms."""
    return channel_norms(w, by_position, groups).sum() + filter_norms(w, by_position).sum()


def gradient(w: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """w / a_c + w / b_n."""
    return scale_groups(
        w,
        inverse(channel_norms(w, by_position, groups)),
        inverse(filter_norms(w, by_position)),
        by_position,
        groups,
    )
