"""Scales of batch normalisations (gamma), and which of them alone determine a channel.

Between layers with weights lie regions of the network: connected normalisations, activations, sums
and concatenations. A scale near zero is certain to silence its channel only if every consumer in
its region reads the channel after a normalisation. A region with a sum or a product is coupled:
there a channel can have several producers. A normalisation that is the only consumer of a
ChannelSelect, as at the entrance of a pre-activation block, alone determines what its block reads,
whether the region is coupled or not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from secateur.channels import operators
from secateur.channels.graph import ChannelGraph
from secateur.channels.trace import trace
from secateur.nn.layers import ChannelSelect
from secateur.nn.norms import scaled_norms
from secateur.sparsity.masks import LAYERS, BatchNorm
from secateur.sparsity.positions import BLOCK

Coupled = Literal["skip", "include", "blocks"]
"""skip: leave out scales in coupled regions; include: include them; blocks: leave them out, and
also those outside residual blocks, if the network has such blocks."""

Modules = dict[str, nn.Module]
"""By path."""


@dataclass(frozen=True)
class NormScale:
    """The scales of one batch normalisation."""

    name: str
    """Path of the normalisation."""
    coupled: bool
    """Whether its region has a sum or a product: a channel can have several producers."""
    gates: bool
    """Whether every layer that reads its region does so after a normalisation, or it is the only
    consumer of a ChannelSelect."""

    @property
    def weight(self) -> str:
        """Name of the parameter."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class FlatScales:
    """Scales of several normalisations, one after the other."""

    values: Tensor
    """Absolute values, (scales,)."""
    ids: Tensor
    """int64, (scales,): canonical id of the channel of each, -1 if it has none."""

    def largest_by_channel(self, count: int) -> Tensor:
        """Largest scale of each channel, NaN if it has none: (count,), by canonical id."""
        return self.by_channel(count, "amax")

    def by_channel(self, count: int, reduce: Literal["sum", "mean", "amax", "prod"]) -> Tensor:
        """The scales of each channel reduced to one number, NaN if it has none: (count,), by
        canonical id."""
        known = self.ids >= 0
        found = torch.full((count,), torch.nan, dtype=self.values.dtype)
        return found.scatter_reduce_(
            0, self.ids[known], self.values[known], reduce, include_self=False
        )


def prunable_norms(model: nn.Module, coupled: Coupled) -> dict[str, BatchNorm]:
    """Batch normalisations whose scales alone determine channels of one producer, or all.

    With `include`, these are all batch normalisations with scales, of any network. Otherwise raises
    PruningError if the network cannot be traced.
    """
    norms = scaled_norms(model)
    if coupled == "include":
        return norms
    scales = norm_scales(model, trace(model))
    alone = {scale.name for scale in scales if scale.gates and not scale.coupled}
    if coupled == "blocks":
        alone = inside_blocks(alone)
    return {name: norm for name, norm in norms.items() if name in alone}


def inside_blocks(names: Iterable[str]) -> set[str]:
    """The modules inside residual blocks (`layer1.0.bn1`); all of them if there are no blocks."""
    every = set(names)
    return {name for name in every if BLOCK.fullmatch(name)} or every


def norm_scales(model: nn.Module, fx_graph: fx.Graph) -> list[NormScale]:
    """All batch normalisations with scales, in the order of the modules."""
    modules = dict(model.named_modules())
    found: list[NormScale] = []
    for region in _regions(fx_graph, modules):
        norms = [n for n in region if isinstance(_module(n, modules), BatchNorm)]
        coupled = any(_combines(node, modules) for node in region)
        gates = not any(_read_unscaled(node, region, modules) for node in region)
        found += [
            NormScale(str(norm.target), coupled, gates or _alone_behind_select(norm, modules))
            for norm in norms
            if modules[str(norm.target)].affine
        ]
    order = {name: place for place, name in enumerate(modules)}
    return sorted(found, key=lambda scale: order[scale.name])


def flat_scales(model: nn.Module, graph: ChannelGraph, scales: list[NormScale]) -> FlatScales:
    """The scales in one tensor, each with its channel."""
    owner: dict[str, Tensor] = {}
    wanted = {scale.weight for scale in scales}
    for group in graph.groups:
        for member in group.members:
            if member.tensor in wanted:
                size = model.get_parameter(member.tensor).numel()
                ids = owner.setdefault(member.tensor, torch.full((size,), -1))
                ids[member.index] = group.ids.unsqueeze(1).expand(member.index.shape)
    names = [scale.weight for scale in scales if scale.weight in owner]
    values = [model.get_parameter(name).detach().abs().cpu() for name in names]
    empty = torch.empty(0)
    return FlatScales(
        values=torch.cat([empty, *values]),
        ids=torch.cat([empty.long(), *(owner[name] for name in names)]),
    )


def with_selected_scales(graph: ChannelGraph, scales: Tensor) -> Tensor:
    """Scales by canonical id, where a channel of a ChannelSelect counts at least with the scale of
    the channel that it selects.

    `scales` and the result have one scale for each id, (ids,), NaN for a channel without any.
    """
    produced = torch.zeros(len(graph.canonical), dtype=torch.bool)
    for layer in graph.layers.values():
        if not layer.depthwise():
            produced[graph.canonical[layer.outputs]] = True
    scales = scales.clone()
    for select in graph.selects.values():
        real = select.owns_channels & (select.index >= 0)
        real &= produced[graph.canonical[select.outputs]]
        outputs = graph.canonical[select.outputs[real]]
        selected = graph.canonical[select.inputs[select.index[real]]]
        scales[outputs] = torch.maximum(scales[outputs], scales[selected])
    return scales


def _regions(fx_graph: fx.Graph, modules: Modules) -> Iterator[list[fx.Node]]:
    """Connected nodes between layers with weights."""
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
            for layer in node.all_input_nodes:  # its other consumers belong to the region
                if _is_layer(layer, modules):
                    fresh = [u for u in layer.users if u not in seen and not _outside(u, modules)]
                    seen.update(fresh)
                    todo += fresh
        yield region


def _module(node: fx.Node, modules: Modules) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _is_layer(node: fx.Node, modules: Modules) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), LAYERS)
    return operators.of_node(node, modules).weighted


def _outside(node: fx.Node, modules: Modules) -> bool:
    if node.op in ("get_attr", "output", "placeholder") or _is_layer(node, modules):
        return True
    return operators.of_node(node, modules).metadata


def _combines(node: fx.Node, modules: Modules) -> bool:
    """Whether two tensors of the region are added, multiplied or the like."""
    tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
    return operators.of_node(node, modules).combines and len(tensors) > 1


def _alone_behind_select(norm: fx.Node, modules: Modules) -> bool:
    selected = norm.all_input_nodes[0]
    return isinstance(_module(selected, modules), ChannelSelect) and len(selected.users) == 1


def _read_unscaled(node: fx.Node, region: list[fx.Node], modules: Modules) -> bool:
    """Whether a layer, or the output, reads a result of the node that no normalisation scaled."""
    producers = [n for n in node.all_input_nodes if _is_layer(n, modules) or n.op == "placeholder"]
    if not producers:
        return False
    if any(_is_layer(u, modules) or u.op == "output" for p in producers for u in p.users):
        return True  # read directly, and by this region too
    inside = set(region)
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if isinstance(modules.get(str(current.target)), BatchNorm):
            continue
        for user in current.users:
            if _is_layer(user, modules) or user.op == "output":
                return True
            if user in inside and user not in seen:
                seen.add(user)
                todo.append(user)
    return False
