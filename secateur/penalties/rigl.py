"""RigL: a sparse network whose connections move while it trains; with random growth, SET.

Source: U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, Rigging the lottery: making all tickets
winners, ICML 2020, algorithm 1. The number of kept weights of every layer is constant from the
first step on. Every `interval` steps, before step T = `until`, each layer drops the share a / 2 *
(1 + cos(pi * t / T)) of its weights, those of the smallest magnitude. It then grows as many weights
at the pruned positions with the largest gradient. A weight that was just dropped may be grown again
and then keeps its value; other grown weights start at zero, with their optimizer state reset. Here
the optimizer also takes its step at an update; in the source it does not.

`allocation` determines the kept share of each layer. erk (equation in section 3, after D. Mocanu et
al., 2018): in proportion to (inputs + outputs + height + width of the kernel) / (inputs * outputs *
height * width), at most 1, such that the network as a whole has the required density. Where the
training holds masks, a layer keeps at most what its mask allows, and the others keep more instead.

SET: D. Mocanu et al., Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science, Nature Communications, 2018: weights grow at random.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base.errors import ArgumentError
from secateur.base.sections import Seed, Share, StepsOrShare
from secateur.penalties._shared import trace
from secateur.penalties._shared.dynamic import (
    DynamicSparsityPenalty,
    DynamicSparsitySettings,
    check_end,
)
from secateur.sparsity import masks
from secateur.sparsity.choices import choose_smallest
from secateur.sparsity.layer_ratios import layers_left
from secateur.sparsity.ratios import Skip
from secateur.training.penalty import TrainingPlan


class Settings(DynamicSparsitySettings):
    """How sparse the network is, and how its connections move."""

    ratio: Share = 0.9
    """Share of the weights that is pruned, over all layers that are not skipped."""
    allocation: Literal["erk", "uniform"] = "erk"
    """erk: small layers keep a larger share; uniform: every layer keeps the same share."""
    initial: Literal["magnitude", "random"] = "magnitude"
    """Which weights are kept at the start: the largest, or random ones as in the source."""
    growth: Literal["gradient", "random"] = "gradient"
    """Where weights grow; random: SET."""
    fraction: Share = 0.3
    """a: share of the weights of a layer that moves at first; it decays along half a cosine."""
    interval: Annotated[StepsOrShare, Field(gt=0)] = 100
    """Steps, or below 1 a share of the training, from one update to the next."""
    until: StepsOrShare = 0.75
    """No connection moves after this many steps, or below 1 this share of the training; 0: no
    connection ever moves."""
    skip: Skip = ()
    """Layers that stay dense: names, or stage.block."""
    seed: Seed = 0
    """Seed of all random choices."""


def build(settings: Settings, model: nn.Module, decay: float) -> DynamicSparsityPenalty:
    """The sparse training of this model; `decay` is the strength of the norm in the loss.

    Raises ArgumentError if a name under `skip` matches no layer, or if all layers are skipped.
    """
    return RigL(settings, model, decay)


def erdos_renyi_kernel(
    shapes: Mapping[str, torch.Size], density: float, caps: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Share of the weights that each layer keeps, by ERK; `density` is that of the whole network.

    `shapes` are the shapes of weights: (outputs, inputs) or (filters, channels, height, width).
    Layers whose share would exceed their cap, by default 1, keep the cap, and the others share the
    remaining weights.
    """
    raw = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
    return _in_proportion(raw, shapes, density, caps or {})


def uniform(
    shapes: Mapping[str, torch.Size], density: float, caps: Mapping[str, float]
) -> dict[str, float]:
    """The same share for each layer, except for those whose cap is lower; see ERK."""
    if all(cap >= density for cap in caps.values()):
        return dict.fromkeys(shapes, density)
    return _in_proportion(dict.fromkeys(shapes, 1.0), shapes, density, caps)


def _in_proportion(
    raw: Mapping[str, float],
    shapes: Mapping[str, torch.Size],
    density: float,
    caps: Mapping[str, float],
) -> dict[str, float]:
    """Shares in proportion to `raw`, at most the caps, that give the density if the caps allow."""
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    limits = {name: caps.get(name, 1.0) for name in shapes}
    full: set[str] = set()
    while len(full) < len(shapes):
        others = [name for name in shapes if name not in full]
        left = density * sum(sizes.values()) - sum(limits[name] * sizes[name] for name in full)
        scale = left / sum(raw[name] * sizes[name] for name in others)
        above = {name for name in others if scale * raw[name] > limits[name]}
        if not above:
            return {name: limits[name] if name in full else scale * raw[name] for name in shapes}
        full |= above
    return limits


