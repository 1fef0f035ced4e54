"""Attention modules with any number of heads of any width, for compact networks.

The attention modules of torch and torchvision compute the width of a head as the width of the
embedding divided by the number of heads. Therefore neither a single head nor a channel of the
embedding can be removed from them. The classes here compute the same from parameters of the same
names, for any number of heads of any width. They replace the original modules in compact networks,
and their code is traced in place of the code of the original modules.

Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017; windows: Liu et al., Swin
Transformer, ICCV 2021.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class FreeAttention(nn.MultiheadAttention):
    """Multi-head self-attention, in place of `nn.MultiheadAttention`.

    `in_proj_weight` is (3 * heads * width, embedding), `out_proj.weight` (embedding, heads *
    width). Attention weights are not returned. Raises ValueError for what is not supported:
    attention to another tensor, padding masks, and additional keys and values.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Three times the same tensor (N, positions, embedding) -> a tensor of its shape, None."""
        if not (query is key and key is value):
            raise ValueError("a MultiheadAttention of one tensor to another is not covered")
        if key_padding_mask is not None or self.bias_k is not None or self.add_zero_attn:
            raise ValueError("a MultiheadAttention with padding or additional keys is not covered")
        if self.in_proj_weight is None:
            raise ValueError("a MultiheadAttention with keys of another width is not covered")
        x = query if self.batch_first else query.transpose(0, 1)
        projected = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = split_heads(projected, self.num_heads)
        mixed = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            None if attn_mask is None else mask_of_scores(attn_mask, self.num_heads),
            self.dropout if self.training else 0.0,
            is_causal and attn_mask is None,
        )
        joined = mixed.transpose(1, 2).flatten(2)
        out = functional.linear(joined, self.out_proj.weight, self.out_proj.bias)
        return (out if self.batch_first else out.transpose(0, 1)), None


class FreeWindowAttention(nn.Module):
    """Shifted-window attention, in place of torchvision's `ShiftedWindowAttention`.

    `qkv.weight` is (3 * heads * width, embedding), `proj.weight` (embedding, heads * width) and
    `relative_position_bias_table` (relative positions, heads).
    """

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, height, width, embedding) -> the same shape."""
        positions = math.prod(self.window_size)
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.view(positions, positions, -1).permute(2, 0, 1).unsqueeze(0)
        windows = split_windows(x, self.window_size, self.shift_size)
        projected = functional.linear(windows, self.qkv.weight, self.qkv.bias)
        q, k, v = split_heads(projected, self.num_heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        scores = separate_regions(scores, x, self.window_size, self.shift_size)
        weights = functional.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        joined = (weights @ v).transpose(1, 2).flatten(2)
        out = functional.linear(joined, self.proj.weight, self.proj.bias)
        out = functional.dropout(out, self.dropout, self.training)
        return join_windows(out, x, self.window_size, self.shift_size)


_FREE: dict[str, type[nn.Module]] = {
    "torch.nn.modules.activation.MultiheadAttention": FreeAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": FreeWindowAttention,
}
"""Replacements by full name of the class, since torchvision is not imported here."""


def free_class(module: nn.Module) -> type[nn.Module] | None:
    """The class with free sizes that replaces this module; None if there is none."""
    return _FREE.get(f"{type(module).__module__}.{type(module).__qualname__}")


def split_heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, positions, 3 * heads * width) -> queries, keys, values: (N, heads, positions, width)."""
    q, k, v = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@fx.wrap
def mask_of_scores(mask: Tensor, heads: int) -> Tensor:
    """A mask for `nn.MultiheadAttention` as `scaled_dot_product_attention` takes it.

    A bool mask is inverted: True means "masked" for the first, "takes part" for the second. A mask
    (N * heads, positions, positions) becomes one of (N, heads, positions, positions).
    """
    if mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    return ~mask if mask.dtype == torch.bool else mask


@fx.wrap
def split_windows(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(N, height, width, channels) -> (N * windows, positions, channels).

    Height and width are padded with zeros to multiples of the window, and rolled by the shift.
    """
    height, width = _padded(x, window)
    x = functional.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    down, right = _shift(x, window, shift)
    x = x.roll((-down, -right), (1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return _flat_windows(x)


def _flat_windows(x: Tensor) -> Tensor:
    """(N, rows, height, columns, width, channels) -> (N * windows, height * width, channels)."""
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


@fx.wrap
def join_windows(
    windows: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """The inverse of `split_windows`; `like` has the height and width of the result."""
    height, width = _padded(like, window)
    x = windows.unflatten(0, (-1, height // window[0], width // window[1]))
    x = x.unflatten(3, (window[0], window[1])).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    down, right = _shift(x, window, shift)
    return x.roll((down, right), (1, 2))[:, : like.shape[1], : like.shape[2]].contiguous()


@fx.wrap
def separate_regions(
    scores: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """Add -100 to the scores between positions that are neighbours only because of the roll.

    `scores` is (N * windows, heads, positions, positions); `like` has the height and width of the
    tensor that was divided into windows.
    """
    height, width = _padded(like, window)
    down, right = _shift(like.new_empty(1, height, width), window, shift)
    if not (down or right):
        return scores
    regions = scores.new_zeros(1, height, width, 1)
    for number, (rows, columns) in enumerate(
        (rows, columns)
        for rows in _regions(window[0], down)
        for columns in _regions(window[1], right)
    ):
        regions[:, rows, columns] = number
    regions = regions.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    owner = _flat_windows(regions).squeeze(-1)  # windows, positions
    apart = (owner.unsqueeze(1) != owner.unsqueeze(2)).to(scores.dtype) * -100.0
    divided = scores.unflatten(0, (-1, len(owner))) + apart.unsqueeze(1)
    return divided.flatten(0, 1)


def _regions(window: int, shift: int) -> tuple[slice, slice, slice]:
    return slice(0, -window), slice(-window, -shift), slice(-shift, None)


def _padded(x: Tensor, window: Sequence[int]) -> tuple[int, int]:
    """Height and width of (N, height, width, ...), rounded up to multiples of the window."""
    height, width = (-(-x.shape[k + 1] // window[k]) * window[k] for k in (0, 1))
    return height, width


def _shift(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """The shift; 0 along a side that a single window covers. `x` is the padded tensor."""
    down, right = (0 if window[k] >= x.shape[k + 1] else shift[k] for k in (0, 1))
    return down, right
