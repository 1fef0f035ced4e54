"""Channel groups: channels with entries in the same tensors, and the positions of the entries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.channels.records import AxisEntry, MemberKind


@dataclass(frozen=True)
class Member:
    """The entries that the channels of a group have along one axis of one tensor."""

    tensor: str
    """Name of the parameter or buffer."""
    axis: int
    index: Tensor
    """int64, (channels, entries): positions along the axis, the same number for each channel."""
    kind: MemberKind
    groups: int = 1
    """Groups of the convolution whose inputs these are; `index` counts inputs over all groups."""

    def entries(self, tensor: Tensor) -> Tensor:
        """Values of each channel in a tensor of this member's shape: (channels, values)."""
        rows = by_channel(tensor, self.axis, self.groups)
        return rows[self.index.to(tensor.device)].flatten(1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum of each channel's entries in a tensor of this member's shape: (channels,)."""
        along = by_channel(values, self.axis, self.groups).sum(1)
        return along[self.index.to(values.device)].sum(1)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels with members in the same tensors."""

    name: str
    """The first layer that produces the channels; numbered if it produces several groups."""
    size: int
    """Number of channels."""
    members: tuple[Member, ...]
    """In the order of execution."""
    producers: tuple[str, ...]
    """Layers that have the channels as outputs; outputs of several producers are added."""
    consumers: tuple[str, ...]
    """Layers that have the channels as inputs."""
    locked: str | None
    """Why none of the channels can be removed; None if they can."""
    ids: Tensor
    """int64, (channels,): canonical ids."""

    @property
    def weights(self) -> tuple[Member, ...]:
        """Members whose magnitude shows the importance of a channel: filters of the layers that
        produce it, weights that consume it, and scales of normalisations in between."""
        return tuple(
            member
            for member in self.members
            if member.kind in ("out", "in")
            or (member.kind == "norm" and member.tensor.endswith("weight"))
        )


def by_channel(tensor: Tensor, axis: int, groups: int = 1) -> Tensor:
    """The tensor with the axis first and all others flattened: (channels, values).

    The result is a view if possible. With `groups` above 1, the tensor is the weight of a
    convolution with that many groups, and the axis is that of its inputs, counted over all groups.
    """
    if groups > 1:
        split = tensor.reshape(groups, -1, *tensor.shape[1:])  # group, output, input, kernel
        return split.transpose(1, 2).reshape(groups * tensor.shape[1], -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


@dataclass(frozen=True)
class _AxisChannels:
    """The channels along one axis, in ascending order of their canonical ids."""

    ids: Tensor
    """Canonical ids, ascending, (channels,)."""
    positions: Tensor
    """Positions along the axis, those of the first channel first."""
    counts: Tensor
    """Number of positions of each channel, (channels,)."""

    def by_class(self, class_of: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each class found here: its number, (ids,), and their positions, (ids, positions)."""
        start = self.counts.cumsum(0) - self.counts
        classes, order = class_of[self.ids].sort(stable=True)
        numbers, sizes = classes.unique_consecutive(return_counts=True)
        widths = self.counts[order[sizes.cumsum(0) - 1]].tolist()
        ids = self.ids[order].split(sizes.tolist())
        firsts = start[order].split(sizes.tolist())
        for number, width, own, first in zip(numbers.tolist(), widths, ids, firsts, strict=True):
            entries = first.unsqueeze(1)
            index = entries if width == 1 else entries + torch.arange(width)
            yield number, own, self.positions[index]


def group_channels(
    axes: Sequence[AxisEntry], canonical: Tensor, locks: Mapping[int, str]
) -> list[ChannelGroup]:
    """Groups of the channels that have entries along the same axes and the same reason for a lock.

    `canonical` has the canonical id of every id, (ids,); `locks` has reasons by canonical id.
    """
    class_of, found = _classes(axes, canonical, locks)
    members: dict[int, list[Member]] = {}
    ids: dict[int, Tensor] = {}
    owners: dict[int, list[tuple[str, MemberKind]]] = {}
    orders: dict[int, Tensor | None] = {}  # by class: order of its channels, if not ascending
    rows: dict[int, list[tuple[int, Tensor]]] = {}  # by axis: class, and positions in its order
    for axis, channels in zip(axes, found, strict=True):
        if id(channels) not in rows:
            rows[id(channels)] = []
            for number, own, index in channels.by_class(class_of):
                if number not in ids:  # the first axis gives the order
                    order = index[:, 0].argsort()
                    ids[number] = own[order]
                    ascending = torch.equal(order, torch.arange(len(order)))
                    orders[number] = None if ascending else order
                order_of = orders[number]
                rows[id(channels)].append((number, index if order_of is None else index[order_of]))
        for number, index in rows[id(channels)]:
            member = Member(axis.tensor, axis.axis, index, axis.kind, axis.groups)
            members.setdefault(number, []).append(member)
            owners.setdefault(number, []).append((axis.owner, axis.kind))
    return _named(members, ids, owners, locks)


def _classes(
    axes: Sequence[AxisEntry], canonical: Tensor, locks: Mapping[int, str]
) -> tuple[Tensor, list[_AxisChannels]]:
    """Class of each canonical id, (ids,), and the channels of each axis.

    The initial classes are the reasons for locking; each axis then divides them by the number of
    its entries (partition refinement).
    """
    class_of = torch.zeros(len(canonical), dtype=torch.int64)
    reasons = sorted(set(locks.values()))
    for canonical_id, reason in locks.items():
        class_of[canonical_id] = 1 + reasons.index(reason)
    fresh = 1 + len(reasons)
    known: dict[bytes, _AxisChannels] = {}  # the tensors of a norm often have equal axes
    found: list[_AxisChannels] = []
    for axis in axes:
        content = axis.ids.numpy().tobytes()
        if content not in known:
            positions = (axis.ids >= 0).nonzero().flatten()
            ids, inverse, counts = canonical[axis.ids[positions]].unique(
                return_inverse=True, return_counts=True
            )
            keys, numbers = (class_of[ids] * (len(positions) + 1) + counts).unique(
                return_inverse=True
            )
            class_of[ids] = fresh + numbers
            fresh += len(keys)
            ordered = positions[inverse.argsort(stable=True)]
            known[content] = _AxisChannels(ids, ordered, counts)
        found.append(known[content])
    return class_of, found


def _named(
    members: Mapping[int, list[Member]],
    ids: Mapping[int, Tensor],
    owners: Mapping[int, list[tuple[str, MemberKind]]],
    locks: Mapping[int, str],
) -> list[ChannelGroup]:
    groups: list[ChannelGroup] = []
    used: dict[str, int] = {}  # name -> how many groups have it
    for number, own in members.items():
        producers = tuple(owner for owner, kind in owners[number] if kind in ("out", "index"))
        consumers = tuple(owner for owner, kind in owners[number] if kind == "in")
        first = producers[0] if producers else "input"
        used[first] = used.get(first, 0) + 1
        groups.append(
            ChannelGroup(
                name=first if used[first] == 1 else f"{first}#{used[first]}",
                size=len(ids[number]),
                members=tuple(own),
                producers=producers,
                consumers=consumers,
                locked=locks.get(int(ids[number][0])),
                ids=ids[number],
            )
        )
    return groups
