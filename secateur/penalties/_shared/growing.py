"""L2 penalties that grow on the units to be pruned until these are small: GReg.

Source: H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via growing regularization, ICLR 2021,
Algorithm 1. At regular intervals the factor of the units to be pruned rises by `decay`; their
weights shrink while the network adapts to their loss. With the factor f of a weight's unit,
R(w) = sum f * w^2 / 2, so that f * w is added to the gradient, in addition to the weight decay of
the optimizer.

The schedule of a training: picking (greg2 only), growing, then stabilising with constant factors
for exactly as many steps as the settings say. After that the training is finished.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.base.errors import ArgumentError, cut
from secateur.base.sections import Positive, Strict
from secateur.penalties._shared import trace
from secateur.penalties._shared.coupled import CoupledWeights
from secateur.sparsity import choices, masks
from secateur.sparsity.choices import Choices, Granularity
from secateur.sparsity.layer_ratios import ratios_by_group, ratios_by_layer
from secateur.sparsity.ratios import Ratios, Rules, Skip, Skipped
from secateur.training.state import with_prefix

PICKING, GROWING, STABILISING, FINISHED = range(4)


class GrowthSettings(Strict):
    """What is pruned, how fast the factors grow, and when they stop. The defaults are those of the
    source for CIFAR."""

    granularity: Granularity | Literal["group"] = "filter"
    """filter: outputs of a layer; channel: inputs of a layer; weight: single weights; group:
    channels with everything that is coupled to them in any layer."""
    ratios: Ratios = Rules(0.5)
    """Share of each layer, or channel group, that is pruned; see sparsity/ratios.py."""
    skip: Skip = ()
    """Layers that are not pruned: names, or stage.block."""
    interval: Annotated[int, Field(ge=1)] = 10
    """Steps of the optimizer from one growth to the next."""
    ceiling: Positive = 1.0
    """A layer's factor stops growing when it exceeds this."""
    magnitude_ratio: Positive = 1000.0
    """It also stops when the mean magnitude of the layer's kept units is this many times that of
    its chosen units; not for granularity weight."""
    stabilise: Annotated[int, Field(ge=0)] = 10_000
    """Steps with constant factors, after the growth."""


