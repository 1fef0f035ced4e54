"""Channels out of a network, with proof that what is left computes the same.

A channel that was decided upon goes with all its members: the network without it computes what the
network with zeros in all of them computes. A channel that nobody decided upon goes if it is dead:
nobody reads it (all weights that read it are zero), or what is read of it is the same for every
input. What such a constant gives to a layer is added to that layer's bias, or taken off the running
mean of the batch normalisation behind it; where it is not the same at every position, as at a
border padded with zeros, or where there is no place for it, the channel stays.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.base.settings import Export
from secateur.channels.graph import ChannelGraph, Selection, build_channel_graph
from secateur.channels.groups import by_channel
from secateur.channels.planner import ShapePlan
from secateur.gconv import export as regroup
from secateur.nn import resizing as shapes
from secateur.nn.layers import ChannelSelect
from secateur.pruning.constants import Constants, Seen
from secateur.sparsity.masks import Masks


@dataclass(frozen=True)
class Compact:
    """A network without some of its channels, and what is left of each layer."""

    model: nn.Module
    masks: Masks
    kept: dict[str, Tensor]
    """Layer -> indices of the outputs that it still has, in their new order; a layer that is not
    named has all of them."""
    shift: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> what its outputs lack because it was folded behind it, (outputs,)."""

    def to(self, dtype: torch.dtype) -> "Compact":
        """The same in another precision; the network is changed in place."""
        shift = {name: tensor.to(dtype) for name, tensor in self.shift.items()}
        return replace(self, model=self.model.to(dtype), shift=shift)


def remove(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    masks: Masks | None = None,
    graph: ChannelGraph | None = None,
) -> Compact:
    """The network without the selected channels; `model` itself is left alone.

    It computes what `mask` gives. `example` is a batch of inputs, of which the shape matters;
    `network` spares following the model again. Raises PruningError as `Network.plan` does.
    """
    small = _twin(model)
    graph = graph or build_channel_graph(small, example)
    plan = graph.plan(selection)
    left = _cut(small, plan, masks or {}, {})
    return Compact(small, left, _kept(graph, plan))


def remove_dead(model: nn.Module, masks: Masks, example: Tensor) -> Compact:
    """The network without its dead channels; `model` itself is left alone.

    `example` is a batch of inputs, of which the shape matters. One channel of a dead layer is kept
    as long as the network's output depends on its input. Raises PruningError naming the first layer
    that has no living output if it does not, or if the network cannot be followed.
    """
    small = _twin(model)
    masks = {name: mask.clone() for name, mask in masks.items()}
    graph = build_channel_graph(small, example)
    dead = _Dead(small, graph, example.to(next(small.parameters()).device))
    selection = dead.selection()
    plan = graph.plan(selection)
    values, shift = dead.fold(graph.ids_of(selection), masks)
    left = _cut(small, plan, masks, values)
    shift = {name: tensor[plan.kept[name].to(tensor.device)] for name, tensor in shift.items()}
    return Compact(small, left, _kept(graph, plan), shift)


def compact(
    model: nn.Module,
    selection: Selection,
    masks: Masks,
    example: Tensor,
    dead: bool,
    export: Export = "none",
) -> Compact:
    """The network without the selected channels, and with `dead` without the dead ones too.

    In between its masks become what `export` says; see gconv/export.py.
    """
    first = remove(model, selection, example, masks)
    if export == "gconv":
        grouped = regroup.export(first.model, first.masks, example)
        order = {n: first.kept[n][i] if n in first.kept else i for n, i in grouped.kept.items()}
        first = Compact(grouped.model, grouped.masks, first.kept | order)
    if not dead:
        return first
    second = remove_dead(first.model, first.masks, example)
    kept = {name: index[second.kept.get(name, slice(None))] for name, index in first.kept.items()}
    return replace(second, kept=second.kept | kept)


@torch.no_grad()
def mask(
    model: nn.Module, selection: Selection, example: Tensor, graph: ChannelGraph | None = None
) -> nn.Module:
    """A copy of the network with zeros in all members of the selected channels."""
    masked = copy.deepcopy(model)
    silence(masked, selection, graph or build_channel_graph(masked, example))
    return masked


