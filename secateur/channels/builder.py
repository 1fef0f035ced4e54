"""First walk through a network: hands out ids and writes down which tensors hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.channels.propagation import ZERO, NamedTensor

Kind = Literal["out", "bias", "in", "norm", "statistic", "scale", "index"]
"""out, in: a layer's weight. bias: a layer's. norm: factor or shift. statistic: running mean or
variance. scale: any other factor or term. index: what a Take takes."""


@dataclass(frozen=True)
class LayerInfo:
    """What was learnt about one convolution or linear layer."""

    weight: str
    bias: str | None
    inputs: Tensor
    """Atoms of its inputs."""
    outputs: Tensor
    """Atoms of its outputs."""
    groups: int

    def depthwise(self) -> bool:
        """Every input has a filter of its own."""
        return self.groups > 1 and self.groups == len(self.inputs)


@dataclass(frozen=True)
class SelectInfo:
    """What was learnt about an index buffer."""

    index: Tensor
    inputs: Tensor
    outputs: Tensor
    owns_channels: bool
    """Positions are channels of their own, which may be zero: a Take."""


@dataclass(frozen=True)
class AxisEntry:
    """One axis of one tensor, with the atom of each entry."""

    tensor: str
    axis: int
    kind: Kind
    ids: Tensor
    owner: str
    groups: int = 1


class UnionFind:
    """Disjoint sets of numbers; the smallest stands for its set."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, x: int) -> int:
        """The number that stands for the set of this one."""
        parent = self.parent
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def canonical(self) -> list[int]:
        """The number that stands for the set of each."""
        found: list[int] = []
        for x, parent in enumerate(self.parent):
            found.append(x if parent == x else found[parent])  # a parent is smaller
        return found

    def join(self, a: int, b: int) -> None:
        """Make one set of two."""
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


