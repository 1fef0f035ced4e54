"""A target for what is left of a network, in place of a ratio, reached by bisection.

`target: {macs: 0.5}` leaves half of the multiply-accumulates (MACs) of the network that is pruned,
`target: {params: 0.3}` three tenths of its parameters. Single weights that the decision masks count
as removed; weights that were zero before do not. `target: {bytes: 0.3}` leaves three tenths of the
bytes of all parameters and buffers, of which masked weights take as many as others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.base.sections import Strict
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
    """The share of the network that is to be left, of MACs, of parameters or of bytes."""

    macs: Share | None = None
    """Of the multiply-accumulates of convolutions and linear layers."""
    params: Share | None = None
    """Of all parameters."""
    bytes: Share | None = None
    """Of the parameters and buffers as a checkpoint stores them, masked weights included."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if len(self._given) != 1:
            raise ValueError(
                "macs: one of macs, params and bytes is needed, the share that is left"
            )
        return self

    @property
    def _given(self) -> list[tuple[str, float]]:
        shares = {"macs": self.macs, "params": self.params, "bytes": self.bytes}
        return [(kind, share) for kind, share in shares.items() if share is not None]

    @property
    def wanted(self) -> tuple[str, float]:
        """`macs`, `params` or `bytes`, and the share."""
        return self._given[0]

    def __str__(self) -> str:
        """As in params.yaml."""
        kind, share = self.wanted
        return f"{{{kind}: {share:g}}}"


class RemainingShare:
    """The share of a network that a decision leaves, found without removing anything."""

    def __init__(self, context: PruningContext) -> None:
        """Runs the network on one image."""
        self.context = context
        model = context.model
        device = next(model.parameters()).device
        self.positions = cost.output_positions(model, context.images[:1].to(device))
        self.weights = masks.prunable(model, "weights")
        self.macs = sum(
            weight.numel() * self.positions[name.removesuffix(".weight")]
            for name, weight in self.weights.items()
        )
        self.params = cost.parameters(model)
        self.parameters = dict(model.named_parameters())
        stored = model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in reversed(stored.items())}  # the first name
        self.tensors: dict[str, Tensor] = {name: stored[name] for name in names.values()}
        self.bytes = sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __call__(self, decision: PruningDecision) -> dict[str, float]:
        """Shares of `macs`, `params` and `bytes` that are left."""
        macs, params, size = self.macs, self.params, self.bytes
        kept = self._kept(decision)
        for name, mask in kept.items():
            size -= self._lost(name, mask) * self.tensors[name].element_size()
        for name, mask in decision.masks.items():
            kept[name] = mask.cpu() & kept[name] if name in kept else mask.cpu()
        for name, mask in kept.items():
            if name not in self.parameters:
                continue
            lost = self._lost(name, mask)
            params -= lost
            if name in self.weights:
                macs -= lost * self.positions[name.removesuffix(".weight")]
        shares = {"macs": macs / self.macs, "params": params / self.params}
        return shares | {"bytes": size / self.bytes}

    def _lost(self, name: str, mask: Tensor) -> int:
        """Number of entries of a tensor for which a mask is False."""
        count = self.tensors[name].numel()
        return count - int(mask.sum()) * (count // mask.numel())

    def _kept(self, decision: PruningDecision) -> dict[str, Tensor]:
        """Masks, broadcastable, of the tensors that have members of removed channels."""
        kept: dict[str, Tensor] = {}
        for name, chosen in decision.channels.items():
            for member in self.context.graph.group(name).members:
                tensor = self.tensors.get(member.tensor)
                if tensor is None:  # a buffer that checkpoints do not hold
                    continue
                entries = torch.ones(tensor.shape[member.axis] * member.groups, dtype=torch.bool)
                entries[member.index[chosen.cpu()].flatten()] = False
                mask = _along_axis(entries, tensor, member.axis, member.groups)
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
