"""Magnitude: in each layer, or over all layers, the groups of weights that matter least go.

Source: of filters by L1 norm H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, Pruning filters
for efficient ConvNets, ICLR 2017; of single weights S. Han et al., NeurIPS 2015. Other criteria,
with their sources, are in pruning/criteria.py.

Filters and channels are taken out of the network whole. Filters that are added to those of other
layers (residual sums), and inputs that are such a sum, are not for one layer to choose: a ratio for
one of these by name is an error, and one for all layers passes them over. Inputs that several
layers read (DenseNet) are masked in the layer that chose them, and go if all of its readers did.
"""

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from secateur.base.errors import SettingsError
from secateur.base.settings import Seed, Strict
from secateur.pruning import criteria
from secateur.pruning.decision import (
    PruningContext,
    PruningDecision,
    decision_from_choices,
    unprunable_layers,
)
from secateur.pruning.target import Target, solve
from secateur.sparsity import choices as grouping
from secateur.sparsity.choices import Choices, Granularity, Pick
from secateur.sparsity.ratios import Ratios, Rules, Skip, by_layer, scaled

WHERE = "pruners.magnitude"


class Settings(Strict):
    """What goes, by what measure, and how much of it."""

    granularity: Granularity = "filter"
    """filter: outputs of a layer; channel: inputs of it; weight: single weights."""
    criterion: criteria.Criterion = "l1"
    """What tells how much a group matters; see pruning/criteria.py."""
    pick: Pick = "min"
    """Which groups go: the least, the most important ones, or any (controls)."""
    seed: Seed = 0
    """Of pick: random."""
    ranking: Literal["layer", "global"] = "layer"
    """Groups are compared within their layer, or over all layers that have a ratio above 0."""
    ratios: Ratios = Rules(0.5)
    """Share of each layer's groups that goes, see sparsity/ratios.py; with ranking global one number."""
    skip: Skip = ()
    """Layers that are left alone: names, or stage.block."""
    target: Target | None = None
    """What is to be left of the network; `ratios` then say in what proportions layers lose."""
    round_to: Annotated[int, Field(ge=1)] = 1
    """Filters or channels that stay are brought up to a multiple of this, if there are so many."""

    @model_validator(mode="after")
    def _one_number_for_all(self) -> Self:
        if self.ranking == "global" and self.ratios.everywhere is None:
            raise ValueError(
                "ratios: ranking global compares all layers, so it takes one number; name layers to "
                "leave alone under skip"
            )
        return self


def prune(settings: Settings, subject: PruningContext) -> PruningDecision:
    """The choice, as whole channels where they can go.

    Raises SettingsError for ratios or a criterion that do not fit the network, PruningError for a
    target that cannot be reached.
    """
    granularity = settings.granularity
    refused = {} if granularity == "weight" else unprunable_layers(subject.graph, granularity)
    ratios = by_layer(subject.model, settings.ratios, granularity, settings.skip, WHERE, refused)
    ratios = {name: ratio for name, ratio in ratios.items() if ratio > 0}
    where = f"{WHERE}.criterion"
    scores = criteria.scores(subject, list(ratios), granularity, settings.criterion, where)
    if not any(score.numel() > 1 for score in scores.values()):
        raise SettingsError(f"params.yaml: {WHERE}.ratios: no layer has a {granularity} to spare")
    within = settings.ranking == "layer"
    picking = grouping.picking_by_layer if within else grouping.picking
    order = picking(scores, settings.pick, settings.seed)
    choose = _within_layers(order) if within else _over_all(order)

    def decide(ratios: dict[str, float]) -> PruningDecision:
        multiple = 1 if granularity == "weight" else settings.round_to
        chosen = {
            name: grouping.spare(gone, order[name], multiple=multiple)
            for name, gone in choose(ratios).items()
        }
        decision = decision_from_choices(
            subject, {name: gone for name, gone in chosen.items() if gone.any()}
        )
        sizes = {name.removesuffix(".weight"): score.numel() for name, score in order.items()}
        asked = sum(ratio * sizes[name] for name, ratio in ratios.items())
        reached = sum(int(gone.sum()) for gone in chosen.values())
        total = sum(sizes.values())
        notes = {"ratio_asked": asked / total, "ratio_reached": reached / total}
        return PruningDecision(decision.masks, decision.channels, notes)

    if settings.target is None:
        return decide(ratios)
    return solve(lambda highest: decide(scaled(ratios, highest)), settings.target, subject).decision


Chooser = Callable[[dict[str, float]], Choices]
"""Ratios by layer -> what goes."""


def _within_layers(order: dict[str, Tensor]) -> Chooser:
    ranks = {name: grouping.ranks({name: score})[name] for name, score in order.items()}

    def choose(ratios: dict[str, float]) -> Choices:
        counts = {
            name: grouping.number_pruned(ratios[name.removesuffix(".weight")], rank.numel())
            for name, rank in ranks.items()
        }
        return {name: rank < counts[name] for name, rank in ranks.items()}

    return choose


def _over_all(order: dict[str, Tensor]) -> Chooser:
    ranks = grouping.ranks(order)
    total = sum(rank.numel() for rank in ranks.values())

    def choose(ratios: dict[str, float]) -> Choices:
        count = grouping.number_pruned(next(iter(ratios.values())), total)
        return {name: rank < count for name, rank in ranks.items()}

    return choose
