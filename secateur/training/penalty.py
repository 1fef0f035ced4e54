"""Penalties as the training loop uses them: terms added to the loss of every step."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from secateur.base import plugin
from secateur.training.callbacks import Row


class Penalty(Protocol):
    """One penalty on one model, multiplied by its strength `decay`."""

    @property
    def finished(self) -> bool:
        """Whether the penalty's own schedule has ended, and with it the training."""

    def __call__(self, step: int) -> Tensor:
        """Value at an optimizer step (from 0, over all epochs): a scalar to differentiate.

        Called once per step, in order.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training restores; empty for a penalty without state."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


@runtime_checkable
class ScheduledPenalty(Protocol):
    """Further members of a penalty that runs a schedule of its own and selects what to prune."""

    max_steps: int
    """Steps of the optimizer that the schedule takes at most."""

    def metrics(self) -> dict[str, float]:
        """Progress of the schedule, for the epoch's row of history; finite numbers."""

    def choices(self) -> dict[str, Tensor]:
        """What to prune, by the weight's parameter name; see sparsity/choices.py."""

    def growth_table(self) -> list[Row]:
        """Progress of the schedule as a table: one row for each step at which it was noted."""


def build(
    name: str, settings: Any, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty | None:
    """The penalty of this name on this model; None where it would add nothing to any loss.

    `shape` of one image, (channels, height, width), is for penalties that follow channels through
    the network: those whose `build` has a parameter of this name.
    """
    make = plugin.load("penalties", name).build
    more = {"shape": shape} if "shape" in inspect.signature(make).parameters else {}
    built: Penalty | None = make(settings, model, decay, **more)
    return built if decay else None
