"""Views of tensors with given sizes: attributes that count channels, and locks of channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.channels.ids import AttributeSize, TracedNumber, TracedSize

Attribute = tuple[str, str]
"""Path of a module, and the name of an attribute that holds a size."""


@dataclass(frozen=True)
class View:
    """A tensor that is viewed, or expanded, with given sizes."""

    node: str
    sizes: tuple[Any, ...]
    """-1 or TracedSizes for sizes that follow the tensor, AttributeSizes for sizes that an
    attribute holds, plain numbers for hard-coded sizes, and a TracedNumber, in place of a view, for
    what the code calculates with."""
    ids: Tensor
    """Ids of its entries, broadcastable to the sizes."""

    def matters(self) -> bool:
        """Whether the view may restrict channels."""
        return any(
            isinstance(size, AttributeSize)
            or getattr(size, "counted", None) is not None
            or (_stated(size) and self.ids.shape[axis] > 1)
            for axis, size in enumerate(self.sizes)
        )


@dataclass
class Settled:
    """The consequences of all views of a network."""

    counts: dict[Attribute, Tensor] = field(default_factory=dict)
    """Attribute -> ids of the channels that it counts."""
    locks: list[tuple[Tensor, str]] = field(default_factory=list)
    """Ids that cannot be removed, and the reason."""
    balances: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    """Node, and the ids of parts that must stay of equal size."""


def settle(views: Sequence[View], canonical_of: Callable[[Tensor], Tensor]) -> Settled:
    """The consequences of the views, once it is known which ids are the same channel.

    If channels differ along a single axis, and an attribute holds the size of this axis, the
    attribute counts the channels, unless the code calculates with it; if the size is hard-coded,
    the channels are locked. If they differ along other axes too, each position of the former axis
    is a part of a balance.
    """
    settled, constant = Settled(), set[Attribute]()
    calculated: dict[Attribute, str] = {}  # attribute -> why it cannot change
    first: list[tuple[Tensor, str]] = []
    for view in views:
        known = canonical_of(view.ids)
        varying = [axis for axis in range(known.dim()) if not _alike(known, axis)]
        fixed = [axis for axis in varying if _stated(view.sizes[axis])]
        counting = varying[0] if fixed == varying and len(fixed) == 1 else None
        for axis, size in enumerate(view.sizes):
            if isinstance(size, AttributeSize) and axis != counting:
                constant.add((size.module, size.key))
            if isinstance(size, AttributeSize) and size.calculated:
                calculated[size.module, size.key] = f"the code calculates with {size.path}"
            if isinstance(size, TracedNumber):
                counted = _number_of(size, canonical_of)
                first.append((counted, f"{view.node} calculates with their number"))
            if isinstance(size, TracedSize) and size.counted is not None:
                along = _along(view.ids, axis) if axis in varying else None
                first += _foreign(view, size, along, canonical_of)
        if counting is not None and isinstance(size := view.sizes[counting], AttributeSize):
            settled.locks += _count(settled.counts, size, _along(view.ids, counting), canonical_of)
        elif fixed and fixed == varying:
            reason = f"{view.node} views them in a hard-coded shape"
            settled.locks.append((view.ids.flatten(), reason))
        elif fixed:
            parts = view.ids.movedim(fixed, tuple(range(len(fixed))))
            rows = parts.flatten(0, len(fixed) - 1).flatten(1)
            settled.balances.append((view.node, list(rows)))
    first += [(settled.counts.pop(k), why) for k, why in calculated.items() if k in settled.counts]
    settled.locks = first + settled.locks  # the first reason for a lock counts
    for key in sorted(constant & settled.counts.keys()):
        reason = f"{'.'.join(filter(None, key))} is the size of something else too"
        settled.locks.append((settled.counts.pop(key), reason))
    return settled


def _number_of(size: TracedNumber, canonical_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Ids that a number depends on; a difference does not on channels that both sizes count."""
    counted = canonical_of(size.counted)
    if size.less is None:
        return counted if len(counted.unique()) > 1 else counted[:0]
    less = canonical_of(size.less)
    ids, places = torch.cat((counted, less)).unique(return_inverse=True)
    left = places[: len(counted)].bincount(minlength=len(ids))
    return ids[left != places[len(counted) :].bincount(minlength=len(ids))]


def _foreign(
    view: View, size: TracedSize, ids: Tensor | None, canonical_of: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, str]]:
    """Locks for a size that counts channels other than those along its axis.

    Computed sizes may count parts of them; each propagation checks whether the parts fit.
    """
    assert size.counted is not None
    if ids is not None:
        counted, own = canonical_of(size.counted), canonical_of(ids)
        if size.computed and bool(torch.isin(counted, canonical_of(view.ids)).any()):
            return []
        if torch.equal(counted.sort().values, own.sort().values):
            return []
    reason = f"{view.node} views a tensor in a size that counts other channels"
    return [(other, reason) for other in (size.counted, ids) if other is not None]


def _count(
    counts: dict[Attribute, Tensor],
    size: AttributeSize,
    ids: Tensor,
    canonical_of: Callable[[Tensor], Tensor],
) -> list[tuple[Tensor, str]]:
    """Record that an attribute counts these channels; returns locks if it also counts others."""
    before = counts.setdefault((size.module, size.key), ids)
    if torch.equal(canonical_of(before), canonical_of(ids)):
        return []
    reason = f"{'.'.join(filter(None, (size.module, size.key)))} is the size of other channels too"
    return [(before, reason), (ids, reason)]


def _stated(size: Any) -> bool:
    """Whether the size is hard-coded, or held by an attribute."""
    return not isinstance(size, TracedSize) and size != -1


def _alike(ids: Tensor, axis: int) -> bool:
    """Whether ids are equal along an axis."""
    return bool((ids == ids.narrow(axis, 0, 1)).all())


def _along(ids: Tensor, axis: int) -> Tensor:
    """Ids along one axis, at the first position of all others."""
    return ids.movedim(axis, 0).flatten(1)[:, 0]
