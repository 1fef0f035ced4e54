"""Choices of the units that are pruned at a granularity: scores and selection.

A unit is a filter, an input channel or a single weight of one layer. A choice is a boolean tensor
with as many axes as the weight and one entry for each unit, True if the unit is to be pruned. Its
shape shows the granularity, and it broadcasts over the weight:

    filter     (filters, 1, 1, 1), or (outputs, 1) for a linear layer
    channel    (1, channels, 1, 1), or (1, inputs)
    weight     the shape of the weight, or of a bias or scale, whose entries are chosen one by one

Where a filter or a channel is a single weight, the other choices determine the granularity.
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
"""The unit of pruning: an output of a layer, an input of a layer, or a single weight."""

Pick = Literal["min", "max", "random"]
"""Which units are chosen: those with the lowest or the highest scores, or random ones."""

Ranking = Literal["layer", "global"]
"""Whether units are compared within a layer (or channel group), or over all of them."""

Choices = dict[str, Tensor]
"""Weight's parameter name -> its choice."""


def magnitude_scores(weight: Tensor, granularity: Granularity) -> Tensor:
    """Mean absolute value of every unit, in the shape of a choice.

    The order of the units of a layer is that of their L1 norms.
    """
    size = weight.detach().abs()
    if granularity == "weight":
        return size
    axis = 0 if granularity == "filter" else 1
    return size.mean([a for a in range(size.dim()) if a != axis], keepdim=True)


def number_pruned(ratio: float, total: int) -> int:
    """Number of units for a ratio of `total` units: rounded up, and at most all but one.

    Computed with the decimal number that the user wrote: 0.55 of 100 is 55.
    """
    return min(ceil(Decimal(repr(ratio)) * total), total - 1)


def number_kept(share: float, total: int) -> int:
    """Number of units for a share of `total` units: rounded up, and at least one."""
    return max(1, ceil(Decimal(repr(share)) * total))


def choose(
    score: Tensor, number: int, pick: Pick = "min", seed: int = 0, mask: Tensor | None = None
) -> Tensor:
    """The choice of `number` units by their scores; of equal scores, the first are chosen.

    Units that `mask` (of the weight's shape) holds at zero as a whole are chosen before all others.
    """
    picked = pick_scores({"": score}, pick, seed)
    return ranks(picked if mask is None else masked_first(picked, {"": mask}))[""] < number


def choose_smallest(score: Tensor, number: int) -> Tensor:
    """As `choose` for the lowest scores, without sorting all of them."""
    if not number:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.flatten()
    largest = flat.kthvalue(number).values
    below, equal = flat < largest, flat == largest
    return (below | (equal & (equal.cumsum(0) <= number - below.sum()))).view(score.shape)


def ranks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank of every unit among those of all layers by score; of equal scores, the first is lower.

    The choice of the `number` lowest units over all layers is `rank < number`; it may choose all
    units of a layer.
    """
    order = torch.cat([score.flatten() for score in scores.values()]).sort(stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return _split(places, scores)


def pick_scores(scores: Mapping[str, Tensor], pick: Pick, seed: int) -> dict[str, Tensor]:
    """Scores whose lowest units are those that `pick` chooses over all layers."""
    if pick == "min":
        return dict(scores)
    if pick == "max":
        return {name: -score for name, score in scores.items()}
    count = sum(score.numel() for score in scores.values())
    device = next(iter(scores.values())).device
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return _split(order.argsort().to(device), scores)


def pick_scores_by_layer(scores: Mapping[str, Tensor], pick: Pick, seed: int) -> dict[str, Tensor]:
    """Scores whose lowest units are those that `pick` chooses in each layer; every layer has its
    own seed."""
    found: dict[str, Tensor] = {}
    for place, (name, score) in enumerate(scores.items()):
        found |= pick_scores({name: score}, pick, seed + place)
    return found


def masked_first(scores: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Scores below all others for units that `masks` (by parameter) hold at zero as a whole.

    With them, a share of the units that is pruned includes those that were pruned before. Otherwise
    random units, or the most important ones, would be pruned in addition to them.
    """
    found = dict(scores)
    for name in scores.keys() & masks.keys():
        kept = masks[name].to(scores[name].device)
        for axis, size in enumerate(scores[name].shape):
            if size == 1:
                kept = kept.any(axis, keepdim=True)
        found[name] = scores[name].double().masked_fill(~kept, -torch.inf)
    return found


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of a flat tensor in the given shapes."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def keep_at_least(choice: Tensor, score: Tensor, least: int = 1, multiple: int = 1) -> Tensor:
    """The choice without its best units, so that at least `least` of the layer's units are kept.

    More are kept until their number is a multiple of `multiple`; a layer that has fewer units
    keeps all. Of equal scores, the last are kept.
    """
    flat = choice.flatten()
    kept = flat.numel() - int(flat.sum())
    wanted = -(-max(kept, least) // multiple) * multiple
    if wanted == kept:
        return choice
    chosen = flat.nonzero().flatten()
    order = chosen[score.flatten()[chosen].argsort(stable=True)]
    flat = flat.clone()
    flat[order[max(0, len(order) - (wanted - kept)) :]] = False
    return flat.view(choice.shape)


def masks_from_choices(model: nn.Module, choices: Mapping[str, Tensor]) -> Masks:
    """Masks of the chosen weights, and of the biases of chosen filters.

    Raises PruningError as `validate_choices` does.
    """
    validate_choices(model, choices)
    found: Masks = {}
    for name, choice in choices.items():
        weight = model.get_parameter(name)
        found[name] = (~choice).expand(weight.shape).contiguous()
        if weight.dim() < 2:
            continue
        layer = model.get_submodule(name.removesuffix(".weight"))
        if choice.shape[1:].numel() == 1 < weight.shape[1:].numel() and layer.bias is not None:
            found[f"{name.removesuffix('weight')}bias"] = ~choice.flatten()
    return found


def validate_choices(model: nn.Module, choices: Mapping[str, Tensor]) -> None:
    """Raise PruningError if a choice does not fit its weight."""
    for name, choice in choices.items():
        weight = model.get_parameter(name)
        if not fits(choice, weight):
            raise PruningError(
                f"the choice for {name} has shape {tuple(choice.shape)}, the weight "
                f"{tuple(weight.shape)}: it is not about this network"
            )


def fits(choice: Tensor, weight: Tensor) -> bool:
    """Whether a tensor can be a choice for a weight."""
    return (
        choice.dtype == torch.bool
        and choice.dim() == weight.dim()
        and all(own in (1, whole) for own, whole in zip(choice.shape, weight.shape, strict=True))
    )
