"""Groups of weights that go together: filters, channels or single weights; scoring, choosing.

A choice is a boolean tensor with as many axes as the weight and one entry a group, True where the
group goes: (filters, 1, 1, 1), (1, channels, 1, 1) or the weight's own shape; for a linear layer
(outputs, 1), (1, inputs) or its shape. So it says by itself what it is about, and broadcasts.
"""

from collections.abc import Mapping
from decimal import Decimal
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.sparsity.masks import Masks

Granularity = Literal["filter", "channel", "weight"]
"""What goes as one: an output of a layer, an input of it, or a single weight."""

Pick = Literal["min", "max", "random"]
"""Which groups of a layer are chosen: the smallest, the largest, or any."""

Choices = dict[str, Tensor]
"""Weight's parameter name -> its choice."""


def scores(weight: Tensor, granularity: Granularity) -> Tensor:
    """Mean absolute value of every group, with the shape of a choice.

    Orders the groups of one layer as their L1 norms do.
    """
    size = weight.detach().abs()
    if granularity == "weight":
        return size
    axis = 0 if granularity == "filter" else 1
    return size.mean([a for a in range(size.dim()) if a != axis], keepdim=True)


def number_pruned(ratio: float, total: int) -> int:
    """How many of so many groups a ratio takes: rounded up, and always one fewer than all.

    Reckons with the decimal number that the user wrote: 0.55 of 100 is 55.
    """
    return min(ceil(Decimal(repr(ratio)) * total), total - 1)


def choose(score: Tensor, number: int, pick: Pick = "min", seed: int = 0) -> Tensor:
    """The choice of `number` groups by their scores; of equal ones the first go."""
    return ranks(picking({"": score}, pick, seed))[""] < number


def smallest_choice(score: Tensor, number: int) -> Tensor:
    """The same choice as `choose` makes of scores that differ, without sorting all of them."""
    if not number:
        return torch.zeros_like(score, dtype=torch.bool)
    return score <= score.flatten().kthvalue(number).values


def ranks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Place of every group among those of all layers by score; of equal ones the first is lower.

    A choice of so many groups over all layers is `rank < number`; it may take whole layers.
    """
    order = torch.cat([score.flatten() for score in scores.values()]).sort(stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return _split(places, scores)


def picking(scores: Mapping[str, Tensor], pick: Pick, seed: int) -> dict[str, Tensor]:
    """Scores by which the lowest go first, whatever is picked; at random over all layers."""
    if pick == "min":
        return dict(scores)
    if pick == "max":
        return {name: -score for name, score in scores.items()}
    count = sum(score.numel() for score in scores.values())
    place = next(iter(scores.values())).device
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return _split(order.argsort().to(place), scores)


def picking_by_layer(scores: Mapping[str, Tensor], pick: Pick, seed: int) -> dict[str, Tensor]:
    """The same with chance of its own for every layer."""
    found: dict[str, Tensor] = {}
    for place, (name, score) in enumerate(scores.items()):
        found |= picking({name: score}, pick, seed + place)
    return found


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of a flat tensor in the given shapes."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def spare(gone: Tensor, score: Tensor, least: int = 1, multiple: int = 1) -> Tensor:
    """The choice without its best groups, so that at least `least` of the layer's stay.

    As many more stay as make their number a multiple; all of them if there are fewer. Of equal
    scores the last are spared.
    """
    flat = gone.flatten()
    left = flat.numel() - int(flat.sum())
    wanted = -(-max(left, least) // multiple) * multiple
    if wanted == left:
        return gone
    chosen = flat.nonzero().flatten()
    order = chosen[score.flatten()[chosen].argsort(stable=True)]
    flat = flat.clone()
    flat[order[max(0, len(order) - (wanted - left)) :]] = False
    return flat.view(gone.shape)


def masks(model: nn.Module, choices: Mapping[str, Tensor]) -> Masks:
    """What stays of each weight; with a whole output its bias goes too."""
    validate_choices(model, choices)
    found: Masks = {}
    for name, gone in choices.items():
        weight = model.get_parameter(name)
        found[name] = (~gone).expand(weight.shape).contiguous()
        layer = model.get_submodule(name.removesuffix(".weight"))
        if gone.shape[1:].numel() == 1 < weight.shape[1:].numel() and layer.bias is not None:
            found[f"{name.removesuffix('weight')}bias"] = ~gone.flatten()
    return found


def validate_choices(model: nn.Module, choices: Mapping[str, Tensor]) -> None:
    """Raise PruningError if a choice does not fit its weight."""
    for name, gone in choices.items():
        weight = model.get_parameter(name)
        if not fits(gone, weight):
            raise PruningError(
                f"the choice for {name} has shape {tuple(gone.shape)}, the weight "
                f"{tuple(weight.shape)}: it is not about this network"
            )


def fits(choice: Tensor, weight: Tensor) -> bool:
    """Whether this can be a choice for a weight of that shape."""
    return (
        choice.dtype == torch.bool
        and choice.dim() == weight.dim()
        and all(own in (1, whole) for own, whole in zip(choice.shape, weight.shape, strict=True))
    )
