"""The interface through which a propagation reports what it finds."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from secateur.channels.ids import AttributeSize, NamedTensor

NormKind = Literal["norm", "statistic", "scale"]
"""Kinds of tensors with one entry for each channel; see `records.MemberKind`."""


class Visitor(Protocol):
    """Creates channel ids and learns what operations do with them; ids are int64, (channels,)."""

    def fixed(self, count: int, reason: str) -> Tensor:
        """New ids for channels that cannot be removed, such as the network's input."""

    def layer(
        self, name: str, weight: NamedTensor, bias: NamedTensor | None, into: Tensor, groups: int
    ) -> Tensor:
        """Ids of the outputs of a convolution or linear layer with these inputs."""

    def norm(self, tensors: Sequence[NamedTensor], kind: NormKind, ids: Tensor) -> None:
        """Tensors with one entry for each of these channels are applied to them."""

    def parameter(self, named: NamedTensor) -> Tensor:
        """Ids of the entries of a tensor that is added or multiplied, in the tensor's shape."""

    def select(self, index: NamedTensor, into: Tensor, owns_channels: bool) -> Tensor:
        """Ids of the channels that an index selects.

        With `owns_channels` every position of the index is a new channel (ChannelSelect); otherwise
        it is the selected channel.
        """

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Entries with these ids are added or multiplied, pair by pair."""

    def couple(self, ids: Tensor, how: str) -> None:
        """Outputs of several layers are combined in channels with these ids, such as in a sum."""

    def lock(self, ids: Tensor, reason: str) -> None:
        """Channels with these ids cannot be removed."""

    def view(self, node: str, sizes: Sequence[Any], ids: Tensor) -> None:
        """A tensor is viewed with these sizes; one id for every entry, broadcastable.

        Sizes are -1 or TracedSizes if they follow the tensor, AttributeSizes if they can be
        changed, and plain numbers if they are hard-coded.
        """

    def size(self, size: AttributeSize) -> int:
        """The size that an attribute holds."""

    def normalise(self, ids: Tensor) -> None:
        """Channels with these ids are normalised together: each influences all others."""

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """The same number of channels must remain in each part."""
