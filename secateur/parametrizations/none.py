"""No parametrization: the weights themselves are trained."""

from torch import nn

from secateur.base.sections import Strict
from secateur.training.parametrization import Parametrization


class Settings(Strict):
    """No settings."""


def build(settings: Settings, model: nn.Module) -> Parametrization | None:
    """The model is left as it is."""
    return None
