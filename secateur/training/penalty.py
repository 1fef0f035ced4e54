"""Penalties as the training loop sees them: what is added to the loss of every step."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from secateur.base import plugin

Row = dict[str, float]
"""One epoch of history: epoch, lr, losses and accuracies."""


class Penalty(Protocol):
    """One penalty on one model, its strength included."""

    @property
    def finished(self) -> bool:
        """Whether the training is over, by the penalty's own clock; asked after every step."""

    def __call__(self, step: int) -> Tensor:
        """Value at this optimizer step (counted from 0 over all epochs), to be differentiated.

        Called once a step, in order.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All that must survive a restart; empty for a penalty without memory."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` was taken."""


@runtime_checkable
class ScheduledPenalty(Protocol):
    """What a penalty has beside that if it runs a course of its own and chooses what goes."""

    needs: int
    """Steps that the course takes at most."""

    def figures(self) -> dict[str, float]:
        """Where it is, for the epoch's row of history; finite numbers."""

    def choices(self) -> dict[str, Tensor]:
        """What is to be pruned, by the weight's parameter name; see sparsity/choices.py."""

    def trace(self) -> list[Row]:
        """A table of the course, a row for each of some steps."""


def build(name: str, settings: Any, model: nn.Module, decay: float) -> Penalty | None:
    """The penalty of this name on this model; None where it would add nothing to any loss."""
    built: Penalty | None = plugin.load("penalties", name).build(settings, model, decay)
    return built if decay else None
