"""A target for the remaining size of a network, in place of a ratio, reached by bisection.

`target: {macs: 0.5}` leaves half of the multiply-accumulates (MACs) of the network that is pruned,
`target: {params: 0.3}` three tenths of its parameters; with `of: dense`, these are shares of the
dense network. Single weights count as removed if the decision masks them, or if they were masked
before; other weights that are zero do not. `target: {bytes: 0.3}` leaves three tenths of the bytes
of all parameters and buffers, where masked weights take as many bytes as others.
`target: {latency: 0.5}` leaves half of the time of a forward pass, predicted from measured layers
(pruning/latency.py), where only whole channels count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from secateur.base.errors import ArgumentError, PruningError
from secateur.base.sections import Share, Strict
from secateur.nn import cost
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.pruning.latency import LatencyTable, widths_left
from secateur.sparsity import masks

MAX_BISECTIONS = 30
TOLERANCE = 1e-5
"""A share this close to the target ends the bisection."""
HIGHEST_RATIO = 1 - 1e-6
"""The highest ratio that is tried."""


class Target(Strict):
    """The share of the network's MACs, parameters, bytes or latency that pruning leaves."""

    macs: Share | None = None
    """Share of the multiply-accumulates of convolutions and linear layers."""
    params: Share | None = None
    """Share of all parameters."""
    bytes: Share | None = None
    """Share of the bytes of parameters and buffers in a checkpoint, masked weights included."""
    latency: Share | None = None
    """Share of the time of a forward pass, predicted for the runtime that was measured."""
    of: Literal["given", "dense"] = "given"
    """What the share refers to: the network that is pruned, without the branches of
    prune.branches, or the dense network that it comes from. They differ from the second round on,
    and where branches are removed."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if len(self._given) != 1:
            raise ValueError(
                "macs: one of macs, params, bytes and latency is needed, the share that is left"
            )
        return self

    @property
    def _given(self) -> list[tuple[str, float]]:
        kinds = [kind for kind in type(self).model_fields if kind != "of"]
        shares = [(kind, getattr(self, kind)) for kind in kinds]
        return [(kind, share) for kind, share in shares if share is not None]

    @property
    def wanted(self) -> tuple[str, float]:
        """The kind (`macs`, `params`, `bytes` or `latency`) and the share."""
        return self._given[0]

    def __str__(self) -> str:
        """The target in the notation of params.yaml."""
        kind, share = self.wanted
        return f"{{{kind}: {share:g}{', of: dense' if self.of == 'dense' else ''}}}"


class RemainingShare:
    """The share of a network that a decision leaves, found without removing anything."""

    def __init__(self, context: PruningContext, dense: nn.Module | None = None) -> None:
        """Runs the network on one image. Shares refer to `dense` if given, else to the network.

        Raises PruningError for a latency table of another network or of images of another size.
        """
        self.context = context
        model = context.model
        device = next(model.parameters()).device
        self.positions = cost.output_positions(model, context.images[:1].to(device))
        if context.latency is not None:
            context.latency.check_positions(self.positions)
        self.weights = masks.prunable(model, "weights")
        self.parameters = dict(model.named_parameters())
        stored = model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in reversed(stored.items())}  # the first name
        self.tensors: dict[str, Tensor] = {name: stored[name] for name in names.values()}
        self.whole: dict[str, float] = self._left(PruningDecision())
        """MACs, parameters, bytes and milliseconds of the network that shares refer to."""
        if dense is not None:
            self.whole = RemainingShare(PruningContext(dense, context.images)).whole
            if context.latency is not None:
                self.whole["latency"] = context.latency.networks[0].ms

    def __call__(self, decision: PruningDecision) -> dict[str, float]:
        """Remaining shares of `macs`, `params`, `bytes` and, with a latency table, `latency`."""
        return {kind: count / self.whole[kind] for kind, count in self._left(decision).items()}

    def _left(self, decision: PruningDecision) -> dict[str, float]:
        """MACs, parameters, bytes and milliseconds that a decision leaves."""
        kept = self._kept(decision)
        mask = masks.joined(decision.masks, self.context.masks)
        macs, params, size = 0, 0, 0
        for name, tensor in self.tensors.items():
            own = kept.get(name, _KeptEntries({}))
            stays = own.count(tensor)
            size += stays * tensor.element_size()
            if name not in self.parameters:
                continue
            if name in mask:
                stays = int((own.mask(tensor) & mask[name].cpu()).sum())
            params += stays
            if name in self.weights:
                macs += stays * self.positions.get(name.removesuffix(".weight"), 0)
        left: dict[str, float] = {"macs": macs, "params": params, "bytes": size}
        if self.context.latency is not None:
            left["latency"] = self._time(self.context.latency, decision)
        return left

    def _time(self, table: LatencyTable, decision: PruningDecision) -> float:
        """Predicted milliseconds of a forward pass without the decision's channels."""
        return table.time(widths_left(self.context.graph, decision.channels))

    def _kept(self, decision: PruningDecision) -> dict[str, "_KeptEntries"]:
        """The kept entries of tensors that have members of removed channels."""
        kept: dict[str, _KeptEntries] = {}
        for name, chosen in decision.channels.items():
            for member in self.context.graph.group(name).members:
                tensor = self.tensors.get(member.tensor)
                if tensor is None:  # a buffer that checkpoints do not hold
                    continue
                along = kept.setdefault(member.tensor, _KeptEntries({})).along
                key = (member.axis, member.groups)
                if key not in along:
                    count = tensor.shape[member.axis] * member.groups
                    along[key] = torch.ones(count, dtype=torch.bool)
                along[key][member.index[chosen.cpu()].flatten()] = False
        return kept


