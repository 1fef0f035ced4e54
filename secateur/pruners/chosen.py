"""What the penalty chose goes, exactly that and nothing else.

Penalties that choose (greg1, greg2) hand their choice on in the sparse-trained checkpoint: filters,
channels or single weights, which they have brought close to zero already. Filters and channels are
taken out of the network wherever no other layer has a say in them.
"""

from secateur.base.errors import PruningError
from secateur.base.settings import Strict
from secateur.pruning.decision import PruningContext, PruningDecision, decision_from_choices


class Settings(Strict):
    """Nothing to set: the penalty's settings say how much of what goes."""


def prune(settings: Settings, subject: PruningContext) -> PruningDecision:
    """What was chosen.

    Raises PruningError if the penalty has made no choice, or one for another network.
    """
    if not subject.choices:
        raise PruningError(
            "pruner = 'chosen': the sparse-trained network carries no choice; sparse-train it with "
            "a penalty that makes one (greg1 or greg2), or prune with another pruner"
        )
    return decision_from_choices(subject, subject.choices)
