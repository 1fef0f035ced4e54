"""Products of two tensors, as in attention, and its windows.

A head is one channel: the products sum over its whole width, so that queries, keys and values of a
head are one unit and can only be removed as a whole.
"""

from collections.abc import Sequence
from typing import Any

import torch

from secateur.base.errors import PruningError
from secateur.channels.ids import ChannelIds, NamedTensor
from secateur.channels.rules import elementwise, shapes
from secateur.channels.rules.call import Call
from secateur.nn import attention


def matmul(call: Call, a: ChannelIds, b: Any) -> ChannelIds:
    """Sums of products over the last axis of `a` and the second to last axis of `b`."""
    b = call.channels(b)
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise PruningError("multiplies a matrix by a vector")
    batch = "abcdefgh"[: max(len(a.shape), len(b.shape)) - 2]
    left = batch[len(batch) - len(a.shape) + 2 :] + "xy"
    right = batch[len(batch) - len(b.shape) + 2 :] + "yz"
    return _contract(call, (left, a), (right, b), f"{batch}xz")


def einsum(call: Call, equation: str, *operands: Any) -> ChannelIds:
    """Products of two tensors whose axes are named by letters."""
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or "." in equation or len(operands) != 2 or len(letters) != 2:
        raise PruningError(f"einsum '{equation}' is not covered")
    a, b = (call.channels(operand) for operand in operands)
    return _contract(call, (letters[0], a), (letters[1], b), result)


def scaled_dot_product_attention(
    call: Call, query: ChannelIds, key: Any, value: Any, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> ChannelIds:  # fmt: skip
    """Products of queries and keys, and sums of values weighted by them."""
    if enable_gqa:
        raise PruningError("heads that share keys (enable_gqa) are not covered")
    key, value = call.channels(key), call.channels(value)
    turned = shapes.transpose(call, key, -2, -1)
    scores = matmul(call, query, turned)
    if attn_mask is not None:
        scores = elementwise.combine(call, scores, attn_mask)
    return matmul(call, scores, value)


def mask_of_scores(call: Call, mask: ChannelIds, heads: int) -> ChannelIds:
    """The mask; along the first of three axes it has entries for heads, which are locked."""
    if len(mask.shape) < 3:
        return mask
    call.lock(mask, "an attention mask has entries for each head")
    return shapes.unflatten(call, mask, 0, (-1, heads))


def _contract(
    call: Call, first: tuple[str, ChannelIds], second: tuple[str, ChannelIds], result: str
) -> ChannelIds:
    """The sum of products over all letters that the result lacks.

    All entries that are summed become one channel, and so do entries that are multiplied.
    """
    sizes: dict[str, int] = {}
    for letters, operand in (first, second):
        if len(set(letters)) != len(letters) or len(letters) != len(operand.shape):
            raise PruningError(f"sums over axes '{letters}' of {len(operand.shape)}")
        for letter, size in zip(letters, operand.shape, strict=True):
            if sizes.setdefault(letter, size) != size and 1 not in (sizes[letter], size):
                raise PruningError(f"sizes {sizes[letter]} and {size} do not fit")
            sizes[letter] = max(size, sizes[letter])
    shape = tuple(sizes[letter] for letter in result)
    every = "".join(sizes)
    summed = [k for k, letter in enumerate(every) if letter not in result]
    x, y = (_united(call, _aligned(letters, t, every), summed) for letters, t in (first, second))
    pairs = list(zip(x.shape, y.shape, strict=True))
    if any(a > b == 1 for a, b in pairs) and any(b > a == 1 for a, b in pairs):
        for ids in (x, y):
            call.visitor.lock(ids.flatten(), "meets every channel of another tensor at once")
        return call.opaque(shape, "an outer product of channels")
    x, y = torch.broadcast_tensors(x, y)
    call.visitor.unify(x.flatten(), y.flatten())
    order = [every.index(letter) for letter in result]
    ids = torch.where(x >= 0, x, y).permute(*order, *summed)
    return ChannelIds(ids.reshape(ids.shape[: len(order)]), shape)


def _aligned(letters: str, x: ChannelIds, every: str) -> torch.Tensor:
    """Ids with an axis for each of `every`."""
    order = sorted(range(len(letters)), key=lambda k: every.index(letters[k]))
    own = iter(x.ids.permute(order).shape)
    return x.ids.permute(order).reshape([next(own) if letter in letters else 1 for letter in every])


def _united(call: Call, ids: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Ids with one entry along these axes, whose entries become one channel."""
    for axis in axes:
        if ids.shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            call.visitor.unify(first.expand(ids.shape).flatten(), ids.flatten())
            ids = first
    return ids


def split_windows(call: Call, x: ChannelIds, window: Sequence[int], shift: Any) -> ChannelIds:
    """Windows of positions in place of images; channels are along the last axis."""
    empty = torch.empty(*x.shape[:-1], 1, device="meta")
    out = attention.split_windows(empty, window, shift)
    return ChannelIds.along(2, x.axis_ids(-1), (*out.shape[:-1], x.shape[-1]))


def join_windows(
    call: Call, windows: ChannelIds, like: ChannelIds, window: Any, shift: Any
) -> ChannelIds:
    """Images in place of windows of positions."""
    return ChannelIds.along(3, windows.axis_ids(-1), (*like.shape[:-1], windows.shape[-1]))


def patch_merging_pad(call: Call, x: ChannelIds) -> ChannelIds:
    """torchvision's `_patch_merging_pad`: the four pixels of each square become channels of one."""
    ids = x.axis_ids(-1)
    height, width = (-(-side // 2) for side in x.shape[-3:-1])
    shape = (*x.shape[:-3], height, width, 4 * len(ids))
    return ChannelIds.along(len(shape) - 1, ids.repeat(4), shape)


def index_parameter(call: Call, table: NamedTensor, dim: int, index: torch.Tensor) -> ChannelIds:
    """Entries of a parameter, by an index along an axis whose entries are all one channel."""
    own = call.visitor.parameter(table)
    ids = _united(call, own, [dim])
    shape = (*own.shape[:dim], *index.shape, *own.shape[dim + 1 :])
    form = (*ids.shape[:dim], *[1] * index.dim(), *ids.shape[dim + 1 :])
    return ChannelIds(ids.reshape(form), shape)
