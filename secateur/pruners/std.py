"""Threshold in standard deviations: prune the entries that are small within their tensor.

Source: the `V` scripts of H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020, after S. Han et al.,
Learning both weights and connections, NeurIPS 2015.
Keep w if |w| >= sensitivity * std(w), the population deviation (divisor n) of its own tensor,
zeros included.
"""

from secateur.base.sections import NonNegative, Strict
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity.masks import Scope, prunable


class Settings(Strict):
    """The threshold, and the parameters that it is applied to."""

    sensitivity: NonNegative = 0.25
    """Smallest absolute value that is kept, in standard deviations; 0 prunes nothing."""
    scope: Scope = "weights_and_biases"
    """Parameters that are pruned."""


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """Masks of all tensors in scope."""
    masks = {
        name: tensor.detach().abs() >= settings.sensitivity * tensor.detach().std(correction=0)
        for name, tensor in prunable(context.model, settings.scope).items()
    }
    return PruningDecision(masks)
