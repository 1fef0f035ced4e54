"""Find dead channels: those that no output of the network depends on.

A channel is dead if every weight that reads it is zero or belongs to a dead output, or if it is the
same for every input and can be folded into the layers that read it (see pruning/folding.py). A
channel that is normalised together with others, as by a LayerNorm, is never dead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.channels.graph import ChannelGraph
from secateur.nn.outputs import tensors_of
from secateur.pruning.constants import ConstantPropagation, LayerInput
from secateur.pruning.folding import ConstantInputs, Folding


@dataclass
class Consumer:
    """A reader of channels: a layer, or the index of a ChannelSelect."""

    name: str
    inputs: Tensor
    """int64, (inputs,): canonical ids; fixed zeros have the id one past the last."""
    outputs: Tensor
    """int64, (outputs,): canonical ids."""
    inputs_read_by: Callable[[Tensor], Tensor]
    """bool, (outputs,) -> bool, (inputs,): which inputs these outputs read."""
    ignorable: Tensor
    """bool, (inputs,): known to be zero, or constant and foldable."""
    foldable: Tensor
    """bool, (inputs,): constant, not zero, and foldable."""
    values: Tensor | None = None
    """The input for two images, NaN where it depends on the image."""
    _last: tuple[Tensor, Tensor] | None = None
    """Argument and result of the last call of `requires`."""

    @cached_property
    def channels(self) -> Tensor:
        """Canonical ids of its inputs, each once."""
        return self.inputs.unique()

    def requires(self, alive: Tensor) -> Tensor:
        """Canonical ids that living outputs depend on; `alive` is bool, (outputs,)."""
        if self._last is None or not torch.equal(alive, self._last[0]):
            self._last = alive, self.inputs[self.inputs_read_by(alive) & ~self.ignorable]
        return self._last[1]


class DeadChannels:
    """The dead channels of a network, and the constants that some of them hold.

    Sets of channels are bool tensors by canonical id, with an extra entry for fixed zeros.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, graph: ChannelGraph, example: Tensor) -> None:
        """`graph` is the model's; only shape, type and device of the batch `example` matter.

        Channels are dead, and constants are equal, for images of every size that the network takes.
        """
        self.graph, self.folding = graph, Folding(model, graph)
        sizes = ConstantPropagation.at_two_sizes(model, graph.fx_graph, example)
        self.consumers = _consumers(graph, self.folding, sizes)
        count = len(graph.canonical)
        self.consumer_count = torch.zeros(count + 1, dtype=torch.int64)
        """By canonical id: how many consumers read it."""
        for consumer in self.consumers:
            self.consumer_count[consumer.channels] += 1
        results = [t for size in sizes for t in tensors_of(size.result)]
        outputs = [t for t in results if t.is_floating_point()]
        self.constant_output = not any(bool(t.isnan().any()) for t in outputs)
        """Whether the network computes the same for every input."""
        self.candidates = torch.zeros(count + 1, dtype=torch.bool)
        for group in graph.groups:
            self.candidates[group.ids] = group.locked is None
        self.candidates[:count] &= ~graph.normalised  # a LayerNorm reads them too

    def selection(self) -> dict[str, Tensor]:
        """Dead channels by group, as many as can be removed.

        Raises PruningError naming the first layer without a living output if the network's output
        does not depend on its input.
        """
        kept = torch.zeros_like(self.candidates)
        while True:
            dead = self._dead(self.candidates & ~kept)
            chosen = self.graph.selection(dead.nonzero().flatten())
            balanced = self.graph.balanced(chosen)
            if sum(map(len, balanced.values())) == sum(map(len, chosen.values())):
                return chosen
            # channels that must be kept are alive, and so are the channels that they read
            kept |= dead
            kept[self.graph.ids_of(balanced)] = False

    def constant_inputs(self, removed: Tensor) -> list[ConstantInputs]:
        """Inputs that must be folded before channels with these canonical ids are removed."""
        among = torch.zeros_like(self.candidates)
        among[removed] = True
        found = []
        for consumer in self.consumers:
            channels = consumer.foldable & among[consumer.inputs]
            if bool(channels.any()) and consumer.values is not None:
                found.append(ConstantInputs(consumer.name, consumer.values, channels))
        return found

    def _dead(self, candidates: Tensor) -> Tensor:
        """The candidates that are dead; a layer that is dead as a whole keeps one channel."""
        candidates = candidates.clone()
        while True:
            dead = torch.zeros_like(candidates)
            while not torch.equal(after := self._sweep(candidates, dead), dead):
                dead = after
                if self.constant_output and (emptied := self.graph.emptied(dead)):
                    raise PruningError(
                        f"layer {emptied[0]} has no living output left; prune or penalise less"
                    )
            if not (emptied := self.graph.emptied(dead)):
                return dead
            candidates[self.graph.output_ids()[emptied[0]][0]] = False

    def _sweep(self, candidates: Tensor, dead: Tensor) -> Tensor:
        """One more pass over the consumers: candidates that no living output depends on.

        The pass runs from the last consumer to the first, and marks a channel as dead once all its
        consumers have been visited. If the network's output is constant it does not, since the
        error has to name the first layer that dies.
        """
        dead, required = dead.clone(), ~candidates
        pending = self.consumer_count.clone()
        for consumer in reversed(self.consumers):
            required[consumer.requires(~dead[consumer.outputs])] = True
            pending[channels := consumer.channels] -= 1
            if not self.constant_output:
                dead[channels] |= ~required[channels] & (pending[channels] == 0)
        return ~required


