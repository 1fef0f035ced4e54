"""Layers of our own that surgery knows how to make smaller."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Take(nn.Module):
    """Channels by their number, in any order; zeros where the number is -1.

    A shortcut that widens with zeros is Take([-1, -1, 0, 1, 2, 3, -1, -1]); a channel selection
    is Take of those that are left. What it takes is its state: a smaller network needs no code
    that knows how it became smaller.
    """

    index: Tensor

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, ...) -> (N, len(index), ...)."""
        zero = functional.pad(x, [0, 0] * (x.dim() - 2) + [0, 1])  # one more channel, of zeros
        return zero.index_select(1, torch.where(self.index < 0, x.shape[1], self.index))

    def extra_repr(self) -> str:
        """How many, and how many of them are zeros."""
        return f"{self.index.numel()}, zeros={int((self.index < 0).sum())}"


class IndexedConv2d(nn.Conv2d):
    """A convolution that reads its inputs, or hands on its outputs, in another order.

    The indices are buffers; either may be missing. With groups it is what a convolution pruned to
    groups of channels amounts to. Its parameters have the names they have in a plain convolution.
    """

    before: Tensor | None
    """Input that stands at each position of the convolution."""
    after: Tensor | None
    """Output of the convolution that stands at each position behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, outputs, H', W')."""
        if self.before is not None:
            x = x.index_select(1, self.before)
        x = self._conv_forward(x, self.weight, self.bias)
        return x if self.after is None else x.index_select(1, self.after)

    @staticmethod
    def of(
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        before: Tensor | None,
        after: Tensor | None,
    ) -> nn.Conv2d:
        """A convolution like `conv` with these; a plain one if it needs no index."""
        plain = before is None and after is None
        made = (nn.Conv2d if plain else IndexedConv2d)(
            weight.shape[1] * groups,
            weight.shape[0],
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            groups,
            bias is not None,
            conv.padding_mode,
            device="meta",
        )
        made.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
        if isinstance(made, IndexedConv2d):
            made.register_buffer("before", before)
            made.register_buffer("after", after)
        return made.train(conv.training)

    def extra_repr(self) -> str:
        """As a convolution, and which indices it has."""
        ends = [name for name in ("before", "after") if getattr(self, name) is not None]
        return f"{super().extra_repr()}, index={'+'.join(ends)}"
