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
