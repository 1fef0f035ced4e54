"""Channels sorted by what they have slots in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.channels.builder import AxisEntry, Kind


@dataclass(frozen=True)
class Member:
    """Where the channels of a group stand in one tensor."""

    tensor: str
    """Name of the parameter or buffer."""
    axis: int
    index: Tensor
    """int64, (channels, positions): entries along the axis, as many for each channel."""
    kind: Kind
    parts: int = 1
    """Groups of the convolution that reads; the index counts inputs over all of them."""

    def entries(self, tensor: Tensor) -> Tensor:
        """What each channel has in the tensor of that name: (channels, entries)."""
        rows = by_channel(tensor, self.axis, self.parts)
        return rows[self.index.to(tensor.device)].flatten(1)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels with slots in the same tensors."""

    name: str
    """Of the first layer that makes them, with a number if that layer makes several groups."""
    size: int
    slots: tuple[Member, ...]
    """In the order in which the network runs."""
    sources: tuple[str, ...]
    """Layers that make the channels; where they are several, their outputs are added up."""
    readers: tuple[str, ...]
    """Layers that read them."""
    locked: str | None
    """Why none of them can be taken away, or None."""
    ids: Tensor
    """int64, (channels,): the atom that stands for each."""


def by_channel(tensor: Tensor, axis: int, parts: int = 1) -> Tensor:
    """Entries along the axis first: (channels, entries). A view where that is possible.

    With `parts` the tensor is the weight of a convolution with so many groups and the axis its
    inputs, counted over all groups.
    """
    if parts > 1:
        split = tensor.reshape(parts, -1, *tensor.shape[1:])  # part, output, input, kernel
        return split.transpose(1, 2).reshape(parts * tensor.shape[1], -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


@dataclass(frozen=True)
class _Place:
    """Where the channels of one axis stand."""

    mine: Tensor
    """Their roots, ascending."""
    at: Tensor
    """Entries of the axis, those of the first root first."""
    counts: Tensor
    """How many entries each root has."""

    def by(self, kind: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Kind, its roots here, and their entries, (roots, entries of each)."""
        start = self.counts.cumsum(0) - self.counts
        sorted_kinds, order = kind[self.mine].sort(stable=True)
        kinds, sizes = sorted_kinds.unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0)
        widths = self.counts[order[ends - 1]].tolist()
        parts = zip(
            self.mine[order].split(sizes.tolist()), start[order].split(sizes.tolist()), strict=True
        )
        for key, width, (mine, first) in zip(kinds.tolist(), widths, parts, strict=True):
            entries = first.unsqueeze(1)
            yield key, mine, self.at[entries if width == 1 else entries + torch.arange(width)]


def sort(
    records: Sequence[AxisEntry], roots: Tensor, locks: Mapping[int, str]
) -> list[ChannelGroup]:
    """Channels sorted by what they have slots in, and by why they are locked."""
    kind = torch.zeros(len(roots), dtype=torch.int64)  # number of the group of each root
    fresh = 1
    reasons = sorted(set(locks.values()))
    for root, reason in locks.items():
        kind[root] = fresh + reasons.index(reason)
    fresh += len(reasons)
    places: dict[bytes, _Place] = {}  # a norm's tensors and its neighbours often hold the same
    found: list[_Place] = []
    for record in records:
        same = record.ids.numpy().tobytes()
        if same not in places:
            at = (record.ids >= 0).nonzero().flatten()
            mine, inverse, counts = roots[record.ids[at]].unique(
                return_inverse=True, return_counts=True
            )
            both = kind[mine] * (len(at) + 1) + counts
            keys, numbers = both.unique(return_inverse=True)
            kind[mine] = fresh + numbers
            fresh += len(keys)
            places[same] = _Place(mine, at[inverse.argsort(stable=True)], counts)
        found.append(places[same])
    slots: dict[int, list[Member]] = {}
    members: dict[int, Tensor] = {}
    orders: dict[int, Tensor | None] = {}  # place of each member among the roots, if not its own
    owners: dict[int, list[tuple[str, Kind]]] = {}
    cells: dict[int, list[tuple[int, Tensor]]] = {}  # by place: kind, and entries in its order
    for record, place in zip(records, found, strict=True):
        if id(place) not in cells:
            cells[id(place)] = here = []
            for key, mine, index in place.by(kind):
                if key not in members:
                    order = index[:, 0].argsort()
                    members[key] = mine[order]
                    orders[key] = None if torch.equal(order, torch.arange(len(order))) else order
                sorted_so = orders[key]
                here.append((key, index if sorted_so is None else index[sorted_so]))
        for key, index in cells[id(place)]:
            slot = Member(record.tensor, record.axis, index, record.kind, record.parts)
            slots.setdefault(key, []).append(slot)
            owners.setdefault(key, []).append((record.owner, record.kind))
    return _named(slots, members, owners, locks)


def _named(
    slots: Mapping[int, list[Member]],
    members: Mapping[int, Tensor],
    owners: Mapping[int, list[tuple[str, Kind]]],
    locks: Mapping[int, str],
) -> list[ChannelGroup]:
    groups: list[ChannelGroup] = []
    taken: dict[str, int] = {}
    for number, held in slots.items():
        sources = tuple(o for o, kind in owners[number] if kind in ("out", "index"))
        readers = tuple(o for o, kind in owners[number] if kind == "in")
        first = sources[0] if sources else "input"
        taken[first] = taken.get(first, 0) + 1
        groups.append(
            ChannelGroup(
                name=first if taken[first] == 1 else f"{first}#{taken[first]}",
                size=len(members[number]),
                slots=tuple(held),
                sources=sources,
                readers=readers,
                locked=locks.get(int(members[number][0])),
                ids=members[number],
            )
        )
    return groups
