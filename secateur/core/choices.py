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

from secateur.core.errors import PruningError
from secateur.core.masks import Masks

Groups = Literal["filter", "channel", "weight"]
"""What goes as one: an output of a layer, an input of it, or a single weight."""

Pick = Literal["min", "max", "random"]
"""Which groups of a layer are chosen: the smallest, the largest, or any."""

Choices = dict[str, Tensor]
"""Weight's parameter name -> its choice."""


def scores(weight: Tensor, groups: Groups) -> Tensor:
    """Mean absolute value of every group, with the shape of a choice.

    Orders the groups of one layer as their L1 norms do.
    """
    size = weight.detach().abs()
    if groups == "weight":
        return size
    axis = 0 if groups == "filter" else 1
    return size.mean([a for a in range(size.dim()) if a != axis], keepdim=True)


def count(ratio: float, groups: int) -> int:
    """How many of so many groups a ratio takes: rounded up, and always one fewer than all.

    Reckons with the decimal number that the user wrote: 0.55 of 100 is 55.
    """
    return min(ceil(Decimal(repr(ratio)) * groups), groups - 1)


def choose(score: Tensor, number: int, pick: Pick = "min", seed: int = 0) -> Tensor:
    """The choice of `number` groups by their scores; of equal ones the first go."""
    flat = score.flatten()
    if pick == "random":
        chance = torch.Generator().manual_seed(seed)
        order = torch.randperm(flat.numel(), generator=chance).to(flat.device)
    else:
        order = flat.sort(stable=True, descending=pick == "max").indices
    gone = torch.zeros_like(flat, dtype=torch.bool)
    gone[order[:number]] = True
    return gone.view(score.shape)


def smallest(score: Tensor, number: int) -> Tensor:
    """The same choice as `choose` makes of scores that differ, without sorting all of them."""
    if not number:
        return torch.zeros_like(score, dtype=torch.bool)
    return score <= score.flatten().kthvalue(number).values


def masks(model: nn.Module, choices: Mapping[str, Tensor]) -> Masks:
    """What stays of each weight; with a whole output its bias goes too."""
    found: Masks = {}
    for name, gone in choices.items():
        weight = model.get_parameter(name)
        if not fits(gone, weight):
            raise PruningError(
                f"the choice for {name} has shape {tuple(gone.shape)}, the weight "
                f"{tuple(weight.shape)}: it is not about this network"
            )
        found[name] = (~gone).expand(weight.shape).contiguous()
        layer = model.get_submodule(name.removesuffix(".weight"))
        if gone.shape[1:].numel() == 1 < weight.shape[1:].numel() and layer.bias is not None:
            found[f"{name.removesuffix('weight')}bias"] = ~gone.flatten()
    return found


def fits(choice: Tensor, weight: Tensor) -> bool:
    """Whether this can be a choice for a weight of that shape."""
    return (
        choice.dtype == torch.bool
        and choice.dim() == weight.dim()
        and all(own in (1, whole) for own, whole in zip(choice.shape, weight.shape, strict=True))
    )
