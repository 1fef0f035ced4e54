"""Scales of batch normalisations, and which of them alone decide about a channel.

Between two layers with weights lies a region of the network: norms, activations, sums and
concatenations, all joined. A scale near zero silences its channel for certain only if whatever
reads the channel in that region reads it through a norm. A region with a sum (or a product) is
coupled: there a channel belongs to several layers. A norm that alone reads a `Take` (the entrance
of a pre-activation block) decides by itself what its block reads, coupled or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from secateur.channels.graph import ChannelGraph
from secateur.channels.propagation import BINARY, trace
from secateur.nn.layers import ChannelSelect
from secateur.nn.norms import Norm, scaled_norms
from secateur.sparsity.masks import LAYERS

Coupled = Literal["skip", "include"]
"""Scales of channels of residual sums: left out, or with the others."""

_WEIGHTED = frozenset({"conv2d", "linear"})
_SIZES = frozenset({"size", "dim", "getattr"})


@dataclass(frozen=True)
class NormScale:
    """The scales of one batch normalisation."""

    name: str
    """Of the normalisation."""
    coupled: bool
    """Its region has a sum or a product: a channel can have several producers."""
    gates: bool
    """Nobody in its region reads a channel that no norm has scaled."""

    @property
    def weight(self) -> str:
        """Name of the parameter."""
        return f"{self.name}.weight"


def prunable_norms(model: nn.Module, coupled: Coupled) -> dict[str, Norm]:
    """Those whose channels one layer makes and nobody reads unscaled, or all of them.

    Raises PruningError if the network cannot be followed; `include` does not need to.
    """
    norms = scaled_norms(model)
    if coupled == "include":
        return norms
    scales = norm_scales(model, trace(model))
    inner = {scale.name for scale in scales if scale.gates and not scale.coupled}
    return {name: norm for name, norm in norms.items() if name in inner}


def norm_scales(model: nn.Module, fx_graph: fx.Graph) -> list[NormScale]:
    """All batch normalisations with scales, in the order of the network; `graph` is its trace."""
    modules = dict(model.named_modules())
    found: list[NormScale] = []
    for region in _regions(fx_graph, modules):
        norms = [n for n in region if isinstance(_module(n, modules), Norm)]
        coupled = any(_merges(node) for node in region)
        gates = not any(_read_raw(node, region, modules) for node in region)
        found += [
            NormScale(str(norm.target), coupled, gates or _alone_behind_take(norm, modules))
            for norm in norms
            if modules[str(norm.target)].affine
        ]
    order = {name: place for place, name in enumerate(modules)}
    return sorted(found, key=lambda scale: order[scale.name])


def flat_scales(model: nn.Module, graph: ChannelGraph, scales: list[NormScale]) -> "FlatScales":
    """The scales as one list, each with its channel."""
    owner: dict[str, Tensor] = {}
    wanted = {scale.weight for scale in scales}
    for group in graph.groups:
        for member in group.members:
            if member.tensor in wanted:
                size = model.get_parameter(member.tensor).numel()
                roots = owner.setdefault(member.tensor, torch.full((size,), -1))
                roots[member.index] = group.ids.unsqueeze(1).expand(member.index.shape)
    names = [scale.weight for scale in scales if scale.weight in owner]
    values = [model.get_parameter(name).detach().abs().cpu() for name in names]
    empty = torch.empty(0)
    return FlatScales(
        names=names,
        sizes=[len(value) for value in values],
        values=torch.cat([empty, *values]),
        ids=torch.cat([empty.long(), *(owner[name] for name in names)]),
    )


@dataclass(frozen=True)
class FlatScales:
    """Scales of several normalisations, one after the other."""

    names: list[str]
    """Of the parameters."""
    sizes: list[int]
    values: Tensor
    """Absolute values."""
    ids: Tensor
    """int64: channel of each, -1 if it has none."""

    def largest_by_channel(self, count: int) -> Tensor:
        """By root, of so many: the largest of its scales, NaN for a channel without any."""
        best = torch.full((count,), float("-inf"), dtype=self.values.dtype)
        known = self.ids >= 0
        best.scatter_reduce_(0, self.ids[known], self.values[known], "amax")
        return torch.where(best.isinf(), torch.nan, best)


def _regions(fx_graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[list[fx.Node]]:
    """Nodes between layers with weights, those that are joined together."""
    seen: set[fx.Node] = set()
    for start in fx_graph.nodes:
        if start in seen or _outside(start, modules):
            continue
        region, todo = [], [start]
        seen.add(start)
        while todo:
            node = todo.pop()
            region.append(node)
            for other in (*node.all_input_nodes, *node.users):
                if other not in seen and not _outside(other, modules):
                    seen.add(other)
                    todo.append(other)
            for layer in node.all_input_nodes:  # others that read the same layer are of the region
                if _layer(layer, modules):
                    fresh = [u for u in layer.users if u not in seen and not _outside(u, modules)]
                    seen.update(fresh)
                    todo += fresh
        yield region


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _alone_behind_take(norm: fx.Node, modules: dict[str, nn.Module]) -> bool:
    taken = norm.all_input_nodes[0]
    return isinstance(_module(taken, modules), ChannelSelect) and len(taken.users) == 1


def with_selected_scales(graph: ChannelGraph, best: Tensor) -> Tensor:
    """By root: `best`, or that of what a `Take` adds to the sum that makes the channel, if larger.

    NaN if that is a channel without a scale.
    """
    made = torch.zeros(len(graph.canonical), dtype=torch.bool)
    for layer in graph.layers.values():
        if not layer.depthwise():
            made[graph.canonical[layer.outputs]] = True
    best = best.clone()
    for select in graph.selects.values():
        real = select.owns_channels & (select.index >= 0) & made[graph.canonical[select.outputs]]
        out = graph.canonical[select.outputs[real]]
        taken = graph.canonical[select.inputs[select.index[real]]]
        best[out] = torch.maximum(best[out], best[taken])
    return best


def _layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), LAYERS)
    return node.op == "call_function" and _called(node) in _WEIGHTED


def _outside(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op in ("get_attr", "output", "placeholder") or _layer(node, modules):
        return True
    return node.op != "call_module" and _called(node) in _SIZES


def _called(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _merges(node: fx.Node) -> bool:
    """Whether two tensors of the region are added up, multiplied or the like."""
    tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
    return node.op != "call_module" and _called(node) in BINARY and len(tensors) > 1


def _read_raw(node: fx.Node, region: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether a layer, or the output, reads what comes out of the node and no norm has scaled."""
    sources = [n for n in node.all_input_nodes if _layer(n, modules) or n.op == "placeholder"]
    if not sources:
        return False
    if any(_layer(u, modules) or u.op == "output" for s in sources for u in s.users):
        return True  # read by a layer as it is made, and by this region too
    inside = set(region)
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if isinstance(modules.get(str(at.target)), Norm):
            continue
        for user in at.users:
            if _layer(user, modules) or user.op == "output":
                return True
            if user in inside and user not in seen:
                seen.add(user)
                todo.append(user)
    return False
