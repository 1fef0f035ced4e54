"""Convert masks that consist of groups of channels to group convolutions (for pruner gconv).

A convolution whose mask keeps G groups of outputs and inputs is a group convolution between two
permutations of channels. The order of channels is free unless an operation depends on it, so that
most permutations need not be computed at run time: the channels of the network are reordered to
make groups contiguous, in all tensors that have entries for them, and an index remains only where
several layers need different orders. The converted network computes what the masked network
computes.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.channels.groups import ChannelGroup
from secateur.gconv.permutation import Grouping, expand_groups, grouping_from_mask
from secateur.nn.layers import ChannelSelect, IndexedConv2d
from secateur.nn.modes import in_eval_mode
from secateur.sparsity.masks import Masks


@dataclass(frozen=True)
class Converted:
    """A network with group convolutions in place of masks."""

    model: nn.Module
    masks: Masks
    """The remaining masks, in the new order of the channels."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> its outputs in their new order, if the order has changed."""


def convert(model: nn.Module, masks: Masks, example: Tensor, fold: bool = True) -> Converted:
    """The network with group convolutions; `model` itself is not changed.

    Masked weights must be zero already. `example` is a batch of inputs, of which only the shape
    matters. Without `fold`, channels are not reordered and every converted convolution has both
    indices. Raises ArgumentError if no mask consists of groups.
    """
    model = in_eval_mode(copy.deepcopy(model))
    masks = {name: mask.clone() for name, mask in masks.items()}
    found = _groupings(model, masks)
    if not found:
        raise ArgumentError(
            "group_convolutions",
            "no convolution's mask is made of groups of one size; prune with the pruner gconv",
            True,
        )
    kept: dict[str, Tensor] = {}
    if fold:
        graph = build_channel_graph(model, example)
        orders = _ChannelOrders(graph, found).chosen
        kept = _reorder(model, masks, graph, orders)
        found = _groupings(model, masks)
    for name in found:
        _replace(model, masks, name, found[name], fold)
    return Converted(model, masks, kept)


def group_convolution_counts(model: nn.Module) -> dict[str, float]:
    """Number of convolutions of a network that have groups, and of index layers."""
    modules = list(model.modules())
    indexed = [m for m in modules if isinstance(m, IndexedConv2d)]
    indices = [index for m in indexed for index in (m.before, m.after) if index is not None]
    return {
        "group_convolutions": float(
            sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in modules)
        ),
        "index_layers": float(len(indices)),
    }


def _groupings(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Grouping]:
    """Groupings by convolution; convolutions whose masks do not consist of groups have none."""
    found: dict[str, Grouping] = {}
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, module in model.named_modules():
        mask = masks.get(f"{name}.weight")
        if not isinstance(module, nn.Conv2d) or mask is None or bool(mask.all()):
            continue
        grouping = None
        if names.count(id(module.weight)) == 1 and bool(
            (mask == mask.flatten(2)[:, :, 0][:, :, None, None]).all()
        ):
            grouping = grouping_from_mask(expand_groups(mask[:, :, 0, 0].cpu(), module.groups))
        if grouping is not None:
            found[name] = grouping
    return found


@dataclass(frozen=True)
class _Side:
    """The inputs or outputs of a convolution, if they are all the channels of a channel group."""

    layer: str
    label: Tensor
    """Number of the convolution's group that each channel belongs to, (channels,)."""
    place: Tensor
    """Channel at each position, (channels,)."""

    def labels(self, order: Tensor) -> Tensor:
        """Groups along the positions when the channels are in this order."""
        return self.label[order[self.place]]

    def sequence(self, order: Tensor) -> tuple[int, ...] | None:
        """The sequence of the groups if each is contiguous in this order, else None."""
        count = int(self.label.max()) + 1
        rows = self.labels(order).reshape(count, -1)
        if bool((rows != rows[:, :1]).any()):
            return None
        return tuple(rows[:, 0].tolist())

    def order(self, sequence: tuple[int, ...] | None) -> Tensor:
        """An order of the channels in which the groups are contiguous and have this sequence.

        Without a given sequence, groups are in the order of their first channels.
        """
        count = int(self.label.max()) + 1
        rank = torch.arange(count)
        now = self.label[self.place]
        if sequence is None:
            first = [int((now == k).nonzero()[0]) for k in range(count)]
            sequence = tuple(sorted(range(count), key=first.__getitem__))
        rank[list(sequence)] = torch.arange(count)
        sorted_places = self.place[rank[now].argsort(stable=True)]
        order = torch.empty_like(self.place)
        order[self.place] = sorted_places
        return order


