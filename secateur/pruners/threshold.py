"""Absolute threshold: prune the entries of all tensors that are smaller than one value.

Source: the `T` scripts of H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
Keep w if |w| >= sensitivity.
"""

from secateur.base.sections import NonNegative, Strict
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity.masks import Scope, prunable


class Settings(Strict):
    """The threshold, and the parameters that it is applied to."""

    sensitivity: NonNegative = 0.001
    """Smallest absolute value that is kept; 0 prunes nothing."""
    scope: Scope = "weights_and_biases"
    """Parameters that are pruned."""


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """Masks of all tensors in scope."""
    masks = {
        name: tensor.detach().abs() >= settings.sensitivity
        for name, tensor in prunable(context.model, settings.scope).items()
    }
    return PruningDecision(masks)
