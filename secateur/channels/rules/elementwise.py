"""Elementwise operations, pooling, and reductions over axes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.base.errors import PruningError
from secateur.channels.ids import ChannelIds, NamedTensor
from secateur.channels.rules.call import Call

ADDITIONS = ("add", "add_", "iadd")
SUMS = (*ADDITIONS, "sub", "sub_", "isub")
PRODUCTS = ("mul", "mul_", "imul", "multiply")
PLACES = object()
"""Stands for the indices of the largest or smallest entries, which cannot be followed."""


def unchanged(call: Call, x: ChannelIds, *_: Any, **__: Any) -> ChannelIds:
    """For functions that act on each entry separately."""
    return x


def unchanged_module(call: Call, module: nn.Module, x: ChannelIds) -> ChannelIds:
    """For modules that act on each entry separately."""
    return x


def combine(call: Call, a: Any, b: Any, *_: Any, **__: Any) -> Any:
    """Two tensors, entry by entry: equal positions become one channel."""
    if a is PLACES or b is PLACES:
        raise call.unknown()
    sides = [
        call.channels(v) if isinstance(v, NamedTensor) and v.tensor.numel() > 1 else v
        for v in (a, b)
    ]
    both = [v for v in sides if isinstance(v, ChannelIds)]
    if len(both) == 1:
        return both[0]
    if not both:
        return a
    shape = torch.broadcast_shapes(both[0].shape, both[1].shape)
    x, y = (v.ids.reshape([1] * (len(shape) - v.ids.dim()) + list(v.ids.shape)) for v in both)
    sizes = [(1,) * (len(shape) - len(v.shape)) + tuple(v.shape) for v in both]
    first, second = (
        any(own[k] == 1 and other.shape[k] > 1 for k in range(len(shape)))
        for own, other in ((sizes[0], y), (sizes[1], x))
    )
    broadcast = call.broadcasts.setdefault(call.node, (first, second))
    for wide, ids in zip(broadcast, (x, y), strict=True):
        if wide:
            call.visitor.lock(ids.flatten(), "meets every channel of another tensor at once")
    if all(broadcast):
        return call.opaque(shape, "an outer product of channels")
    if any(broadcast):
        return ChannelIds(y if broadcast[0] else x, tuple(shape))
    if x.numel() > y.numel():  # a parameter with an entry for every position, perhaps
        x, y = y, x
    x, y = torch.broadcast_tensors(x, y)
    call.visitor.unify(x.flatten(), y.flatten())
    if isinstance(a, ChannelIds) and isinstance(b, ChannelIds):
        call.visitor.couple(x.flatten(), _meeting(call, a, b))
    ids = torch.where(x >= 0, x, y)
    return ChannelIds(ChannelIds.from_expanded(ids).ids, tuple(shape))


def combine_all(call: Call, *values: Any, **named: Any) -> Any:
    """Any number of tensors, entry by entry, among arguments that may be numbers or None."""
    every = (*values, *named.values())
    if any(value is PLACES for value in every):
        raise call.unknown()
    tensors = [v for v in every if isinstance(v, ChannelIds | NamedTensor)]
    result = combine(call, tensors[0], None)
    for number, tensor in enumerate(tensors[1:]):  # each pair has a place of its own in broadcasts
        result = combine(replace(call, node=f"{call.node}:{number}"), result, tensor)
    return result


def _meeting(call: Call, a: ChannelIds, b: ChannelIds) -> str:
    """How the report describes that two results are combined by this operation."""
    if call.name in SUMS:
        return "a residual sum"
    if call.name not in PRODUCTS:
        return f"the operation {call.name}"
    positions = [any(size > 1 for size in v.shape[2:]) for v in (a, b)]
    return "a product" if positions[0] == positions[1] else "a squeeze-excite product"


def pool(call: Call, x: ChannelIds, *options: Any, **more: Any) -> ChannelIds:
    """The last two axes change their sizes; channels along them are locked."""
    function: Any = getattr(functional, call.name)
    return _pooled(call, x, lambda image: function(image, *options, **more))


def pool_module(call: Call, module: nn.Module, x: ChannelIds) -> ChannelIds:
    """See pool."""
    return _pooled(call, x, module)


def _pooled(call: Call, x: ChannelIds, run: Callable[[Tensor], Any]) -> ChannelIds:
    out = run(torch.zeros(1, 1, *x.shape[2:]))
    if not isinstance(out, Tensor):
        raise PruningError("gives more than one tensor")
    shape = (*x.shape[:2], *out.shape[2:])
    if x.varies(len(x.shape) - 1) or x.varies(len(x.shape) - 2):
        call.lock(x, "pooled together with other channels")
        return call.opaque(shape, "pooled from several channels")
    return ChannelIds(x.ids, shape)


def reduce(
    call: Call, x: ChannelIds, dim: Any = None, keepdim: bool = False, **_: Any
) -> ChannelIds:
    """Mean, sum or extremum over axes; channels along them are locked."""
    axes = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = sorted(k % len(x.shape) for k in axes)
    kept = [1 if k in axes else s for k, s in enumerate(x.shape)]
    dropped = [s for k, s in enumerate(x.shape) if k not in axes]
    shape = kept if keepdim else dropped
    if any(x.varies(k) for k in axes):
        call.lock(x, f"{call.node} sums over them")
        return call.opaque(shape, "made of several channels")
    if keepdim:
        return ChannelIds(x.ids, tuple(shape))
    ids = x.ids.reshape([s for k, s in enumerate(x.ids.shape) if k not in axes])
    return ChannelIds(ids, tuple(shape))


def extremum(call: Call, x: ChannelIds, dim: Any = None, keepdim: bool = False) -> Any:
    """`max` or `min` of two tensors, of all entries, or over one axis.

    Over an axis it gives values and indices; a network may only use the values.
    """
    if isinstance(dim, ChannelIds | NamedTensor):
        return combine(call, x, dim)
    values = reduce(call, x, dim, keepdim)
    return values if dim is None else [values, PLACES]


def deviation(
    call: Call,
    x: ChannelIds,
    dim: Any = None,
    unbiased: Any = True,
    keepdim: bool = False,
    **_: Any,
) -> ChannelIds:
    """Standard deviation or variance over axes; see reduce."""
    return reduce(call, x, None if isinstance(dim, bool) else dim, keepdim)
