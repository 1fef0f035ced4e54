"""Absolute threshold: what is smaller than one value, the same for all tensors, goes.

Source: the `T` scripts of H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
Keep w if |w| >= sensitivity.
"""

from secateur.base.settings import NonNegative, Strict
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity.masks import Scope, prunable


class Settings(Strict):
    """The threshold and what it is held against."""

    sensitivity: NonNegative = 0.001
    """Smallest absolute value that stays; 0 prunes nothing."""
    scope: Scope = "weights_and_biases"


def prune(settings: Settings, subject: PruningContext) -> PruningDecision:
    """Masks of all tensors in scope."""
    masks = {
        name: tensor.detach().abs() >= settings.sensitivity
        for name, tensor in prunable(subject.model, settings.scope).items()
    }
    return PruningDecision(masks)
