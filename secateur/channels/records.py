"""Records of the first propagation: layers, index buffers, and axes of tensors with their ids."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

MemberKind = Literal["out", "bias", "in", "norm", "statistic", "scale", "index"]
"""The role of the entries along an axis for a channel.

out: filters of the layer that produces it. bias: bias of that layer. in: weights that consume it.
norm: weight or bias of a normalisation. statistic: running mean or variance. scale: any other
tensor that is multiplied or added. index: position in the index of a ChannelSelect.
"""


@dataclass(frozen=True)
class LayerInfo:
    """A convolution or linear layer."""

    weight: str
    """Name of the parameter."""
    bias: str | None
    """Name of the parameter."""
    inputs: Tensor
    """Channel ids, int64, (inputs,)."""
    outputs: Tensor
    """Channel ids, int64, (outputs,)."""
    groups: int

    def depthwise(self) -> bool:
        """Whether every input has its own filters."""
        return self.groups > 1 and self.groups == len(self.inputs)


@dataclass(frozen=True)
class SelectInfo:
    """An index buffer that selects channels."""

    index: Tensor
    """Its content, int64, (outputs,); negative for zeros."""
    inputs: Tensor
    """Ids of the channels that it selects from, int64, (inputs,)."""
    outputs: Tensor
    """Channel ids, int64, (outputs,)."""
    owns_channels: bool
    """Whether each output is a new channel, which may be zero (ChannelSelect). Otherwise it is the
    same channel as the selected input."""


@dataclass(frozen=True)
class AxisEntry:
    """One axis of one tensor, with the channel id of each entry."""

    tensor: str
    """Name of the parameter or buffer."""
    axis: int
    kind: MemberKind
    ids: Tensor
    """int64, (entries,)."""
    owner: str
    """Path of the module."""
    groups: int = 1
    """Groups of the convolution, if the axis is that of its inputs; `ids` covers all groups."""
