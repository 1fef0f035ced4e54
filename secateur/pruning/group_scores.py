"""Scores of whole channel groups: the importance of a channel with everything coupled to it.

The members of a channel are its filter in each layer that produces it, the weights of each layer
that reads it, and its scale in each normalisation in between; biases and shifts do not count. A
criterion gives the channel a share for each member. With w the entries of the channel in one
member:

    l1                 sum of |w|.
    l2                 sum of w^2.
    taylor             (sum of w * dL/dw)^2.
    fisher, wanda      sum of the scores of single weights; wanda without normalisations.
    geometric_median   mean Euclidean distance to the other channels; without normalisations.
    bn_scale           |gamma|; normalisations only.

Sources of the criteria are in pruning/criteria.py. Shares are reduced over the members, and the
scores of a group are normalised to make groups comparable: G. Fang et al., DepGraph: Towards any
structural pruning, CVPR 2023. Ranking `isomorphic` compares only groups of equal structure: G. Fang
et al., Isomorphic pruning for vision models, ECCV 2024.

Where parts must stay balanced (grouped convolutions, shuffles), a unit consists of one channel of
each part and is scored by the mean of its channels (channels/selection.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from secateur.base.errors import ArgumentError
from secateur.channels.graph import ChannelGraph
from secateur.channels.groups import ChannelGroup, Member, by_channel
from secateur.pruning import criteria
from secateur.pruning.criteria import Criterion
from secateur.pruning.decision import PruningContext
from secateur.sparsity import choices
from secateur.sparsity.scores import mean_distances, share_of_not_smaller

Reduction = Literal["sum", "mean", "max", "prod"]
"""How the shares of a channel's members become one score."""
ScoreNormalisation = Literal["none", "sum", "mean", "max", "standard", "lamp"]
"""How the scores of a group are normalised. sum, mean, max: divided by their sum, mean or maximum;
standard: mean 0 and deviation 1; lamp: each divided by the sum of all that are not smaller."""
StructuralRanking = Literal[choices.Ranking, "isomorphic"]
"""layer: scores are compared within their group; global: over all groups; isomorphic: over groups
with members of the same kinds in modules of the same types."""


@dataclass(frozen=True)
class ScoredGroup:
    """The channels of one group, or of several with a common balance, in units with scores."""

    groups: tuple[str, ...]
    """Names of the channel groups."""
    units: Tensor
    """int64, (units, channels): canonical ids of the channels that are removed as one unit."""
    scores: Tensor
    """(units,); the units with the lowest scores are removed first."""
    structure: tuple[str, ...]
    """Equal for groups of equal structure."""


def score_groups(
    context: PruningContext,
    criterion: Criterion,
    reduction: Reduction = "mean",
    normalisation: ScoreNormalisation = "mean",
) -> tuple[list[ScoredGroup], dict[str, str]]:
    """All groups whose channels can be removed, and the names of the others with the reason.

    Raises ArgumentError for criterion lamp, which is a normalisation of groups.
    """
    if criterion == "lamp":
        raise ArgumentError(
            "criterion", "of a group is criterion l2 with normalise: lamp", criterion
        )
    graph = context.graph
    free = [group for group in graph.groups if group.locked is None]
    by_id = torch.zeros(len(graph.canonical), dtype=torch.float64)
    without: dict[str, str] = {}
    for group, shares in zip(free, _shares(context, free, criterion), strict=True):
        if shares:
            by_id[group.ids] = reduce(torch.stack(shares), reduction).cpu()
        else:
            without[group.name] = f"nothing in it has a {criterion}"
    units, refused = graph.units(by_id)
    refused |= without
    found = []
    for unit in units:
        if not any(name in refused for name in unit.groups):
            scores = normalise(by_id[unit.ids].mean(1), normalisation)
            found.append(ScoredGroup(unit.groups, unit.ids, scores, _structure(graph, unit.groups)))
    return found, refused


def reduce(shares: Tensor, reduction: Reduction) -> Tensor:
    """Shares, (members, channels) -> one score for each channel, (channels,)."""
    if reduction == "max":
        return shares.amax(0)
    if reduction == "prod":
        return shares.prod(0)
    return shares.sum(0) if reduction == "sum" else shares.mean(0)


def normalise(scores: Tensor, normalisation: ScoreNormalisation) -> Tensor:
    """Scores of one group, (units,), normalised without division by 0."""
    if normalisation == "none":
        return scores
    if normalisation == "lamp":
        return share_of_not_smaller(scores)
    if normalisation == "standard":
        scores, by = scores - scores.mean(), scores.std(correction=0)
    elif normalisation == "max":
        by = scores.max()
    else:
        by = scores.sum() if normalisation == "sum" else scores.mean()
    return scores / by if bool(by > 0) else scores


