"""Layers of compact networks: channel selection, convolution with indices, removed layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class ChannelSelect(nn.Module):
    """Selects channels by index, in any order; index -1 gives a channel of zeros.

    A shortcut that pads with zeros is ChannelSelect([-1, -1, 0, 1, 2, 3, -1, -1]); after pruning,
    the layer selects the remaining channels. The index is a buffer, so that the tensors alone
    describe a compact network. Change it with `set_index`, not by writing into the buffer.
    """

    index: Tensor
    """int64, (channels of the output,)."""

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.int64))
        self._analyse(list(index))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, ...) -> (N, len(index), ...)."""
        return select_channels(x, self.index, self._padding, self._zeros)

    def set_index(self, index: Tensor) -> None:
        """Select these channels from now on; the buffer is reused if the length does not change."""
        if index.shape == self.index.shape:
            self.index.copy_(index)
        else:
            self.index = index.to(self.index)
        self._analyse(self.index.tolist())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._analyse(self.index.tolist())

    def _analyse(self, index: list[int]) -> None:
        """Store the properties of the index that make the selection cheap."""
        self._padding = _padding(index)
        self._zeros = min(index, default=0) < 0

    def extra_repr(self) -> str:
        """Number of output channels, and how many of them are zeros."""
        return f"{self.index.numel()}, zeros={int((self.index < 0).sum())}"


@fx.wrap
def select_channels(
    x: Tensor, index: Tensor, padding: tuple[int, int] | None, zeros: bool
) -> Tensor:
    """Channels of `x` by index, zeros for -1; `zeros` says whether the index contains -1.

    `padding` is `_padding(index)`. Selecting all channels in order, as dense networks do, costs
    nothing, or only a padding.
    """
    if padding is not None and x.shape[1] + sum(padding) == len(index):
        return functional.pad(x, [0, 0] * (x.dim() - 2) + list(padding)) if any(padding) else x
    if not zeros:
        return x.index_select(1, index)
    wider = functional.pad(x, [0, 0] * (x.dim() - 2) + [0, 1])  # one more channel, of zeros
    return wider.index_select(1, torch.where(index < 0, x.shape[1], index))


def _padding(index: list[int]) -> tuple[int, int] | None:
    """How many -1 precede and follow 0, 1, 2, ...; None for an index of another form."""
    channels = [n for n in index if n >= 0]
    before = index.index(0) if 0 in index else 0
    if channels and index[before : before + len(channels)] == list(range(len(channels))):
        return before, len(index) - before - len(channels)
    return None


class Removed(nn.Module):
    """Takes the place of a layer of a removed residual branch: returns zero, whatever the input.

    The last layer of the branch returns a plain number, which can be added to a tensor in place as
    well; the others return a single zero with as many axes as their input, since functions between
    them take tensors.
    """

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | float:
        """Zero."""
        tensors = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
        return 0.0 if self.last or not tensors else tensors[0].new_zeros((1,) * tensors[0].dim())

    def extra_repr(self) -> str:
        """Whether it is the last layer of its branch."""
        return f"last={self.last}"


class IndexedConv2d(nn.Conv2d):
    """A convolution that permutes its input channels, its output channels, or both.

    With groups, this is a convolution that was pruned to groups of channels. The indices are
    buffers; the parameters have the same names as in `nn.Conv2d`.
    """

    before: Tensor | None
    """int64, (in_channels,): the input channel at each position of the convolution."""
    after: Tensor | None
    """int64, (outputs,): the convolution's output channel at each position of the result."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, outputs, H', W')."""
        if self.before is not None:
            x = x.index_select(1, self.before)
        x = self._conv_forward(x, self.weight, self.bias)
        return x if self.after is None else x.index_select(1, self.after)

    @staticmethod
    def from_conv(
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        before: Tensor | None,
        after: Tensor | None,
    ) -> nn.Conv2d:
        """A convolution with the options of `conv` and these tensors; `nn.Conv2d` if no indices."""
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
        """The options of the convolution, and which indices it has."""
        ends = [name for name in ("before", "after") if getattr(self, name) is not None]
        return f"{super().extra_repr()}, index={'+'.join(ends)}"