class GroupBuilder:
    """First walk: hands out ids and writes down who holds them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sets = UnionFind(0)
        self.records: dict[tuple[str, int], AxisEntry] = {}
        self.layers: dict[str, LayerInfo] = {}
        self.selects: dict[str, SelectInfo] = {}
        self.held: dict[str, tuple[Tensor, int]] = {}
        self.fixed_atoms: list[Tensor] = []
        self.locked: list[tuple[Tensor, str]] = []
        self.balances: list[tuple[str, list[Tensor]]] = []
        self.reasons: dict[int, str] = {}
        self.canonical = torch.empty(0, dtype=torch.int64)
        self.padded = torch.empty(0, dtype=torch.bool)
        """By atom: meets fixed zeros. The last entry is for fixed zeros themselves."""
        self._padded: list[Tensor] = []
        self._roots_and_zero = torch.tensor([ZERO])
        self._used: set[str] = set()

    def _new(self, count: int) -> Tensor:
        start = len(self.sets.parent)
        self.sets.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def _record(
        self, held: NamedTensor, axis: int, kind: Kind, ids: Tensor, owner: str, groups: int = 1
    ) -> None:
        self._used.add(held.name)
        key = (held.name, axis)
        if held.tensor.shape[axis] * (groups if axis == 1 else 1) != len(ids):
            raise PruningError(
                f"{held.name} has {held.tensor.shape[axis]} entries for {len(ids)} channels"
            )
        if key in self.records:
            self.meet(self.records[key].ids, ids)
        else:
            self.records[key] = AxisEntry(held.name, axis, kind, ids, owner, groups)

    def fixed(self, count: int, reason: str) -> Tensor:
        """New ids, locked."""
        ids = self._new(count)
        self.fixed_atoms.append(ids)
        self.lock(ids, reason)
        return ids

    def layer(
        self, name: str, weight: NamedTensor, bias: NamedTensor | None, into: Tensor, groups: int
    ) -> Tensor:
        """New ids for a layer's outputs; the ones it made before if it runs again."""
        known = self.records.get((weight.name, 0))
        count = weight.tensor.shape[0]
        out = known.ids if known else self._new(count)
        self._record(weight, 0, "out", out, name)
        if bias is not None:
            self._record(bias, 0, "bias", out, name)
        layer = LayerInfo(weight.name, bias.name if bias else None, into, out, groups)
        if layer.depthwise():
            self._record_through(layer, into)
        else:
            self._record(weight, 1, "in", into, name, groups)
            if groups > 1 and name not in self.layers:
                for side, ids in (("inputs", into), ("outputs", out)):
                    parts = list(ids.reshape(groups, -1))
                    self.balances.append((f"{side} of {name}", parts))
        self.layers.setdefault(name, layer)
        return out

    def _record_through(self, layer: LayerInfo, into: Tensor) -> None:
        """Depthwise: what is read and what is made are the same channels."""
        self.meet(into.repeat_interleave(len(layer.outputs) // layer.groups), layer.outputs)

    def norm(self, held: Sequence[NamedTensor], kind: str, into: Tensor) -> None:
        """One entry for each channel."""
        for one in held:
            if kind in ("norm", "statistic", "scale"):
                self._record(one, 0, kind, into, one.name.rpartition(".")[0])  # type: ignore[arg-type]

    def parameter(self, held: NamedTensor) -> Tensor:
        """New ids for every entry; which axis has the channels is seen in the end."""
        self._used.add(held.name)
        if held.name not in self.held:
            named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            count = held.tensor.numel()
            ids = self._new(count) if held.name in named else self.fixed(count, "a constant")
            self.held[held.name] = (ids.reshape(held.tensor.shape), ZERO)
        return self.held[held.name][0]

    def select(self, index: NamedTensor, into: Tensor, owns_channels: bool) -> Tensor:
        """New ids for the positions of a Take; otherwise the chosen ones go on."""
        self._used.add(index.name)
        numbers = index.tensor.detach().cpu()
        if index.name in self.selects:
            before = self.selects[index.name]
            self.meet(before.inputs, into)
            return before.outputs
        if owns_channels:
            out = self._new(len(numbers))
        else:
            out = into[numbers]
            if index.name not in dict(self.model.named_buffers()):
                self.lock(into, f"chosen by {index.name}, which is no buffer")
        self.selects[index.name] = SelectInfo(numbers, into, out, owns_channels)
        self._record(index, 0, "index", out, index.name.removesuffix(".index"))
        return out

    def meet(self, a: Tensor, b: Tensor) -> None:
        """Atoms that are added or multiplied are one channel; beside a fixed zero they stay."""
        different = a != b
        x, y = a[different] - ZERO, b[different] - ZERO
        base = len(self.sets.parent) - ZERO
        key = (x * base + y).unique()
        pairs = torch.stack((key // base, key % base), dim=1) + ZERO
        zeros = (pairs == ZERO).any(dim=1)
        beside = pairs[zeros].amax(dim=1)
        if len(beside):
            self._padded.append(beside)
            self.lock(beside, "added to zeros that the code pads with")
        for x, y in pairs[~zeros].tolist():
            self.sets.join(x, y)

    def lock(self, ids: Tensor, reason: str) -> None:
        """Remember why they stay."""
        self.locked.append((ids[ids >= 0].unique(), reason))

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """Remember the parts."""
        self.balances.append((where, list(parts)))

    def close(self) -> None:
        """Settle what stands for what; PruningError if a layer was never seen."""
        for name in self._parameters_left():
            raise PruningError(
                f"layer {name} never runs in eval mode, so what it reads is unknown; build the "
                "network without it"
            )
        self._hold()
        self.canonical = torch.tensor(self.sets.canonical())
        self._roots_and_zero = torch.cat((self.canonical, torch.tensor([ZERO])))  # ZERO is the last
        self.padded = torch.zeros(len(self.canonical) + 1, dtype=torch.bool)
        for ids in self._padded:
            self.padded[ids] = True
        for ids, reason in self.locked:
            for root in self.canonical[ids].unique().tolist():
                self.reasons.setdefault(root, reason)

    def root(self, ids: Tensor) -> Tensor:
        """What stands for each atom; fixed zeros stand for themselves."""
        return self._roots_and_zero[ids]

    def _parameters_left(self) -> list[str]:
        layers = [n for n, p in self.model.named_parameters() if p.numel() > 1]
        return [n.rpartition(".")[0] for n in layers if n not in self._used]

    def _hold(self) -> None:
        """Find the axis of every added or multiplied tensor along which channels differ."""
        for name, (ids, _) in self.held.items():
            sets: list[int] = [self.sets.find(a) for a in ids.flatten().tolist()]
            roots = torch.tensor(sets).reshape(ids.shape)
            if torch.equal(roots, ids):
                continue  # met nothing
            axes = [
                axis
                for axis in range(ids.dim())
                if bool((roots == _first_along(roots, axis)).all())
            ]
            if not axes:
                self.lock(ids.flatten(), f"{name} treats positions of a channel differently")
                continue
            line = roots.movedim(axes[0], 0).flatten(1)[:, 0] if roots.dim() > 1 else roots
            self.held[name] = (ids, axes[0])
            self.records[name, axes[0]] = AxisEntry(
                name, axes[0], "scale", line, name.rpartition(".")[0]
            )


def _first_along(roots: Tensor, axis: int) -> Tensor:
    """The first entry of every other axis, so that only this one is left."""
    index = [slice(None) if k == axis else slice(0, 1) for k in range(roots.dim())]
    return roots[tuple(index)]
