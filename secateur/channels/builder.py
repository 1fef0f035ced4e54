"""The first visitor: creates channel ids and records which tensors have entries for them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.channels.ids import ZERO, AttributeSize, NamedTensor
from secateur.channels.records import AxisEntry, LayerInfo, MemberKind, SelectInfo
from secateur.channels.union_find import UnionFind
from secateur.channels.views import Attribute, View, settle
from secateur.channels.visitor import NormKind


class GroupBuilder:
    """A Visitor that unites the ids of one channel; `finish` gives every id its canonical id."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.axes: dict[tuple[str, int], AxisEntry] = {}
        """By tensor and axis."""
        self.layers: dict[str, LayerInfo] = {}
        self.selects: dict[str, SelectInfo] = {}
        """By index buffer."""
        self.parameters: dict[str, tuple[Tensor, int]] = {}
        """For tensors that are added or multiplied: id of each entry, in the tensor's shape, and
        the axis along which channels differ, ZERO if there is none."""
        self.fixed_ids: list[Tensor] = []
        """In the order of their creation."""
        self.balances: list[tuple[str, list[Tensor]]] = []
        """Place in the network, and the ids of each part."""
        self.canonical = torch.empty(0, dtype=torch.int64)
        """Canonical id of every id, (ids,)."""
        self.reasons: dict[int, str] = {}
        """Canonical id -> why the channel is locked."""
        self.beside_zeros = torch.empty(0, dtype=torch.bool)
        """By id: added to fixed zeros. The last entry is for ZERO itself."""
        self.couplings: list[tuple[Tensor, str]] = []
        """Ids where the outputs of several layers are combined, and how."""
        self._sets = UnionFind(0)
        self._locks: list[tuple[Tensor, str]] = []
        self.sizes: dict[Attribute, Tensor] = {}
        """Module and attribute -> ids of the channels that the attribute counts."""
        self.normalised = torch.empty(0, dtype=torch.bool)
        """By canonical id: normalised together with other channels."""
        self._views: list[View] = []
        self._normalised: list[Tensor] = []
        self._beside: list[Tensor] = []
        self._canonical_and_zero = torch.tensor([ZERO])
        self._used: set[str] = set()
        self._buffers = {name for name, _ in model.named_buffers()}
        self._constant = _constants(model)

    def _new(self, count: int) -> Tensor:
        fresh = self._sets.add(count)
        return torch.arange(fresh.start, fresh.stop)

    def _note(
        self, named: NamedTensor, axis: int, kind: MemberKind, ids: Tensor, owner: str,
        groups: int = 1,
    ) -> None:  # fmt: skip
        """Record that an axis of a tensor has these ids, and unite them with earlier ids of it."""
        self._used.add(named.name)
        if (reason := self._constant(named.name)) is not None:
            self.lock(ids, f"{named.name} is {reason}")
        size = named.tensor.shape[axis]
        if size * (groups if axis == 1 else 1) != len(ids):
            raise PruningError(f"{named.name} has {size} entries for {len(ids)} channels")
        if (named.name, axis) in self.axes:
            self.unify(self.axes[named.name, axis].ids, ids)
        else:
            self.axes[named.name, axis] = AxisEntry(named.name, axis, kind, ids, owner, groups)

    def fixed(self, count: int, reason: str) -> Tensor:
        """New ids, which are locked."""
        ids = self._new(count)
        self.fixed_ids.append(ids)
        self.lock(ids, reason)
        return ids

    def layer(
        self, name: str, weight: NamedTensor, bias: NamedTensor | None, into: Tensor, groups: int
    ) -> Tensor:
        """New ids for the outputs; those of the first call if the layer runs again."""
        known = self.axes.get((weight.name, 0))
        outputs = known.ids if known else self._new(weight.tensor.shape[0])
        self._note(weight, 0, "out", outputs, name)
        if bias is not None:
            self._note(bias, 0, "bias", outputs, name)
        layer = LayerInfo(weight.name, bias.name if bias else None, into, outputs, groups)
        if layer.depthwise():  # its outputs are the same channels as its inputs
            self.unify(into.repeat_interleave(len(outputs) // groups), outputs)
        else:
            self._note(weight, 1, "in", into, name, groups)
            if groups > 1 and name not in self.layers:
                for side, ids in (("inputs", into), ("outputs", outputs)):
                    self.balance(f"{side} of {name}", list(ids.reshape(groups, -1)))
        self.layers.setdefault(name, layer)
        return outputs

    def norm(self, tensors: Sequence[NamedTensor], kind: NormKind, ids: Tensor) -> None:
        """Record the tensors."""
        for named in tensors:
            self._note(named, 0, kind, ids, named.name.rpartition(".")[0])

    def parameter(self, named: NamedTensor) -> Tensor:
        """New ids for every entry; `finish` finds the axis along which channels differ."""
        self._used.add(named.name)
        if named.name not in self.parameters:
            ids = self._new(named.tensor.numel())
            if (reason := self._constant(named.name)) is not None:
                self.lock(ids, reason)
            self.parameters[named.name] = (ids.reshape(named.tensor.shape), ZERO)
        return self.parameters[named.name][0]

    def select(self, index: NamedTensor, into: Tensor, owns_channels: bool) -> Tensor:
        """New ids with `owns_channels`, else the selected ids."""
        self._used.add(index.name)
        numbers = index.tensor.detach().cpu()
        if index.name in self.selects:
            before = self.selects[index.name]
            self.unify(before.inputs, into)
            return before.outputs
        if owns_channels:
            outputs = self._new(len(numbers))
        else:
            numbers = numbers % len(into)  # negative ones count from the end
            outputs = into[numbers]
            if index.name not in self._buffers:
                self.lock(into, f"chosen by {index.name}, which is no buffer")
        self.selects[index.name] = SelectInfo(numbers, into, outputs, owns_channels)
        self._note(index, 0, "index", outputs, index.name.removesuffix(".index"))
        return outputs

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Unite the ids of each pair; an id that is paired with ZERO is locked instead."""
        pairs = _different_pairs(a, b, len(self._sets.parent))
        with_zero = (pairs == ZERO).any(dim=1)
        beside = pairs[with_zero].amax(dim=1)
        if len(beside):
            self._beside.append(beside)
            self.lock(beside, "added to zeros that the code pads with")
        for x, y in pairs[~with_zero].tolist():
            self._sets.union(x, y)

    def couple(self, ids: Tensor, how: str) -> None:
        """Record the operation."""
        self.couplings.append((ids[ids >= 0].unique(), how))

    def lock(self, ids: Tensor, reason: str) -> None:
        """Record the reason; of several reasons, the first one counts."""
        self._locks.append((ids[ids >= 0].unique(), reason))

    def view(self, node: str, sizes: Sequence[Any], ids: Tensor) -> None:
        """Record the view, for `views.settle`."""
        if (view := View(node, tuple(sizes), ids)).matters():
            self._views.append(view)

    def size(self, size: AttributeSize) -> int:
        """The size itself."""
        return int(size)

    def normalise(self, ids: Tensor) -> None:
        """Record the ids."""
        self._normalised.append(ids)

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """Record the parts."""
        self.balances.append((where, list(parts)))

    def finish(self) -> None:
        """Compute canonical ids and reasons for locks, once all nodes have been propagated.

        Raises PruningError naming a layer that never ran.
        """
        _refuse_unused(self.model, self._used)
        _join_other_uses(self)
        self.canonical = torch.tensor(self._sets.canonical())
        self._find_axes()
        self._canonical_and_zero = torch.cat((self.canonical, torch.tensor([ZERO])))
        self.beside_zeros = torch.zeros(len(self.canonical) + 1, dtype=torch.bool)
        for ids in self._beside:
            self.beside_zeros[ids] = True
        self.normalised = torch.zeros(len(self.canonical), dtype=torch.bool)
        for ids in self._normalised:
            self.normalised[self.canonical[ids[ids >= 0]]] = True
        views = settle(self._views, self.canonical_of)
        self.sizes = views.counts
        self.balances += views.balances
        self._locks += [(ids[ids >= 0].unique(), reason) for ids, reason in views.locks]
        for ids, reason in self._locks:
            for canonical_id in self.canonical[ids].unique().tolist():
                self.reasons.setdefault(canonical_id, reason)

    def canonical_of(self, ids: Tensor) -> Tensor:
        """The canonical id of each id; ZERO, which is the last index, stays ZERO."""
        return self._canonical_and_zero[ids]

    def _find_axes(self) -> None:
        """The axis of every added or multiplied tensor along which channels differ."""
        sizes = self.canonical.bincount()
        for name, (ids, _) in self.parameters.items():
            if name in self.selects:
                self.lock(self.selects[name].inputs, f"{name} is not only an index of channels")
            canonical = self.canonical[ids]
            if bool((sizes[canonical] == 1).all()):
                continue  # it was combined with no channels
            axis = _only_axis(canonical)
            if axis is None:
                self.lock(ids.flatten(), f"{name} treats positions of a channel differently")
                continue
            along = canonical.movedim(axis, 0).flatten(1)[:, 0] if ids.dim() > 1 else canonical
            self.parameters[name] = (ids, axis)
            self.axes.setdefault((name, axis), _scale(name, axis, along))


def _scale(name: str, axis: int, ids: Tensor) -> AxisEntry:
    """The axis of a tensor that is added or multiplied."""
    return AxisEntry(name, axis, "scale", ids, name.rpartition(".")[0])


def _join_other_uses(built: GroupBuilder) -> None:
    """The entries of a layer's tensor that other code reads too are the layer's channels."""
    for (name, _), entry in built.axes.items():
        if name not in built.parameters or name in built.selects:
            continue
        ids, _ = built.parameters[name]
        if ids.dim() == 1:
            built.unify(entry.ids, ids)
        else:
            built.lock(entry.ids, f"{name} is read by other code than its layer's")


def _constants(model: nn.Module) -> Callable[[str], str | None]:
    """A function: name of a tensor -> why it cannot become smaller; None if it can."""
    saved = {name for name, _ in model.named_parameters()}
    unsaved: set[str] = set()
    for path, module in model.named_modules():
        for key, _ in module.named_buffers(path, recurse=False):
            persistent = key.rpartition(".")[2] not in module._non_persistent_buffers_set
            (saved if persistent else unsaved).add(key)

    def reason(name: str) -> str | None:
        if name in unsaved:
            return "a buffer that checkpoints do not hold"
        return None if name in saved else "a constant"

    return reason


def _different_pairs(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Pairs of different ids below `count`, each once, (pairs, 2)."""
    different = a != b
    x, y = a[different] - ZERO, b[different] - ZERO  # from 0, so that a pair is one number
    base = count - ZERO
    key = (x * base + y).unique()
    return torch.stack((key // base, key % base), dim=1) + ZERO


def _refuse_unused(model: nn.Module, used: set[str]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and name not in used:
            layer = name.rpartition(".")[0]
            unused = f"layer {layer} never runs" if layer else f"parameter {name} is not used"
            raise PruningError(
                f"{unused} in eval mode, so its channels are unknown; build the network without it"
            )


def _only_axis(ids: Tensor) -> int | None:
    """The only axis along which ids differ; the first if they do along none, None if several."""
    for axis in range(ids.dim()):
        if bool((ids == _first_of_other_axes(ids, axis)).all()):
            return axis
    return None


def _first_of_other_axes(ids: Tensor, axis: int) -> Tensor:
    """The first entry along every axis but one; the result has size 1 there."""
    return ids[tuple(slice(None) if k == axis else slice(0, 1) for k in range(ids.dim()))]
