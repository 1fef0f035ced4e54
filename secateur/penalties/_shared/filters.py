"""What remains of a pruned filter: shifts of normalisations, and biases of depthwise layers.

A filter of zeros still has an effect if a normalisation after it adds its shift: the following
layers read a constant. Removing the filter removes these entries too, so that they must be zero as
well.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from secateur.base.errors import ArgumentError
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.nn.modes import in_eval_mode
from secateur.sparsity.choices import Choices
from secateur.sparsity.masks import LAYERS, BatchNorm


class EntriesBehindFilters:
    """Scales and shifts of normalisations, and biases, that belong to the filters of a network.

    An entry is pruned with its filter if its normalisation reads only the layer of this filter,
    directly; otherwise if all layers that produce its channel have pruned it.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int] | None) -> None:
        """`shape` is that of one image. Raises PruningError if the network cannot be traced."""
        if shape is None:
            raise ArgumentError("granularity", "filter needs the shape of an image")
        example = torch.zeros(1, *shape, device=next(model.parameters()).device)
        self.graph: ChannelGraph = build_channel_graph(in_eval_mode(copy.deepcopy(model)), example)
        own = dict(model.named_parameters())
        self.ids: dict[str, Tensor] = {}
        """Name of a parameter -> canonical id of each entry, -1 where it has none."""
        for group in self.graph.groups:
            for member in group.members:
                if member.kind in ("norm", "bias") and member.tensor in own:
                    size = own[member.tensor].numel()
                    ids = self.ids.setdefault(member.tensor, torch.full((size,), -1))
                    ids[member.index] = group.ids.unsqueeze(1).expand(member.index.shape)
        self.source: dict[str, str] = {}
        """Name of a parameter -> weight of the only layer to whose outputs it is applied."""
        for layer in self.graph.layers.values():
            if layer.bias is not None:
                self.source[layer.bias] = layer.weight
        for norm, layer_name in _norms_behind_layers(self.graph.fx_graph, model).items():
            weight = self.graph.layers[layer_name].weight
            self.source |= {f"{norm}.weight": weight, f"{norm}.bias": weight}

    def concerned(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The parameters that lose entries if all filters of these weights are pruned."""
        every = {name: torch.ones(len(w), dtype=torch.bool) for name, w in weights.items()}
        return [name for name, kept in self.kept(every).items() if not bool(kept.all())]

    def kept(self, choice: Choices) -> dict[str, Tensor]:
        """Name of a parameter -> True where it is kept, on the CPU."""
        gone = self._without_producer(choice)
        found: dict[str, Tensor] = {}
        for name, ids in self.ids.items():
            pruned = gone[ids] & (ids >= 0)
            if (weight := self.source.get(name, "")) in choice:
                pruned |= choice[weight].flatten().cpu()
            found[name] = ~pruned
        return found

    def _without_producer(self, choice: Choices) -> Tensor:
        """bool, by canonical id: channels that are pruned in every layer that produces them."""
        graph = self.graph
        layers, left = torch.zeros(2, len(graph.canonical)).unbind(0)
        for layer in graph.layers.values():
            if layer.depthwise():  # its outputs are the channels of its inputs
                continue
            ids = graph.canonical[layer.outputs]
            pruned = torch.zeros(len(ids), dtype=torch.bool)
            if layer.weight in choice:
                pruned = choice[layer.weight].flatten().cpu()
            layers.index_add_(0, ids, torch.ones(len(ids)))
            left.index_add_(0, ids, (~pruned).float())
        for select in graph.selects.values():  # what it selects is never pruned by itself
            if select.owns_channels:
                left[graph.canonical[select.outputs]] += 1
        return (layers > 0) & (left == 0)


def _norms_behind_layers(graph: fx.Graph, model: nn.Module) -> dict[str, str]:
    """Batch normalisation -> the layer that it reads, by name, where it reads only this layer."""
    modules = dict(model.named_modules())
    read: dict[str, set[str]] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and isinstance(modules.get(name), BatchNorm):
            source = node.all_input_nodes[0]
            read.setdefault(name, set()).add(str(source.target) if source.op == node.op else "")
    alone = {name: next(iter(sources)) for name, sources in read.items() if len(sources) == 1}
    return {n: source for n, source in alone.items() if isinstance(modules.get(source), LAYERS)}