class RigL(DynamicSparsityPenalty):
    """Masks that keep a constant number of weights in each layer."""

    def __init__(self, settings: Settings, model: nn.Module, decay: float) -> None:
        layers = masks.layers(model)
        held = {f"{name}.weight": layers[name].weight for name in layers_left(model, settings.skip)}
        super().__init__(model, "rigl", settings.norm, decay, held)
        self.settings = settings
        self.numbers: dict[str, int] = {}
        """Name of a weight -> number of its entries that are kept; known from `start` on."""
        self.allowed: dict[str, Tensor] = {}
        """For weights with a mask that the training holds: True where an entry may be kept."""
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def start(self, plan: TrainingPlan) -> None:
        """Choose the weights to start from. ArgumentError if the training has no step, or ends
        before the first connection would move."""
        check_end(0, plan, self.name)
        self.interval = max(1, plan.in_steps(self.settings.interval))
        self.until = plan.in_steps(self.settings.until)
        end = min(self.until, plan.steps)
        if self.settings.until and self.interval >= end:
            raise ArgumentError(
                "penalties.rigl.interval",
                f"connections would move every {self.interval:,} steps, and none after step "
                f"{end:,} of {plan.steps:,}; allowed: fewer steps than that, more epochs, "
                "a later until, or until = 0, with which none moves at all",
                self.settings.interval,
            )
        updates = -(-self.until // self.interval)
        self.trace_interval = trace.interval(updates)
        own = {name: plan.masks[name] for name in self.held if name in plan.masks}
        self.allowed = {name: mask.to(self.held[name].device) for name, mask in own.items()}
        self.numbers = self._numbers()
        chance = torch.Generator().manual_seed(self.settings.seed)
        for name, weight in self.held.items():
            if self.settings.initial == "random":
                score = torch.rand(weight.shape, generator=chance).to(weight.device)
            else:
                score = weight.detach().abs()
            self.choice[name] = ~self._highest(name, score, self.numbers[name])
        self.refresh()
        self.mask()

    def _numbers(self) -> dict[str, int]:
        """How many entries of each weight are kept, by the allocation; no more than are allowed."""
        shapes = {name: weight.shape for name, weight in self.held.items()}
        allowed = {name: int(mask.sum()) for name, mask in self.allowed.items()}
        caps = {name: number / shapes[name].numel() for name, number in allowed.items()}
        allocate = erdos_renyi_kernel if self.settings.allocation == "erk" else uniform
        shares = allocate(shapes, 1 - self.settings.ratio, caps)
        numbers = {n: max(1, round(shares[n] * shape.numel())) for n, shape in shapes.items()}
        return {name: min(number, allowed.get(name, number)) for name, number in numbers.items()}

    def due(self, step: int) -> bool:
        """At regular intervals, not at the first step."""
        return 0 < step < self.until and step % self.interval == 0

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Mask the gradients; before an update, store all of them, to know where to grow."""
        found = self.gradients(self.held)
        if self.due(step) and self.settings.growth == "gradient":
            self._gradients = [gradient.abs() for gradient in found]
        torch._foreach_mul_(found, self.keep)

    def update(self, step: int, optimizer: Optimizer) -> None:
        """Drop some weights in each layer, and grow the same number."""
        share = self.settings.fraction / 2 * (1 + math.cos(math.pi * step / self.until))
        seed = self.settings.seed * 1_000_003 + self.updates + 1
        chance = torch.Generator().manual_seed(seed)
        for place, (name, weight) in enumerate(self.held.items()):
            kept = ~self.choice[name]
            number = int(share * self.numbers[name])
            size = weight.detach().abs().masked_fill(~kept, torch.inf)
            stays = kept & ~choose_smallest(size, number)
            if self.settings.growth == "random":
                score = torch.rand(weight.shape, generator=chance).to(weight.device)
            else:
                score = self._gradients[place]
            grown = self._highest(name, score.masked_fill(stays, -torch.inf), number)
            self.choice[name] = ~(stays | grown)
            _forget(optimizer, weight, grown & ~kept)
        self._gradients = []

    def _highest(self, name: str, score: Tensor, number: int) -> Tensor:
        """True at the entries with the highest scores among those that may be kept."""
        if name in self.allowed:
            score = score.masked_fill(~self.allowed[name], -torch.inf)
        return choose_smallest(-score, number)


def _forget(optimizer: Optimizer, weight: Tensor, entries: Tensor) -> None:
    """Set the optimizer state of these entries to zero."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(entries, 0.0)
