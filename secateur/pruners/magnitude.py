"""Magnitude pruning: the least important filters, channels or weights, by layer or globally.

Sources: for filters by L1 norm, H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, Pruning
filters for efficient ConvNets, ICLR 2017; for single weights, S. Han et al., NeurIPS 2015. Other
criteria, with their sources, are in pruning/criteria.py.

Filters and channels are removed whole. Where the outputs of several layers are added (residual
sums), no single layer can choose among its filters, nor a layer that reads the sum among its
inputs: a ratio that names such a layer is an error, and a ratio for all layers skips it. Inputs
that several layers read (DenseNet) are masked in the layer that chose them, and removed if all
layers that read them chose them.

Granularity group: channels together with everything that is coupled to them in any layer, scored as
described in pruning/group_scores.py, so that residual sums, depthwise convolutions and
squeeze-excite products are pruned too.

Granularity 2:4: the two least important of every four consecutive inputs, in all layers whose
number of inputs is a multiple of four (sparsity/semi_structured.py). Removing dead channels
afterwards would shift inputs between these fours and break the pattern: set
prune.remove_dead: false.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from secateur.base.errors import ArgumentError
from secateur.base.sections import Seed, Strict
from secateur.pruning import criteria, group_scores
from secateur.pruning.decision import (
    PruningContext,
    PruningDecision,
    decision_from_choices,
    unprunable_layers,
)
from secateur.pruning.group_scores import (
    GroupRanking,
    Reduction,
    ScoreNormalisation,
    StructuralRanking,
)
from secateur.pruning.target import Target, solve_rounded
from secateur.sparsity import choices, masks, semi_structured
from secateur.sparsity.choices import Choices, Granularity, Pick
from secateur.sparsity.layer_ratios import (
    layers_left,
    ratios_by_group,
    ratios_by_layer,
    ratios_by_parameter,
    scaled,
)
from secateur.sparsity.ratios import Ratios, Rules, Skip


def _two_of_four(value: Any) -> Any:
    """Undo YAML 1.1, which reads an unquoted 2:4 as the sexagesimal number 124."""
    return "2:4" if value == 124 and not isinstance(value, bool) else value


class Settings(Strict):
    """What is pruned, by which criterion, and how much of it."""

    granularity: Annotated[Granularity | Literal["group", "2:4"], BeforeValidator(_two_of_four)] = (
        "filter"
    )
    """filter: outputs of a layer; channel: inputs of a layer (pixels only if `ratios` names the
    first layer, a linear one; their columns are zero); weight: single weights; group: channels with
    everything that is coupled to them; 2:4: two of every four consecutive inputs."""
    scope: masks.Scope | None = None
    """For granularity weight: the parameters whose entries are ranked; null: weights. A bias has
    the ratio of its layer."""
    criterion: criteria.Criterion = "l1"
    """How importance is measured; see pruning/criteria.py, for groups pruning/group_scores.py."""
    reduce: Reduction | None = None
    """For granularity group: how the scores of a channel in its tensors become one; null: mean."""
    normalise: ScoreNormalisation | None = None
    """For granularity group: how scores of different groups are made comparable; null: mean."""
    pick: Pick = "min"
    """Which units are pruned: the least important, the most important, or random ones (the last
    two are controls)."""
    seed: Seed = 0
    """For pick: random."""
    ranking: StructuralRanking = "layer"
    """layer: within a layer (granularity group: within a channel group); global: over all layers
    that have a ratio above 0; isomorphic: over channel groups of equal structure."""
    ratios: Ratios = Rules(0.5)
    """Share of each layer's units that is pruned, see sparsity/ratios.py; one number with ranking
    global or isomorphic."""
    skip: Skip = ()
    """Layers that are not pruned: names, or stage.block."""
    target: Target | None = None
    """Size that the network is pruned to; `ratios` are then the proportions between layers."""
    round_to: Annotated[int, Field(ge=1)] | None = None
    """The number of kept filters or channels is a multiple of this; a layer that has fewer keeps
    all. null: 1, and with a latency target the multiple that the measured layers suggest."""
    keep_at_least: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of each layer, or channel group, that is kept whatever the ranking. null: a quarter
    where channel groups are compared with each other, else one filter, channel or weight."""

    @model_validator(mode="after")
    def _one_number_for_all(self) -> Self:
        if self.ranking != "layer" and self.ratios.everywhere is None:
            raise ValueError(
                f"ratios: ranking {self.ranking} compares all layers, so it takes one number; name "
                "layers to leave alone under skip"
            )
        return self

    @model_validator(mode="after")
    def _only_of_groups(self) -> Self:
        if self.granularity != "group":
            for key in ("reduce", "normalise"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: needs granularity: group, which has several tensors")
            if self.ranking == "isomorphic":
                raise ValueError("ranking: isomorphic needs granularity: group")
        elif self.criterion == "lamp":
            raise ValueError("criterion: lamp of a group is criterion: l2 with normalise: lamp")
        return self

    @model_validator(mode="after")
    def _scope_and_two_of_four(self) -> Self:
        if self.scope is not None and self.granularity != "weight":
            raise ValueError(f"scope: {self.scope} needs granularity: weight")
        if self.round_to is not None and self.granularity == "weight":
            raise ValueError(
                "round_to: is a multiple of filters or channels, and granularity weight keeps none "
                "of them whole"
            )
        if self.granularity == "2:4":
            for key in ("ratios", "ranking", "pick", "target", "round_to", "keep_at_least"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key}: granularity 2:4 prunes the lower half of every four weights, so "
                        "there is nothing to set; name layers to leave alone under skip"
                    )
        return self

    @model_validator(mode="after")
    def _latency_of_channels(self) -> Self:
        if self.granularity == "weight" and self.target is not None and self.target.latency:
            raise ValueError(
                "target: latency needs whole channels, so granularity: group, filter or channel"
            )
        return self

    @property
    def least(self) -> float:
        """The smallest share that is kept."""
        if self.keep_at_least is not None:
            return self.keep_at_least
        return 0.25 if self.granularity == "group" and self.ranking != "layer" else 0.0


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """The least important units, as whole channels where these can be removed.

    Raises ArgumentError for ratios or a criterion that do not fit the network, PruningError for a
    target that cannot be reached.
    """
    granularity = settings.granularity
    if granularity == "group":
        return _prune_groups(settings, context)
    if granularity == "2:4":
        return _prune_two_of_four(settings, context)
    ratios = _ratios(settings, granularity, context)
    scores = criteria.parameter_scores(context, list(ratios), granularity, settings.criterion)
    if not any(score.numel() > 1 for score in scores.values()):
        raise ArgumentError("ratios", f"no layer has a {granularity} to spare")
    pick = choices.pick_scores_by_layer if settings.ranking == "layer" else choices.pick_scores
    scores = choices.masked_first(pick(scores, settings.pick, settings.seed), context.masks)

    choose = _by_layer(scores) if settings.ranking == "layer" else _over_all_layers(scores)

    def least(name: str, choice: Tensor) -> int:
        biases = not name.endswith("weight")
        return 0 if biases else choices.number_kept(settings.least, choice.numel())

    def decide(ratios: dict[str, float], multiple: int) -> PruningDecision:
        multiple = 1 if granularity == "weight" else multiple
        chosen = {
            name: choices.keep_at_least(choice, scores[name], least(name, choice), multiple)
            for name, choice in choose(ratios).items()
        }
        decision = decision_from_choices(
            context, {name: choice for name, choice in chosen.items() if choice.any()}, granularity
        )
        notes = _ratios_reached(ratios, chosen)
        return PruningDecision(decision.masks, decision.channels, notes)

    if settings.target is None:
        return decide(ratios, settings.round_to or 1)
    return solve_rounded(
        lambda highest, multiple: decide(scaled(ratios, highest), multiple),
        settings.target,
        context,
        settings.round_to,
    )


