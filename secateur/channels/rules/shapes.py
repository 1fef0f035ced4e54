"""Operations that move entries without changing them, and those that read a tensor's shape."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from secateur.base.errors import PruningError
from secateur.channels.ids import ZERO, AttributeSize, ChannelIds, TracedSize
from secateur.channels.rules.call import Call, zeros


def reshape(call: Call, x: ChannelIds, *shape: Any) -> ChannelIds:
    """Ids move with their entries.

    An axis along which channels differ cannot become smaller if its size is hard-coded; if an
    attribute holds the size, it can. See channels/views.py.
    """
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    out = ChannelIds.from_expanded(x.expanded().reshape(_present(call, sizes)))
    call.visitor.view(call.node, sizes, out.ids)
    return out


def reshape_as(call: Call, x: ChannelIds, other: ChannelIds) -> ChannelIds:
    """See reshape."""
    return reshape(call, x, size(call, other))


def _present(call: Call, sizes: Sequence[Any]) -> tuple[int, ...]:
    """The sizes, with the current values of attributes."""
    return tuple(call.visitor.size(s) if isinstance(s, AttributeSize) else s for s in sizes)


def unflatten(call: Call, x: ChannelIds, dim: int, sizes: Sequence[int]) -> ChannelIds:
    """One axis becomes several."""
    dim %= len(x.shape)
    others = size(call, x)
    return reshape(call, x, (*others[:dim], *sizes, *others[dim + 1 :]))


def channel_shuffle(call: Call, x: ChannelIds, groups: int) -> ChannelIds:
    """Channels of `groups` groups are interleaved."""
    count, size = x.shape[:2]
    pixels = tuple(map(TracedSize, x.shape[2:]))
    split = reshape(call, x, (count, groups, TracedSize(size // groups), *pixels))
    turned = ChannelIds(split.ids.transpose(1, 2), (count, size // groups, groups, *pixels))
    return reshape(call, turned, (count, TracedSize(size), *pixels))


def channel_shuffle_module(call: Call, module: nn.ChannelShuffle, x: ChannelIds) -> ChannelIds:
    """See channel_shuffle."""
    return channel_shuffle(call, x, module.groups)


def pixel_shuffle(call: Call, x: ChannelIds, upscale_factor: int) -> ChannelIds:
    """Several channels become the pixels of one; they are one unit."""
    count, channels, height, width = x.shape
    factor = int(upscale_factor)
    ids = x.axis_ids(1).reshape(-1, factor**2)
    whole = ids.amax(dim=1, keepdim=True)
    call.visitor.unify(whole.expand(ids.shape).flatten(), ids.flatten())
    shape = (count, channels // factor**2, height * factor, width * factor)
    return ChannelIds.along(1, whole.flatten(), shape)


def pixel_shuffle_module(call: Call, module: nn.PixelShuffle, x: ChannelIds) -> ChannelIds:
    """See pixel_shuffle."""
    return pixel_shuffle(call, x, module.upscale_factor)


def flip(call: Call, x: ChannelIds, *dims: Any) -> ChannelIds:
    """Entries in reverse order along axes."""
    axes = dims[0] if isinstance(dims[0], tuple | list) else dims
    return ChannelIds(x.ids.flip(tuple(axes)), x.shape)


def repeat(call: Call, x: ChannelIds, *sizes: Any) -> ChannelIds:
    """Several copies along each axis."""
    given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    return ChannelIds.from_expanded(x.expanded().repeat(tuple(map(int, given))))


def flatten(call: Call, x: ChannelIds, start_dim: int = 0, end_dim: int = -1) -> ChannelIds:
    """Several axes become one."""
    return ChannelIds.from_expanded(torch.flatten(x.expanded(), start_dim, end_dim))


def flatten_module(call: Call, module: nn.Flatten, x: ChannelIds) -> ChannelIds:
    """See flatten."""
    return flatten(call, x, module.start_dim, module.end_dim)


def permute(call: Call, x: ChannelIds, *dims: Any) -> ChannelIds:
    """Axes in another order."""
    order = dims[0] if isinstance(dims[0], tuple | list) else dims
    return ChannelIds(x.ids.permute(order), tuple(x.shape[k] for k in order))


def transpose(call: Call, x: ChannelIds, dim0: int, dim1: int) -> ChannelIds:
    """Two axes exchanged."""
    return ChannelIds.from_expanded(x.expanded().transpose(dim0, dim1))


def squeeze(call: Call, x: ChannelIds, *dims: Any) -> ChannelIds:
    """Without axes of size 1; PruningError if that of the channels has become one of them."""
    given = dims[0] if dims and isinstance(dims[0], tuple | list) else dims
    for axis in {k % len(x.shape) for k in given} or range(len(x.shape)):
        single = x.shape[axis] == 1
        before, _ = call.broadcasts.setdefault(f"{call.node}:{axis}", (single, single))
        if single and not before:
            raise PruningError(
                "one channel is left, whose axis would be dropped too; remove fewer, or let the "
                "code name the axes to drop"
            )
    return ChannelIds.from_expanded(x.expanded().squeeze(*dims))


def unsqueeze(call: Call, x: ChannelIds, dim: int) -> ChannelIds:
    """With one more axis, of size 1."""
    return ChannelIds.from_expanded(x.expanded().unsqueeze(dim))


def expand(call: Call, x: ChannelIds, *sizes: Any) -> ChannelIds:
    """Axes of size 1 repeated, and new axes before them; -1 leaves an axis as it is."""
    given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    out = ChannelIds.from_expanded(x.expanded().expand(_present(call, given)))
    call.visitor.view(call.node, given, out.ids)
    return out


def unbind(call: Call, x: ChannelIds, dim: int = 0) -> list[ChannelIds]:
    """The entries along one axis, which must keep its size."""
    entries = [ChannelIds.from_expanded(entry) for entry in x.expanded().unbind(dim)]
    entry(call, x, dim % len(x.shape))
    return entries


def entry(call: Call, x: ChannelIds, axis: int) -> None:
    """Report that single entries along an axis are read, so that it must keep its size."""
    if x.varies(axis):
        sizes = [s if k == axis else TracedSize(s) for k, s in enumerate(x.shape)]
        call.visitor.view(call.node, sizes, x.ids)


def roll(call: Call, x: ChannelIds, shifts: Any, dims: Any = None) -> ChannelIds:
    """Entries move along axes; channels along them are locked."""
    axes = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    if any(x.varies(axis) for axis in axes):
        call.lock(x, f"{call.node} moves them by a hard-coded number")
        ids = torch.roll(x.expanded(), shifts, dims)
        return ChannelIds.from_expanded(ids)
    return x


def expand_as(call: Call, x: ChannelIds, other: ChannelIds) -> ChannelIds:
    """Axes of size 1 repeated to the size of another tensor's."""
    return ChannelIds.from_expanded(x.expanded().expand(other.shape))


