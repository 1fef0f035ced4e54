"""L2 penalties that grow on the groups that are to go, until these are small: GReg.

Source: H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via growing regularization, ICLR 2021,
Algorithm 1. Every so many steps the factor of the groups that are to go rises by a little
(`decay`); their weights shrink on their own account while the network learns to do without them.
With factor f of a weight's group, R(w) = sum f * w^2 / 2, so that f * w is added to the gradient,
beside the optimizer's own weight decay.

The course of a training: perhaps picking (greg2), then growing, then stabilising under factors
that no longer change, for exactly as many steps as were asked for; then it is over.
"""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.base.errors import SettingsError
from secateur.base.settings import Positive, Strict
from secateur.sparsity import choices as grouping
from secateur.sparsity import masks
from secateur.sparsity.choices import Choices, Granularity
from secateur.sparsity.ratios import Ratios, Rules, Skip, by_layer

PICKING, GROWING, STABILISING, FINISHED = range(4)
POINTS = 500
"""How many points the record of a course has at most, but for its end."""


class GrowthSettings(Strict):
    """What goes, how fast the factors grow, and when they stop. Defaults: the source's, CIFAR."""

    granularity: Granularity = "filter"
    """filter: outputs of a layer; channel: inputs of it; weight: single weights."""
    ratios: Ratios = Rules(0.5)
    """Share of each layer that goes; see sparsity/ratios.py."""
    skip: Skip = ()
    """Layers that are left alone: names, or stage.block."""
    interval: Annotated[int, Field(ge=1)] = 10
    """Steps of the optimizer from one growth to the next."""
    ceiling: Positive = 1.0
    """A layer's factor stops growing when it exceeds this."""
    magnitude_ratio: Positive = 1000.0
    """Or when its kept groups are so many times as large as those that go; not for weights."""
    stabilise: Annotated[int, Field(ge=0)] = 10_000
    """Steps with factors that no longer change."""