def _ratios(
    settings: Settings, granularity: Granularity, context: PruningContext
) -> dict[str, float]:
    """Ratio of every parameter that is pruned, by its name."""
    if granularity == "weight":
        scope = settings.scope or "weights"
        return ratios_by_parameter(context.model, settings.ratios, scope, settings.skip)
    refused = unprunable_layers(context.graph, granularity)
    ratios = ratios_by_layer(context.model, settings.ratios, granularity, settings.skip, refused)
    return {f"{name}.weight": ratio for name, ratio in ratios.items() if ratio > 0}


def _prune_two_of_four(settings: Settings, context: PruningContext) -> PruningDecision:
    """Masks of two of every four consecutive inputs, in layers that have a multiple of four."""
    suitable = semi_structured.suitable_layers(context.model)
    names = [name for name in layers_left(context.model, settings.skip) if name in suitable]
    if not names:
        raise ArgumentError("granularity", "no layer has a multiple of four inputs", "2:4")
    scores = criteria.scores(context, names, "weight", settings.criterion)
    found = {name: ~semi_structured.smaller_two_of_four(score) for name, score in scores.items()}
    line = (
        "2:4: only GPUs with sparse matrix units (compute capability 8.0 and higher) skip these "
        "zeros, and only if prune.remove_dead: false leaves the fours in place; on a CPU nothing "
        "is gained in time"
    )
    return PruningDecision(found, lines=(line,))