def pad(
    call: Call, x: ChannelIds, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> ChannelIds:
    """Padding with zeros gets the id ZERO; with other values, channels are locked."""
    ids, shape = x.ids, list(x.shape)
    for k in range(len(pad) // 2):
        axis, (before, after) = len(shape) - 1 - k, pad[2 * k : 2 * k + 2]
        shape[axis] += before + after
        along = _channels_along(x, axis)
        along, _ = call.broadcasts.setdefault(f"{call.node}:{axis}", (along, along))
        if not along or before == after == 0:
            continue
        if mode != "constant" or value not in (None, 0, 0.0) or min(before, after) < 0:
            call.lock(x, "padded among the channels with values other than zero")
            return call.opaque(shape, "padded among the channels")
        if ids.shape[axis] == 1:
            ids = ids.expand([x.shape[i] if i == axis else n for i, n in enumerate(ids.shape)])
        width = [0, 0] * (ids.dim() - 1 - axis) + [before, after]
        ids = functional.pad(ids, width, value=ZERO)
    return ChannelIds(ids, tuple(shape))


def _channels_along(x: ChannelIds, axis: int) -> bool:
    """Whether channels differ along an axis; a single one lies along axis 1 or the last one."""
    if x.ids.numel() > 1:
        return x.varies(axis)
    last = x.shape[-1] == 1 and 1 not in x.shape[1:-1]
    return axis == (len(x.shape) - 1 if last else 1)


def pad_module(call: Call, module: nn.ZeroPad2d | nn.ZeroPad3d, x: ChannelIds) -> ChannelIds:
    """See pad."""
    return pad(call, x, module.padding)


def new_zeros(call: Call, x: ChannelIds, *size: Any, **_: Any) -> ChannelIds:
    """Zeros in the given shape."""
    sizes = size[0] if isinstance(size[0], tuple | list) else size
    return zeros(sizes)


def size(call: Call, x: ChannelIds, dim: int | None = None) -> Any:
    """Sizes that follow the tensor."""
    sizes = tuple(TracedSize.of(x, axis) for axis in range(len(x.shape)))
    return sizes if dim is None else sizes[dim]


def dim(call: Call, x: ChannelIds) -> int:
    """The number of axes."""
    return len(x.shape)


def attribute(call: Call, x: ChannelIds, name: str) -> Any:
    """`getattr`: the shape, and attributes that do not depend on channels."""
    known = {"shape": size(call, x), "ndim": len(x.shape)}
    known |= {"dtype": call.dtype, "device": torch.device("cpu")}
    if name not in known:
        raise PruningError(f"do not know what .{name} does to channels")
    return known[name]
