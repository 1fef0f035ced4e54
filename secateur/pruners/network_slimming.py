"""Network Slimming: prune channels whose batch-normalisation scale is below a global threshold.

Source: Z. Liu, J. Li, Z. Shen, G. Huang, S. Yan, C. Zhang, Learning efficient convolutional
networks through network slimming, ICCV 2017. The threshold is the value at index
floor(ratio * number of scales) of all |gamma| in ascending order. A channel with several scales is
pruned only if all of them are below the threshold. A channel that a layer reads without a scale in
between is kept, because no scale measures its importance. With `reduce` or `normalise` a channel
has one score in place of its scales, and the threshold is found among these scores; both settings
follow G. Fang et al., DepGraph: Towards any structural pruning, CVPR 2023.
"""

from decimal import Decimal
from math import ceil, floor
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.channels import scales
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.pruning.group_scores import Reduction, ScoreNormalisation, normalise
from secateur.pruning.target import Target, solve_rounded
from secateur.sparsity.choices import keep_at_least


class Settings(Strict):
    """How much is pruned, and where."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the scales that are below the threshold."""
    coupled: Literal["skip", "union", "blocks"] = "skip"
    """Channels of residual sums. skip: they are kept, and their scales do not count; union: a
    channel is pruned if its scales are below the threshold in all layers whose outputs are added;
    blocks: as skip, but in networks with residual blocks only channels inside these blocks, not the
    stem's (as in the code of classifier-pruner: 7,552 scales of ResNet-50, where skip has 7,616).
    """
    reduce: Reduction | None = None
    """For coupled: union: how the scales of a channel become the one score that is compared with
    the threshold; null: max, so that all scales must be below."""
    normalise: ScoreNormalisation | None = None
    """For coupled: union: how scores of different channel groups are made comparable, as in
    pruning/group_scores.py; null: none."""
    keep_at_least: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of each layer's channels that is kept whatever the threshold; at least one channel."""
    keep_rounds: Literal["up", "down"] | None = None
    """How keep_at_least is rounded: 0.01 of 256 is 3 (up; also null) or 2 (down, as in
    classifier-pruner)."""
    target: Target | None = None
    """Size that the network is pruned to, in place of a ratio."""
    round_to: Annotated[int, Field(ge=1)] | None = None
    """The number of kept channels is a multiple of this; a layer that has fewer keeps all. null: 1,
    and with a latency target the multiple that the measured layers suggest."""

    @model_validator(mode="after")
    def _only_of_union(self) -> Self:
        for key in ("reduce", "normalise"):
            if getattr(self, key) is not None and self.coupled != "union":
                raise ValueError(f"{key}: needs coupled: union, where a channel has several scales")
        return self


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """Whole channels whose scales are below the threshold; the notes have the share of the scales.

    Raises ArgumentError if no channel that can be pruned has a scale, PruningError for a target
    that cannot be reached.
    """
    slimming = _Slimming(settings, context)
    if settings.target is None:
        return slimming.decide(settings.ratio, settings.round_to or 1)
    return solve_rounded(slimming.decide, settings.target, context, settings.round_to)


_REDUCTIONS: dict[str, Literal["sum", "mean", "amax", "prod"]] = {
    "sum": "sum",
    "mean": "mean",
    "max": "amax",
    "prod": "prod",
}


class _Slimming:
    """The scales that are compared, and the decision for each ratio."""

    def __init__(self, settings: Settings, context: PruningContext) -> None:
        self.settings, self.graph = settings, context.graph
        count = len(self.graph.canonical)
        union = settings.coupled == "union"
        every = scales.norm_scales(context.model, self.graph.fx_graph)
        compared = [scale for scale in every if scale.gates and (union or not scale.coupled)]
        if settings.coupled == "blocks":
            inside = scales.inside_blocks(scale.name for scale in compared)
            compared = [scale for scale in compared if scale.name in inside]
        entries = scales.flat_scales(context.model, self.graph, compared)
        others = [scale for scale in every if scale not in compared]
        veto = scales.flat_scales(context.model, self.graph, others).largest_by_channel(count)
        self.score = scales.with_selected_scales(self.graph, entries.largest_by_channel(count))
        """By canonical id: the largest scale of the channel; NaN where it has none."""
        self.prunable = ~self.score.isnan() & veto.isnan() & self._unlocked(count, union)
        """By canonical id."""
        known = entries.ids.clamp_min(0)
        own = self.prunable[known] & (entries.ids >= 0)
        self.scales, self.ids = entries.values[own], known[own]
        if settings.reduce or settings.normalise:
            self._score_groups(entries)
        if not len(self.scales):
            raise ArgumentError(
                "coupled",
                "no scale of a batch normalisation decides about a channel that may be removed",
                settings.coupled,
            )

    def _score_groups(self, entries: scales.FlatScales) -> None:
        """One score for each channel in place of its scales; see the settings."""
        how = _REDUCTIONS[self.settings.reduce or "max"]
        found = entries.by_channel(len(self.score), how).double()
        for group in self.graph.groups:
            ids = group.ids[self.prunable[group.ids] & ~found[group.ids].isnan()]
            if len(ids):
                found[ids] = normalise(found[ids], self.settings.normalise or "none")
        self.score = scales.with_selected_scales(self.graph, found)
        self.ids = self.ids.unique()
        self.scales = found[self.ids]

    def _unlocked(self, count: int, union: bool) -> Tensor:
        """Channels that are not locked and, without `union`, are produced by a single layer."""
        unlocked = torch.zeros(count, dtype=torch.bool)
        depthwise = {n for n, layer in self.graph.layers.items() if layer.depthwise()}
        for group in self.graph.groups:
            producers = set(group.producers) - depthwise
            if group.locked is None and (union or len(producers) == 1):
                unlocked[group.ids] = True
        return unlocked

    def decide(self, ratio: float, multiple: int) -> PruningDecision:
        """The channels below the threshold of this ratio; `multiple` is that of `round_to`."""
        place = floor(Decimal(repr(ratio)) * len(self.scales))
        threshold = self.scales.sort().values[place]
        below = self._with_enough_kept(self.prunable & (self.score < threshold), multiple)
        chosen = {}
        for name, index in self.graph.selection(below.nonzero().flatten()).items():
            score = self.score[self.graph.group(name).ids[index]]
            chosen[name] = index[score.argsort(stable=True)]
        channels = self.graph.removable(chosen)
        pruned = torch.isin(self.ids, self.graph.ids_of(channels)).sum()
        notes = {
            "ratio_asked": ratio,
            "ratio_reached": float(pruned) / len(self.scales),
            "threshold": float(threshold),
            "scales": float(len(self.scales)),
        }
        return PruningDecision({}, channels, notes)

    def _with_enough_kept(self, chosen: Tensor, multiple: int) -> Tensor:
        """Keep the best channels of layers that would lose too many or not keep a multiple.

        Repeated over all layers until nothing changes, since layers that are added share channels.
        """
        share = Decimal(repr(self.settings.keep_at_least))
        whole = floor if self.settings.keep_rounds == "down" else ceil
        chosen = chosen.clone()
        while True:
            before = int(chosen.sum())
            for outputs in self.graph.output_ids().values():
                ids = outputs.unique()
                least = max(1, whole(share * len(ids)))
                chosen[ids] = keep_at_least(chosen[ids], self.score[ids], least, multiple)
            if int(chosen.sum()) == before:
                return chosen
