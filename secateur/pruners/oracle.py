"""Oracle: try every possible choice of filters, and take the one with the lowest loss.

Source: the method `Oracle` in the code of H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via
growing regularization, ICLR 2021: a reference for other criteria, for networks with few filters.
When each layer loses k of its n filters, the number of trials is the product of the binomials
C(n, k). Each trial computes the mean cross-entropy of the network without these filters on training
images, in eval mode. Of equal losses the first is taken.

The number k is rounded up, as in all pruners here; the original rounds down. The original can also
finetune each candidate, which a pruner does not; a study over seeds of `pick: random` shows what
finetuned candidates reach.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.pruning import removal
from secateur.pruning.decision import (
    PruningContext,
    PruningDecision,
    decision_from_choices,
    unprunable_layers,
)
from secateur.sparsity import choices, masks
from secateur.sparsity.choices import Choices
from secateur.sparsity.layer_ratios import ratios_by_layer
from secateur.sparsity.ratios import Ratios, Rules, Skip


class Settings(Strict):
    """How many filters are pruned, and how many trials are allowed."""

    ratios: Ratios = Rules(0.5)
    """Share of each layer's filters that is pruned; see sparsity/ratios.py."""
    skip: Skip = ()
    """Layers that are not pruned: names, or stage.block."""
    max_trials: Annotated[int, Field(ge=1)] = 10_000
    """With more choices than this, the pruner raises an error."""


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """The filters without which the loss is lowest.

    Raises ArgumentError for ratios that do not fit the network or leave too many choices,
    PruningError if the images have no labels, or the network is no classifier.
    """
    context.need_labels("pruner oracle")
    numbers = _numbers(settings, context)
    weights = {name: context.model.get_parameter(name) for name in numbers}
    trials = math.prod(math.comb(len(weights[name]), k) for name, k in numbers.items())
    if trials > settings.max_trials:
        raise ArgumentError(
            "ratios",
            f"more than {settings.max_trials:,} choices of filters (max_trials); oracle is for "
            "networks of a few filters",
        )
    best: tuple[float, PruningDecision] | None = None
    for choice in _combinations({n: len(w) for n, w in weights.items()}, numbers):
        shaped = {n: c.view(-1, *[1] * (weights[n].dim() - 1)) for n, c in choice.items()}
        decision = decision_from_choices(context, shaped, "filter")
        loss = _loss(context, decision)
        if best is None or loss < best[0]:
            best = loss, decision
    assert best is not None
    notes = {"trials": float(trials), "loss": best[0]}
    return PruningDecision(best[1].masks, best[1].channels, notes)


def _numbers(settings: Settings, context: PruningContext) -> dict[str, int]:
    """Number of filters that each layer loses, by its weight's parameter name."""
    refused = unprunable_layers(context.graph, "filter")
    ratios = ratios_by_layer(context.model, settings.ratios, "filter", settings.skip, refused)
    found = {
        f"{name}.weight": choices.number_pruned(
            ratio, len(context.model.get_parameter(f"{name}.weight"))
        )
        for name, ratio in ratios.items()
        if ratio > 0
    }
    if not any(found.values()):
        raise ArgumentError("ratios", "no layer has a filter to spare")
    return {name: number for name, number in found.items() if number}


def _combinations(sizes: dict[str, int], numbers: dict[str, int]) -> Iterator[Choices]:
    """Every choice of `numbers[name]` filters in each layer, flat, in lexicographic order."""
    by_layer = [itertools.combinations(range(sizes[name]), k) for name, k in numbers.items()]
    for picked in itertools.product(*by_layer):
        found = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
        for name, filters in zip(numbers, picked, strict=True):
            found[name][list(filters)] = True
        yield found


def _loss(context: PruningContext, decision: PruningDecision) -> float:
    """Mean cross-entropy of the network without what the decision prunes."""
    model = removal.mask(context.model, decision.channels, context.images[:1], context.graph)
    model.eval()
    masks.apply(model, decision.masks)
    return context.loss(model, "pruner oracle")
