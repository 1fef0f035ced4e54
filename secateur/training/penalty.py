"""Penalties as the training loop uses them: terms added to the loss of every step."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base import plugin
from secateur.base.errors import ArgumentError
from secateur.base.sections import Train
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
class MeasuredPenalty(Protocol):
    """Further member of a penalty whose progress is noted."""

    def metrics(self) -> dict[str, float]:
        """Progress after an epoch, for its row of history; finite numbers, always the same keys."""


@runtime_checkable
class ScheduledPenalty(MeasuredPenalty, Protocol):
    """Further members of a penalty that runs a schedule of its own and selects what to prune."""

    max_steps: int
    """Steps of the optimizer that the schedule takes at most."""

    def choices(self) -> dict[str, Tensor]:
        """What to prune, by the weight's parameter name; see sparsity/choices.py."""

    def growth_table(self) -> list[Row]:
        """Progress of the schedule as a table: one row for each step at which it was noted."""


@runtime_checkable
class MaskingPenalty(Protocol):
    """Further member of a penalty that holds entries of parameters at zero."""

    def held_factors(self) -> Mapping[str, Tensor]:
        """Parameter name -> 1 where an entry is kept now, else 0; broadcastable to it."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a penalty knows in advance of the training that it is part of."""

    settings: Train
    steps: int
    """Steps of the optimizer, over all epochs."""
    images: int
    """Number of images in the training split."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name -> False where the training holds entries at zero."""

    def in_steps(self, value: float) -> int:
        """Number of steps that a `StepsOrShare` stands for; a share is rounded down."""
        return int(value * self.steps) if value < 1 else int(value)


@runtime_checkable
class SteppingPenalty(Protocol):
    """Further members of a penalty that acts on gradients and weights at every step.

    What it remembers between two steps is in its `state_dict`.
    """

    def start(self, plan: TrainingPlan) -> None:
        """Called once, before a saved state is restored and before the first step.

        Raises ArgumentError naming the key of the training's settings that does not suit it.
        """

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Called when the gradients of a step are computed, those of the penalty included."""

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Called when the optimizer has changed the weights, and masked ones are zero again."""


def begin(
    penalty: Penalty | None,
    settings: Train,
    steps_per_epoch: int,
    images: int,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Tell a penalty about the training, before its first step; `images` are those of the split.

    Raises ArgumentError naming the key of the training's settings that does not suit it.
    """
    steps = settings.epochs * steps_per_epoch
    if isinstance(penalty, SteppingPenalty):
        penalty.start(TrainingPlan(settings, steps, images, masks or {}))
    if not isinstance(penalty, ScheduledPenalty):
        return
    if penalty.max_steps > steps:
        raise ArgumentError(
            "epochs",
            f"the penalty may need {penalty.max_steps:,} steps until it is finished; at "
            f"{steps_per_epoch:,} steps an epoch that is "
            f"{math.ceil(penalty.max_steps / steps_per_epoch):,} epochs. It ends by itself, so "
            "more do no harm",
            settings.epochs,
        )
    if settings.keep != "last":
        raise ArgumentError(
            "keep",
            "a penalty with a schedule of its own is complete only at the end of it; keep must be "
            "'last'",
            settings.keep,
        )


def build(
    name: str, settings: Any, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty | None:
    """The penalty of this name on this model; None where it would change no training.

    `shape` of one image, (channels, height, width), is for penalties that follow channels through
    the network: those whose `build` has a parameter of this name.
    """
    make = plugin.load("penalties", name).build
    more = {"shape": shape} if "shape" in inspect.signature(make).parameters else {}
    built: Penalty | None = make(settings, model, decay, **more)
    return built if decay or isinstance(built, SteppingPenalty) else None
