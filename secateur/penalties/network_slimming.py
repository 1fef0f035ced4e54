"""Network Slimming: the L1 norm of the scales of batch normalisations.

Source: Z. Liu, J. Li, Z. Shen, G. Huang, S. Yan, C. Zhang, Learning efficient convolutional
networks through network slimming, ICCV 2017, equation 1. R = sum |gamma| over the scales; its
gradient is sign(gamma), and 0 at 0. Shifts are not covered.
"""

from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.channels.scales import Coupled, prunable_norms
from secateur.penalties._shared.formula import NormPenalty, lasso
from secateur.training.penalty import Penalty


class Settings(Strict):
    """Which scales it covers."""

    coupled: Coupled = "skip"
    """skip: scales of channels that a single layer produces | include: also scales of residual sums
    | blocks: as skip, but in networks with residual blocks only scales inside these blocks, not the
    stem's (as in the code of classifier-pruner)."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """L1 norm of the covered scales, times `decay`.

    Raises ArgumentError if there are none, PruningError if the network cannot be traced (skip).
    """
    norms = prunable_norms(model, settings.coupled)
    if not norms:
        raise ArgumentError(
            "coupled",
            "this network has no batch normalisation with scales there",
            settings.coupled,
        )
    covered: list[Tensor] = [norm.weight for norm in norms.values()]
    return NormPenalty(model, lasso, False, decay, covered)
