"""The channel graph: which channels of a network can only be removed together.

A channel is produced by an output of one layer, or of several whose outputs are added, and it is
consumed by inputs of others; normalisations have entries for it in between. All of these are its
members. Channels with members in the same tensors form a group. An operation without a rule is
refused by name, and channels whose removal would change others are locked, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from secateur.base.errors import PruningError
from secateur.channels.builder import GroupBuilder, LayerInfo, SelectInfo, UnionFind
from secateur.channels.groups import ChannelGroup, group_channels
from secateur.channels.planner import ShapePlan, ShapePlanner
from secateur.channels.propagation import Propagation, trace
from secateur.channels.report import describe

Selection = Mapping[str, Tensor]
"""Group name -> numbers of the channels to take away, int64; the first ones matter most."""


@dataclass(frozen=True)
class BalanceConstraint:
    """An operation after which as many channels must be left in each part as in any other."""

    where: str
    parts: tuple[tuple[tuple[str, int], ...], ...]
    """Channels of each part, as (group, number)."""


class ChannelGraph:
    """The channels of a network, as `follow` found them."""

    def __init__(self, model: nn.Module, fx_graph: fx.Graph, shape: Sequence[int]) -> None:
        self.model, self.fx_graph, self.shape = model, fx_graph, tuple(shape)
        self._found = GroupBuilder(model)
        walk = Propagation(model, fx_graph, self._found)
        walk.run(self.shape)
        self._found.close()
        self._spread = walk.spread
        self.layers: dict[str, LayerInfo] = self._found.layers
        self.selects: dict[str, SelectInfo] = self._found.selects
        self.canonical: Tensor = self._found.canonical
        """The atom that stands for each atom's channel."""
        records, locks = list(self._found.records.values()), self._found.reasons
        self.groups: tuple[ChannelGroup, ...] = tuple(
            group_channels(records, self.canonical, locks)
        )
        self._by_name = {group.name: group for group in self.groups}
        self.balances: tuple[BalanceConstraint, ...] = self._balances()

    def __str__(self) -> str:
        """Groups, their members, and why some are locked; see channels/report.py."""
        return describe(self.groups, type(self.model).__name__, self.shape)

    def group(self, name: str) -> ChannelGroup:
        """The group of that name; PruningError if there is none."""
        if name not in self._by_name:
            raise PruningError(f"no group of channels is called '{name}'")
        return self._by_name[name]

    def output_ids(self) -> dict[str, Tensor]:
        """Roots of what each layer makes, and each index buffer, in the order of the network."""
        made = {name: self.canonical[layer.outputs] for name, layer in self.layers.items()}
        return made | {name: self.canonical[s.outputs] for name, s in self.selects.items()}

    def ids_of(self, selection: Selection) -> Tensor:
        """Roots of the selected channels; PruningError if one is locked or does not exist."""
        found = [torch.empty(0, dtype=torch.int64)]
        for name, chosen in selection.items():
            group = self.group(name)
            if len(chosen) == 0:
                continue
            if group.locked is not None:
                raise PruningError(f"channels of {name} cannot be taken away: {group.locked}")
            if int(chosen.min()) < 0 or int(chosen.max()) >= group.size:
                raise PruningError(f"{name} has {group.size} channels, not one for every number")
            found.append(group.ids[chosen.cpu()])
        return torch.cat(found).unique()

    def _among(self, roots: Tensor) -> Tensor:
        """bool by root: whether it is one of these."""
        among = torch.zeros(len(self.canonical), dtype=torch.bool)
        among[roots] = True
        return among

    def selection(self, roots: Tensor) -> dict[str, Tensor]:
        """The channels with these roots, by group."""
        among = self._among(roots)
        chosen = {g.name: among[g.ids].nonzero().flatten() for g in self.groups}
        return {name: index for name, index in chosen.items() if len(index)}

    def plan(self, selection: Selection) -> ShapePlan:
        """What taking these channels away leaves of every tensor.

        Raises PruningError naming the layer if one is left without outputs, if channels are locked,
        or if what is left does not fit together, as with unequal groups of a convolution.
        """
        gone = self.ids_of(selection)
        lost = self._among(gone)
        for name, roots in self.output_ids().items():
            if bool(lost[roots].all()):
                raise PruningError(f"layer {name} would be left without outputs; take away less")
        visitor = ShapePlanner(self._found, gone)
        Propagation(self.model, self.fx_graph, visitor, self._spread).run(self.shape)
        return visitor.plan

    def removable(self, selection: Selection) -> dict[str, Tensor]:
        """A selection that can go: `balanced`, with what is left without any source.

        A channel that a `Take` took from one that goes would say zero, and its norms their shift:
        it goes too, unless it is locked, needs a balance, or is the last one of its Take.
        """
        chosen = self.balanced(selection)
        gone = self.ids_of(chosen)
        more = self._orphans(gone)
        lost, orphan = self._among(gone), self._among(more)
        for roots in [self.canonical[s.outputs] for s in self.selects.values() if s.owns_channels]:
            left = roots[~lost[roots]]
            if len(left) and bool(orphan[left].all()):
                orphan[left[0]] = False
        for name, index in self.selection(orphan.nonzero().flatten()).items():
            chosen[name] = torch.cat((chosen.get(name, index[:0]), index))
        return chosen

    def _orphans(self, gone: Tensor) -> Tensor:
        """Roots of free channels, without balances, all of whose sources were taken from `gone`."""
        free = torch.zeros(len(self.canonical), dtype=torch.bool)
        for group in self.groups:
            free[group.ids] = group.locked is None
        for layer in self.layers.values():
            if not layer.depthwise():
                free[self.canonical[layer.outputs]] = False
        for _, parts in self._found.balances:
            for part in parts:
                free[self.canonical[part[part >= 0]]] = False
        lost = self._among(gone)
        before = lost
        while True:
            alive, robbed = torch.zeros_like(lost), torch.zeros_like(lost)  # by what they take
            for select in self.selects.values():
                if select.owns_channels:
                    ids = select.inputs[select.index]
                    known = (select.index >= 0) & (ids >= 0)
                    out, taken = self.canonical[select.outputs[known]], self.canonical[ids[known]]
                    alive[out[~lost[taken]]] = True
                    robbed[out[lost[taken]]] = True
            after = lost | (free & robbed & ~alive)
            if torch.equal(after, lost):
                return (lost & ~before).nonzero().flatten()
            lost = after

    def balanced(self, selection: Selection) -> dict[str, Tensor]:
        """The selection without those channels that have to stay for the others' sake.

        No layer is emptied, and the parts of every balance lose the same number, of those that are
        selected the first ones. Without balances that is the selection itself. Never raises for
        channels that are not locked; where nothing else is possible, channels that need a balance
        all stay.
        """
        chosen = self._leave_one({name: _once(index) for name, index in selection.items()})
        if not self.balances:
            return chosen
        for whole, spare in ((True, False), (True, True), (False, True)):
            attempt = self._evened(chosen, whole, spare)
            try:
                self.plan(attempt)
            except PruningError:
                continue
            return attempt
        return self._unbalanced(chosen)

    def _leave_one(self, selection: Selection) -> dict[str, Tensor]:
        """Keep the channel that matters least to the selection wherever all outputs would go."""
        gone = self._among(self.ids_of(selection))
        emptied = [roots for roots in self.output_ids().values() if bool(gone[roots].all())]
        if not emptied:
            return dict(selection)
        ranks = self._ranks(selection)
        for roots in emptied:
            if bool(gone[roots].all()):
                gone[max(roots.unique().tolist(), key=ranks.__getitem__)] = False
        return self._pick(selection, gone)

    def _evened(self, selection: Selection, whole: bool, spare: bool) -> dict[str, Tensor]:
        """The same number out of each balanced part; with `spare` never all of a part."""
        rank = self._ranks(selection)
        cells = self._cells
        chosen = set(rank)
        taken = self._whole_groups(chosen) if whole else set()
        for parts in cells:
            live = [p - taken for p in parts if p - taken]
            if not live:
                continue
            picked = [sorted(part & chosen, key=rank.__getitem__) for part in live]
            count = min(len(p) for p in picked)
            if spare:
                count = min(count, min(len(part) for part in live) - 1)
            for part in picked:
                chosen -= set(part[count:])
        return self._pick(selection, self._among(torch.tensor(sorted(chosen), dtype=torch.int64)))

    def _unbalanced(self, selection: Selection) -> dict[str, Tensor]:
        bound = {root for parts in self._cells for part in parts for root in part}
        free = ~self._among(torch.tensor(sorted(bound), dtype=torch.int64))
        return self._pick(selection, free)

    def _pick(self, selection: Selection, chosen: Tensor) -> dict[str, Tensor]:
        """Those that are chosen, bool by root; without groups of which nothing is."""
        stays = {name: chosen[self.group(name).ids[index]] for name, index in selection.items()}
        return {name: selection[name][mine] for name, mine in stays.items() if bool(mine.any())}

    def _ranks(self, selection: Selection) -> dict[int, int]:
        """Place of every selected root in its group's order."""
        return {
            root: place
            for name, index in selection.items()
            for place, root in enumerate(self.group(name).ids[index].tolist())
        }

    @cached_property
    def _cells(self) -> list[list[set[int]]]:
        """Balanced parts by root; where balances share channels, the finest division of both."""
        where: dict[int, list[tuple[int, int]]] = {}
        merged = UnionFind(len(self._found.balances))
        for number, (_, parts) in enumerate(self._found.balances):
            for part, ids in enumerate(parts):
                for root in self.canonical[ids[ids >= 0]].unique().tolist():
                    if where.get(root):
                        merged.join(where[root][0][0], number)
                    where.setdefault(root, []).append((number, part))
        cells: dict[int, dict[tuple[tuple[int, int], ...], set[int]]] = {}
        for root, places in where.items():
            component = cells.setdefault(merged.find(places[0][0]), {})
            component.setdefault(tuple(places), set()).add(root)
        return [list(component.values()) for component in cells.values()]

    def _whole_groups(self, chosen: set[int]) -> set[int]:
        """Roots of those groups of convolutions that are selected with all inputs and outputs."""
        taken: set[int] = set()
        for layer in self.layers.values():
            if layer.groups == 1 or layer.depthwise():
                continue
            sides = (a.reshape(layer.groups, -1) for a in (layer.inputs, layer.outputs))
            ids = torch.cat(tuple(sides), dim=1)
            both = [set(self.canonical[row[row >= 0]].tolist()) for row in ids]
            full = [row for row in both if row <= chosen]
            for row in full[: len(both) - 1]:
                taken |= row
        return taken

    def _balances(self) -> tuple[BalanceConstraint, ...]:
        if not self._found.balances:
            return ()
        names = {
            root: (group.name, number)
            for group in self.groups
            for number, root in enumerate(group.ids.tolist())
        }

        def named(ids: Tensor) -> tuple[tuple[str, int], ...]:
            return tuple(names[r] for r in self.canonical[ids[ids >= 0]].tolist() if r in names)

        return tuple(
            BalanceConstraint(w, tuple(map(named, parts))) for w, parts in self._found.balances
        )


def build_channel_graph(model: nn.Module, example: Tensor) -> ChannelGraph:
    """The channels of a network; `example` is a batch of inputs, of which only the shape matters.

    Raises PruningError naming the first operation that is not understood, or the first layer that
    never runs.
    """
    return ChannelGraph(model, trace(model), example.shape[1:])


def _once(index: Tensor) -> Tensor:
    """Every number where it stands first."""
    return torch.tensor(list(dict.fromkeys(index.tolist())), dtype=torch.int64)
