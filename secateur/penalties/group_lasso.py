"""Group lasso over channels and filters: the sum of their Euclidean norms.

Source: M. Yuan, Y. Lin, Model selection and estimation in regression with grouped variables,
JRSS B, 2006; on networks W. Wen et al., Learning structured sparsity, NeurIPS 2016.
With a_c the norm of input channel c and b_n the norm of filter n: R(W) = sum_c a_c + sum_n b_n;
gradient w/a_c + w/b_n, and 0 in a group of zeros.
"""

from torch import Tensor, nn

from secateur.penalties._formula import (
    ClosedFormPenalty,
    GroupSettings,
    channel_norms,
    filter_norms,
    inverse,
    scale_groups,
)
from secateur.training.penalty import Penalty


class Settings(GroupSettings):
    """Whether biases are covered too."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """Group lasso of every covered tensor, summed, times `decay`."""
    return ClosedFormPenalty(model, value, gradient, settings.biases, decay)


def value(w: Tensor) -> Tensor:
    """Sum of channel norms plus sum of filter norms."""
    return channel_norms(w).sum() + filter_norms(w).sum()


def gradient(w: Tensor) -> Tensor:
    """w / a_c + w / b_n."""
    return scale_groups(w, inverse(channel_norms(w)), inverse(filter_norms(w)))
