"""Exact removal of channels: the compact network computes what the masked network computes.

A selected channel is removed with all its members. The resulting network equals the network with
zeros in all these members, in which every LayerNorm takes its mean and variance over the remaining
channels. A channel that was not selected is removed if it is dead (see pruning/dead_channels.py).
Constants that dead channels hold are folded into biases or running means (see pruning/folding.py);
where that is not possible, the channel is kept. Residual branches are removed whole: their layers
then return zero (`layers.Removed`).
"""

import copy
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.channels.graph import ChannelGraph, Selection, build_channel_graph
from secateur.channels.groups import by_channel
from secateur.channels.planner import ShapePlan
from secateur.gconv import conversion
from secateur.nn import resizing
from secateur.nn.layers import ChannelSelect
from secateur.nn.modes import in_eval_mode
from secateur.nn.norms import mask_layer_norm
from secateur.pruning.branches import Branch
from secateur.pruning.dead_channels import DeadChannels
from secateur.sparsity.masks import Masks


@dataclass(frozen=True)
class Compact:
    """A network without some of its channels, and the outputs that each layer has kept."""

    model: nn.Module
    masks: Masks
    kept: dict[str, Tensor]
    """Layer -> indices of the outputs that it has kept, in their new order; layers that are not
    named have kept all."""
    shift: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> contribution that its outputs lack because it was folded after it, (outputs,)."""

    def to(self, dtype: torch.dtype, leave: Container[str] = ()) -> "Compact":
        """This network in another precision; the model is changed in place.

        Tensors that are neither float32 nor float64, and those named in `leave`, are not changed.
        """
        shift = {name: tensor.to(dtype) for name, tensor in self.shift.items()}
        return replace(self, model=to_precision(self.model, dtype, leave), shift=shift)


def to_precision(model: nn.Module, dtype: torch.dtype, leave: Container[str] = ()) -> nn.Module:
    """The network with its float32 and float64 tensors in `dtype`, in place; see `Compact.to`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = {id(tensor) for name, tensor in tensors if name in leave}
    single_or_double = (torch.float32, torch.float64)

    def convert(tensor: Tensor) -> Tensor:
        converts = tensor.dtype in single_or_double and id(tensor) not in left
        return tensor.to(dtype) if converts else tensor

    return model._apply(convert)


def remove(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    masks: Masks | None = None,
    graph: ChannelGraph | None = None,
) -> Compact:
    """The network without the selected channels; `model` itself is not changed.

    It computes the same as the result of `mask`. `example` is a batch of inputs, of which only the
    shape matters. Given its `graph`, the model is not traced again. Raises PruningError if the
    network cannot be traced, or if the selection cannot be removed.
    """
    small = _shallow_copy(model)
    graph = graph or build_channel_graph(small, example)
    plan = graph.plan(selection)
    kept_masks = _resize(small, plan, masks or {}, {})
    return Compact(small, kept_masks, _kept_outputs(graph, plan))


def remove_dead(
    model: nn.Module, masks: Masks, example: Tensor, graph: ChannelGraph | None = None
) -> Compact:
    """The network without its dead channels; `model` itself is not changed.

    `example` is a batch of inputs, of which only the shape matters. Given its `graph`, the model is
    not traced again. A dead layer keeps one channel. Raises PruningError if the network cannot be
    traced, or, naming the first layer without a living output, if the output of the network does
    not depend on its input.
    """
    small = _shallow_copy(model)
    masks = {name: mask.clone() for name, mask in masks.items()}
    graph = graph or build_channel_graph(small, example)
    parameter = next(small.parameters())
    dead = DeadChannels(small, graph, example.to(parameter.device, parameter.dtype))
    selection = dead.selection()
    plan = graph.plan(selection)
    folded = dead.folding.fold(dead.constant_inputs(graph.ids_of(selection)), masks)
    kept_masks = _resize(small, plan, masks, folded.tensors)
    shift = {n: tensor[plan.kept[n].to(tensor.device)] for n, tensor in folded.shift.items()}
    return Compact(small, kept_masks, _kept_outputs(graph, plan), shift)


def compact(
    model: nn.Module,
    selection: Selection,
    masks: Masks,
    example: Tensor,
    dead: bool,
    group_convolutions: bool = False,
    branches: Sequence[Branch] = (),
) -> Compact:
    """The network without the selected channels and branches and, with `dead`, the dead channels.

    With `group_convolutions`, masks are converted after the selected channels are removed
    (gconv/conversion.py).
    """
    first = remove_branches(remove(model, selection, example, masks), branches)
    if group_convolutions:
        grouped = conversion.convert(first.model, first.masks, example)
        order = {n: first.kept[n][i] if n in first.kept else i for n, i in grouped.kept.items()}
        first = Compact(grouped.model, grouped.masks, first.kept | order)
    if not dead:
        return first
    second = remove_dead(first.model, first.masks, example)
    kept = {name: index[second.kept.get(name, slice(None))] for name, index in first.kept.items()}
    return replace(second, kept=second.kept | kept)


