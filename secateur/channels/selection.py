"""Which channels of a selection can be removed, and which channels lose their purpose with them.

Channels are given by their canonical ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.channels.groups import ChannelGroup
from secateur.channels.records import LayerInfo, SelectInfo
from secateur.channels.union_find import UnionFind


@dataclass(frozen=True)
class BalanceConstraint:
    """An operation that needs the same number of channels in each of several parts."""

    where: str
    """Node of the traced network, or layer."""
    parts: tuple[tuple[tuple[str, int], ...], ...]
    """Channels of each part, as (group, index)."""


@dataclass(frozen=True)
class RemovalUnits:
    """Channels in units that can be removed one by one, each unit as a whole.

    A unit is a single channel or, where parts must stay balanced, one channel of each part.
    """

    groups: tuple[str, ...]
    """Channel groups that the channels belong to."""
    ids: Tensor
    """int64, (units, channels): canonical ids, the least important unit first in a balance."""


class Balances:
    """The balances of a network; makes a selection respect them."""

    def __init__(
        self,
        balances: Sequence[tuple[str, Sequence[Tensor]]],
        canonical: Tensor,
        layers: Mapping[str, LayerInfo],
    ) -> None:
        """`balances` as `GroupBuilder` records them; `canonical`: canonical id of every id."""
        self._balances, self._canonical, self._layers = balances, canonical, layers

    def __bool__(self) -> bool:
        """Whether the network has any balances."""
        return bool(self._balances)

    def _known(self, ids: Tensor) -> Tensor:
        """Canonical ids, without those of fixed zeros."""
        return self._canonical[ids[ids >= 0]]

    def constraints(self, groups: Sequence[ChannelGroup]) -> tuple[BalanceConstraint, ...]:
        """The balances, with channels as indices within their groups."""
        if not self:
            return ()
        names = {
            canonical_id: (group.name, number)
            for group in groups
            for number, canonical_id in enumerate(group.ids.tolist())
        }

        def named(ids: Tensor) -> tuple[tuple[str, int], ...]:
            return tuple(names[i] for i in self._known(ids).tolist() if i in names)

        return tuple(BalanceConstraint(w, tuple(map(named, ps))) for w, ps in self._balances)

    @cached_property
    def cells(self) -> list[list[set[int]]]:
        """For each set of balances that share channels, its finest division into parts."""
        places: dict[int, list[tuple[int, int]]] = {}  # id -> number of a balance, and of a part
        merged = UnionFind(len(self._balances))
        for number, (_, parts) in enumerate(self._balances):
            for part, ids in enumerate(parts):
                for canonical_id in self._known(ids).unique().tolist():
                    if places.get(canonical_id):
                        merged.union(places[canonical_id][0][0], number)
                    places.setdefault(canonical_id, []).append((number, part))
        cells: dict[int, dict[tuple[tuple[int, int], ...], set[int]]] = {}
        for canonical_id, where in places.items():
            component = cells.setdefault(merged.find(where[0][0]), {})
            component.setdefault(tuple(where), set()).add(canonical_id)
        return [list(component.values()) for component in cells.values()]

    @cached_property
    def bound(self) -> Tensor:
        """All channels that are in a balance, int64, ascending."""
        bound = {i for parts in self.cells for part in parts for i in part}
        return torch.tensor(sorted(bound), dtype=torch.int64)

    def even(self, rank: Mapping[int, int], whole: bool, spare: bool) -> Tensor:
        """The selected channels, reduced so that all parts of a balance lose the same number.

        `rank` has the rank of every selected channel; lower ranks are selected first. With `whole`,
        groups of a convolution that are selected as a whole are removed as a whole; with `spare`,
        no part loses all of its channels.
        """
        chosen = set(rank)
        removed = self._whole_groups(chosen) if whole else set()
        for parts in self.cells:
            live = [part - removed for part in parts if part - removed]
            if not live:
                continue
            picked = [sorted(part & chosen, key=rank.__getitem__) for part in live]
            count = min(len(p) for p in picked)
            if spare:
                count = min(count, min(len(part) for part in live) - 1)
            for channels in picked:
                chosen -= set(channels[count:])
        return torch.tensor(sorted(chosen), dtype=torch.int64)

    def _whole_groups(self, chosen: set[int]) -> set[int]:
        """Channels of groups of convolutions that are selected with all inputs and outputs."""
        removed: set[int] = set()
        for layer in self._layers.values():
            if layer.groups == 1 or layer.depthwise():
                continue
            sides = (ids.reshape(layer.groups, -1) for ids in (layer.inputs, layer.outputs))
            both = [set(self._known(row).tolist()) for row in torch.cat(tuple(sides), dim=1)]
            full = [row for row in both if row <= chosen]
            for row in full[: len(both) - 1]:
                removed |= row
        return removed


def removal_units(
    groups: Sequence[ChannelGroup], cells: Sequence[Sequence[set[int]]], scores: Tensor
) -> tuple[list[RemovalUnits], dict[str, str]]:
    """All channels that can be removed, in units; and the names of groups without any, with the
    reason.

    `cells` are those of `Balances`; `scores` is the importance of each channel by canonical id. The
    channels of the parts are matched in the order of their scores, so that the least important
    channels of all parts are removed first.
    """
    refused = {group.name: group.locked for group in groups if group.locked is not None}
    owner = {i: group for group in groups for i in group.ids.tolist()}
    bound: dict[str, list[RemovalUnits]] = {}  # by the first group
    taken: set[int] = set()
    for parts in cells:
        channels = sorted(set().union(*parts))
        owners = list(dict.fromkeys(owner[i].name for i in channels if i in owner))
        taken |= set(channels)
        locked = next((refused[name] for name in owners if name in refused), None)
        if locked is not None:
            for name in owners:
                refused.setdefault(name, f"in balance with channels that are locked: {locked}")
            continue
        ordered = [sorted(part, key=lambda i: (float(scores[i]), i)) for part in parts]
        columns = list(zip(*ordered, strict=False))  # of unequal parts, the rest stays
        found = RemovalUnits(tuple(owners), torch.tensor(columns, dtype=torch.int64))
        bound.setdefault(owners[0], []).append(found)
    units: list[RemovalUnits] = []
    for group in groups:
        units += bound.get(group.name, [])
        alone = [i for i in group.ids.tolist() if i not in taken]
        if alone and group.locked is None:
            units.append(RemovalUnits((group.name,), torch.tensor(alone).unsqueeze(1)))
    return units, refused


def orphans(
    gone: Tensor, free: Tensor, selects: Mapping[str, SelectInfo], canonical: Tensor
) -> Tensor:
    """Free channels of ChannelSelects that select only removed channels: bool, (ids,).

    `gone` and `free` are bool, (ids,). A channel that selects only orphans is an orphan too.
    """
    lost = gone
    while True:
        alive, robbed = torch.zeros_like(lost), torch.zeros_like(lost)
        for select in selects.values():
            if select.owns_channels:
                ids = select.inputs[select.index]
                known = (select.index >= 0) & (ids >= 0)
                outputs, selected = canonical[select.outputs[known]], canonical[ids[known]]
                alive[outputs[~lost[selected]]] = True
                robbed[outputs[lost[selected]]] = True
        after = lost | (free & robbed & ~alive)
        if torch.equal(after, lost):
            return lost & ~gone
        lost = after