@torch.no_grad()
def silence(model: nn.Module, selection: Selection, graph: ChannelGraph) -> None:
    """Zeros in all members of the selected channels, in place; `network` is the model's."""
    gone = torch.zeros(len(graph.canonical), dtype=torch.bool)
    gone[graph.ids_of(selection)] = True
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, chosen in selection.items():
        for member in graph.group(name).members:
            if member.kind not in ("statistic", "index"):
                tensor = tensors[member.tensor]
                entries = member.index[chosen.cpu()].flatten().to(tensor.device)
                _set_zero(tensor, member.axis, member.groups, entries)
    for name, select in graph.selects.items():
        if select.owns_channels:
            taken = graph.canonical[select.inputs[select.index]]
            lost = gone[taken] | gone[graph.canonical[select.outputs]]
            layer = model.get_submodule(name.removesuffix(".index"))
            assert isinstance(layer, ChannelSelect)
            layer.put(select.index.masked_fill(lost, -1))


def _set_zero(tensor: Tensor, axis: int, parts: int, entries: Tensor) -> None:
    if parts == 1:
        tensor.index_fill_(axis, entries, 0.0)
        return
    rows = by_channel(tensor, axis, parts)
    rows[entries] = 0.0
    inputs = tensor.shape[1]
    split = rows.reshape(parts, inputs, -1, *tensor.shape[2:]).transpose(1, 2)
    tensor.copy_(split.reshape(tensor.shape))


