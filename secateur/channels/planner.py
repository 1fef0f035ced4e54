"""Second walk, through the smaller network: what is left of every tensor, if that fits together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.channels.builder import GroupBuilder, LayerInfo
from secateur.channels.propagation import ZERO, NamedTensor


@dataclass
class ShapePlan:
    """Which entries of every tensor stay; the result of a check."""

    cuts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Tensor -> axis -> indices that stay, in their new order."""
    columns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Weight of a grouped convolution -> rows (outputs,), and columns of each (outputs, inputs)."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Index buffer -> its new content."""
    groups: dict[str, int] = field(default_factory=dict)
    """Convolution -> its groups from now on."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> indices of its outputs that stay, in their new order."""

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor of that name; the tensor itself if all of it does."""
        if name in self.columns:
            rows, columns = (index.to(tensor.device) for index in self.columns[name])
            return tensor[rows.unsqueeze(1), columns]
        for axis, index in sorted(self.cuts.get(name, {}).items(), key=lambda cut: cut[0]):
            whole = len(index) == tensor.shape[axis] and bool(index.diff().eq(1).all())
            if not whole:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor


class ShapePlanner:
    """Second walk, through the smaller network: what every layer finds of what it knew."""

    def __init__(self, found: GroupBuilder, gone: Tensor) -> None:
        self.found = found
        self.left = torch.ones(len(found.canonical) + 1, dtype=torch.bool)  # the last: fixed zeros
        self.left[gone] = False
        self.plan = ShapePlan()
        self._fixed = iter(found.fixed_atoms)
        self._records = found.records

    def _stay(self, ids: Tensor) -> Tensor:
        """Positions whose channel stays."""
        return self.left[self.found.root(ids)].nonzero().flatten()

    def _match(self, where: str, old: Tensor, new: Tensor) -> Tensor:
        """The old position of each new one: equal channels in equal order."""
        stay = self._stay(old)
        kept, found = self.found.root(old[stay]), self.found.root(new)
        if torch.equal(kept, found):
            return stay
        by_kept, by_found = kept.argsort(stable=True), found.argsort(stable=True)
        if len(kept) != len(found) or not torch.equal(kept[by_kept], found[by_found]):
            raise PruningError(f"{where} would no longer read the channels that it reads now")
        index = torch.empty_like(stay)
        index[by_found] = stay[by_kept]
        return index

    def _cut(self, name: str, axis: int, index: Tensor) -> None:
        before = self.plan.cuts.setdefault(name, {}).setdefault(axis, index)
        if not torch.equal(before, index):
            raise PruningError(f"{name} would be needed in two orders")

    def fixed(self, count: int, reason: str) -> Tensor:
        """The ids of the first walk, in the same order."""
        return next(self._fixed)

    def layer(
        self, name: str, weight: NamedTensor, bias: NamedTensor | None, into: Tensor, groups: int
    ) -> Tensor:
        """What stays of a layer: columns by what it finds, rows by what is not gone."""
        layer = self.found.layers[name]
        if len(into) == 0:
            raise PruningError(f"layer {name} would be left without inputs; take away less")
        if layer.depthwise():
            index = self._match(name, layer.inputs, into)
            each = len(layer.outputs) // layer.groups
            rows = (index.unsqueeze(1) * each + torch.arange(each)).flatten()
            self.plan.groups[name] = len(index)
        elif layer.groups > 1:
            rows = self._grouped(name, layer, into)
        else:
            rows = self._stay(layer.outputs)
            self._cut(layer.weight, 1, self._match(name, layer.inputs, into))
        self._cut(layer.weight, 0, rows)
        if bias is not None:
            self._cut(bias.name, 0, rows)
        self.plan.kept[name] = rows
        return layer.outputs[rows]

    def _grouped(self, name: str, layer: LayerInfo, into: Tensor) -> Tensor:
        """Groups keep as many inputs and outputs as each other, or go as a whole."""
        inputs, outputs = len(layer.inputs) // layer.groups, len(layer.outputs) // layer.groups
        index = self._match(name, layer.inputs, into)
        owners = index // inputs
        left = owners.unique_consecutive()
        rows_of = self._stay(layer.outputs)
        rows = [rows_of[rows_of // outputs == owner] for owner in left]
        counts = {int((owners == owner).sum()) for owner in left}
        even = len(left.unique()) == len(left) and len(counts) == 1
        if not even or len({len(r) for r in rows}) != 1 or sum(map(len, rows)) != len(rows_of):
            raise PruningError(
                f"the {layer.groups} groups of {name} would no longer be of one size; take the "
                "same number of channels from each, or whole groups"
            )
        columns = (index % inputs).reshape(len(left), -1)
        order = torch.cat(rows)
        self.plan.groups[name] = len(left)
        self.plan.columns[layer.weight] = (order, columns.repeat_interleave(len(rows[0]), dim=0))
        return order

    def norm(self, held: Sequence[NamedTensor], kind: str, into: Tensor) -> None:
        """Entries in the order in which the channels come."""
        known: tuple[Tensor, Tensor] | None = None
        for one in held:
            ids = self._records[one.name, 0].ids
            if known is None or ids is not known[0]:
                known = ids, self._match(one.name, ids, into)
            self._cut(one.name, 0, known[1])

    def parameter(self, held: NamedTensor) -> Tensor:
        """What stays of a tensor that is added or multiplied."""
        ids, axis = self.found.held[held.name]
        if axis == ZERO:
            return ids
        line = self._records[held.name, axis].ids
        index = self._stay(line)
        self._cut(held.name, axis, index)
        return ids.index_select(axis, index)

    def select(self, index: NamedTensor, into: Tensor, owns_channels: bool) -> Tensor:
        """What stays of an index buffer, and the numbers that it now has to hold."""
        known = self.found.selects[index.name]
        matched = self._match(index.name, known.inputs, into)
        place = torch.full((len(known.inputs) + 1,), ZERO)  # the last one stands for zeros
        place[matched] = torch.arange(len(matched))
        stay = self._stay(known.outputs)
        values = place[known.index][stay]
        self._cut(index.name, 0, stay)
        self.plan.values[index.name] = values
        return known.outputs[stay]

    def meet(self, a: Tensor, b: Tensor) -> None:
        """Only what was one channel before may meet."""
        x, y = self.found.root(a), self.found.root(b)
        wrong = (x != y) & ~self._beside_zero(a, b) & ~self._beside_zero(b, a)
        if bool(wrong.any()):
            raise PruningError("would add up channels that do not belong together")

    def _beside_zero(self, a: Tensor, b: Tensor) -> Tensor:
        return (a == ZERO) & self.found.padded[b]

    def lock(self, ids: Tensor, reason: str) -> None:
        """Nothing to do: locked channels are never among those that go."""

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """Nothing to do: what does not fit is noticed by those who read."""