def _consumers(
    graph: ChannelGraph, folding: Folding, sizes: list[ConstantPropagation]
) -> list[Consumer]:
    """All consumers in the order of execution, layers first; `sizes` has the constants at each."""
    layers = [
        _layer(name, graph, folding, [size.inputs[name] for size in sizes])
        for name, layer in graph.layers.items()
        if not layer.depthwise()
    ]
    selects = [
        _select(name, graph, [size.inputs[name] for size in sizes])
        for name, select in graph.selects.items()
        if select.owns_channels
    ]
    return layers + selects


def _layer(
    name: str, graph: ChannelGraph, folding: Folding, sizes: list[list[LayerInput]]
) -> Consumer:
    """A convolution or linear layer; `sizes` has its input at each size and call."""
    layer = graph.layers[name]
    weight = folding.tensors[layer.weight]
    reads = weight.flatten(2).any(dim=2) if weight.dim() > 2 else weight.bool()
    blocks = reads.reshape(layer.groups, -1, reads.shape[1])
    zero = _zero(sizes)
    constant = torch.stack([calls[0].constant for calls in sizes]).all(dim=0) & ~zero
    if bool(constant.any()):
        constant &= blocks.any(dim=1).flatten()
    foldable = folding.foldable(name, sizes, constant)
    return Consumer(
        name,
        _canonical(graph, layer.inputs),
        _canonical(graph, layer.outputs),
        _block_reader(blocks),
        (zero | foldable).cpu(),
        foldable.cpu(),
        sizes[0][0].values,
    )


def _select(name: str, graph: ChannelGraph, sizes: list[list[LayerInput]]) -> Consumer:
    """The index of a ChannelSelect."""
    select = graph.selects[name]
    zero = _zero(sizes).cpu()
    inputs, outputs = _canonical(graph, select.inputs), _canonical(graph, select.outputs)
    reader = _index_reader(select.index, len(inputs))
    return Consumer(name, inputs, outputs, reader, zero, torch.zeros_like(zero))


def _zero(sizes: list[list[LayerInput]]) -> Tensor:
    """Inputs that are zero at each size and call, bool, (inputs,)."""
    return torch.stack([call.zero for calls in sizes for call in calls]).all(dim=0)


def _canonical(graph: ChannelGraph, ids: Tensor) -> Tensor:
    """Canonical ids; a negative id, a fixed zero, becomes the id one past the last."""
    return torch.where(ids >= 0, graph.canonical[ids.clamp_min(0)], len(graph.canonical))


def _block_reader(reads: Tensor) -> Callable[[Tensor], Tensor]:
    """Outputs -> inputs that they read; `reads` is bool, (groups, outputs, inputs of a group)."""
    matrix = reads.float().cpu()
    return lambda outputs: (outputs.view(len(matrix), 1, -1).float() @ matrix).flatten() > 0


def _index_reader(index: Tensor, inputs: int) -> Callable[[Tensor], Tensor]:
    """Outputs -> inputs that they read: the input at its index; none for a negative index."""
    none, real = torch.zeros(inputs, dtype=torch.bool), index >= 0
    return lambda outputs: none.index_fill(0, index[outputs & real], True)
