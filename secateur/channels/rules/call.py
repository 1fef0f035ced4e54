"""One call of an operation, as passed to its rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.channels.ids import (
    ZERO,
    AttributeSize,
    ChannelIds,
    NamedTensor,
    TracedNumber,
    TracedSize,
)
from secateur.channels.visitor import Visitor

Broadcasts = dict[str, tuple[bool, bool]]
"""Node -> whether its first and its second operand are combined with all channels of the other; for
a concatenation, whether channels differ along an axis other than the joined one. Node and axis ->
whether a padding is among channels, or whether the axis has size 1 where such axes are dropped.
This can no longer be seen when a single channel is left, so later propagations reuse the result of
the first."""


@dataclass(frozen=True)
class Call:
    """A node of the traced network, with everything that rules need besides its arguments."""

    node: str
    """Name of the node."""
    name: str
    """Name of the function or method; for a module its type, with an article."""
    visitor: Visitor
    modules: Mapping[str, nn.Module]
    """Modules of the network by path."""
    names: Mapping[int, str]
    """Names of the parameters and buffers by the id() of the tensor."""
    dtype: torch.dtype
    """Type of the network's tensors."""
    broadcasts: Broadcasts
    within: Sequence[str] = ()
    """Paths of the modules whose code the node belongs to, and its own if it is a module."""

    def inside(self, kind: type[nn.Module]) -> bool:
        """Whether the node belongs to the code of a module of this type, whose sizes it uses."""
        return any(isinstance(self.modules.get(path), kind) for path in self.within)

    def unknown(self) -> PruningError:
        """The error for arguments that the rule does not cover."""
        return PruningError(f"do not know what {self.name} does to channels")

    def channels(self, value: Any) -> ChannelIds:
        """An operand as channel ids; the ids of its entries if it is a parameter or buffer."""
        if isinstance(value, NamedTensor):
            return ChannelIds.from_expanded(self.visitor.parameter(value))
        if not isinstance(value, ChannelIds):
            raise self.unknown()
        return value

    def tensor(self, module: nn.Module, key: str) -> NamedTensor | None:
        """A parameter or buffer of a module, None if it has none; of several names, the first."""
        value = getattr(module, key, None)
        if value is None:
            return None
        if id(value) not in self.names:
            raise PruningError(f"its {key} is computed from other tensors")
        return NamedTensor(self.names[id(value)], value)

    def weight(self, module: nn.Module) -> NamedTensor:
        """The weight of a module that always has one."""
        weight = self.tensor(module, "weight")
        assert weight is not None
        return weight

    def counted(self, module: nn.Module, x: ChannelIds, *keys: str) -> None:
        """Report that attributes of a module without tensors are the number of channels, axis 1.

        An attribute that is another number in the unpruned network is not changed.
        """
        path = next(path for path, other in self.modules.items() if other is module)
        for key in keys:
            size = AttributeSize.of(getattr(module, key), path, key)
            if size == x.shape[1]:
                sizes = [size if axis == 1 else -1 for axis in range(len(x.shape))]
                self.visitor.view(self.node, sizes, x.ids)
            self.visitor.size(size)

    def calculates(self, *values: Any) -> None:
        """Report that the result depends on these numbers, of which sizes would change."""
        for value in values:
            if isinstance(value, AttributeSize):
                value.calculated = True
            if (counted := getattr(value, "counted", None)) is not None:
                number = TracedNumber.of(value, counted, getattr(value, "less", None))
                self.visitor.view(self.node, [number], torch.tensor([ZERO]))

    def lock(self, x: ChannelIds, reason: str) -> None:
        """Report that no channel of this tensor can be removed."""
        self.visitor.lock(x.ids.flatten(), reason)

    def opaque(self, shape: Sequence[int], reason: str) -> ChannelIds:
        """A tensor whose entries each depend on several channels; it cannot become smaller."""
        ids = self.visitor.fixed(1, reason)
        return ChannelIds(ids.reshape([1] * len(shape)), tuple(shape))

    def created(self, value: Any, arguments: Sequence[Any]) -> Any:
        """The result of an operation without channels: zeros, or a tensor that does not change.

        Numbers keep the origin of the sizes in `arguments`; tensors lock the channels.
        """
        counted = [v.counted for v in arguments if getattr(v, "counted", None) is not None]
        if counted and type(value) is float:
            return TracedNumber.of(value, torch.cat(counted))
        if counted and type(value) is int:
            size = TracedSize(value)
            size.counted, size.computed = torch.cat(counted), True
            return size
        if isinstance(value, Tensor):
            self.calculates(*arguments)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if not bool(value.any()):
            return zeros(value.shape)
        return self.opaque(value.shape, "made by the code")


def zeros(shape: Sequence[int]) -> ChannelIds:
    """A tensor of zeros."""
    return ChannelIds(torch.full([1] * len(shape), ZERO), tuple(shape))
