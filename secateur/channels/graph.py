"""The channel graph: which channels of a network can only be removed together.

A channel is produced by an output of one layer, or of several layers whose outputs are added, and
is consumed by inputs of other layers; normalisations in between have entries for it. All of these
are its members. Channels with members in the same tensors form a group. For an operation without a
rule, an error names it; channels whose removal would change others are locked, with the reason.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from secateur.base.errors import PruningError
from secateur.channels.builder import GroupBuilder
from secateur.channels.groups import ChannelGroup, group_channels
from secateur.channels.planner import ShapePlan, ShapePlanner
from secateur.channels.propagation import Propagation
from secateur.channels.records import LayerInfo, SelectInfo
from secateur.channels.report import describe
from secateur.channels.selection import (
    BalanceConstraint,
    Balances,
    RemovalUnits,
    orphans,
    removal_units,
)
from secateur.channels.trace import trace

Selection = Mapping[str, Tensor]
"""Group name -> indices of channels to remove, int64, (channels,); if not all can be removed, the
first ones take precedence."""


class ChannelGraph:
    """The channel groups of a network, and the result of removing channels.

    `print(graph)` lists the groups. `build_channel_graph` builds the graph of a network.
    """

    def __init__(self, model: nn.Module, fx_graph: fx.Graph, shape: Sequence[int]) -> None:
        """`shape` is that of one image, (channels, height, width), or (features,)."""
        self.model, self.fx_graph, self.shape = model, fx_graph, tuple(shape)
        self._built = GroupBuilder(model)
        propagation = Propagation(model, fx_graph, self._built, self.shape)
        propagation.run()
        self._built.finish()
        self._broadcasts = propagation.broadcasts
        self.layers: dict[str, LayerInfo] = self._built.layers
        """Convolutions and linear layers, in the order of execution."""
        self.selects: dict[str, SelectInfo] = self._built.selects
        """By index buffer."""
        self.canonical: Tensor = self._built.canonical
        """Canonical id of every channel id: equal for ids of one channel, int64, (ids,)."""
        self.normalised: Tensor = self._built.normalised
        """By canonical id, bool: normalised together with other channels (LayerNorm), so that
        removing the channel changes all others."""
        axes = list(self._built.axes.values())
        self.groups: tuple[ChannelGroup, ...] = tuple(
            group_channels(axes, self.canonical, self._built.reasons)
        )
        self.couplings: dict[str, tuple[str, ...]] = self._couplings()
        """Group -> how the results of its producers are coupled, if there are several."""
        self._by_name = {group.name: group for group in self.groups}
        self._balances = Balances(self._built.balances, self.canonical, self.layers)
        self.balances: tuple[BalanceConstraint, ...] = self._balances.constraints(self.groups)

    def __str__(self) -> str:
        """Groups, their members, and why some are locked; see channels/report.py."""
        return describe(self.groups, type(self.model).__name__, self.shape, self.couplings)

    def _couplings(self) -> dict[str, tuple[str, ...]]:
        owner = torch.full((len(self.canonical),), -1)
        for number, group in enumerate(self.groups):
            owner[group.ids] = number
        meeting: dict[int, dict[str, None]] = {}  # number of a group -> how, in order
        for ids, how in self._built.couplings:
            for number in owner[self.canonical[ids]].unique().tolist():
                meeting.setdefault(number, {})[how] = None
        found = {}
        for number, group in enumerate(self.groups):
            together = list(meeting.get(number, {}))
            if any(n in self.layers and self.layers[n].depthwise() for n in group.producers):
                together.append("a depthwise convolution")
            if len(set(group.producers)) > 1 and together:
                found[group.name] = tuple(together)
        return found

    def group(self, name: str) -> ChannelGroup:
        """The group of that name; PruningError if there is none."""
        if name not in self._by_name:
            raise PruningError(f"no group of channels is called '{name}'")
        return self._by_name[name]

    def output_ids(self) -> dict[str, Tensor]:
        """Canonical ids of the outputs of each layer and each index buffer, (outputs,)."""
        layers = {name: self.canonical[layer.outputs] for name, layer in self.layers.items()}
        return layers | {name: self.canonical[s.outputs] for name, s in self.selects.items()}

    @cached_property
    def _outputs(self) -> tuple[list[str], Tensor, Tensor]:
        """Names as in `output_ids`, all of these ids, and for each id the index of its name."""
        found = self.output_ids()
        counts = torch.tensor([len(ids) for ids in found.values()], dtype=torch.int64)
        places = torch.arange(len(found)).repeat_interleave(counts)
        return list(found), torch.cat([torch.empty(0, dtype=torch.int64), *found.values()]), places

    def emptied(self, gone: Tensor) -> list[str]:
        """Layers and index buffers all of whose outputs are in `gone`, bool, (ids,)."""
        names, ids, places = self._outputs
        left = places[~gone[ids]].bincount(minlength=len(names))
        return [names[place] for place in (left == 0).nonzero().flatten().tolist()]

    def ids_of(self, selection: Selection) -> Tensor:
        """Canonical ids of the selected channels, ascending.

        Raises PruningError if a group or a channel does not exist or is locked.
        """
        found = [torch.empty(0, dtype=torch.int64)]
        for name, chosen in selection.items():
            group = self.group(name)
            if len(chosen) == 0:
                continue
            if group.locked is not None:
                raise PruningError(f"channels of {name} cannot be removed: {group.locked}")
            if int(chosen.min()) < 0 or int(chosen.max()) >= group.size:
                raise PruningError(f"{name} has {group.size} channels, not one for every number")
            found.append(group.ids[chosen.cpu()])
        return torch.cat(found).unique()

    def selection(self, ids: Tensor) -> dict[str, Tensor]:
        """The channels with these canonical ids, by group."""
        among = self._among(ids)
        chosen = {g.name: among[g.ids].nonzero().flatten() for g in self.groups}
        return {name: index for name, index in chosen.items() if len(index)}

    def units(self, scores: Tensor) -> tuple[list[RemovalUnits], dict[str, str]]:
        """All channels that can be removed, in units that can be removed one by one; and groups
        without any, with the reason. `scores` (ids,) is the importance of each channel."""
        return removal_units(self.groups, self._balances.cells if self._balances else [], scores)

    def plan(self, selection: Selection) -> ShapePlan:
        """The entries of every tensor that remain when these channels are removed.

        Raises PruningError if a channel is locked, if a layer is left without outputs (naming it),
        or if the remaining tensors do not fit together, as with unequal groups of a convolution.
        """
        gone = self.ids_of(selection)
        lost = self._among(gone)
        if emptied := self.emptied(lost):
            raise PruningError(f"layer {emptied[0]} would be left without outputs; remove fewer")
        planner = ShapePlanner(self._built, gone)
        Propagation(self.model, self.fx_graph, planner, self.shape, self._broadcasts).run()
        return planner.plan

    def removable(self, selection: Selection) -> dict[str, Tensor]:
        """A selection that can be removed: `balanced`, and channels that select only removed ones.

        When a removed channel is selected by a ChannelSelect, the resulting channel becomes zero,
        and constant after its normalisation. It is removed too, unless it is locked, must stay
        balanced, or is the last one of its ChannelSelect.
        """
        chosen = self.balanced(selection)
        lost = self._among(self.ids_of(chosen))
        orphaned = orphans(lost, self._selected_alone(), self.selects, self.canonical)
        for ids in [self.canonical[s.outputs] for s in self.selects.values() if s.owns_channels]:
            left = ids[~lost[ids]]
            if len(left) and bool(orphaned[left].all()):
                orphaned[left[0]] = False
        for name, index in self.selection(orphaned.nonzero().flatten()).items():
            chosen[name] = torch.cat((chosen.get(name, index[:0]), index))
        return chosen

    def balanced(self, selection: Selection) -> dict[str, Tensor]:
        """The selection without channels that cannot be removed.

        No layer loses all outputs, and the parts of every balance lose the same number of channels,
        the first ones that are selected. Where that is impossible, no channel that must stay
        balanced is removed. Raises PruningError if a channel is locked, as `ids_of` does.
        """
        chosen = self._leave_one({name: _distinct(index) for name, index in selection.items()})
        if not self._balances:
            return chosen
        rank = self._ranks(chosen)
        for whole, spare in ((True, False), (True, True), (False, True)):
            attempt = self._pick(chosen, self._among(self._balances.even(rank, whole, spare)))
            try:
                self.plan(attempt)
            except PruningError:
                continue
            return attempt
        return self._pick(chosen, ~self._among(self._balances.bound))

    def _leave_one(self, selection: Selection) -> dict[str, Tensor]:
        """The selection without the last output, in group order, of layers that would lose all."""
        gone = self._among(self.ids_of(selection))
        if not (emptied := self.emptied(gone)):
            return dict(selection)
        ranks, outputs = self._ranks(selection), self.output_ids()
        for ids in map(outputs.__getitem__, emptied):
            if bool(gone[ids].all()):
                gone[max(ids.unique().tolist(), key=ranks.__getitem__)] = False
        return self._pick(selection, gone)

    def _selected_alone(self) -> Tensor:
        """bool, (ids,): free channels that no layer produces and that are in no balance."""
        free = torch.zeros(len(self.canonical), dtype=torch.bool)
        for group in self.groups:
            free[group.ids] = group.locked is None
        for layer in self.layers.values():
            if not layer.depthwise():
                free[self.canonical[layer.outputs]] = False
        if self._balances:
            free[self._balances.bound] = False
        return free

    def _among(self, ids: Tensor) -> Tensor:
        """bool, (ids,): whether each id is one of these."""
        among = torch.zeros(len(self.canonical), dtype=torch.bool)
        among[ids] = True
        return among

    def _pick(self, selection: Selection, chosen: Tensor) -> dict[str, Tensor]:
        """The selected channels that are also in `chosen`, bool, (ids,), without empty groups."""
        stays = {name: chosen[self.group(name).ids[index]] for name, index in selection.items()}
        return {name: selection[name][own] for name, own in stays.items() if bool(own.any())}

    def _ranks(self, selection: Selection) -> dict[int, int]:
        """Canonical id -> its rank in the selection of its group."""
        return {
            canonical_id: place
            for name, index in selection.items()
            for place, canonical_id in enumerate(self.group(name).ids[index].tolist())
        }


def build_channel_graph(model: nn.Module, example: Tensor) -> ChannelGraph:
    """The channel graph of a network in eval mode.

    `example` is a batch of inputs, (images, channels, height, width), (images, features) or
    (sequences, steps, features), of which only the shape matters. Raises PruningError naming the
    first operation without a rule, or the first layer that never runs.
    """
    return ChannelGraph(model, trace(model), example.shape[1:])


def _distinct(index: Tensor) -> Tensor:
    """Every number once, in the order of first occurrence."""
    return torch.tensor(list(dict.fromkeys(index.tolist())), dtype=torch.int64)