@dataclass(frozen=True)
class _KeptEntries:
    """The entries of a tensor that are kept, by axis."""

    along: dict[tuple[int, int], Tensor]
    """Axis and number of groups (see `by_channel`) -> bool, (entries,)."""

    def count(self, tensor: Tensor) -> int:
        """Number of entries that are kept: the product over the axes."""
        number, axes = tensor.numel(), dict(self.along)
        for axis, groups in self.along:
            if groups > 1:  # counted for each group of a convolution separately
                whole = torch.ones(tensor.shape[0], dtype=torch.bool)
                outputs = axes.pop((0, 1), whole).view(groups, -1).sum(1)
                inputs = axes.pop((axis, groups)).view(groups, -1).sum(1)
                number //= tensor.shape[0] * tensor.shape[axis]
                number *= int((inputs * outputs).sum())
        for (axis, _), entries in axes.items():
            number = number // tensor.shape[axis] * int(entries.sum())
        return number

    def mask(self, tensor: Tensor) -> Tensor:
        """True where the entry is kept, in a shape that broadcasts to the tensor's."""
        found = torch.ones([1] * tensor.dim(), dtype=torch.bool)
        for (axis, groups), entries in self.along.items():
            shape = [1] * tensor.dim()
            if groups > 1:  # inputs over all groups of a convolution -> (outputs, inputs of one)
                outputs = tensor.shape[0]
                rows = entries.view(groups, 1, -1).expand(groups, outputs // groups, -1)
                found = found & rows.reshape(outputs, -1, *shape[2:])
            else:
                shape[axis] = -1
                found = found & entries.view(shape)
        return found


@dataclass(frozen=True)
class Solution:
    """The decision that comes closest to a target."""

    decision: PruningDecision
    ratio: float
    """The ratio of this decision."""


def solve(
    decide: Callable[[float], PruningDecision], target: Target, context: PruningContext
) -> Solution:
    """The ratio from 0 to 1 whose decision leaves the share closest to the target.

    `decide` must not remove less for a higher ratio. The requested and the reached share are added
    to the notes of the decision. Raises PruningError if the highest ratio leaves more than the
    target.
    """
    kind, wanted = target.wanted
    check_latency(target, context)
    if target.of == "dense" and context.dense is None:
        raise ArgumentError("target.of", "the dense network is known in the pipeline only", "dense")
    remaining = RemainingShare(context, context.dense if target.of == "dense" else None)
    known: dict[int, tuple[PruningDecision, float]] = {}

    def share_left(decision: PruningDecision) -> float:
        """Share that a decision leaves; cached for decisions with the same `channels` object."""
        if decision.masks or id(decision.channels) not in known:
            known[id(decision.channels)] = decision, remaining(decision)[kind]
        return known[id(decision.channels)][1]

    low, high = (0.0, decide(0.0)), (HIGHEST_RATIO, decide(HIGHEST_RATIO))
    shares = {ratio: share_left(decision) for ratio, decision in (low, high)}
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
        shares[middle] = share_left(found[1])
        if abs(shares[middle] - wanted) < abs(shares[best[0]] - wanted):
            best = found
        low, high = (found, high) if shares[middle] > wanted else (low, found)
    ratio, decision = best
    notes = {f"{kind}_left_asked": wanted, f"{kind}_left_reached": shares[ratio]}
    return Solution(replace(decision, notes={**decision.notes, **notes}), ratio)


def solve_rounded(
    decide: Callable[[float, int], PruningDecision],
    target: Target,
    context: PruningContext,
    round_to: int | None,
) -> PruningDecision:
    """As `solve`, where `decide` takes a ratio and the multiple that widths are rounded up to.

    Without `round_to` the multiple is 1. For a latency target it is the multiple of the latency
    table or, if the target cannot be reached with it, the largest of its half, quarter, ... that
    reaches the target; the notes then have it as `round_to`.
    """
    check_latency(target, context)
    if round_to is not None or context.latency is None or target.latency is None:
        multiple = round_to or 1
        return solve(lambda ratio: decide(ratio, multiple), target, context).decision
    for multiple in _halves(context.latency.multiple):
        try:
            found = solve(lambda ratio, by=multiple: decide(ratio, by), target, context)  # type: ignore[misc]
        except PruningError:
            if multiple == 1:
                raise
        else:
            notes = {**found.decision.notes, "round_to": float(multiple)}
            return replace(found.decision, notes=notes)
    raise AssertionError("the last multiple is 1")


def _halves(multiple: int) -> Iterator[int]:
    """The multiple, its half, and so on down to 1."""
    while multiple >= 1:
        yield multiple
        multiple //= 2


def check_latency(target: Target, context: PruningContext) -> None:
    """Raise ArgumentError for a latency target without a table of measured layers."""
    if target.latency is not None and context.latency is None:
        raise ArgumentError(
            "target",
            "latency is predicted from a table of measured layers; name its runtime as "
            "prune.latency",
            str(target),
        )
