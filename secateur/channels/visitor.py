"""What a propagation reports to the object that builds something from it."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from secateur.channels.ids import AttributeSize, NamedTensor

NormKind = Literal["norm", "statistic", "scale"]
"""Kinds of tensors with one entry for each channel; see `records.MemberKind`."""


class Visitor(Protocol):
    """Makes channel ids and notes what operations do with them; ids are int64, (channels,)."""

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

        With `owns_channels` every position of the index is a channel of its own (ChannelSelect);
        otherwise it is the channel that is selected.
        """

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Entries with these ids are added or multiplied, pair by pair."""

    def couple(self, ids: Tensor, how: str) -> None:
        """Channels with these ids are where results of several layers meet, for instance in a
        sum."""

    def lock(self, ids: Tensor, reason: str) -> None:
        """Channels with these ids cannot be removed."""

    def view(self, node: str, sizes: Sequence[Any], ids: Tensor) -> None:
        """A tensor is viewed in these sizes; one id for every entry, broadcastable.

        Sizes are -1 or TracedSizes where they follow the tensor, AttributeSizes where they can be
        changed, and otherwise numbers that stand in the code.
        """

    def size(self, size: AttributeSize) -> int:
        """The size that an attribute holds."""

    def normalise(self, ids: Tensor) -> None:
        """Channels with these ids are normalised together: each has an influence on all others."""

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """Equally many channels must remain in each part."""