class PrunedUnits:
    """The filters, channels or weights that are to be pruned, by layer, and their magnitudes.

    Only layers that lose at least one unit are included, in order; tensors have one entry for each
    of these layers.
    """

    def __init__(
        self, model: nn.Module, settings: GrowthSettings, granularity: Granularity
    ) -> None:
        """Raises ArgumentError for ratios that do not fit the network."""
        self.granularity = granularity
        ratios = ratios_by_layer(model, settings.ratios, granularity, settings.skip)
        weights = {f"{name}.weight": layer.weight for name, layer in masks.layers(model).items()}
        self.numbers = {
            name: number
            for name, weight in weights.items()
            if (number := self._number(weight, ratios[name.removesuffix(".weight")]))
        }
        """Weight's parameter name -> number of its units that are pruned."""
        if not self.numbers:
            raise ArgumentError("ratios", f"no layer has a {granularity} to spare")
        self.names = list(self.numbers)
        self.weights = [weights[name] for name in self.names]
        self.choice: Choices = {}
        """Empty until the units are chosen."""

    def choose(self, pick: choices.Pick = "min", seed: int = 0) -> None:
        """Choose by the current L1 norms of the units; units that are zero are always chosen first.

        Masks of earlier rounds hold units at zero, and a ratio includes these.
        """
        for place, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            score = choices.magnitude_scores(weight, self.granularity)
            self.choice[name] = choices.choose(
                score, self.numbers[name], pick, seed + place, weight.detach() != 0
            )

    def choice_of_smallest(self) -> Choices:
        """The units that currently have the smallest L1 norms, on the CPU; changes nothing."""
        return {
            name: choices.choose_smallest(
                choices.magnitude_scores(weight, self.granularity), self.numbers[name]
            ).cpu()
            for name, weight in zip(self.names, self.weights, strict=True)
        }

    @torch.no_grad()
    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """Mean |w| of the kept and of the chosen units by layer, float64 on the CPU.

        Before the choice, the smallest units count as chosen.
        """
        pairs = []
        for name, weight in zip(self.names, self.weights, strict=True):
            score = choices.magnitude_scores(weight, self.granularity)
            choice = self.choice.get(name)
            if choice is None:
                choice = choices.choose_smallest(score, self.numbers[name])
            choice = choice.to(score.device)
            number = choice.sum()
            chosen = (score * choice).sum() / number.clamp_min(1)
            kept = (score * ~choice).sum() / (choice.numel() - number).clamp_min(1)
            pairs.append(torch.stack([kept, chosen]))
        means = torch.stack(pairs).cpu().double()
        return means[:, 0], means[:, 1]

    def magnitude_ratios(self) -> Tensor:
        """Magnitude of the kept units over that of the chosen units by layer; always finite."""
        kept, chosen = self.magnitudes()
        return kept / chosen.clamp_min(1e-30)

    @torch.no_grad()
    def expand(self, chosen: Tensor, kept: Tensor) -> list[Tensor]:
        """Factors of each layer's chosen and kept units -> tensors that broadcast over its weight.

        Before the choice, all units have the factor `chosen`.
        """
        if not self.choice:
            return [w.new_tensor(float(f)) for w, f in zip(self.weights, chosen, strict=True)]
        expanded = []
        for index, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            self.choice[name] = self.choice[name].to(weight.device)
            factor = weight.new_full((), float(chosen[index]))
            other = weight.new_full((), float(kept[index]))
            by_unit = torch.where(self.choice[name], factor, other)
            if by_unit.shape == weight.shape:  # in the weight's memory format
                by_unit = torch.empty_like(weight).copy_(by_unit)
            expanded.append(by_unit)
        return expanded

    def as_choices(self) -> Choices:
        """What is chosen, on the CPU, by the weight's parameter name."""
        return {name: choice.cpu() for name, choice in self.choice.items()}

    def _number(self, weight: Tensor, ratio: float) -> int:
        sizes = {"filter": weight.shape[0], "channel": weight.shape[1], "weight": weight.numel()}
        return choices.number_pruned(ratio, sizes[self.granularity])


class HasRatios(Protocol):
    """Settings that say how much of each layer is pruned."""

    @property
    def ratios(self) -> Rules:
        """Share of each layer."""

    @property
    def skip(self) -> tuple[Skipped, ...]:
        """Layers that are not pruned."""


