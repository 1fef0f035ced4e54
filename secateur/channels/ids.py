"""Values that are propagated in place of activations: channel ids, sizes and named tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.base.errors import PruningError

ZERO = -1
"""The id of entries that are zero for every input, such as padding."""


class TracedSize(int):
    """A size that was read from a tensor, and that changes when the tensor gets smaller.

    Arithmetic with a TracedSize gives a TracedSize.
    """

    counted: Tensor | None = None
    """Ids of the channels that the size counts, or that it was computed from; None if it does not
    depend on channels."""
    less: Tensor | None = None
    """Of the difference of two sizes, the ids that the second one counts."""
    computed: bool = False
    """Whether it is the result of arithmetic."""

    @classmethod
    def of(cls, x: "ChannelIds", axis: int) -> "TracedSize":
        """The size of an axis."""
        size = cls(x.shape[axis])
        if x.varies(axis):
            size.counted = x.ids.movedim(axis, 0).reshape(size, -1)[:, 0]
        return size


def _keep_traced(name: str) -> None:
    plain = getattr(int, name)

    def traced(self: int, *others: Any) -> Any:
        for other in others:
            if isinstance(other, AttributeSize):
                other.calculated = True
        result = plain(self, *others)
        if not isinstance(result, int):
            return result
        size = TracedSize(result)
        sizes = [v for v in (self, *others) if isinstance(v, TracedSize)]
        counted = [v.counted for v in sizes if v.counted is not None]
        size.counted = torch.cat(counted) if counted else None
        if name == "__sub__" and len(counted) == 2 and not any(v.computed for v in sizes):
            size.counted, size.less = counted
        size.computed = True
        return size

    setattr(TracedSize, name, traced)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "neg"):
    _keep_traced(f"__{_name}__")


class TracedNumber(float):
    """The result of a calculation with a TracedSize that is no size."""

    counted: Tensor
    """Ids of the channels that the size counts."""
    less: Tensor | None = None
    """As `TracedSize.less`."""

    @classmethod
    def of(cls, value: float, counted: Tensor, less: Tensor | None = None) -> "TracedNumber":
        """The number with its origin."""
        number = cls(value)
        number.counted, number.less = counted, less
        return number


class AttributeSize(int):
    """A size that a module of the network holds as an attribute, such as its number of heads.

    It can change with the channels that it counts. Arithmetic with it gives a plain number, which
    would have to change too; that is recorded in `calculated`.
    """

    module: str
    """Path of the module."""
    key: str
    """Name of the attribute."""
    calculated: bool = False
    """Whether the network's code calculates with it, or decides by it."""
    tracing: ClassVar[bool] = False
    """Whether the network's code runs, so that comparisons are its own."""

    @classmethod
    def of(cls, value: int, module: str, key: str) -> "AttributeSize":
        """The number with its origin."""
        size = cls(value)
        size.module, size.key = module, key
        return size

    @property
    def path(self) -> str:
        """Path of the attribute."""
        return f"{self.module}.{self.key}".lstrip(".")


def _note_calculation(name: str) -> None:
    plain = getattr(int, name)

    def noted(self: AttributeSize, *others: Any) -> Any:
        if any(isinstance(other, TracedSize) for other in others):
            return NotImplemented  # so that the result is a TracedSize
        self.calculated |= all(isinstance(other, int | float) for other in others)
        return plain(self, *others)

    setattr(AttributeSize, name, noted)


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "neg"),
    *("truediv", "rtruediv", "pow", "rpow", "float", "divmod", "rdivmod", "abs"),
):
    _note_calculation(f"__{_name}__")


def _note_decision(name: str) -> None:
    plain = getattr(int, name)

    def noted(self: AttributeSize, *others: Any) -> Any:
        self.calculated |= AttributeSize.tracing
        return plain(self, *others)

    setattr(AttributeSize, name, noted)


for _name in ("lt", "le", "gt", "ge", "eq", "ne", "int"):
    _note_decision(f"__{_name}__")


@dataclass(frozen=True)
class ChannelIds:
    """The channel id of every entry of a tensor."""

    ids: Tensor
    """int64, broadcastable to `shape`: an axis along which ids are equal has one entry."""
    shape: tuple[int, ...]
    """Shape of the tensor."""

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
    """A parameter or buffer of the network, or another tensor attribute, with its path."""

    name: str
    tensor: Tensor
