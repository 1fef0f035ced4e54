"""The interface of parametrizations: sparse-train computes weights from other parameters."""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base import plugin
from secateur.base.errors import ArgumentError
from secateur.sparsity.choices import Choices
from secateur.training.penalty import ChoosingPenalty, Penalty, TrainingPlan


class Parametrization(Protocol):
    """A parametrization of the weights of one model, which it has changed in place.

    Its parameters are parameters of the model, so the optimizer trains them and the saved state of
    a training contains them.
    """

    def start(self, plan: TrainingPlan) -> None:
        """Called once, before a saved state is restored and before the first step."""

    def __call__(self, step: int) -> Tensor:
        """Its term in the loss at an optimizer step (counted from 0): a differentiable scalar."""

    def metrics(self) -> dict[str, float]:
        """Progress after an epoch, for its history row: finite numbers, always the same keys."""

    def collapse(self) -> Choices:
        """Give the model plain weights again, equal to those of its forward pass in eval mode.

        Returns which weights are zero, as choices of single weights by parameter name.
        """


def build(
    name: str, settings: Any, model: nn.Module, epochs: int | None = None
) -> Parametrization | None:
    """Parametrize the model in place; None if parametrization `name` does not change it.

    With 0 `epochs` the network is passed on unchanged, so the result is None too.
    """
    if epochs == 0:
        return None
    built: Parametrization | None = plugin.load("parametrizations", name).build(settings, model)
    return built


def joined(
    name: str, parametrization: Parametrization | None, penalty: Penalty | None
) -> Penalty | None:
    """The penalty with the parametrization's term added; the penalty itself if that is None.

    Raises ArgumentError if both of them select what to prune.
    """
    if parametrization is None:
        return penalty
    if isinstance(penalty, ChoosingPenalty):
        raise ArgumentError(
            "parametrization",
            "prunes by itself, and so does the penalty; take one that does not (none, l1, ...), or "
            "parametrization none",
            name,
        )
    return _Joined(parametrization, penalty)


class _Joined:
    """A penalty whose value includes the term of a parametrization."""

    def __init__(self, parametrization: Parametrization, penalty: Penalty | None) -> None:
        self.parametrization, self.penalty = parametrization, penalty

    @property
    def finished(self) -> bool:
        """Whether the penalty has ended the training."""
        return self.penalty is not None and self.penalty.finished

    def __call__(self, step: int) -> Tensor:
        """Sum of both terms."""
        term = self.parametrization(step)
        return term if self.penalty is None else term + self.penalty(step)

    def start(self, plan: TrainingPlan) -> None:
        """Tell the parametrization about the training."""
        self.parametrization.start(plan)

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def metrics(self) -> dict[str, float]:
        """Progress of the parametrization."""
        return self.parametrization.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        """State of the penalty; the parametrization's state is part of the model."""
        return {} if self.penalty is None else self.penalty.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if self.penalty is not None:
            self.penalty.load_state_dict(state)


def holders(model: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    """The modules that have this parameter, and its name in each: several if they share it."""
    return [
        (module, key)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter is weight
    ]


def zeros(model: nn.Module, names: Iterable[str]) -> Choices:
    """The zeros in these weights, as choices of single weights, on the CPU."""
    found = {name: (model.get_parameter(name).detach() == 0).cpu() for name in names}
    return {name: choice for name, choice in found.items() if bool(choice.any())}