class PrunedChannels:
    """As `PrunedUnits`, for channels with everything that is coupled to them.

    In place of a layer there is a channel group, or several groups that must lose equal numbers.
    """

    def __init__(self, model: nn.Module, settings: HasRatios, shape: Sequence[int] | None) -> None:
        """`shape` is that of one image. Raises ArgumentError for ratios that do not fit the
        network, PruningError if the network cannot be traced."""
        self.coupled = CoupledWeights(model, shape)
        graph = self.coupled.graph
        layers = {group.name: group.producers for group in graph.groups}
        units, refused = graph.units(torch.zeros(len(graph.canonical)))
        ratios = ratios_by_group(model, settings.ratios, settings.skip, layers, refused)
        self.numbers: dict[str, int] = {}
        """Name of the first group -> number of units to prune; a unit is one channel, or one
        channel of each of several parts."""
        self.ratios: dict[str, float] = {}
        self.channels: dict[str, Tensor] = {}
        """The candidate channels, by canonical id, (channels,)."""
        self._names: dict[int, str] = {}  # by place among the graph's units
        for place, unit in enumerate(units):
            ratio = min(ratios[name] for name in unit.groups)
            number = choices.number_pruned(ratio, len(unit.ids)) if len(unit.ids) > 1 else 0
            if number:
                first = unit.groups[0]
                name = first if first not in self.numbers else f"{first}, {place}"
                self._names[place] = name
                self.numbers[name], self.channels[name] = number, unit.ids.flatten()
                self.ratios[name] = ratio
        if not self.numbers:
            raise ArgumentError("ratios", "no group has a channel to spare")
        self.names = list(self.numbers)
        self.weights = list(self.coupled.weights.values())
        self.choice: Choices = {}
        """By name, one entry for each of the channels; empty until they are chosen."""
        ones = self.coupled.sums(torch.ones_like)
        self._sizes = ones.detach().cpu()  # weights of each channel

    def choose(self, pick: choices.Pick = "min", seed: int = 0) -> None:
        """Choose by the current mean magnitude of the weights of each channel."""
        self.choice = self._chosen(pick, seed)

    def choice_of_smallest(self) -> Choices:
        """The channels that currently have the smallest mean magnitude; changes nothing."""
        return self._chosen("min", 0)

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """Mean |w| of the kept and of the chosen channels by group, float64 on the CPU.

        Before the choice, the smallest channels count as chosen.
        """
        scores = self._scores()
        choice = self.choice or self.choice_of_smallest()
        pairs = [
            (own[~choice[name].cpu()].mean(), own[choice[name].cpu()].mean())
            for name, own in ((name, scores[ids]) for name, ids in self.channels.items())
        ]
        kept, chosen = (torch.stack(part).double() for part in zip(*pairs, strict=True))
        return kept, chosen

    def magnitude_ratios(self) -> Tensor:
        """Magnitude of the kept channels over that of the chosen ones by group; always finite."""
        kept, chosen = self.magnitudes()
        return kept / chosen.clamp_min(1e-30)

    @torch.no_grad()
    def expand(self, chosen: Tensor, kept: Tensor) -> list[Tensor]:
        """Factors of each group's chosen and kept channels -> tensors that broadcast over weights.

        A weight has the sum of the factors of the two channels that it connects. Before the choice,
        all channels have the factor `chosen`.
        """
        factors = torch.zeros(len(self.coupled.owner))
        for place, (name, ids) in enumerate(self.channels.items()):
            own = torch.full((len(ids),), float(chosen[place]))
            if name in self.choice:
                own[~self.choice[name].cpu()] = float(kept[place])
            factors[self.coupled.number[ids]] = own
        by_weight = self.coupled.by_weight(factors.to(self.weights[0].device))
        return [by_weight[name] for name in self.coupled.weights]

    def as_choices(self) -> Choices:
        """What is chosen, as outputs of the layers that produce the channels, and of selections of
        channels, by the name of the weight or index."""
        graph = self.coupled.graph
        gone = torch.zeros(len(graph.canonical), dtype=torch.bool)
        for name, choice in self.choice.items():
            gone[self.channels[name][choice.cpu()]] = True
        found: Choices = {}
        for name, ids in graph.output_ids().items():
            layer = graph.layers.get(name)
            if bool(gone[ids].any()) and not (layer and layer.depthwise()):
                shape = [-1, *[1] * (self.coupled.weights[layer.weight].dim() - 1)] if layer else -1
                found[layer.weight if layer else name] = gone[ids].view(shape)
        return found

    @torch.no_grad()
    def _scores(self) -> Tensor:
        """Mean |w| of all weights coupled to a channel, by canonical id; 0 for locked channels."""
        mean = self.coupled.sums(torch.abs).cpu() / self._sizes
        return torch.cat((mean, mean.new_zeros(1)))[self.coupled.number]

    def unit_scores(self) -> dict[str, Tensor]:
        """Mean magnitude of the weights of every unit, by name, (units,)."""
        scores = self._scores()
        units = self.coupled.graph.units(scores)[0]
        return {name: scores[units[place].ids].mean(1) for place, name in self._names.items()}

    def _chosen(self, pick: choices.Pick, seed: int) -> Choices:
        scores = self._scores()
        chosen = choices.pick_scores_by_layer(
            {name: scores[ids] for name, ids in self.channels.items()}, pick, seed
        )
        by_id = torch.zeros(len(scores))
        for name, ids in self.channels.items():
            by_id[ids] = chosen[name].to(by_id.dtype)
        found: Choices = {}
        for place, unit in enumerate(self.coupled.graph.units(by_id)[0]):
            if name := self._names.get(place, ""):
                order = by_id[unit.ids].mean(1).argsort(stable=True)
                gone = unit.ids[order[: self.numbers[name]]].flatten()
                found[name] = torch.isin(self.channels[name], gone)
        return found


