"""Which channels live and die together, in any network that torch.fx can trace.

A channel is made by an output of one layer, or of several whose outputs are added up, and it is
read by inputs of others; normalisations have entries for it on the way. All of these are its slots.
Channels with the same kind of slots make a group. What is not understood is refused by name, and
channels that cannot go without changing the others are locked, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx, nn

from secateur.core.errors import PruningError
from secateur.core.graph import ZERO, Held, Walk, trace

Kind = Literal["out", "bias", "in", "norm", "statistic", "scale", "index"]
Selection = Mapping[str, Tensor]
"""Group name -> numbers of the channels to take away, int64; the first ones matter most."""


@dataclass(frozen=True)
class Slot:
    """Where the channels of a group stand in one tensor."""

    tensor: str
    """Name of the parameter or buffer."""
    axis: int
    index: Tensor
    """int64, (channels, positions): entries along the axis, as many for each channel."""
    kind: Kind
    """out, in: a layer's weight. bias: a layer's. norm: factor or shift. statistic: running mean or
    variance. scale: any other factor or term. index: what a Take takes."""
    parts: int = 1
    """Groups of the convolution that reads; the index counts inputs over all of them."""

    def entries(self, tensor: Tensor) -> Tensor:
        """What each channel has in the tensor of that name: (channels, entries)."""
        rows = by_channel(tensor, self.axis, self.parts)
        return rows[self.index.to(tensor.device)].flatten(1)


@dataclass(frozen=True)
class Group:
    """Channels with slots in the same tensors."""

    name: str
    """Of the first layer that makes them, with a number if that layer makes several groups."""
    size: int
    slots: tuple[Slot, ...]
    """In the order in which the network runs."""
    sources: tuple[str, ...]
    """Layers that make the channels; where they are several, their outputs are added up."""
    readers: tuple[str, ...]
    """Layers that read them."""
    locked: str | None
    """Why none of them can be taken away, or None."""
    roots: Tensor
    """int64, (channels,): the atom that stands for each."""


@dataclass(frozen=True)
class Balance:
    """An operation after which as many channels must be left in each part as in any other."""

    where: str
    parts: tuple[tuple[tuple[str, int], ...], ...]
    """Channels of each part, as (group, number)."""


@dataclass
class Plan:
    """Which entries of every tensor stay; the result of a check."""

    cuts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Tensor -> axis -> indices that stay, in their new order."""
    columns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Weight of a grouped convolution -> rows (outputs,), and columns of each (outputs, inputs)."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Index buffer -> its new content."""
    groups: dict[str, int] = field(default_factory=dict)
    """Convolution -> its groups from now on."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> indices of its outputs that stay, in their new order."""

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor of that name; the tensor itself if all of it does."""
        if name in self.columns:
            rows, columns = (index.to(tensor.device) for index in self.columns[name])
            return tensor[rows.unsqueeze(1), columns]
        for axis, index in self.cuts.get(name, {}).items():
            whole = len(index) == tensor.shape[axis] and bool(index.diff().eq(1).all())
            if not whole:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor


@dataclass(frozen=True)
class Layer:
    """What was learnt about one convolution or linear layer."""

    weight: str
    bias: str | None
    into: Tensor
    """Atoms of its inputs."""
    out: Tensor
    """Atoms of its outputs."""
    groups: int

    def depthwise(self) -> bool:
        """Every input has a filter of its own."""
        return self.groups > 1 and self.groups == len(self.into)


@dataclass(frozen=True)
class Selecting:
    """What was learnt about an index buffer."""

    index: Tensor
    into: Tensor
    out: Tensor
    own: bool
    """Positions are channels of their own, which may be zero: a Take."""


@dataclass(frozen=True)
class Record:
    """One axis of one tensor, with the atom of each entry."""

    tensor: str
    axis: int
    kind: Kind
    atoms: Tensor
    owner: str
    parts: int = 1


class Network:
    """The channels of a network, as `follow` found them."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shape: Sequence[int]) -> None:
        self.model, self.graph, self.shape = model, graph, tuple(shape)
        book = _Recorder(model)
        walk = Walk(model, graph, book)
        walk.run(self.shape)
        book.close()
        self.spread = walk.spread
        self.layers: dict[str, Layer] = book.layers
        self.selects: dict[str, Selecting] = book.selects
        self.records: list[Record] = list(book.records.values())
        self.fixed: list[Tensor] = book.fixed_atoms
        self.parameters: dict[str, tuple[Tensor, int]] = book.held
        self.padded: Tensor = book.padded
        self.roots: Tensor = book.roots
        """The atom that stands for each atom's channel."""
        self.locks: dict[int, str] = book.reasons
        self.groups: tuple[Group, ...] = tuple(_groups(self.records, self.roots, self.locks))
        self._by_name = {group.name: group for group in self.groups}
        self._balances = book.balances
        self.balances: tuple[Balance, ...] = tuple(self._balance(*b) for b in book.balances)

    def group(self, name: str) -> Group:
        """The group of that name; PruningError if there is none."""
        if name not in self._by_name:
            raise PruningError(f"no group of channels is called '{name}'")
        return self._by_name[name]

    def outputs(self) -> dict[str, Tensor]:
        """Roots of what each layer makes, and each index buffer, in the order of the network."""
        made = {name: self.roots[layer.out] for name, layer in self.layers.items()}
        return made | {name: self.roots[s.out] for name, s in self.selects.items()}

    def gone(self, selection: Selection) -> Tensor:
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
            found.append(group.roots[chosen.cpu()])
        return torch.cat(found).unique()

    def selection(self, roots: Tensor) -> dict[str, Tensor]:
        """The channels with these roots, by group."""
        chosen = {g.name: torch.isin(g.roots, roots).nonzero().flatten() for g in self.groups}
        return {name: index for name, index in chosen.items() if len(index)}

    def plan(self, selection: Selection) -> Plan:
        """What taking these channels away leaves of every tensor.

        Raises PruningError naming the layer if one is left without outputs, if channels are locked,
        or if what is left does not fit together, as with unequal groups of a convolution.
        """
        gone = self.gone(selection)
        for name, roots in self.outputs().items():
            if bool(torch.isin(roots, gone).all()):
                raise PruningError(f"layer {name} would be left without outputs; take away less")
        book = _Cutter(self, gone)
        Walk(self.model, self.graph, book, self.spread).run(self.shape)
        return book.plan

    def allowed(self, selection: Selection) -> dict[str, Tensor]:
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
        gone, ranks = self.gone(selection), self._ranks(selection)
        for roots in self.outputs().values():
            if bool(torch.isin(roots, gone).all()):
                last = max(roots.unique().tolist(), key=ranks.__getitem__)
                gone = gone[gone != last]
        return self._pick(selection, set(gone.tolist()))

    def _evened(self, selection: Selection, whole: bool, spare: bool) -> dict[str, Tensor]:
        """The same number out of each balanced part; with `spare` never all of a part."""
        rank = self._ranks(selection)
        cells = self._cells()
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
        return self._pick(selection, chosen)

    def _unbalanced(self, selection: Selection) -> dict[str, Tensor]:
        bound = {root for parts in self._cells() for part in parts for root in part}
        return self._pick(selection, set(self._ranks(selection)) - bound)

    def _pick(self, selection: Selection, chosen: set[int]) -> dict[str, Tensor]:
        result = {}
        for name, index in selection.items():
            roots = self.group(name).roots[index].tolist()
            stays = torch.tensor([root in chosen for root in roots], dtype=torch.bool)
            if bool(stays.any()):
                result[name] = index[stays]
        return result

    def _ranks(self, selection: Selection) -> dict[int, int]:
        """Place of every selected root in its group's order."""
        return {
            root: place
            for name, index in selection.items()
            for place, root in enumerate(self.group(name).roots[index].tolist())
        }

    def _cells(self) -> list[list[set[int]]]:
        """Balanced parts by root; where balances share channels, the finest division of both."""
        where: dict[int, list[tuple[int, int]]] = {}
        merged = _Union(len(self._balances))
        for number, (_, parts) in enumerate(self._balances):
            for part, atoms in enumerate(parts):
                for root in self.roots[atoms[atoms >= 0]].unique().tolist():
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
            into, out = (self.roots[a].reshape(layer.groups, -1) for a in (layer.into, layer.out))
            both = [set(row) for row in torch.cat((into, out), dim=1).tolist()]
            full = [row for row in both if row <= chosen]
            for row in full[: len(both) - 1]:
                taken |= row
        return taken

    def _balance(self, where: str, parts: Sequence[Tensor]) -> Balance:
        names = {
            root: (group.name, number)
            for group in self.groups
            for number, root in enumerate(group.roots.tolist())
        }
        return Balance(
            where,
            tuple(
                tuple(names[r] for r in self.roots[p[p >= 0]].tolist() if r in names) for p in parts
            ),
        )


