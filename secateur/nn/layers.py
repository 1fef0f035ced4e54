"""Layers of our own that surgery knows how to make smaller."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class ChannelSelect(nn.Module):
    """Channels by their number, in any order; zeros where the number is -1.

    A shortcut that widens with zeros is Take([-1, -1, 0, 1, 2, 3, -1, -1]); a channel selection
    is Take of those that are left. What it takes is its state: a smaller network needs no code
    that knows how it became smaller. Whoever writes into `index` uses `put`.
    """

    index: Tensor

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.int64))
        self._note(list(index))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, ...) -> (N, len(index), ...)."""
        return take(x, self.index, self._border, self._zeros)

    def put(self, index: Tensor) -> None:
        """Take these from now on; the buffer stays the same as long as their number does."""
        if index.shape == self.index.shape:
            self.index.copy_(index)
        else:
            self.index = index.to(self.index)
        self._note(self.index.tolist())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._note(self.index.tolist())

    def _note(self, numbers: list[int]) -> None:
        """What makes it cheap, looked at once."""
        self._border = _border(numbers)
        self._zeros = min(numbers, default=0) < 0

    def extra_repr(self) -> str:
        """How many, and how many of them are zeros."""
        return f"{self.index.numel()}, zeros={int((self.index < 0).sum())}"


@fx.wrap
def take(x: Tensor, index: Tensor, border: tuple[int, int] | None, zeros: bool) -> Tensor:
    """Channels of x by index, zeros for -1, if there are `zeros`; `border` is `_border(index)`.

    All channels in their order, as dense networks have them, cost nothing, or padding.
    """
    if border is not None and x.shape[1] + sum(border) == len(index):
        return functional.pad(x, [0, 0] * (x.dim() - 2) + list(border)) if any(border) else x
    if not zeros:
        return x.index_select(1, index)
    wider = functional.pad(x, [0, 0] * (x.dim() - 2) + [0, 1])  # one more channel, of zeros
    return wider.index_select(1, torch.where(index < 0, x.shape[1], index))


def _border(index: list[int]) -> tuple[int, int] | None:
    """Zeros before and after 0, 1, 2, ...; None if the index is nothing of that kind."""
    numbers = [n for n in index if n >= 0]
    before = index.index(0) if 0 in index else 0
    if numbers and index[before : before + len(numbers)] == list(range(len(numbers))):
        return before, len(index) - before - len(numbers)
    return None


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