def pruned_units(
    model: nn.Module, settings: GrowthSettings, shape: Sequence[int] | None
) -> PrunedUnits | PrunedChannels:
    """The units to be pruned, at the granularity of the settings; `shape` is that of one image."""
    if settings.granularity == "group":
        return PrunedChannels(model, settings, shape)
    return PrunedUnits(model, settings, settings.granularity)


class GrowingPenalty:
    """The schedule that both methods share; they differ in `grow` and `ends`.

    Factors and averages are tensors with one entry for each layer of `pruned`.
    """

    max_steps = 0
    """Most steps that the schedule can take; set by the subclass, which knows the growth."""

    def __init__(
        self,
        model: nn.Module,
        settings: GrowthSettings,
        decay: float,
        name: str,
        shape: Sequence[int] | None,
    ) -> None:
        """`decay` is the growth of a factor at each update; `name` is the name of the penalty, for
        messages; `shape` is the shape of one image.

        Raises ArgumentError unless `decay` is above 0, and for ratios that do not fit the network.
        """
        if not decay > 0:
            raise ArgumentError(
                "decay",
                f"penalty {name} grows its factors by it, so it must be greater than 0",
                decay,
            )
        self.settings, self.growth = settings, decay
        self.pruned = pruned_units(model, settings, shape)
        self.phase, self.since, self.steps, self.updates = GROWING, 0, 0, 0
        """`since`: the step at which stabilising began."""
        count = len(self.pruned.names)
        self.trace = trace.Trace((3, count))
        """Factor, mean |w| of kept and of chosen units, by layer."""
        self.factor, self.kept_factor = torch.zeros(count), torch.zeros(count)
        """Factors of the chosen and of the kept units."""
        self.average = torch.zeros(count, dtype=torch.float64)
        """Exponential average of the magnitude ratios over the updates."""
        self.active = torch.ones(count, dtype=torch.bool)
        """Layers whose factor still grows."""
        self._expanded: list[Tensor] = []

    def grow(self) -> None:
        """Raise `self.factor` and `self.kept_factor`."""
        raise NotImplementedError

    def ends(self) -> Tensor:
        """bool: layers whose growth ends now."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether the steps with constant factors are over."""
        done = self.steps - 1 - self.since
        return self.phase == STABILISING and done >= self.settings.stabilise

    def __call__(self, step: int) -> Tensor:
        """Half the sum of factor * w^2 at this step, a scalar."""
        if self.phase < STABILISING and step % self.settings.interval == 0:
            self._update(step)
        elif not self._expanded:  # resumed
            self._expanded = self.pruned.expand(self.factor, self.kept_factor)
        if step % self.trace_interval == 0:
            self.trace.add(step, self._point())
        self.steps = step + 1
        total: Tensor = _HalfSquares.apply(self._expanded, *self.pruned.weights)
        return total

    def metrics(self) -> dict[str, float]:
        """Phase from 0 (picking) to 3 (finished), largest factor, number of layers whose units are
        chosen, and the magnitude ratio (kept over chosen), of each layer and as a mean."""
        ratios = self.pruned.magnitude_ratios()
        layers = [name.removesuffix(".weight") for name in self.pruned.names]
        return {
            "phase": float(FINISHED if self.finished else self.phase),
            "factor": float(self.factor.max()),
            "layers_chosen": float(len(self.pruned.choice)),
            "magnitude_ratio": float(ratios.mean()),
            **{f"magnitude_ratio/{n}": float(r) for n, r in zip(layers, ratios, strict=True)},
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""
        return {
            "clock": torch.tensor([self.phase, self.since, self.steps, self.updates]),
            "factor": self.factor,
            "kept_factor": self.kept_factor,
            "average": self.average,
            "active": self.active,
            **self.trace.state_dict(),
            **{f"choice/{name}": choice for name, choice in self.pruned.choice.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; ValueError if it is the state of another network."""
        for name, own in self.state_dict().items():
            found = state.get(name)
            if not name.startswith(("trace.", "choice/")) and (
                found is None or found.shape != own.shape or found.dtype != own.dtype
            ):
                raise ValueError(f"penalty: {name} does not fit")
        chosen = with_prefix(state, "choice/")
        if unknown := sorted(chosen.keys() - set(self.pruned.names)):
            raise ValueError(f"penalty: no weight {cut(unknown[0])}")
        self.phase, self.since, self.steps, self.updates = map(int, state["clock"].tolist())
        self.factor, self.kept_factor = state["factor"].clone(), state["kept_factor"].clone()
        self.average, self.active = state["average"].clone(), state["active"].clone()
        self.trace.load_state_dict(state)
        self.pruned.choice = {name: choice.clone() for name, choice in chosen.items()}
        self._expanded = []

    def choices(self) -> Choices:
        """What is to be pruned, by the weight's parameter name; see sparsity/choices.py."""
        return self.pruned.as_choices()

    def trace_table(self) -> list[dict[str, float]]:
        """A row for each point of the trace and one for the end: magnitudes by layer and over all
        layers, and the largest factor."""
        rows: list[dict[str, float]] = []
        for step, point in [*self.trace.points, (self.steps, self._point())]:
            factor, kept, chosen = point.double()
            row = {"step": float(step), "factor": float(factor.max())}
            row |= {"kept": float(kept.mean()), "chosen": float(chosen.mean())}
            for name, of_kept, of_chosen in zip(self.pruned.names, kept, chosen, strict=True):
                layer = name.removesuffix(".weight")
                row |= {f"kept {layer}": float(of_kept), f"chosen {layer}": float(of_chosen)}
            rows.append(row)
        return rows

    @property
    def trace_interval(self) -> int:
        """Steps from one point of the trace to the next."""
        return trace.interval(self.max_steps)

    @property
    def separated(self) -> Tensor:
        """Layers that have reached `magnitude_ratio`; none with granularity weight."""
        if self.settings.granularity == "weight":
            return torch.zeros_like(self.active)
        return self.average >= self.settings.magnitude_ratio

    @property
    def over_ceiling(self) -> Tensor:
        """Layers whose factor exceeds the ceiling."""
        return self.factor > self.settings.ceiling

    def steps_for(self, updates: int) -> int:
        """Steps of a schedule with this number of updates, the first at step 0."""
        return (updates - 1) * self.settings.interval + 1 + self.settings.stabilise

    def _update(self, step: int) -> None:
        """One growth of the factors; the last one begins the stabilising phase."""
        if self.settings.granularity != "weight":
            now = self.pruned.magnitude_ratios()
            self.average = 0.9 * self.average + 0.1 * now if self.updates else now
        self.updates += 1
        self.grow()
        self.active &= ~self.ends()
        if not bool(self.active.any()):
            self.phase, self.since = STABILISING, step
        self._expanded = self.pruned.expand(self.factor, self.kept_factor)

    def _point(self) -> Tensor:
        """Factor and magnitudes of every layer: (3, layers)."""
        means = self.pruned.magnitudes()
        return torch.stack([self.factor, *(part.float() for part in means)])


class _HalfSquares(torch.autograd.Function):
    """Half the sum of factor * w^2 over tensors; the products factor * w are the gradients."""

    @staticmethod
    def forward(ctx: Any, factors: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = torch._foreach_mul(weights, factors)
        products = torch._foreach_mul(ctx.gradients, weights)
        return 0.5 * torch.stack([product.sum() for product in products]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        torch._foreach_mul_(ctx.gradients, upstream)
        return None, *ctx.gradients


def updates_until(limit: float, growth: float, start: float = 0.0, *, reach: bool = False) -> int:
    """Number of additions of `growth` that bring a float32 from `start` above `limit`, at least 1.

    With `reach`, the sum may also equal the limit. Raises ValueError if the limit is never reached
    because the growth is lost in rounding.
    """
    rough = max((limit - start) / growth, 0.0)
    if rough < 2**24:  # beyond, adding no longer changes a float32
        sums = np.full(int(rough * 1.01) + 3, growth, np.float32)
        sums[0] += np.float32(start)
        sums = np.add.accumulate(sums)
        reached = sums >= np.float32(limit) if reach else sums > np.float32(limit)
        if reached.any():
            return int(reached.argmax()) + 1
    raise ValueError(f"{limit:g} is out of reach in steps of {growth:g}")


def grown(count: int, growth: float) -> float:
    """The float32 result of adding `growth` to 0 `count` times."""
    return float(np.add.accumulate(np.full(count, growth, np.float32))[-1])
