"""Absolute threshold: what is smaller than one value, the same for all tensors, goes.

Source: the `T` scripts of H. Yang, W. Wen, H. Li, DeepHoyer, ICLR 2020.
Keep w if |w| >= sensitivity.
"""

from torch import nn

from secateur.core.choices import Choices
from secateur.core.masks import Masks, Scope, prunable
from secateur.core.settings import NonNegative, Strict


class Settings(Strict):
    """The threshold and what it is held against."""

    sensitivity: NonNegative = 0.001
    """Smallest absolute value that stays; 0 prunes nothing."""
    scope: Scope = "weights_and_biases"


def prune(settings: Settings, model: nn.Module, choices: Choices) -> Masks:
    """Masks of all tensors in scope."""
    return {
        name: tensor.detach().abs() >= settings.sensitivity
        for name, tensor in prunable(model, settings.scope).items()
    }
