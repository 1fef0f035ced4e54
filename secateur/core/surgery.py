"""Dead channels -> a smaller network, with proof that it computes the same.

An output of a layer is dead if nobody reads it (all weights that read it are zero), or if it says
the same for every input (all its own weights are zero). The first is simply left out. The second is
a constant: what it gives to the next layer is added to that layer's bias and then it is left out,
unless the next layer pads its input, where a constant is not the same at the border.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.core.channels import Link, links
from secateur.core.errors import PruningError
from secateur.core.masks import Masks
from secateur.core.shapes import resize

EXACT = 1e-9  # float64, relative to the largest output
ROUNDING = 1e-4  # float32, relative to the largest output


@dataclass(frozen=True)
class Compact:
    """A network without its dead outputs, and what is left of each layer."""

    model: nn.Module
    masks: Masks
    kept: dict[str, Tensor]
    """Layer -> indices of the outputs that it still has."""


def remove_dead(model: nn.Module, masks: Masks, example: Tensor) -> Compact:
    """Remove every dead output of every layer but the last; `model` itself is left alone.

    `example` is a batch of inputs of any size. Raises PruningError if a layer has no living output
    left, or if the network cannot be followed.
    """
    small = copy.deepcopy(model).eval()
    masks = {name: mask.clone() for name, mask in masks.items()}
    joints = links(small, example)
    kept = {link.producer: torch.arange(_layer(small, link.producer)[0]) for link in joints}
    changed = True
    while changed:  # a layer that loses readers may be dead in its turn
        changed = False
        for link in joints:
            keep = _fold(small, masks, link)
            if bool(keep.all()):
                continue
            if not bool(keep.any()):
                raise PruningError(
                    f"layer {link.producer} has no living output left; prune or penalise less"
                )
            kept[link.producer] = kept[link.producer][keep]
            _cut(small, masks, link, keep)
            changed = True
    return Compact(small, masks, kept)


@torch.no_grad()
def _fold(model: nn.Module, masks: Masks, link: Link) -> Tensor:
    """Which outputs of the producer must stay; constants of those that go are folded."""
    producer, consumer = (model.get_submodule(n) for n in (link.producer, link.consumer))
    assert isinstance(producer, nn.Conv2d | nn.Linear)
    assert isinstance(consumer, nn.Conv2d | nn.Linear)
    outputs = producer.weight.shape[0]
    reads = _by_output(consumer.weight, outputs)  # (readers, outputs, positions)
    unread = (reads == 0).all(dim=2).all(dim=0)
    silent = (producer.weight == 0).flatten(1).all(dim=1)
    constant, even = _constants(producer, link)
    padded = isinstance(consumer, nn.Conv2d) and any(p != 0 for p in _padding(consumer))
    exact = (constant == 0) | (even & (not padded) & (consumer.bias is not None))
    gone = unread | (silent & exact)
    fold = gone & ~unread & (constant != 0)
    if bool(fold.any()) and consumer.bias is not None:
        addition = (reads[:, fold].sum(dim=2) * constant[fold]).sum(dim=1)
        consumer.bias += addition
        if (mask := masks.get(f"{link.consumer}.bias")) is not None:
            mask |= (addition != 0).to(mask.device)
    return ~gone


@torch.no_grad()
def _constants(producer: nn.Conv2d | nn.Linear, link: Link) -> tuple[Tensor, Tensor]:
    """What each output says when its weights are silent, as the next layer sees it.

    Gives the values (outputs,), and whether each is the same at every position (outputs,).
    """
    outputs = producer.weight.shape[0]
    bias = producer.bias if producer.bias is not None else producer.weight.new_zeros(outputs)
    seen = bias.view(1, -1, *[1] * len(link.side)).expand(1, outputs, *link.side)
    for module in link.through:
        seen = module(seen)
    flat = seen.reshape(outputs, -1)
    return flat[:, 0], (flat == flat[:, :1]).all(dim=1)


@torch.no_grad()
def _cut(model: nn.Module, masks: Masks, link: Link, keep: Tensor) -> None:
    """Take the outputs that are not kept out of the producer, and out of what reads them."""
    columns = keep.repeat_interleave(link.positions)
    state = model.state_dict()
    for tensors in (state, masks):
        for name in (f"{link.producer}.weight", f"{link.producer}.bias"):
            if name in tensors:
                tensors[name] = tensors[name][keep].clone()
        if (name := f"{link.consumer}.weight") in tensors:
            tensors[name] = tensors[name][:, columns].clone()
    resize(model, {name: tensor.shape for name, tensor in state.items()})
    model.load_state_dict(state)


@torch.no_grad()
def verify(masked: nn.Module, compact: Compact, batch: Tensor, tolerance: float) -> float:
    """Run both on the same batch; gives the largest difference over the largest output.

    Raises PruningError naming the first layer that differs by more than `tolerance`.
    """
    before, after = _outputs(masked, batch), _outputs(compact.model, batch)
    scale = max(float(before[""].abs().max()), 1e-30)
    worst = float((before[""] - after[""]).abs().max()) / scale
    if worst <= tolerance:
        return worst
    where, by = "the output", worst
    for name, full in before.items():
        index = compact.kept.get(name)
        same = full if index is None else full.index_select(1, index.to(full.device))
        by = float((same - after[name]).abs().max()) / max(float(same.abs().max()), 1e-30)
        if by > tolerance:
            where = f"layer {name}" if name else "the output"
            break
    raise PruningError(
        f"the compact network is not the masked one: {where} differs by {by:.2g} of its largest "
        f"value (allowed: {tolerance:g}). Nothing was written; this is a bug of the removal"
    )


def _outputs(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Output of every layer by name, in order, and of the whole network under ''."""
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, n=name: seen.update({n: out}))
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    try:
        whole = model.eval()(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {**seen, "": whole}


def _by_output(weight: Tensor, outputs: int) -> Tensor:
    """The reader's weights by what they read: (readers, outputs, positions)."""
    return weight.reshape(weight.shape[0], outputs, -1)


def _layer(model: nn.Module, name: str) -> torch.Size:
    return model.get_parameter(f"{name}.weight").shape


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    return (1,) if isinstance(conv.padding, str) else tuple(conv.padding)
