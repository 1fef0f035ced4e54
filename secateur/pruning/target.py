"""A target for what is left of a network, in place of a ratio, reached by bisection.

`target: {macs: 0.5}` leaves half of the multiply-accumulates (MACs) of the network that is pruned,
`target: {params: 0.3}` three tenths of its parameters. Single weights that the decision masks count
as removed; weights that were zero before do not.
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

MAX_BISECTIONS = 30
TOLERANCE = 1e-5
"""A share this close to the target ends the bisection."""
HIGHEST_RATIO = 1 - 1e-6
"""The highest ratio that is tried."""

Share = Annotated[float, Field(gt=0, lt=1)]


class Target(Strict):
    """The share of the network that is to be left, of MACs or of parameters."""

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
        """`macs` or `params`, and the share."""
        if self.macs is not None:
            return "macs", self.macs
        assert self.params is not None
        return "params", self.params


class RemainingShare:
    """The share of a network that a decision leaves, found without removing anything."""

    def __init__(self, context: PruningContext) -> None:
        """Runs the network on one image."""
        self.context = context
        model = context.model
        device = next(model.parameters()).device
        self.positions = cost.output_positions(model, context.images[:1].to(device))
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
        for name, mask in kept.items():
            parameter = self.context.model.get_parameter(name)
            lost = parameter.numel() - int(mask.sum()) * (parameter.numel() // mask.numel())
            params -= lost
            if name in self.weights:
                macs -= lost * self.positions[name.removesuffix(".weight")]
        return {"macs": macs / self.macs, "params": params / self.params}

    def _kept(self, decision: PruningDecision) -> dict[str, Tensor]:
        """Masks, broadcastable, of the parameters that have members of removed channels."""
        kept: dict[str, Tensor] = {}
        for name, chosen in decision.channels.items():
            for member in self.context.graph.group(name).members:
                if member.kind in ("statistic", "index"):
                    continue
                parameter = self.context.model.get_parameter(member.tensor)
                entries = torch.ones(parameter.shape[member.axis] * member.groups, dtype=torch.bool)
                entries[member.index[chosen.cpu()].flatten()] = False
                mask = _along_axis(entries, parameter, member.axis, member.groups)
                before = kept.get(member.tensor)
                kept[member.tensor] = mask if before is None else before & mask
        return kept


def _along_axis(entries: Tensor, parameter: Tensor, axis: int, groups: int) -> Tensor:
    """Entries of an axis in a shape that broadcasts; for `groups` see `by_channel`."""
    if groups > 1:  # inputs over all groups of a convolution -> (outputs, inputs of a group)
        outputs = parameter.shape[0]
        rows = entries.view(groups, 1, -1).expand(groups, outputs // groups, -1)
        return rows.reshape(outputs, -1, *[1] * (parameter.dim() - 2))
    shape = [1] * parameter.dim()
    shape[axis] = -1
    return entries.view(shape)


@dataclass(frozen=True)
class Solution:
    """The decision that comes closest to a target."""

    decision: PruningDecision
    ratio: float
    """The ratio that leads to it."""


def solve(
    decide: Callable[[float], PruningDecision], target: Target, context: PruningContext
) -> Solution:
    """The ratio from 0 to 1 whose decision leaves a share that is closest to the target.

    `decide` must not remove less for a higher ratio. The notes of the decision get the share asked
    for and the share reached. Raises PruningError if the highest ratio leaves more than the target.
    """
    kind, wanted = target.wanted
    remaining = RemainingShare(context)
    low, high = (0.0, decide(0.0)), (HIGHEST_RATIO, decide(HIGHEST_RATIO))
    shares = {ratio: remaining(decision)[kind] for ratio, decision in (low, high)}
    if shares[HIGHEST_RATIO] > wanted:
        raise PruningError(
            f"target.{kind} = {wanted:g} cannot be reached: with the highest ratio that the "
            f"settings allow, {shares[HIGHEST_RATIO]:.4f} is left. Prune more layers, or ask for "
            "more to be left"
        )
    best = min((low, high), key=lambda found: abs(shares[found[0]] - wanted))
    for _ in range(MAX_BISECTIONS):
        if abs(shares[best[0]] - wanted) <= TOLERANCE or shares[low[0]] == shares[high[0]]:
            break
        middle = (low[0] + high[0]) / 2
        found = (middle, decide(middle))
        shares[middle] = remaining(found[1])[kind]
        if abs(shares[middle] - wanted) < abs(shares[best[0]] - wanted):
            best = found
        low, high = (found, high) if shares[middle] > wanted else (low, found)
    ratio, decision = best
    notes = {f"{kind}_left_asked": wanted, f"{kind}_left_reached": shares[ratio]}
    return Solution(replace(decision, notes={**decision.notes, **notes}), ratio)