def _twin(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors still are the model's: they are only read until `_cut`.

    Buffers that checkpoints do not hold are copied at once.
    """
    known: dict[int, Any] = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    for module in model.modules():  # a dozen empty dictionaries each are half of deepcopy's time
        for own in vars(module).values():
            if type(own) in (dict, OrderedDict) and not own:
                known[id(own)] = type(own)()
    return copy.deepcopy(model, known).eval()


@torch.no_grad()
def _cut(twin: nn.Module, plan: ShapePlan, masks: Masks, values: Mapping[str, Tensor]) -> Masks:
    """Give a twin tensors of its own, as the plan says; gives the masks of what is left.

    `values` has tensors that are no longer what the model has.
    """
    own: dict[int, Tensor] = {}
    for name, old in [*twin.named_parameters(), *twin.named_buffers()]:
        new = plan.values.get(name, plan.shrink(name, values.get(name, old)))
        new = new.clone() if new is old else new.to(old.device)
        own[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    # one tensor under several names stays one
    state = {name: own[id(old)] for name, old in twin.state_dict(keep_vars=True).items()}
    groups = {name: {"groups": count} for name, count in plan.groups.items()}
    shapes.put(twin, state, groups)
    return {name: plan.shrink(name, mask).clone() for name, mask in masks.items()}


def _kept(graph: ChannelGraph, plan: ShapePlan) -> dict[str, Tensor]:
    """What is left of every layer that could have become smaller."""
    free = torch.zeros(len(graph.canonical), dtype=torch.bool)
    for group in graph.groups:
        free[group.ids] = group.locked is None
    return {
        name: plan.kept[name]
        for name, layer in graph.layers.items()
        if bool(free[graph.canonical[layer.outputs]].any())
    }


@dataclass
class _Reader:
    """A layer, or an index buffer, that reads channels."""

    name: str
    inputs: Tensor
    """Roots of its inputs; the last root stands for fixed zeros."""
    outputs: Tensor
    """Roots of its outputs."""
    reads: Callable[[Tensor], Tensor]
    """bool, (outputs,) -> bool, (inputs,): which inputs these outputs read."""
    harmless: Tensor
    """bool, (inputs,): known to be zero, or constant and foldable."""
    folds: Tensor
    """bool, (inputs,): constant, not zero, and foldable."""
    seen: Tensor | None = None
    """What it sees, one image, NaN where it depends on the input."""
    _asked: tuple[Tensor, Tensor] | None = None

    @cached_property
    def mine(self) -> Tensor:
        """Roots of its inputs, each once."""
        return self.inputs.unique()

    def wants(self, alive: Tensor) -> Tensor:
        """Roots without which these outputs, bool, would not be what they are."""
        if self._asked is None or not torch.equal(alive, self._asked[0]):
            self._asked = alive, self.inputs[self.reads(alive) & ~self.harmless]
        return self._asked[1]


class _Dead:
    """Which channels are dead, and where their constants go."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, graph: ChannelGraph, example: Tensor) -> None:
        self.model, self.graph = model, graph
        dtype = next(model.parameters()).dtype
        found = Constants.of(model, graph.fx_graph, example.to(dtype))
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.modules = dict(model.named_modules())
        self.behind = _norms_behind(graph)
        self.readers = [
            self._layer(name, found.inputs[name])
            for name, layer in graph.layers.items()
            if not layer.depthwise()
        ] + [
            self._take(name, found.inputs[name])
            for name, s in graph.selects.items()
            if s.owns_channels
        ]
        self.asked = torch.zeros(len(graph.canonical) + 1, dtype=torch.int64)
        """By root: how many readers there are to ask."""
        for reader in self.readers:
            self.asked[reader.mine] += 1
        outputs = [t for t in _tensors(found.result) if t.is_floating_point()]
        self.idle = not any(bool(t.isnan().any()) for t in outputs)
        count = len(graph.canonical)
        self.candidates = torch.zeros(count + 1, dtype=torch.bool)  # the last: fixed zeros
        for group in graph.groups:
            self.candidates[group.ids] = group.locked is None

    def selection(self) -> dict[str, Tensor]:
        """Dead channels by group, as many as can go; PruningError if the network is idle."""
        stay = torch.zeros_like(self.candidates)
        while True:
            gone = self._gone(self.candidates & ~stay)
            chosen = self.graph.selection(gone.nonzero().flatten())
            possible = self.graph.balanced(chosen)
            if sum(map(len, possible.values())) == sum(map(len, chosen.values())):
                return chosen
            # those that must stay are read again, and read what they read
            roots = self.graph.ids_of(possible)
            stay |= gone
            stay[roots] = False

    def _gone(self, candidates: Tensor) -> Tensor:
        """bool by root; keeps one channel of a layer that would be emptied."""
        candidates = candidates.clone()
        while True:
            gone = torch.zeros_like(candidates)
            while not torch.equal(after := self._sweep(candidates, gone), gone):
                gone = after
                if self.idle and (layer := self._emptied(gone)):
                    raise PruningError(
                        f"layer {layer} has no living output left; prune or penalise less"
                    )
            if not (layer := self._emptied(gone)):
                return gone
            candidates[self.graph.output_ids()[layer][0]] = False

    def _sweep(self, candidates: Tensor, gone: Tensor) -> Tensor:
        """One more round: nobody who is not gone himself reads what goes, unless harmlessly.

        From the last reader to the first; a channel all of whose readers have been asked counts as
        gone at once, except in an idle network, where the first layer to go has to be named.
        """
        gone, hurt = gone.clone(), ~candidates
        pending = self.asked.clone()
        for reader in reversed(self.readers):
            hurt[reader.wants(~gone[reader.outputs])] = True
            pending[mine := reader.mine] -= 1
            if not self.idle:
                gone[mine] = gone[mine] | (~hurt[mine] & (pending[mine] == 0))
        return ~hurt

    def _emptied(self, gone: Tensor) -> str | None:
        outputs = self.graph.output_ids().items()
        return next((name for name, rows in outputs if bool(gone[rows].all())), None)

    def _roots(self, ids: Tensor) -> Tensor:
        roots = self.graph.canonical
        return torch.where(ids >= 0, roots[ids.clamp_min(0)], len(roots))

    def _layer(self, name: str, seen: list[Seen]) -> _Reader:
        layer = self.graph.layers[name]
        weight = self.tensors[layer.weight]
        reads = weight.flatten(2).any(dim=2) if weight.dim() > 2 else weight.bool()
        blocks = reads.reshape(layer.groups, -1, reads.shape[1])
        zero = torch.stack([of.zero for of in seen]).all(dim=0)
        folds = seen[0].known & ~zero
        if bool(folds.any()):
            folds &= blocks.any(dim=1).flatten()
        if len(seen) > 1 or (layer.bias is None and name not in self.behind):
            folds = torch.zeros_like(folds)
        if (x := seen[0].x) is not None:
            for channel in folds.nonzero().flatten().tolist():
                folds[channel] = self._even(name, x, channel)
        into, out = self._roots(layer.inputs), self._roots(layer.outputs)
        harmless = (zero | folds).cpu()
        return _Reader(name, into, out, _in_blocks(blocks), harmless, folds.cpu(), seen[0].x)

    def _take(self, name: str, seen: list[Seen]) -> _Reader:
        select = self.graph.selects[name]
        zero = torch.stack([of.zero for of in seen]).all(dim=0).cpu()
        never = torch.zeros_like(zero)
        into, out = self._roots(select.inputs), self._roots(select.outputs)
        return _Reader(name, into, out, _one_each(select.index, len(into)), zero, never)

    def _even(self, name: str, seen: Tensor, channel: int) -> bool:
        """Whether a constant input adds the same to an output at every position."""
        module = self.modules.get(name)
        axis = -1 if isinstance(module, nn.Linear) else 1
        x = by_channel(seen, axis)[channel]
        same = bool((x == x[0]).all())
        if not isinstance(module, nn.Conv2d):
            return same and isinstance(module, nn.Linear)
        if same and (_unpadded(module) or module.padding_mode != "zeros"):
            return True
        only = torch.zeros_like(seen)
        only[:, channel] = seen[:, channel]
        adds = self._alone(module, only, channel).flatten(2)[0]
        slack = 64 * torch.finfo(adds.dtype).eps * adds.abs().max()
        return bool((adds - adds[:, :1]).abs().max() <= slack)

    def _alone(self, conv: nn.Conv2d, only: Tensor, channel: int) -> Tensor:
        """What one input of a convolution gives to all outputs that read it."""
        inputs = conv.weight.shape[1]
        part, column = divmod(channel, inputs)
        each = conv.weight.shape[0] // conv.groups
        rows = conv.weight[part * each : (part + 1) * each, column : column + 1]
        alone = copy.copy(conv)
        alone.groups = 1
        return alone._conv_forward(only[:, channel : channel + 1], rows, None)

    @torch.no_grad()
    def fold(self, gone: Tensor, masks: Masks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the constants of channels that go to biases, or take them off running means.

        Gives these tensors, and what the outputs of layers lack where it was taken off behind them.
        Biases that were masked and no longer are zero leave their masks.
        """
        values: dict[str, Tensor] = {}
        shift: dict[str, Tensor] = {}
        lost = torch.zeros_like(self.candidates)
        lost[gone] = True
        for reader in self.readers:
            chosen = reader.folds & lost[reader.inputs]
            if not bool(chosen.any()) or reader.seen is None:
                continue
            adds = self._adds(reader.name, reader.seen, chosen)
            bias = self.graph.layers[reader.name].bias
            if bias is None:
                mean = self.behind[reader.name]
                values[mean] = values.get(mean, self.tensors[mean]) - adds
                shift[reader.name] = adds
                continue
            values[bias] = values.get(bias, self.tensors[bias]) + adds
            if (held := masks.get(bias)) is not None:
                held |= (adds != 0).to(held.device)
        return values, shift

    def _adds(self, name: str, seen: Tensor, chosen: Tensor) -> Tensor:
        """What constant inputs add to each output, (outputs,)."""
        module = self.modules[name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        form = [1] * seen.dim()
        form[_axis(module.weight)] = -1
        only = torch.where(chosen.to(seen.device).reshape(form), seen, 0.0)
        if isinstance(module, nn.Linear):
            return nn.functional.linear(only, module.weight).reshape(-1, module.weight.shape[0])[0]
        adds = module._conv_forward(only, module.weight, None)[0]
        return adds[:, adds.shape[1] // 2, adds.shape[2] // 2]


def _in_blocks(reads: Tensor) -> Callable[[Tensor], Tensor]:
    """Outputs and inputs in groups; `reads` is bool, (groups, outputs, inputs) of each."""
    matrix = reads.float().cpu()
    return lambda of: (of.view(len(matrix), 1, -1).float() @ matrix).flatten() > 0


def _one_each(index: Tensor, inputs: int) -> Callable[[Tensor], Tensor]:
    """Every output reads the input at its index, or none where that is negative."""
    none, real = torch.zeros(inputs, dtype=torch.bool), index >= 0
    return lambda of: none.index_fill(0, index[of & real], True)


def _norms_behind(graph: ChannelGraph) -> dict[str, str]:
    """Layer -> running mean of the batch normalisation that alone reads it."""
    modules = dict(graph.model.named_modules())
    found: dict[str, str] = {}
    nodes = [n for n in graph.fx_graph.nodes if n.op == "call_module"]
    calls = [str(n.target) for n in nodes]
    for node in nodes:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module":
            continue
        name, norm = str(node.target), str(users[0].target)
        module = modules[norm]
        tracked = isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.track_running_stats
        if tracked and calls.count(name) == calls.count(norm) == 1:
            found[name] = f"{norm}.running_mean"
    return found


def _axis(weight: Tensor) -> int:
    """Where a layer with this weight has its channels, before and behind it."""
    return -1 if weight.dim() == 2 else 1


def _unpadded(conv: nn.Conv2d) -> bool:
    padding = (1,) if isinstance(conv.padding, str) else tuple(conv.padding)
    return conv.padding == "valid" or not any(padding)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []
