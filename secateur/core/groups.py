"""Channels sorted by what they have slots in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.recorder import Kind, Record


@dataclass(frozen=True)
class Slot:
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


def by_channel(tensor: Tensor, axis: int, parts: int = 1) -> Tensor:
    """Entries along the axis first: (channels, entries). A view where that is possible.

    With `parts` the tensor is the weight of a convolution with so many groups and the axis its
    inputs, counted over all groups.
    """
    if parts > 1:
        split = tensor.reshape(parts, -1, *tensor.shape[1:])  # part, output, input, kernel
        return split.transpose(1, 2).reshape(parts * tensor.shape[1], -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def sort(records: Sequence[Record], roots: Tensor, locks: Mapping[int, str]) -> list[Group]:
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
        both = kind[mine] * (len(at) + 1) + counts
        keys, places = both.unique(return_inverse=True)
        kind[mine] = fresh + places
        fresh += len(keys)
        found.append((mine, at[inverse.argsort(stable=True)], counts))
    slots: dict[int, list[Slot]] = {}
    members: dict[int, Tensor] = {}
    orders: dict[int, Tensor] = {}  # place of each member among the roots
    owners: dict[int, list[tuple[str, Kind]]] = {}
    for record, (mine, at, counts) in zip(records, found, strict=True):
        start = counts.cumsum(0) - counts
        for number in kind[mine].unique().tolist():
            where = (kind[mine] == number).nonzero().flatten()
            width = int(counts[where[0]])
            index = at[start[where].unsqueeze(1) + torch.arange(width)]
            if number not in members:
                orders[number] = index[:, 0].argsort()
                members[number] = mine[where][orders[number]]
            index = index[orders[number]]
            slot = Slot(record.tensor, record.axis, index, record.kind, record.parts)
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
