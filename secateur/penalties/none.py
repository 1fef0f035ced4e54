"""No penalty: sparse-train is plain training, the control for all other penalties."""

from torch import nn

from secateur.base.sections import Strict
from secateur.training.penalty import Penalty


class Settings(Strict):
    """No settings."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty | None:
    """Nothing is added to the loss."""
    return None
