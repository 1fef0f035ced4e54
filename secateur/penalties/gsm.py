"""Global sparse momentum (GSM): at each step, the loss updates only the most important weights.

Source: X. Ding, G. Ding, X. Zhou, Y. Guo, J. Han, J. Liu, Global sparse momentum SGD for pruning
very deep neural networks, NeurIPS 2019, equations 5 to 9. At every step the Q weights with the
largest |w * dL/dw| are active. The gradient that enters the momentum is dL/dw + decay * w for
active weights, and decay * w alone for passive ones, which therefore shrink exponentially towards
zero. Q is the number of weights to be kept. The active weights are chosen anew at each step, so
that a weight can return. In the end the weights of the smallest magnitude are pruned, which barely
changes the network.

`decay` is the weight decay of the source; a high momentum (0.98 or 0.99 there) shrinks passive
weights faster.
"""

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.penalties._shared.dynamic import DynamicSparsityPenalty, check_end, lowest
from secateur.sparsity import choices, masks
from secateur.sparsity.choices import Choices, Ranking
from secateur.sparsity.layer_ratios import ratios_by_parameter
from secateur.sparsity.ratios import Ratios, Rules, Skip
from secateur.training.penalty import TrainingPlan

POINTS = 200
"""Points of the trace of magnitudes."""


class Settings(Strict):
    """What is pruned, and how much of it."""

    ratios: Ratios = Rules(0.9)
    """Share of each layer that is pruned, see sparsity/ratios.py; one number with ranking
    global."""
    ranking: Ranking = "global"
    """global, as in the source: over all layers that have a ratio above 0; layer: within each."""
    scope: masks.Scope = "weights"
    """Parameters whose entries are ranked."""
    skip: Skip = ()
    """Layers that are not pruned: names, or stage.block."""

    @model_validator(mode="after")
    def _one_number_for_all(self) -> Self:
        if self.ranking == "global" and self.ratios.everywhere is None:
            raise ValueError(
                "ratios: ranking global compares all layers, so it takes one number; name layers "
                "to leave alone under skip"
            )
        return self


def build(settings: Settings, model: nn.Module, decay: float) -> DynamicSparsityPenalty:
    """The penalty on the weights of this model, with `decay` as their weight decay.

    Raises ArgumentError unless `decay` is above 0, and for ratios that do not fit the network.
    """
    if not decay > 0:
        raise ArgumentError(
            "decay", "penalty gsm shrinks weights by it, so it must be greater than 0", decay
        )
    return GSM(settings, model, decay)


class GSM(DynamicSparsityPenalty):
    """Gradients of the loss for the active weights, decay for all."""

    def __init__(self, settings: Settings, model: nn.Module, decay: float) -> None:
        self.ratios = ratios_by_parameter(model, settings.ratios, settings.scope, settings.skip)
        held = {name: model.get_parameter(name) for name in self.ratios}
        super().__init__(model, "gsm", "l2", 0.0, held)
        self.settings, self.decay = settings, decay

    def start(self, plan: TrainingPlan) -> None:
        """ArgumentError for an optimizer other than sgd, or for a training without steps."""
        if plan.settings.optimizer != "sgd":
            raise ArgumentError(
                "optimizer",
                "penalty gsm works by the momentum of sgd; others divide by the size of the "
                "gradient, so that decay alone would not shrink a weight exponentially",
                plan.settings.optimizer,
            )
        check_end(0, plan, self.name)
        self.trace_interval = -(-plan.steps // POINTS)

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """Half of `decay` times the sum of squares; without gradient, which `before_step` adds."""
        squares = torch.stack([weight.square().sum() for weight in self.held.values()])
        return 0.5 * self.decay * squares.sum()

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Set the gradients of passive weights to zero, and add the decay to all."""
        weights = list(self.held.values())
        gradients = self.gradients(self.held)
        torch._foreach_mul_(gradients, self._active(weights, gradients))
        torch._foreach_add_(gradients, weights, alpha=self.decay)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Record the magnitudes of what would be kept and pruned now; nothing is set to zero."""
        if step % self.trace_interval == 0:
            self.trace.add(step, self._now())

    def choices(self) -> Choices:
        """The weights that are currently the smallest."""
        return {name: choice.cpu() for name, choice in self._smallest().items() if choice.any()}

    def metrics(self) -> dict[str, float]:
        """Mean magnitude of what would be kept now over that of what would be pruned."""
        _, kept, chosen = self._now().tolist()
        return {"magnitude_ratio": kept / max(chosen, 1e-30)}

    def _active(self, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """1 where |w * dL/dw| is among the largest, else 0; ties at the threshold are passive."""
        scores = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(scores)
        if self.settings.ranking == "layer":
            flats = [score.flatten() for score in scores]
            shares = list(self.ratios.values())
        else:
            flats = [torch.cat([score.flatten() for score in scores])]
            shares = [next(iter(self.ratios.values()))]
        limits = [
            flat.kthvalue(number).values if (number := choices.number_pruned(share, len(flat))) else
            flat.new_tensor(-1.0)
            for flat, share in zip(flats, shares, strict=True)
        ]  # fmt: skip
        limits = limits * len(scores) if len(limits) < len(scores) else limits
        pairs = zip(scores, limits, strict=True)
        return [(score > limit).to(score.dtype) for score, limit in pairs]

    @torch.no_grad()
    def _now(self) -> Tensor:
        """A point of the trace for the current weights."""
        chosen = self._smallest()
        pruned = sum(int(choice.sum()) for choice in chosen.values())
        total = sum(choice.numel() for choice in chosen.values())
        keep = self.as_factors({name: ~choice for name, choice in chosen.items()})
        return self.point(pruned / total, keep)

    def _smallest(self) -> Choices:
        scores = {name: weight.detach().abs() for name, weight in self.held.items()}
        return lowest(scores, self.ratios, self.settings.ranking)