class Growing:
    """What both methods share; they differ in `grow` and `ends`.

    All layers with something to lose are numbered in order; factors, means and the like are
    tensors with one entry for each of them. `kept` and `chosen` below are groups.
    """

    max_steps = 0
    """Most steps that the course can take; set by whoever knows the growth."""

    def __init__(
        self, model: nn.Module, settings: GrowthSettings, decay: float, where: str
    ) -> None:
        """`decay` is the growth of a factor at once; `where` the key of the settings.

        Raises SettingsError unless it is above 0, and for ratios that do not fit the network.
        """
        if not decay > 0:
            raise SettingsError(
                f"params.yaml: decay = {decay:g}: {where} grows its factors by it, so it must be "
                "greater than 0"
            )
        self.settings, self.step_size = settings, decay
        ratios = by_layer(model, settings.ratios, settings.granularity, settings.skip, where)
        weights = {f"{name}.weight": layer.weight for name, layer in masks.layers(model).items()}
        self.numbers = {
            name: number
            for name, weight in weights.items()
            if (number := self._number(weight, ratios[name.removesuffix(".weight")]))
        }
        if not self.numbers:
            raise SettingsError(f"params.yaml: {where}.ratios: no layer has a group to spare")
        self.names = list(self.numbers)
        self.weights = [weights[name] for name in self.names]
        self.choice: Choices = {}
        self.phase, self.since, self.steps, self.updates = GROWING, 0, 0, 0
        count = len(self.names)
        self.factor, self.others = torch.zeros(count), torch.zeros(count)
        self.average = torch.zeros(count, dtype=torch.float64)
        self.active = torch.ones(count, dtype=torch.bool)
        self.record: list[tuple[int, Tensor]] = []
        self._spread: list[Tensor] = []

    # what the two methods do in their own ways

    def grow(self) -> None:
        """Raise factors: `self.factor` (chosen groups) and `self.others` (kept ones)."""
        raise NotImplementedError

    def ends(self) -> Tensor:
        """Which layers have grown enough."""
        raise NotImplementedError

    # what fit() asks

    @property
    def finished(self) -> bool:
        """Whether the steps under constant factors are through."""
        done = self.steps - 1 - self.since
        return self.phase == STABILISING and done >= self.settings.stabilise

    def __call__(self, step: int) -> Tensor:
        """Half the sum of factor * w^2 at this step, a scalar."""
        if self.phase < STABILISING and step % self.settings.interval == 0:
            self._update(step)
        elif not self._spread:  # gone on from a saved state
            self._spread = self._factors()
        if step % self.every == 0:
            self.record.append((step, self._point()))
        self.steps = step + 1
        total: Tensor = _Pull.apply(self._spread, *self.weights)
        return total

    def metrics(self) -> dict[str, float]:
        """How far it is: the phase from 0 (picking) to 3 (finished), the largest factor, layers
        whose choice is made, and kept over chosen magnitude, of each layer and in the mean."""
        ratios = _over(*self._means())
        layers = [name.removesuffix(".weight") for name in self.names]
        return {
            "phase": float(FINISHED if self.finished else self.phase),
            "factor": float(self.factor.max()),
            "picked": float(len(self.choice)),
            "magnitude_ratio": float(ratios.mean()),
            **{f"magnitude_ratio/{n}": float(r) for n, r in zip(layers, ratios, strict=True)},
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as plain tensors."""
        steps = [step for step, _ in self.record]
        points = [point for _, point in self.record] or [torch.zeros(0, 3, len(self.names))]
        return {
            "clock": torch.tensor([self.phase, self.since, self.steps, self.updates]),
            "factor": self.factor,
            "others": self.others,
            "average": self.average,
            "active": self.active,
            "record.steps": torch.tensor(steps, dtype=torch.int64),
            "record.points": torch.stack(points) if self.record else points[0],
            **{f"choice/{name}": choice for name, choice in self.choice.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` was taken."""
        self.phase, self.since, self.steps, self.updates = map(int, state["clock"].tolist())
        for name in ("factor", "others", "average", "active"):
            setattr(self, name, state[name].clone())
        points = zip(state["record.steps"].tolist(), state["record.points"], strict=True)
        self.record = [(step, point.clone()) for step, point in points]
        self.choice = {
            name.removeprefix("choice/"): choice.clone()
            for name, choice in state.items()
            if name.startswith("choice/")
        }
        self._spread = []

    # what sparse-train asks afterwards

    def choices(self) -> Choices:
        """What is to go, by the weight's parameter name; see sparsity/choices.py."""
        return {name: choice.cpu() for name, choice in self.choice.items()}

    def growth_table(self) -> list[dict[str, float]]:
        """Mean |w| of kept and chosen groups over the steps, by layer and over all layers.

        One row for each of at most 500 points and one for the end. The largest factor is with it.
        """
        points = [*self.record, (self.steps, self._point())]
        rows: list[dict[str, float]] = []
        for step, point in points:
            factor, kept, chosen = point.double()
            row = {"step": float(step), "factor": float(factor.max())}
            row |= {"kept": float(kept.mean()), "chosen": float(chosen.mean())}
            for name, some, others in zip(self.names, kept, chosen, strict=True):
                layer = name.removesuffix(".weight")
                row |= {f"kept {layer}": float(some), f"chosen {layer}": float(others)}
            rows.append(row)
        return rows

    # the clockwork

    @property
    def every(self) -> int:
        """Steps from one point of the record to the next."""
        return -(-self.max_steps // POINTS)

    @property
    def grouped(self) -> bool:
        """Whether groups are more than single weights, so that their means are watched."""
        return self.settings.granularity != "weight"

    @property
    def large_apart(self) -> Tensor:
        """Layers whose kept groups are as many times as large as asked."""
        if not self.grouped:
            return torch.zeros_like(self.active)
        return self.average >= self.settings.magnitude_ratio

    @property
    def over(self) -> Tensor:
        """Layers whose factor exceeds the ceiling."""
        return self.factor > self.settings.ceiling

    def steps_for(self, updates: int) -> int:
        """Steps of a course with so many updates, the first of them at step 0."""
        return (updates - 1) * self.settings.interval + 1 + self.settings.stabilise

    def pick(self, how: grouping.Pick = "min", seed: int = 0) -> None:
        """Choose by the weights as they are now."""
        for place, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            score = grouping.scores(weight, self.settings.granularity)
            self.choice[name] = grouping.choose(score, self.numbers[name], how, seed + place)

    def _number(self, weight: Tensor, ratio: float) -> int:
        """How many groups of a weight go."""
        sizes = {"filter": weight.shape[0], "channel": weight.shape[1], "weight": weight.numel()}
        return grouping.number_pruned(ratio, sizes[self.settings.granularity])

    def _update(self, step: int) -> None:
        """One growth, and what follows from it."""
        if self.grouped:
            now = _over(*self._means())
            self.average = 0.9 * self.average + 0.1 * now if self.updates else now
        self.updates += 1
        self.grow()
        self.active &= ~self.ends()
        if not bool(self.active.any()):
            self.phase, self.since = STABILISING, step
        self._spread = self._factors()

    @torch.no_grad()
    def _factors(self) -> list[Tensor]:
        """Factor of every group, to be broadcast over its weight."""
        if not self.choice:  # nothing is chosen yet: all groups alike
            return [w.new_tensor(float(f)) for w, f in zip(self.weights, self.factor, strict=True)]
        spread = []
        for index, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            self.choice[name] = self.choice[name].to(weight.device)
            factor = weight.new_full((), float(self.factor[index]))
            other = weight.new_full((), float(self.others[index]))
            by_group = torch.where(self.choice[name], factor, other)
            if by_group.shape == weight.shape:  # laid out in memory as the weight is
                by_group = torch.empty_like(weight).copy_(by_group)
            spread.append(by_group)
        return spread

    @torch.no_grad()
    def _means(self) -> tuple[Tensor, Tensor]:
        """Mean |w| of kept and of chosen groups, one for each layer, float64 on the CPU.

        As long as nothing is chosen, of those that would be if it were done now.
        """
        pairs = []
        for name, weight in zip(self.names, self.weights, strict=True):
            score = grouping.scores(weight, self.settings.granularity)
            gone = self.choice.get(name)
            if gone is None:
                gone = grouping.smallest_choice(score, self.numbers[name])
            gone = gone.to(score.device)
            number = gone.sum()
            chosen = (score * gone).sum() / number.clamp_min(1)
            kept = (score * ~gone).sum() / (gone.numel() - number).clamp_min(1)
            pairs.append(torch.stack([kept, chosen]))
        means = torch.stack(pairs).cpu().double()
        return means[:, 0], means[:, 1]

    def _point(self) -> Tensor:
        """Factor, kept and chosen mean of every layer: (3, layers)."""
        return torch.stack([self.factor, *(part.float() for part in self._means())])


class _Pull(torch.autograd.Function):
    """Half the sum of factor * w^2 over tensors; factor * w was all there is to compute."""

    @staticmethod
    def forward(ctx: Any, factors: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.pulls = torch._foreach_mul(weights, factors)
        products = torch._foreach_mul(ctx.pulls, weights)
        return 0.5 * torch.stack([product.sum() for product in products]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        torch._foreach_mul_(ctx.pulls, upstream)
        return None, *ctx.pulls


def updates_until(limit: float, growth: float, start: float = 0.0, *, reach: bool = False) -> int:
    """How many additions of `growth` bring a float32 from `start` above `limit`, or to it.

    At least one. Raises ValueError if it would never get there, for it adds too little.
    """
    rough = max((limit - start) / growth, 0.0)
    if rough < 2**24:  # beyond, a float32 stays where it is
        sums = np.full(int(rough * 1.01) + 3, growth, np.float32)
        sums[0] += np.float32(start)
        sums = np.add.accumulate(sums)
        there = sums >= np.float32(limit) if reach else sums > np.float32(limit)
        if there.any():
            return int(there.argmax()) + 1
    raise ValueError(f"{limit:g} is out of reach in steps of {growth:g}")


def grown(count: int, growth: float) -> float:
    """Where so many additions of `growth` bring a float32 from 0."""
    return float(np.add.accumulate(np.full(count, growth, np.float32))[-1])


def _over(kept: Tensor, chosen: Tensor) -> Tensor:
    """kept / chosen, finite also where nothing is left of the chosen."""
    return kept / chosen.clamp_min(1e-30)