def _prune_groups(settings: Settings, context: PruningContext) -> PruningDecision:
    """The least important channels with everything that is coupled to them."""
    graph = context.graph
    groups, refused = group_scores.score_groups(
        context, settings.criterion, settings.reduce or "mean", settings.normalise or "mean"
    )
    layers = {group.name: group.producers for group in graph.groups}
    by_name = ratios_by_group(context.model, settings.ratios, settings.skip, layers, refused)
    ratios = [min(by_name[name] for name in group.groups) for group in groups]
    chosen = [number for number, ratio in enumerate(ratios) if ratio > 0]
    if not any(len(groups[number].units) > 1 for number in chosen):
        raise ArgumentError("ratios", "no group has a channel to spare")
    pick = choices.pick_scores_by_layer if settings.ranking == "layer" else choices.pick_scores
    scores = pick({str(n): groups[n].scores for n in chosen}, settings.pick, settings.seed)
    ranked = GroupRanking(
        tuple(replace(groups[number], scores=scores[str(number)]) for number in chosen),
        tuple(ratios[number] for number in chosen),
        settings.ranking,
        settings.least,
        settings.round_to or 1,
    )
    total = sum(group.units.numel() for group in ranked.groups)

    known: dict[bytes, dict[str, Tensor]] = {}

    def decide(ranked: GroupRanking) -> PruningDecision:
        units = ranked.chosen()
        key = torch.cat(units).numpy().tobytes()  # close ratios often choose the same channels
        if key not in known:
            known[key] = graph.removable(ranked.selection(graph, units))
        channels = known[key]
        pairs = zip(ranked.ratios, ranked.groups, strict=True)
        asked = sum(ratio * group.units.numel() for ratio, group in pairs)
        reached = sum(len(index) for index in channels.values())
        notes = {"ratio_asked": asked / total, "ratio_reached": reached / total}
        return PruningDecision({}, channels, notes)

    if settings.target is None:
        return decide(ranked)
    return solve_rounded(
        lambda highest, multiple: decide(replace(ranked.with_highest(highest), multiple=multiple)),
        settings.target,
        context,
        settings.round_to,
    )


Chooser = Callable[[dict[str, float]], Choices]
"""Ratios by parameter -> units to prune."""


def _by_layer(scores: dict[str, Tensor]) -> Chooser:
    """Choose in each layer the share of its units that its ratio says."""
    ranks = {name: choices.ranks({name: score})[name] for name, score in scores.items()}

    def choose(ratios: dict[str, float]) -> Choices:
        counts = {
            name: choices.number_pruned(ratios[name], rank.numel()) for name, rank in ranks.items()
        }
        return {name: rank < counts[name] for name, rank in ranks.items()}

    return choose


def _over_all_layers(scores: dict[str, Tensor]) -> Chooser:
    """Choose a share of the units of all layers together; all ratios are equal."""
    ranks = choices.ranks(scores)
    total = sum(rank.numel() for rank in ranks.values())

    def choose(ratios: dict[str, float]) -> Choices:
        count = choices.number_pruned(next(iter(ratios.values())), total)
        return {name: rank < count for name, rank in ranks.items()}

    return choose


def _ratios_reached(ratios: dict[str, float], chosen: Choices) -> dict[str, float]:
    """The share of all units that was asked for, and the share that was chosen."""
    sizes = {name: choice.numel() for name, choice in chosen.items()}
    total = sum(sizes.values())
    asked = sum(ratio * sizes[name] for name, ratio in ratios.items())
    reached = sum(int(choice.sum()) for choice in chosen.values())
    return {"ratio_asked": asked / total, "ratio_reached": reached / total}