class _ChannelOrders:
    """For each channel group, an order with contiguous groups at as many sides as possible."""

    def __init__(self, graph: ChannelGraph, groupings: Mapping[str, Grouping]) -> None:
        self.graph, self.groupings = graph, groupings
        self.sequences: dict[str, tuple[int, ...]] = {}
        """Convolution -> the sequence of its groups, once one of its sides has one."""
        self.chosen: dict[str, Tensor] = {}
        """Channel group -> its order: for each position, the channel that moves there."""
        fixed = _fixed(graph)
        for group in graph.groups:
            if group.name not in fixed:
                self._choose(group)

    def _choose(self, group: ChannelGroup) -> None:
        sides = list(self._sides(group))
        if not sides:
            return
        unchanged = torch.arange(group.size)
        best, most = unchanged, self._contiguous(sides, unchanged)
        for side in sides:
            order = side.order(self.sequences.get(side.layer))
            met = self._contiguous(sides, order)
            if len(met) > len(most):
                best, most = order, met
        self.sequences |= {sides[k].layer: sequence for k, sequence in most.items()}
        if not torch.equal(best, unchanged):
            self.chosen[group.name] = best

    def _contiguous(self, sides: list[_Side], order: Tensor) -> dict[int, tuple[int, ...]]:
        """Sides, by number, with contiguous groups in this order, and the sequence of the groups.

        Both sides of a convolution need the same sequence.
        """
        met: dict[int, tuple[int, ...]] = {}
        known = dict(self.sequences)
        for number, side in enumerate(sides):
            sequence = side.sequence(order)
            if sequence is not None and known.setdefault(side.layer, sequence) == sequence:
                met[number] = sequence
        return met

    def _sides(self, group: ChannelGroup) -> Iterable[_Side]:
        """The sides of converted convolutions whose channels are this channel group."""
        number = {channel_id: k for k, channel_id in enumerate(group.ids.tolist())}
        for name, grouping in self.groupings.items():
            layer = self.graph.layers.get(name)
            if layer is None:
                continue
            for ids, members in (
                (layer.inputs, grouping.inputs),
                (layer.outputs, grouping.outputs),
            ):
                if len(ids) != group.size or bool((ids < 0).any()):
                    continue
                channels = self.graph.canonical[ids].tolist()
                if set(channels) != set(number):
                    continue
                place = torch.tensor([number[channel_id] for channel_id in channels])
                label = torch.empty_like(place)
                label[place[members]] = torch.arange(len(members)).unsqueeze(1)
                yield _Side(name, label, place)


def _fixed(graph: ChannelGraph) -> set[str]:
    """Channel groups whose order must not change."""
    fixed = {g.name for g in graph.groups if g.locked is not None}
    fixed |= {g.name for g in graph.groups if any(member.groups > 1 for member in g.members)}
    fixed |= {name for b in graph.balances for part in b.parts for name, _ in part}
    for select in graph.selects.values():
        channels = graph.canonical[select.inputs[select.inputs >= 0]]
        repeated = len(channels.unique()) < len(channels)
        if select.owns_channels and repeated:  # the index cannot be rewritten
            fixed |= {g.name for g in graph.groups if bool(torch.isin(g.ids, channels).any())}
    return fixed


@torch.no_grad()
def _reorder(
    model: nn.Module, masks: Masks, graph: ChannelGraph, orders: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put channels into these orders, in place; returns the new order of the layers' outputs."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    owner = {layer.weight: name for name, layer in graph.layers.items()}
    shared = {name for name, select in graph.selects.items() if not select.owns_channels}
    kept: dict[str, Tensor] = {}
    for group_name, order in orders.items():
        group = graph.group(group_name)
        for member in group.members:
            if member.tensor in shared:  # it passes on the content of its positions
                continue
            there, here = member.index.flatten(), member.index[order].flatten()
            _move(tensors[member.tensor], member.axis, there, here)
            if member.tensor in masks:
                _move(masks[member.tensor], member.axis, there, here)
            if member.kind == "out" and member.tensor in owner:
                outputs = len(tensors[member.tensor])
                now = kept.setdefault(owner[member.tensor], torch.arange(outputs))
                _move(now, 0, there, here)
        for name, select in graph.selects.items():
            if select.owns_channels:
                _rewrite_index(tensors[name], graph.canonical[select.inputs], group, order)
    for module in model.modules():
        if isinstance(module, ChannelSelect):
            module.set_index(module.index)
    return kept


def _move(tensor: Tensor, axis: int, there: Tensor, here: Tensor) -> None:
    """Move entries along an axis from `here` to `there`, all at once, in place."""
    there, here = there.to(tensor.device), here.to(tensor.device)
    tensor.index_copy_(axis, there, tensor.index_select(axis, here))


def _rewrite_index(index: Tensor, channels: Tensor, group: ChannelGroup, order: Tensor) -> None:
    """Rewrite an index for the new positions of a group's channels, in place."""
    position = {channel_id: k for k, channel_id in enumerate(channels.tolist())}
    moved = torch.arange(len(channels))
    for place, channel in enumerate(order.tolist()):
        was, now = int(group.ids[channel]), int(group.ids[place])
        if was in position:
            moved[position[was]] = position[now]
    moved = moved.to(index.device)
    index.copy_(torch.where(index >= 0, moved[index.clamp_min(0)], index))


@torch.no_grad()
def _replace(model: nn.Module, masks: Masks, name: str, grouping: Grouping, fold: bool) -> None:
    """Replace a masked convolution by a group convolution."""
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    out, into = grouping.outputs, grouping.inputs
    if not _is_identity(into.flatten()):  # inputs need an index anyway
        by_output = out[:, 0].argsort()
        out, into = out[by_output], into[by_output]
    device = conv.weight.device
    rows, columns = out.flatten().to(device), into.flatten().to(device)
    inner = (into % conv.weight.shape[1]).repeat_interleave(out.shape[1], dim=0).to(device)
    weight = conv.weight[rows.unsqueeze(1), inner]
    bias = None if conv.bias is None else conv.bias[rows]
    if (mask := masks.get(f"{name}.bias")) is not None:
        masks[f"{name}.bias"] = mask[rows.to(mask.device)]
    masks.pop(f"{name}.weight")
    place = torch.empty_like(rows)
    place[rows] = torch.arange(len(rows), device=device)
    before, after = columns, place
    if isinstance(conv, IndexedConv2d):
        before = columns if conv.before is None else conv.before[columns]
        after = place if conv.after is None else place[conv.after]
    needed = [None if fold and _is_identity(index) else index for index in (before, after)]
    model.set_submodule(name, IndexedConv2d.from_conv(conv, weight, bias, len(out), *needed))


def _is_identity(index: Tensor) -> bool:
    """Whether an index is 0, 1, 2 and so on."""
    return torch.equal(index, torch.arange(len(index), device=index.device))
