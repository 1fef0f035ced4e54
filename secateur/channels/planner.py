"""The second visitor: the entries of every tensor that remain after a removal, with checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.channels.builder import GroupBuilder
from secateur.channels.ids import ZERO, AttributeSize, NamedTensor
from secateur.channels.records import LayerInfo
from secateur.channels.visitor import NormKind


@dataclass
class ShapePlan:
    """Which entries of every tensor remain, checked by a propagation; indices are int64."""

    cuts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Tensor -> axis -> indices that remain, in their new order."""
    columns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Weight of a convolution with groups -> rows that remain, (outputs,), and for each the columns
    that remain, (outputs, inputs of a group)."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Index buffer -> its new content."""
    groups: dict[str, int] = field(default_factory=dict)
    """Convolution -> its number of groups after the removal."""
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """Module and attribute -> number of channels or heads that it counts, after the removal."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> indices of its outputs that remain, in their new order."""

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """The remaining entries of the tensor with this name; the tensor itself if all remain."""
        if name in self.columns:
            rows, columns = (index.to(tensor.device) for index in self.columns[name])
            return tensor[rows.unsqueeze(1), columns]
        for axis, index in sorted(self.cuts.get(name, {}).items(), key=lambda cut: cut[0]):
            count = tensor.shape[axis]
            if len(index) != count or not torch.equal(index, torch.arange(count)):
                tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor


class ShapePlanner:
    """A Visitor that propagates the remaining ids, and records their former positions."""

    def __init__(self, built: GroupBuilder, gone: Tensor) -> None:
        """`gone` has the canonical ids of the channels to remove, int64."""
        self.built = built
        self.plan = ShapePlan()
        self._remains = torch.ones(len(built.canonical) + 1, dtype=torch.bool)  # the last: ZERO
        self._remains[gone] = False
        self._fixed = iter(built.fixed_ids)
        self._modules = {name for name, _ in built.model.named_modules()}

    def _remaining(self, ids: Tensor) -> Tensor:
        """Positions whose channel remains."""
        return self._remains[self.built.canonical_of(ids)].nonzero().flatten()

    def _match(self, where: str, old: Tensor, new: Tensor) -> Tensor:
        """The old position of each new id; ids of the same channel are matched in order."""
        before, found = self.built.canonical_of(old), self.built.canonical_of(new)
        positions = self._remains[before].nonzero().flatten()
        kept = before[positions]
        if torch.equal(kept, found):
            return positions
        by_kept, by_found = kept.argsort(stable=True), found.argsort(stable=True)
        if len(kept) != len(found) or not torch.equal(kept[by_kept], found[by_found]):
            raise PruningError(f"{where} would no longer read the channels that it reads now")
        index = torch.empty_like(positions)
        index[by_found] = positions[by_kept]
        return index

    def _cut(self, name: str, axis: int, index: Tensor) -> None:
        before = self.plan.cuts.setdefault(name, {}).setdefault(axis, index)
        if not torch.equal(before, index):
            raise PruningError(f"{name} would be needed in two orders")

    def fixed(self, count: int, reason: str) -> Tensor:
        """The ids of the first propagation, in which they were created in the same order."""
        return next(self._fixed)

    def layer(
        self, name: str, weight: NamedTensor, bias: NamedTensor | None, into: Tensor, groups: int
    ) -> Tensor:
        """Keep the rows of the remaining outputs, and the columns of the inputs in `into`."""
        layer = self.built.layers[name]
        if len(into) == 0:
            raise PruningError(f"layer {name} would be left without inputs; remove fewer")
        if layer.depthwise():
            index = self._match(name, layer.inputs, into)
            each = len(layer.outputs) // layer.groups
            rows = (index.unsqueeze(1) * each + torch.arange(each)).flatten()
            self._regroup(name, len(index))
        elif layer.groups > 1:
            rows = self._grouped(name, layer, into)
        else:
            rows = self._remaining(layer.outputs)
            self._cut(layer.weight, 1, self._match(name, layer.inputs, into))
        self._cut(layer.weight, 0, rows)
        if bias is not None:
            self._cut(bias.name, 0, rows)
        self.plan.kept[name] = rows
        return layer.outputs[rows]

    def _regroup(self, name: str, count: int) -> None:
        """Record a convolution's groups; those of a plain function call are part of the code."""
        if name in self._modules:
            self.plan.groups[name] = count

    def _grouped(self, name: str, layer: LayerInfo, into: Tensor) -> Tensor:
        """Groups keep equal numbers of inputs and outputs, or are removed as a whole."""
        inputs, outputs = len(layer.inputs) // layer.groups, len(layer.outputs) // layer.groups
        index = self._match(name, layer.inputs, into)
        owners = index // inputs
        left = owners.unique_consecutive()
        remaining = self._remaining(layer.outputs)
        rows = [remaining[remaining // outputs == owner] for owner in left]
        counts = {int((owners == owner).sum()) for owner in left}
        even = len(left.unique()) == len(left) and len(counts) == 1
        if not even or len({len(r) for r in rows}) != 1 or sum(map(len, rows)) != len(remaining):
            raise PruningError(
                f"the {layer.groups} groups of {name} would no longer be of one size; remove the "
                "same number of channels from each, or whole groups"
            )
        columns = (index % inputs).reshape(len(left), -1)
        order = torch.cat(rows)
        self._regroup(name, len(left))
        self.plan.columns[layer.weight] = (order, columns.repeat_interleave(len(rows[0]), dim=0))
        return order

    def norm(self, tensors: Sequence[NamedTensor], kind: NormKind, ids: Tensor) -> None:
        """Keep the entries of the channels in `ids`, in their order."""
        known: tuple[Tensor, Tensor] | None = None  # often equal for all tensors
        for named in tensors:
            before = self.built.axes[named.name, 0].ids
            if known is None or before is not known[0]:
                known = before, self._match(named.name, before, ids)
            self._cut(named.name, 0, known[1])

    def parameter(self, named: NamedTensor) -> Tensor:
        """Ids of the entries that remain."""
        ids, axis = self.built.parameters[named.name]
        if axis == ZERO:
            return ids
        index = self._remaining(self.built.axes[named.name, axis].ids)
        self._cut(named.name, axis, index)
        return ids.index_select(axis, index)

    def select(self, index: NamedTensor, into: Tensor, owns_channels: bool) -> Tensor:
        """Keep the remaining positions of the index, and update where it points to."""
        known = self.built.selects[index.name]
        matched = self._match(index.name, known.inputs, into)
        position = torch.full((len(known.inputs) + 1,), ZERO)  # the last one is that of zeros
        position[matched] = torch.arange(len(matched))
        remaining = self._remaining(known.outputs)
        self._cut(index.name, 0, remaining)
        self.plan.values[index.name] = position[known.index][remaining]
        return known.outputs[remaining]

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Check that each pair was one channel before the removal."""
        x, y = self.built.canonical_of(a), self.built.canonical_of(b)
        wrong = (x != y) & ~self._was_padding(a, b) & ~self._was_padding(b, a)
        if bool(wrong.any()):
            raise PruningError("would add up channels that do not belong together")

    def _was_padding(self, a: Tensor, b: Tensor) -> Tensor:
        return (a == ZERO) & self.built.beside_zeros[b]

    def couple(self, ids: Tensor, how: str) -> None:
        """Nothing to do: the builder has recorded it."""

    def lock(self, ids: Tensor, reason: str) -> None:
        """Nothing to do: locked channels are never removed."""

    def view(self, node: str, sizes: Sequence[Any], ids: Tensor) -> None:
        """Nothing to do: the view itself fails if channels do not fit its sizes."""

    def size(self, size: AttributeSize) -> int:
        """The number of remaining channels that the attribute counts."""
        counted = self.built.sizes.get((size.module, size.key))
        if counted is None:
            return int(size)
        left = len(self._remaining(counted))
        self.plan.sizes[size.module, size.key] = left
        return left

    def normalise(self, ids: Tensor) -> None:
        """Nothing to do: the normalisation is over the remaining channels."""

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """Nothing to do: the operation that needs the balance checks it."""
