"""What the penalty chose goes, exactly that and nothing else.

Penalties that choose (greg1, greg2) hand their choice on in the sparse-trained checkpoint: filters,
channels or single weights, which they have brought close to zero already.
"""

from torch import nn

from secateur.core import groups
from secateur.core.errors import PruningError
from secateur.core.choices import Choices
from secateur.core.masks import Masks
from secateur.core.settings import Strict


class Settings(Strict):
    """Nothing to set: the penalty's settings say how much of what goes."""


def prune(settings: Settings, model: nn.Module, choices: Choices) -> Masks:
    """Masks of the tensors that lose something.

    Raises PruningError if the penalty has made no choice, or one for another network.
    """
    if not choices:
        raise PruningError(
            "pruner = 'chosen': the sparse-trained network carries no choice; sparse-train it with "
            "a penalty that makes one (greg1 or greg2), or prune with another pruner"
        )
    return groups.masks(model, choices)