def _shares(
    context: PruningContext, groups: Sequence[ChannelGroup], criterion: Criterion
) -> list[list[Tensor]]:
    """For each group the shares of all members for which the criterion is defined, each (channels,)
    and float64."""
    counted = [[m for m in group.weights if _has_share(m, criterion)] for group in groups]
    names = dict.fromkeys(member.tensor for own in counted for member in own)
    weights: dict[str, Tensor] = {name: context.model.get_parameter(name) for name in names}
    if criterion == "geometric_median":
        return [[_distances(weights[m.tensor].detach(), m) for m in own] for own in counted]
    entries = _by_entry(context, weights, criterion)
    found = [[m.sums(entries[m.tensor]) for m in own if m.tensor in entries] for own in counted]
    if criterion == "taylor":
        return [[share.square() for share in own] for own in found]
    return found


def _has_share(member: Member, criterion: Criterion) -> bool:
    if criterion == "bn_scale":
        return member.kind == "norm"
    return member.kind != "norm" or criterion not in ("wanda", "geometric_median")


def _by_entry(
    context: PruningContext, weights: Mapping[str, Tensor], criterion: Criterion
) -> dict[str, Tensor]:
    """For every entry of these parameters the term that is summed over a channel, float64."""
    if not weights:
        return {}
    if criterion == "taylor":
        by_weight = criteria.gradients(context, list(weights.values()))
        pairs = zip(weights.items(), by_weight, strict=True)
        return {n: (weight.detach() * gradient).double() for (n, weight), gradient in pairs}
    if criterion == "fisher":
        found = criteria.loss_increases(context, weights)
    elif criterion == "wanda":
        found = criteria.input_products(context, weights)
    else:
        sizes = {name: weight.detach().abs() for name, weight in weights.items()}
        found = {n: s.square() for n, s in sizes.items()} if criterion == "l2" else sizes
    return {name: entry.double() for name, entry in found.items()}


def _distances(weight: Tensor, member: Member) -> Tensor:
    """Mean Euclidean distance of each channel's entries to those of the other channels."""
    rows = by_channel(weight, member.axis, member.groups)[member.index.to(weight.device)]
    return mean_distances(rows.flatten(1).double())


def _structure(graph: ChannelGraph, names: Iterable[str]) -> tuple[str, ...]:
    """Kind and module type of every member that counts, in the order of execution."""
    found = []
    for name in names:
        for member in graph.group(name).weights:
            path = member.tensor.rpartition(".")[0]
            layer = graph.layers.get(path)
            kind = "depthwise" if layer is not None and layer.depthwise() else member.kind
            found.append(f"{kind} {type(graph.model.get_submodule(path)).__name__}")
    return tuple(found)


@dataclass(frozen=True)
class GroupRanking:
    """Groups with scores, in the order in which their units are removed as ratios grow."""

    groups: tuple[ScoredGroup, ...]
    ratios: tuple[float, ...]
    """Share of the units of each group; all equal with a ranking over several groups."""
    ranking: StructuralRanking
    least: float = 0.0
    """Smallest share of each group's units that is kept; at least one unit is."""
    multiple: int = 1
    """The number of kept channels of a group is a multiple of this; a smaller group keeps all."""

    def with_highest(self, ratio: float) -> "GroupRanking":
        """This ranking with all ratios scaled by one factor, so that the highest is `ratio`."""
        most = max(self.ratios)
        return replace(self, ratios=tuple(own / most * ratio for own in self.ratios))

    def chosen(self) -> list[Tensor]:
        """For each group the units to remove, bool, (units,)."""
        found: list[Tensor] = [torch.empty(0)] * len(self.groups)
        for numbers in self._compared():
            scores = {str(n): self.groups[n].scores for n in numbers}
            ranks = choices.ranks(scores)
            total = sum(score.numel() for score in scores.values())
            count = choices.number_pruned(self.ratios[numbers[0]], total)
            for number in numbers:
                found[number] = self._kept_apart(number, ranks[str(number)] < count)
        return found

    def selection(
        self, graph: ChannelGraph, units: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The channels of the chosen units by channel group, the least important first.

        `units` is the result of `chosen`, if it is already known.
        """
        by_id = torch.zeros(len(graph.canonical), dtype=torch.float64)
        ids = []
        for group, chosen in zip(self.groups, units or self.chosen(), strict=True):
            own = group.units[chosen]
            by_id[own] = group.scores[chosen].to(by_id).unsqueeze(1).expand(own.shape)
            ids.append(own.flatten())
        selected = graph.selection(torch.cat(ids))
        order = {name: by_id[graph.group(name).ids[i]].argsort() for name, i in selected.items()}
        return {name: index[order[name]] for name, index in selected.items()}

    def _compared(self) -> list[list[int]]:
        """Numbers of the groups that are ranked together."""
        if self.ranking == "layer":
            return [[number] for number in range(len(self.groups))]
        together: dict[tuple[str, ...], list[int]] = {}
        for number, group in enumerate(self.groups):
            key = group.structure if self.ranking == "isomorphic" else ()
            together.setdefault(key, []).append(number)
        return list(together.values())

    def _kept_apart(self, number: int, chosen: Tensor) -> Tensor:
        """A choice of units without the best ones, which `least` and `multiple` keep."""
        group = self.groups[number]
        units, channels = group.units.shape
        least = choices.number_kept(self.least, units)
        multiple = self.multiple // gcd(self.multiple, channels)
        return choices.keep_at_least(chosen, group.scores, least, multiple)
