"""Prune exactly what the penalty has chosen.

Penalties that choose (greg1, greg2, gradual, rigl, gsm) store their choice in the sparse-trained
checkpoint: filters, channels or single weights, which they have brought to zero, or close to it,
already. Parametrizations (str, variational_dropout) store which weights they have set to zero.
Filters and channels are removed whole unless they are coupled to other layers.
"""

from secateur.base.errors import PruningError
from secateur.base.sections import Strict
from secateur.pruning.decision import PruningContext, PruningDecision, decision_from_choices


class Settings(Strict):
    """Nothing to set: what is pruned follows from the settings of the penalty."""


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """The penalty's choice, as whole channels where these can be removed.

    Raises PruningError if there is no choice, or one for another network.
    """
    if not context.choices:
        raise PruningError(
            "pruner chosen: the network carries no choice; train it with a penalty that makes one "
            "(greg1, greg2, gradual, rigl, gsm) or a parametrization, or prune with another pruner"
        )
    return decision_from_choices(context, context.choices)
