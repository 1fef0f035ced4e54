"""Values that are propagated in place of activations: channel ids, sizes and named tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.base.errors import PruningError

ZERO = -1
"""The id of entries that are zero for every input, such as padding."""


class TracedSize(int):
    """A size that was read from a tensor, so that it changes when the tensor gets smaller.

    Arithmetic with a TracedSize gives a TracedSize.
    """


def _keep_traced(name: str) -> None:
    plain = getattr(int, name)

    def traced(self: int, *others: Any) -> Any:
        result = plain(self, *others)
        return TracedSize(result) if isinstance(result, int) else result

    setattr(TracedSize, name, traced)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "neg"):
    _keep_traced(f"__{_name}__")


@dataclass(frozen=True)
class ChannelIds:
    """The channel id of every entry of a tensor."""

    ids: Tensor
    """int64, broadcastable to `shape`: an axis along which ids are equal has one entry."""
    shape: tuple[int, ...]
    """Of the tensor."""

    @classmethod
    def from_expanded(cls, ids: Tensor) -> "ChannelIds":
        """From one id for every entry; axes along which ids are equal are reduced to one entry."""
        shape = tuple(ids.shape)
        for axis, size in enumerate(shape):
            if size > 1:
                first = ids.narrow(axis, 0, 1)
                if ids.stride(axis) == 0 or bool((ids == first).all()):
                    ids = first
        return cls(ids, shape)

    @classmethod
    def along(cls, axis: int, ids: Tensor, shape: Sequence[int]) -> "ChannelIds":
        """Ids that differ along one axis only, (size,)."""
        form = [1] * len(shape)
        form[axis] = -1
        return cls(ids.reshape(form), tuple(shape))

    def expanded(self) -> Tensor:
        """One id for every entry, in the tensor's shape; a view."""
        return self.ids.expand(self.shape)

    def varies(self, axis: int) -> bool:
        """Whether ids differ along this axis."""
        return self.ids.shape[axis] > 1

    def axis_ids(self, axis: int) -> Tensor:
        """The ids along one axis, (size,); PruningError if they differ along others too."""
        axis %= len(self.shape)
        if any(self.varies(other) for other in range(len(self.shape)) if other != axis):
            raise PruningError(f"channels differ along other axes than {axis} as well")
        return self.ids.flatten().expand(self.shape[axis])


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer of the network; or another tensor attribute, by its path."""

    name: str
    tensor: Tensor
