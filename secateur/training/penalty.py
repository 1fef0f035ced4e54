"""The interface of penalties: terms that the training loop adds to the loss of every step."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base import plugin
from secateur.base.errors import ArgumentError
from secateur.base.sections import Train, in_steps
from secateur.training.callbacks import Row


class Penalty(Protocol):
    """A penalty on one model, multiplied by its strength `decay`."""

    @property
    def finished(self) -> bool:
        """Whether the penalty's own schedule has ended, which ends the training."""

    def __call__(self, step: int) -> Tensor:
        """Value at an optimizer step (from 0, over all epochs): a differentiable scalar.

        Called once per step, in order.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a resumed training restores; empty for a penalty without state."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


@runtime_checkable
class MeasuredPenalty(Protocol):
    """Additional method of a penalty that reports its progress."""

    def metrics(self) -> dict[str, float]:
        """Progress after an epoch, for its history row: finite numbers, always the same keys."""


@runtime_checkable
class ChoosingPenalty(MeasuredPenalty, Protocol):
    """Additional members of a penalty that chooses during the training what is pruned."""

    max_steps: int
    """Largest number of optimizer steps until the penalty ends the training; 0 if it never does."""

    def choices(self) -> dict[str, Tensor]:
        """What to prune, by parameter name of the weight; see sparsity/choices.py."""

    def trace_table(self) -> list[Row]:
        """The trace of the penalty's schedule, one row for each recorded step: `step`, the largest
        factor or the pruned share, and the mean magnitudes of kept and of chosen weights."""


@runtime_checkable
class MaskingPenalty(Protocol):
    """Additional method of a penalty that holds entries of parameters at zero."""

    def held_factors(self) -> Mapping[str, Tensor]:
        """Parameter name -> 1 for entries that are kept now, else 0; broadcastable to its shape."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a penalty knows in advance about the training that it is part of."""

    settings: Train
    steps: int
    """Number of optimizer steps, over all epochs."""
    images: int
    """Number of images in the training split."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name -> mask, False for entries that the training holds at zero."""

    def in_steps(self, value: float) -> int:
        """Number of steps that a `StepsOrShare` stands for; a share is rounded down."""
        return in_steps(value, self.steps)


@runtime_checkable
class SteppingPenalty(Protocol):
    """Additional methods of a penalty that acts on gradients and weights at every step.

    Its `state_dict` contains everything that it remembers between two steps.
    """

    def start(self, plan: TrainingPlan) -> None:
        """Called once, before a saved state is restored and before the first step.

        Raises ArgumentError naming the key of the training's settings that it does not support.
        """

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Called after the gradients of a step, including the penalty's, have been computed."""

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Called after the optimizer has updated the weights and masks have been applied again."""


def begin(
    penalty: Penalty | None,
    settings: Train,
    steps_per_epoch: int,
    images: int,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Tell a penalty about the training before its first step; `images` counts the training images.

    Raises ArgumentError naming the key of the training's settings that it does not support.
    """
    steps = settings.epochs * steps_per_epoch
    if isinstance(penalty, SteppingPenalty):
        penalty.start(TrainingPlan(settings, steps, images, masks or {}))
    if not isinstance(penalty, ChoosingPenalty):
        return
    if penalty.max_steps > steps:
        raise ArgumentError(
            "epochs",
            f"the penalty may need {penalty.max_steps:,} steps until it is finished; at "
            f"{steps_per_epoch:,} steps an epoch that is "
            f"{math.ceil(penalty.max_steps / steps_per_epoch):,} epochs. It ends by itself, so "
            "more epochs do no harm",
            settings.epochs,
        )
    if settings.keep != "last":
        raise ArgumentError(
            "keep",
            "a penalty that chooses what is pruned has done so only at the end of the training; "
            "keep must be 'last'",
            settings.keep,
        )


def build(
    name: str, settings: Any, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty | None:
    """The penalty of this name on this model; None if it would have no effect.

    `shape`, (channels, height, width) of one image, is passed to penalties whose `build` has a
    parameter of this name, which follow channels through the network.
    """
    make = plugin.load("penalties", name).build
    more = {"shape": shape} if "shape" in inspect.signature(make).parameters else {}
    built: Penalty | None = make(settings, model, decay, **more)
    return built if decay or isinstance(built, SteppingPenalty) else None
