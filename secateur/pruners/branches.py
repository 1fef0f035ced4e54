"""Depth pruning: remove whole residual branches, so that the network has fewer layers.

A branch is what a residual block adds to its input (pruning/branches.py); without it the block is
its shortcut. As all layers of the branch go, latency falls as MACs do, which narrower layers do not
achieve where the processor computes 16 channels at once anyway.

Branches are removed one by one: in each step the one without which the mean cross-entropy on
training images, in eval mode, is lowest. In a residual network, most single branches can be left
out at a small loss (A. Veit, M. Wilber, S. Belongie, Residual networks behave like ensembles of
relatively shallow networks, NeurIPS 2016). Removing layers compared with removing filters at equal
latency: S. Elkerdawy, M. Elhoushi, A. Singh, H. Zhang, N. Ray, To filter prune, or to layer prune,
that is the question, ACCV 2020; their criteria differ from the loss used here.
"""

import copy
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.nn.modes import in_eval_mode
from secateur.pruning.branches import Branch, find_named, residual_branches, silence
from secateur.pruning.decision import PruningContext, PruningDecision

Names = tuple[str, ...]


class Settings(Strict):
    """How many branches are removed, or which."""

    number: Annotated[int, Field(ge=1)] | None = 1
    """Number of branches that are removed; null with `remove`."""
    remove: Names = ()
    """Branches that are removed, by name, such as layer1.2."""
    skip: Names = ()
    """Branches that are not removed."""

    @model_validator(mode="after")
    def _number_or_names(self) -> Self:
        if bool(self.remove) == (self.number is not None):
            raise ValueError("number: either a number of branches or their names under remove")
        return self


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """The named branches, or those without which the loss is lowest.

    Raises ArgumentError for a name that the network lacks, and a number larger than that of its
    branches; PruningError if a number is given and the images have no labels.
    """
    example = context.images[:1]
    for key in ("remove", "skip"):
        find_named(context.graph, example, getattr(settings, key), key)
    if settings.number is None:
        return PruningDecision(branches=settings.remove)
    branches = residual_branches(context.graph, example)
    left = {name: branch for name, branch in branches.items() if name not in settings.skip}
    if settings.number > len(left):
        raise ArgumentError(
            "number",
            f"the network has {len(left)} residual branches to remove",
            settings.number,
        )
    return _by_loss(settings.number, context, left)


def _by_loss(number: int, context: PruningContext, left: dict[str, Branch]) -> PruningDecision:
    """Of the branches in `left`, those that are removed one by one."""
    removed: list[Branch] = []
    notes = {"loss_before": _loss(context, removed)}
    lines = []
    while len(removed) < number:
        losses = {name: _loss(context, [*removed, branch]) for name, branch in left.items()}
        best = min(losses, key=losses.__getitem__)
        listed = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        lines.append(f"without {best}: loss {losses[best]:.3f} (of {listed})")
        removed.append(left.pop(best))
        notes["loss"] = losses[best]
    return PruningDecision(
        branches=tuple(branch.name for branch in removed), notes=notes, lines=tuple(lines)
    )


def _loss(context: PruningContext, removed: Sequence[Branch]) -> float:
    """Mean cross-entropy of the network without these branches."""
    model = in_eval_mode(copy.deepcopy(context.model))
    silence(model, removed)
    return context.loss(model, "pruner branches")
