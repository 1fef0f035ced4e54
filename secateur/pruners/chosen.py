"""Prune exactly what the penalty has chosen.

Penalties that choose what to prune (greg1, greg2, gradual, rigl, gsm) store their choice in the
sparse-trained checkpoint: filters, channels or single weights, which training has already brought
to zero or close to it. Parametrizations (str, variational_dropout) store which weights they have
set to zero. Filters and channels are removed whole unless they are coupled to other layers.
"""

from secateur.base.errors import PruningError
from secateur.base.sections import Strict
from secateur.pruning.decision import PruningContext, PruningDecision, decision_from_choices


class Settings(Strict):
    """No settings: the settings of the penalty determine what is pruned."""


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """The penalty's choice, as whole channels where these can be removed.

    Raises PruningError if the checkpoint has no choice, or one that belongs to another network.
    """
    if not context.choices:
        raise PruningError(
            "pruner chosen: the network carries no choice; train it with a penalty that makes one "
            "(greg1, greg2, gradual, rigl, gsm) or a parametrization, or prune with another pruner"
        )
    return decision_from_choices(context, context.choices)