def follow(model: nn.Module, example: Tensor) -> Network:
    """The channels of a network; `example` is a batch of inputs, of which only the shape matters.

    Raises PruningError naming the first operation that is not understood, or the first layer that
    never runs.
    """
    return Network(model, trace(model), example.shape[1:])


def by_channel(tensor: Tensor, axis: int, parts: int = 1) -> Tensor:
    """Entries along the axis first: (channels, entries). A view where that is possible.

    With `parts` the tensor is the weight of a convolution with so many groups and the axis its
    inputs, counted over all groups.
    """
    if parts > 1:
        split = tensor.reshape(parts, -1, *tensor.shape[1:])  # part, output, input, kernel
        return split.transpose(1, 2).reshape(parts * tensor.shape[1], -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _once(index: Tensor) -> Tensor:
    """Every number where it stands first."""
    return torch.tensor(list(dict.fromkeys(index.tolist())), dtype=torch.int64)


class _Union:
    """Disjoint sets of numbers; the smallest stands for its set."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, x: int) -> int:
        parent = self.parent
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


class _Recorder:
    """First walk: hands out atoms and writes down who holds them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sets = _Union(0)
        self.records: dict[tuple[str, int], Record] = {}
        self.layers: dict[str, Layer] = {}
        self.selects: dict[str, Selecting] = {}
        self.held: dict[str, tuple[Tensor, int]] = {}
        self.fixed_atoms: list[Tensor] = []
        self.locked: list[tuple[Tensor, str]] = []
        self.balances: list[tuple[str, list[Tensor]]] = []
        self.reasons: dict[int, str] = {}
        self.roots = torch.empty(0, dtype=torch.int64)
        self._padded: list[Tensor] = []
        self._used: set[str] = set()

    def _new(self, count: int) -> Tensor:
        start = len(self.sets.parent)
        self.sets.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def _record(
        self, held: Held, axis: int, kind: Kind, atoms: Tensor, owner: str, parts: int = 1
    ) -> None:
        self._used.add(held.name)
        key = (held.name, axis)
        if held.tensor.shape[axis] * (parts if axis == 1 else 1) != len(atoms):
            raise PruningError(
                f"{held.name} has {held.tensor.shape[axis]} entries for {len(atoms)} channels"
            )
        if key in self.records:
            self.meet(self.records[key].atoms, atoms)
        else:
            self.records[key] = Record(held.name, axis, kind, atoms, owner, parts)

    def fixed(self, count: int, reason: str) -> Tensor:
        atoms = self._new(count)
        self.fixed_atoms.append(atoms)
        self.lock(atoms, reason)
        return atoms

    def layer(
        self, name: str, weight: Held, bias: Held | None, into: Tensor, groups: int
    ) -> Tensor:
        known = self.records.get((weight.name, 0))
        count = weight.tensor.shape[0]
        out = known.atoms if known else self._new(count)
        self._record(weight, 0, "out", out, name)
        if bias is not None:
            self._record(bias, 0, "bias", out, name)
        layer = Layer(weight.name, bias.name if bias else None, into, out, groups)
        if layer.depthwise():
            self._record_through(layer, into)
        else:
            self._record(weight, 1, "in", into, name, groups)
            if groups > 1 and name not in self.layers:
                for side, atoms in (("inputs", into), ("outputs", out)):
                    parts = list(atoms.reshape(groups, -1))
                    self.balances.append((f"{side} of {name}", parts))
        self.layers.setdefault(name, layer)
        return out

    def _record_through(self, layer: Layer, into: Tensor) -> None:
        """Depthwise: what is read and what is made are the same channels."""
        self.meet(into.repeat_interleave(len(layer.out) // layer.groups), layer.out)

    def norm(self, held: Sequence[Held], kind: str, into: Tensor) -> None:
        for one in held:
            if kind in ("norm", "statistic", "scale"):
                self._record(one, 0, kind, into, one.name.rpartition(".")[0])  # type: ignore[arg-type]

    def parameter(self, held: Held) -> Tensor:
        self._used.add(held.name)
        if held.name not in self.held:
            named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            count = held.tensor.numel()
            atoms = self._new(count) if held.name in named else self.fixed(count, "a constant")
            self.held[held.name] = (atoms.reshape(held.tensor.shape), ZERO)
        return self.held[held.name][0]

    def select(self, index: Held, into: Tensor, own: bool) -> Tensor:
        self._used.add(index.name)
        numbers = index.tensor.detach().cpu()
        if index.name in self.selects:
            before = self.selects[index.name]
            self.meet(before.into, into)
            return before.out
        if own:
            out = self._new(len(numbers))
        else:
            out = into[numbers]
            if index.name not in dict(self.model.named_buffers()):
                self.lock(into, f"chosen by {index.name}, which is no buffer")
        self.selects[index.name] = Selecting(numbers, into, out, own)
        self._record(index, 0, "index", out, index.name.removesuffix(".index"))
        return out

    def meet(self, a: Tensor, b: Tensor) -> None:
        different = a != b
        pairs = torch.stack((a[different], b[different]), dim=1).unique(dim=0)
        zeros = (pairs == ZERO).any(dim=1)
        beside = pairs[zeros].amax(dim=1)
        if len(beside):
            self._padded.append(beside)
            self.lock(beside, "added to zeros that the code pads with")
        for x, y in pairs[~zeros].tolist():
            self.sets.join(x, y)

    def lock(self, atoms: Tensor, reason: str) -> None:
        self.locked.append((atoms[atoms >= 0].unique(), reason))

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        self.balances.append((where, list(parts)))

    def close(self) -> None:
        """Settle what stands for what; PruningError if a layer was never seen."""
        for name in self._parameters_left():
            raise PruningError(
                f"layer {name} never runs in eval mode, so what it reads is unknown; build the "
                "network without it"
            )
        self._hold()
        self.roots = torch.tensor([self.sets.find(k) for k in range(len(self.sets.parent))])
        for atoms, reason in self.locked:
            for root in self.roots[atoms].unique().tolist():
                self.reasons.setdefault(root, reason)

    @property
    def padded(self) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *self._padded]).unique()

    def _parameters_left(self) -> list[str]:
        layers = [n for n, p in self.model.named_parameters() if p.numel() > 1]
        return [n.rpartition(".")[0] for n in layers if n not in self._used]

    def _hold(self) -> None:
        """Find the axis of every added or multiplied tensor along which channels differ."""
        for name, (atoms, _) in self.held.items():
            sets: list[int] = [self.sets.find(a) for a in atoms.flatten().tolist()]
            roots = torch.tensor(sets).reshape(atoms.shape)
            if torch.equal(roots, atoms):
                continue  # met nothing
            axes = [
                axis
                for axis in range(atoms.dim())
                if bool((roots == _first_along(roots, axis)).all())
            ]
            if not axes:
                self.lock(atoms.flatten(), f"{name} treats positions of a channel differently")
                continue
            line = roots.movedim(axes[0], 0).flatten(1)[:, 0] if roots.dim() > 1 else roots
            self.held[name] = (atoms, axes[0])
            self.records[name, axes[0]] = Record(
                name, axes[0], "scale", line, name.rpartition(".")[0]
            )


def _first_along(roots: Tensor, axis: int) -> Tensor:
    """The first entry of every other axis, so that only this one is left."""
    index = [slice(None) if k == axis else slice(0, 1) for k in range(roots.dim())]
    return roots[tuple(index)]


class _Cutter:
    """Second walk, through the smaller network: what every layer finds of what it knew."""

    def __init__(self, network: Network, gone: Tensor) -> None:
        self.network, self.gone = network, gone
        self.plan = Plan()
        self._fixed = iter(network.fixed)
        self._records = {(r.tensor, r.axis): r for r in network.records}

    def _root(self, atoms: Tensor) -> Tensor:
        return torch.where(atoms >= 0, self.network.roots[atoms.clamp_min(0)], ZERO)

    def _stay(self, atoms: Tensor) -> Tensor:
        """Positions whose channel stays."""
        return (~torch.isin(self._root(atoms), self.gone)).nonzero().flatten()

    def _match(self, where: str, old: Tensor, new: Tensor) -> Tensor:
        """The old position of each new one: equal channels in equal order."""
        stay = self._stay(old)
        kept, found = self._root(old)[stay], self._root(new)
        by_kept, by_found = kept.argsort(stable=True), found.argsort(stable=True)
        if len(kept) != len(found) or not torch.equal(kept[by_kept], found[by_found]):
            raise PruningError(f"{where} would no longer read the channels that it reads now")
        index = torch.empty_like(stay)
        index[by_found] = stay[by_kept]
        return index

    def _cut(self, name: str, axis: int, index: Tensor) -> None:
        before = self.plan.cuts.setdefault(name, {}).setdefault(axis, index)
        if not torch.equal(before, index):
            raise PruningError(f"{name} would be needed in two orders")

    def fixed(self, count: int, reason: str) -> Tensor:
        return next(self._fixed)

    def layer(
        self, name: str, weight: Held, bias: Held | None, into: Tensor, groups: int
    ) -> Tensor:
        layer = self.network.layers[name]
        if len(into) == 0:
            raise PruningError(f"layer {name} would be left without inputs; take away less")
        if layer.depthwise():
            index = self._match(name, layer.into, into)
            each = len(layer.out) // layer.groups
            rows = (index.unsqueeze(1) * each + torch.arange(each)).flatten()
            self.plan.groups[name] = len(index)
        elif layer.groups > 1:
            rows = self._grouped(name, layer, into)
        else:
            rows = self._stay(layer.out)
            self._cut(layer.weight, 1, self._match(name, layer.into, into))
        self._cut(layer.weight, 0, rows)
        if bias is not None:
            self._cut(bias.name, 0, rows)
        self.plan.kept[name] = rows
        return layer.out[rows]

    def _grouped(self, name: str, layer: Layer, into: Tensor) -> Tensor:
        """Groups keep as many inputs and outputs as each other, or go as a whole."""
        inputs, outputs = len(layer.into) // layer.groups, len(layer.out) // layer.groups
        index = self._match(name, layer.into, into)
        owners = index // inputs
        left = owners.unique_consecutive()
        rows_of = self._stay(layer.out)
        rows = [rows_of[rows_of // outputs == owner] for owner in left]
        counts = {int((owners == owner).sum()) for owner in left}
        even = len(left.unique()) == len(left) and len(counts) == 1
        if not even or len({len(r) for r in rows}) != 1 or sum(map(len, rows)) != len(rows_of):
            raise PruningError(
                f"the {layer.groups} groups of {name} would no longer be of one size; take the "
                "same number of channels from each, or whole groups"
            )
        columns = (index % inputs).reshape(len(left), -1)
        order = torch.cat(rows)
        self.plan.groups[name] = len(left)
        self.plan.columns[layer.weight] = (order, columns.repeat_interleave(len(rows[0]), dim=0))
        return order

    def norm(self, held: Sequence[Held], kind: str, into: Tensor) -> None:
        for one in held:
            self._cut(one.name, 0, self._match(one.name, self._records[one.name, 0].atoms, into))

    def parameter(self, held: Held) -> Tensor:
        atoms, axis = self.network.parameters[held.name]
        if axis == ZERO:
            return atoms
        line = self._records[held.name, axis].atoms
        index = self._stay(line)
        self._cut(held.name, axis, index)
        return atoms.index_select(axis, index)

    def select(self, index: Held, into: Tensor, own: bool) -> Tensor:
        known = self.network.selects[index.name]
        matched = self._match(index.name, known.into, into)
        place = torch.full((len(known.into) + 1,), ZERO)  # the last one stands for zeros
        place[matched] = torch.arange(len(matched))
        stay = self._stay(known.out)
        values = place[known.index][stay]
        self._cut(index.name, 0, stay)
        self.plan.values[index.name] = values
        return known.out[stay]

    def meet(self, a: Tensor, b: Tensor) -> None:
        x, y = self._root(a), self._root(b)
        wrong = (x != y) & ~self._beside_zero(a, b) & ~self._beside_zero(b, a)
        if bool(wrong.any()):
            raise PruningError("would add up channels that do not belong together")

    def _beside_zero(self, a: Tensor, b: Tensor) -> Tensor:
        return (a == ZERO) & torch.isin(b, self.network.padded)

    def lock(self, atoms: Tensor, reason: str) -> None:
        """Nothing to do: locked channels are never among those that go."""

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """Nothing to do: what does not fit is noticed by those who read."""


def _groups(records: Sequence[Record], roots: Tensor, locks: Mapping[int, str]) -> list[Group]:
    """Channels sorted by what they have slots in, and by why they are locked."""
    kind = torch.zeros(len(roots), dtype=torch.int64)  # number of the group of each root
    fresh = 1
    reasons = sorted(set(locks.values()))
    for root, reason in locks.items():
        kind[root] = fresh + reasons.index(reason)
    fresh += len(reasons)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for record in records:
        at = (record.atoms >= 0).nonzero().flatten()
        mine, inverse, counts = roots[record.atoms[at]].unique(
            return_inverse=True, return_counts=True
        )
        keys, places = torch.stack((kind[mine], counts), 1).unique(dim=0, return_inverse=True)
        kind[mine] = fresh + places
        fresh += len(keys)
        found.append((mine, at[inverse.argsort(stable=True)], counts))
    slots: dict[int, list[Slot]] = {}
    members: dict[int, Tensor] = {}
    owners: dict[int, list[tuple[str, Kind]]] = {}
    for record, (mine, at, counts) in zip(records, found, strict=True):
        start = counts.cumsum(0) - counts
        for number in kind[mine].unique().tolist():
            where = (kind[mine] == number).nonzero().flatten()
            width = int(counts[where[0]])
            index = at[start[where].unsqueeze(1) + torch.arange(width)]
            if number not in members:
                order = index[:, 0].argsort()
                members[number] = mine[where][order]
            by_root = members[number].argsort()
            order = torch.empty_like(by_root)
            order[by_root] = torch.arange(len(by_root))  # rank of each member among the roots
            slot = Slot(record.tensor, record.axis, index[order], record.kind, record.parts)
            slots.setdefault(number, []).append(slot)
            owners.setdefault(number, []).append((record.owner, record.kind))
    return _named(slots, members, owners, locks)


def _named(
    slots: Mapping[int, list[Slot]],
    members: Mapping[int, Tensor],
    owners: Mapping[int, list[tuple[str, Kind]]],
    locks: Mapping[int, str],
) -> list[Group]:
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for number, held in slots.items():
        sources = tuple(o for o, kind in owners[number] if kind in ("out", "index"))
        readers = tuple(o for o, kind in owners[number] if kind == "in")
        first = sources[0] if sources else "input"
        taken[first] = taken.get(first, 0) + 1
        groups.append(
            Group(
                name=first if taken[first] == 1 else f"{first}#{taken[first]}",
                size=len(members[number]),
                slots=tuple(held),
                sources=sources,
                readers=readers,
                locked=locks.get(int(members[number][0])),
                roots=members[number],
            )
        )
    return groups
