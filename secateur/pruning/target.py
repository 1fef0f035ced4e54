"""How much is to be left of a network, in place of a ratio: solved by bisection.

`target: {macs: 0.5}` leaves half of the multiply-accumulates of the network that is pruned,
`target: {params: 0.3}` three tenths of its parameters. Single weights that the decision takes count
as gone; those that were zero before do not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.base.settings import Strict
from secateur.nn import cost
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks

HALVINGS = 30
CLOSE = 1e-5
"""A share that is so near to what is wanted is as good as equal."""
MOST = 1 - 1e-6
"""The highest ratio that is tried."""

Share = Annotated[float, Field(gt=0, lt=1)]


class Target(Strict):
    """The share of the dense network that is left; one of the two."""

    macs: Share | None = None
    """Of the multiply-accumulates of convolutions and linear layers."""
    params: Share | None = None
    """Of all parameters."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.macs is None) == (self.params is None):
            raise ValueError("macs: one of macs and params is needed, the share that is left")
        return self

    @property
    def wanted(self) -> tuple[str, float]:
        """Which of them, and how much."""
        if self.macs is not None:
            return "macs", self.macs
        assert self.params is not None
        return "params", self.params


class Left:
    """Tells what a decision leaves of a network, without taking anything out of it."""

    def __init__(self, subject: PruningContext) -> None:
        """Puts one image through."""
        self.subject = subject
        model = subject.model
        place = next(model.parameters()).device
        self.positions = cost.output_positions(model, subject.images[:1].to(place))
        self.weights = {f"{n}.weight": layer.weight for n, layer in masks.layers(model).items()}
        self.macs = sum(
            weight.numel() * self.positions[name.removesuffix(".weight")]
            for name, weight in self.weights.items()
        )
        self.params = cost.parameters(model)

    def __call__(self, decision: PruningDecision) -> dict[str, float]:
        """Shares of `macs` and `params` that are left."""
        macs, params = self.macs, self.params
        kept = self._kept(decision)
        for name, mask in decision.masks.items():
            kept[name] = mask.cpu() & kept[name] if name in kept else mask.cpu()
        for name, stays in kept.items():
            parameter = self.subject.model.get_parameter(name)
            lost = parameter.numel() - int(stays.sum()) * (parameter.numel() // stays.numel())
            params -= lost
            if name in self.weights:
                macs -= lost * self.positions[name.removesuffix(".weight")]
        return {"macs": macs / self.macs, "params": params / self.params}

    def _kept(self, decision: PruningDecision) -> dict[str, Tensor]:
        """Which entries of parameters the channels leave: bool, broadcastable."""
        kept: dict[str, Tensor] = {}
        for name, chosen in decision.channels.items():
            for member in self.subject.graph.group(name).members:
                if member.kind in ("statistic", "index"):
                    continue
                parameter = self.subject.model.get_parameter(member.tensor)
                stays = torch.ones(parameter.shape[member.axis] * member.groups, dtype=torch.bool)
                stays[member.index[chosen.cpu()].flatten()] = False
                part = _spread(stays, parameter, member.axis, member.groups)
                before = kept.get(member.tensor)
                kept[member.tensor] = part if before is None else before & part
        return kept


def _spread(stays: Tensor, parameter: Tensor, axis: int, parts: int) -> Tensor:
    """Entries along an axis as they stand in the parameter; see `groups.by_channel` for parts."""
    if parts > 1:  # inputs over all groups of a convolution: (outputs, inputs of a group)
        rows = parameter.shape[0] // parts
        stays = stays.view(parts, 1, -1).expand(parts, rows, -1).reshape(parameter.shape[0], -1)
        return stays.view(*stays.shape, *[1] * (parameter.dim() - 2))
    shape = [1] * parameter.dim()
    shape[axis] = -1
    return stays.view(shape)


@dataclass(frozen=True)
class Solved:
    """The decision that comes nearest to a target."""

    decision: PruningDecision
    ratio: float
    """What it took."""


def solve(
    decide: Callable[[float], PruningDecision], target: Target, subject: PruningContext
) -> Solved:
    """The ratio from 0 to 1 whose decision leaves what is nearest to the target.

    `decide` takes away no less for a higher ratio. The decision's notes get what was asked and what
    is reached. Raises PruningError if the highest ratio leaves more than is wanted.
    """
    kind, wanted = target.wanted
    left = Left(subject)
    low, high = (0.0, decide(0.0)), (MOST, decide(MOST))
    shares = {ratio: left(decision)[kind] for ratio, decision in (low, high)}
    if shares[MOST] > wanted:
        raise PruningError(
            f"target.{kind} = {wanted:g} cannot be reached: with the highest ratio that the "
            f"settings allow, {shares[MOST]:.4f} is left. Prune more layers, or ask for more to be "
            "left"
        )
    best = min((low, high), key=lambda it: abs(shares[it[0]] - wanted))
    for _ in range(HALVINGS):
        if abs(shares[best[0]] - wanted) <= CLOSE or shares[low[0]] == shares[high[0]]:
            break
        middle = (low[0] + high[0]) / 2
        found = (middle, decide(middle))
        shares[middle] = left(found[1])[kind]
        if abs(shares[middle] - wanted) < abs(shares[best[0]] - wanted):
            best = found
        low, high = (found, high) if shares[middle] > wanted else (low, found)
    ratio, decision = best
    notes = {f"{kind}_left_asked": wanted, f"{kind}_left_reached": shares[ratio]}
    return Solved(replace(decision, notes={**decision.notes, **notes}), ratio)