def remove_branches(compact: Compact, branches: Sequence[Branch]) -> Compact:
    """The network without these residual branches; its model is changed in place."""
    modules = {name: 1 for branch in branches for name in branch.modules}
    modules |= {branch.modules[-1]: resizing.LAST for branch in branches}
    resizing.remove_layers(compact.model, modules)
    left = dict(compact.model.named_parameters())
    return replace(
        compact,
        masks={name: mask for name, mask in compact.masks.items() if name in left},
        kept={name: index for name, index in compact.kept.items() if name not in modules},
    )


@torch.no_grad()
def mask(
    model: nn.Module, selection: Selection, example: Tensor, graph: ChannelGraph | None = None
) -> nn.Module:
    """A copy of the network with zeros in all members of the selected channels; see `silence`."""
    masked = copy.deepcopy(model, _new_empty_tables(model))
    silence(masked, selection, graph or build_channel_graph(masked, example))
    return masked


@torch.no_grad()
def silence(model: nn.Module, selection: Selection, graph: ChannelGraph) -> None:
    """Set all members of the selected channels to zero, in place; `graph` is the model's.

    From then on, normalisations over several channels (LayerNorm) exclude these channels from mean
    and variance.
    """
    removed = torch.zeros(len(graph.canonical), dtype=torch.bool)
    removed[graph.ids_of(selection)] = True
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, chosen in selection.items():
        for member in graph.group(name).members:
            if member.kind not in ("statistic", "index"):
                tensor = tensors[member.tensor]
                entries = member.index[chosen.cpu()].flatten().to(tensor.device)
                _set_zero(tensor, member.axis, member.groups, entries)
                norm = model.get_submodule(member.tensor.rpartition(".")[0])
                if member.kind == "norm" and isinstance(norm, nn.LayerNorm):
                    mask_layer_norm(norm, entries)
    for name, select in graph.selects.items():
        if select.owns_channels:
            selected = graph.canonical[select.inputs[select.index]]
            zero = removed[selected] | removed[graph.canonical[select.outputs]]
            layer = model.get_submodule(name.removesuffix(".index"))
            assert isinstance(layer, ChannelSelect)
            layer.set_index(select.index.masked_fill(zero, -1))


def _set_zero(tensor: Tensor, axis: int, groups: int, entries: Tensor) -> None:
    """Set some entries along an axis to zero, in place; see `by_channel` for `groups`."""
    if groups == 1:
        tensor.index_fill_(axis, entries, 0.0)
        return
    rows = by_channel(tensor, axis, groups)
    rows[entries] = 0.0
    inputs = tensor.shape[1]
    split = rows.reshape(groups, inputs, -1, *tensor.shape[2:]).transpose(1, 2)
    tensor.copy_(split.reshape(tensor.shape))


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares its tensors with the model; `_resize` replaces them all.

    Buffers that checkpoints do not hold are copied.
    """
    known: dict[int, Any] = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return in_eval_mode(copy.deepcopy(model, known | _new_empty_tables(model)))


def _new_empty_tables(model: nn.Module) -> dict[int, Any]:
    """Copies of the empty dictionaries of the modules by id, as a memo of deepcopy.

    Every module has about a dozen of these, which take half of the time of a deepcopy.
    """
    return {
        id(own): type(own)()
        for module in model.modules()
        for own in vars(module).values()
        if type(own) in (dict, OrderedDict) and not own
    }


@torch.no_grad()
def _resize(
    copied: nn.Module, plan: ShapePlan, masks: Masks, changed: Mapping[str, Tensor]
) -> Masks:
    """Give a shallow copy its own tensors, in the plan's shapes; returns masks in these shapes.

    `changed` has new values for some tensors of the model, by name.
    """
    own: dict[int, Tensor] = {}
    for name, old in [*copied.named_parameters(), *copied.named_buffers()]:
        new = plan.values.get(name)
        if new is None:
            new = plan.shrink(name, changed.get(name, old))
        new = new.clone() if new is old else new.to(old.device)
        own[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    # a tensor that is shared under several names stays shared, and an extra state is as it was
    stored = copied.state_dict(keep_vars=True)
    state = {name: own.get(id(old), old) for name, old in stored.items()}
    sizes = {name: {"groups": count} for name, count in plan.groups.items()}
    for (module, key), count in plan.sizes.items():
        sizes.setdefault(module, {})[resizing.SIZE + key] = count
    resizing.assign(copied, state, sizes)
    return {name: plan.shrink(name, mask).clone() for name, mask in masks.items()}


def _kept_outputs(graph: ChannelGraph, plan: ShapePlan) -> dict[str, Tensor]:
    """Indices of the kept outputs of every layer that has outputs that can be removed."""
    free = torch.zeros(len(graph.canonical), dtype=torch.bool)
    for group in graph.groups:
        free[group.ids] = group.locked is None
    return {
        name: plan.kept[name]
        for name, layer in graph.layers.items()
        if bool(free[graph.canonical[layer.outputs]].any())
    }
