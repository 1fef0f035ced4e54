"""Operations that join tensors along an axis, divide them, or select entries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur.base.errors import PruningError
from secateur.channels.ids import ChannelIds, NamedTensor, TracedSize
from secateur.channels.rules import attention, elementwise, shapes
from secateur.channels.rules.call import Call


def cat(call: Call, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> ChannelIds:
    """Ids are joined like their tensors.

    If channels differ along another axis, such as that of an embedding to which a class token is
    joined, entries at the same position of this axis become one channel.
    """
    if not all(isinstance(t, ChannelIds | NamedTensor) for t in tensors):
        raise PruningError("joins channels with something that has none")
    parts = [call.channels(t) for t in tensors]
    dim = (dim if axis is None else axis) % len(parts[0].shape)
    across = any(part.varies(k) for part in parts for k in range(len(part.shape)) if k != dim)
    if all(part.ids.numel() == 1 for part in parts):  # one channel may have several entries
        across = any(part.shape[dim] > 1 for part in parts if bool((part.ids >= 0).all()))
    if call.broadcasts.setdefault(call.node, (across, across))[0]:
        parts = _one_along(call, parts, dim)
    ids = []
    for part in parts:
        form = [
            part.shape[k] if k == dim or any(p.varies(k) for p in parts) else 1
            for k in range(len(part.shape))
        ]
        ids.append(part.ids.expand(form))
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    for part in parts:
        sizes = enumerate(zip(part.shape, shape, strict=True))
        if any(one != other for k, (one, other) in sizes if k != dim):
            raise PruningError(f"sizes {tuple(part.shape)} do not fit")
    joined = torch.cat(ids, dim)
    if call.broadcasts[call.node][0]:  # one channel along `dim`
        joined = joined.narrow(dim, 0, 1)
    return ChannelIds(joined, tuple(shape))


def stack(call: Call, tensors: Sequence[Any], dim: int = 0) -> ChannelIds:
    """As `cat` along a new axis: the tensors have the same channels."""
    parts = [shapes.unsqueeze(call, call.channels(t), dim) for t in tensors]
    call.broadcasts.setdefault(call.node, (True, True))
    return cat(call, parts, dim)


def _one_along(call: Call, parts: Sequence[ChannelIds], dim: int) -> list[ChannelIds]:
    """Parts whose entries along an axis are one channel, which all parts share."""
    rows = []
    for part in parts:
        first = part.ids.narrow(dim, 0, 1)
        if part.varies(dim):
            call.visitor.unify(first.expand(part.ids.shape).flatten(), part.ids.flatten())
        rows.append(first)
    real = [row for row in rows if bool((row >= 0).any())]  # zeros fit any channel
    if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
        raise PruningError("joins tensors of different sizes")
    for row in real[1:]:
        a, b = torch.broadcast_tensors(real[0], row)
        call.visitor.unify(a.flatten(), b.flatten())
    return [ChannelIds(real[0], part.shape) for part in parts]


def chunk(call: Call, x: ChannelIds, chunks: int, dim: int = 0) -> list[ChannelIds]:
    """Channels are divided into equal parts, which must stay equal."""
    parts = [ChannelIds.from_expanded(part) for part in x.expanded().chunk(chunks, dim)]
    if x.varies(dim):
        call.visitor.balance(call.node, [part.ids.flatten() for part in parts])
    return parts


def glu(call: Call, x: ChannelIds, dim: int = -1) -> Any:
    """The first half along an axis times the sigmoid of the second."""
    first, second = chunk(call, x, 2, dim)
    return elementwise.combine(call, first, second)


def glu_module(call: Call, module: nn.GLU, x: ChannelIds) -> Any:
    """See glu."""
    return glu(call, x, module.dim)


def split(call: Call, x: ChannelIds, split_size_or_sections: Any, dim: int = 0) -> list[ChannelIds]:
    """As chunk if the size was read from a tensor; otherwise channels are locked."""
    size = split_size_or_sections
    parts = [ChannelIds.from_expanded(part) for part in x.expanded().split(size, dim)]
    if x.varies(dim) and isinstance(size, TracedSize):
        call.visitor.balance(call.node, [part.ids.flatten() for part in parts])
    elif x.varies(dim):
        call.lock(x, f"{call.node} splits them at hard-coded positions")
    return parts


def index_select(call: Call, x: ChannelIds, dim: int, index: Any) -> ChannelIds:
    """Entries along one axis by an index; an index buffer is a member of the channels' group.

    With a boolean mask channels are locked, since it marks channels by their positions.
    """
    dim %= len(x.shape)
    numbers = index.tensor if isinstance(index, NamedTensor) else torch.as_tensor(index)
    if numbers.dtype in (torch.bool, torch.uint8):
        call.lock(x, f"{call.node} selects them by a boolean mask")
        numbers = numbers.nonzero().flatten()
    elif isinstance(index, NamedTensor) and (x.varies(dim) or x.shape[dim] == 1):
        ids = call.visitor.select(index, x.axis_ids(dim), owns_channels=False)
        shape = [len(ids) if k == dim else s for k, s in enumerate(x.shape)]
        return ChannelIds.along(dim, ids, shape)
    elif isinstance(index, NamedTensor):
        call.visitor.parameter(index)  # which must not be renumbered with channels elsewhere
    else:
        call.lock(x, "selected by hard-coded indices")
    return ChannelIds.from_expanded(x.expanded().index_select(dim, numbers.cpu()))


def getitem(call: Call, x: Any, index: Any) -> Any:
    """`x[index]`: one of several tensors, or slices, single entries or an index of one axis."""
    if isinstance(x, list | tuple):
        return x[index]
    if isinstance(x, NamedTensor) and isinstance(index, NamedTensor):
        call.visitor.parameter(index)
        return attention.index_parameter(call, x, 0, index.tensor)
    x = call.channels(x)
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [p for p in parts if not isinstance(p, NamedTensor | list | ChannelIds)]:
        at = next(k for k, p in enumerate(parts) if p is Ellipsis)
        missing = len(x.shape) - sum(p is not None for p in parts) + 1
        parts[at : at + 1] = [slice(None)] * missing
    axis = 0
    for part in parts:
        if part is None:
            continue
        if isinstance(part, NamedTensor | list):
            if sum(isinstance(p, slice) and p == slice(None) for p in parts) != len(parts) - 1:
                raise PruningError("do not know what this index does to channels")
            return index_select(call, x, axis, part)
        if x.varies(axis) and isinstance(part, int):
            shapes.entry(call, x, axis)
        elif x.varies(axis) and part != slice(None):
            call.lock(x, f"{call.node} selects some of them by hard-coded indices")
        axis += 1
    return ChannelIds.from_expanded(x.expanded()[tuple(parts)])
