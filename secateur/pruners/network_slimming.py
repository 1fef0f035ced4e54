"""Network Slimming: channels whose batch-normalisation scale is below one threshold for all go.

Source: Z. Liu, J. Li, Z. Shen, G. Huang, S. Yan, C. Zhang, Learning efficient convolutional
networks through network slimming, ICCV 2017. The threshold is the value at place
floor(ratio * number of scales) of all |gamma| in order; what is below it goes. A channel with
several scales goes only if all of them are below. Channels that some layer reads without a scale in
between stay: no scale tells whether they matter.
"""

from decimal import Decimal
from math import ceil, floor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.base.settings import Strict
from secateur.channels import scales
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.pruning.target import Target, solve
from secateur.sparsity.choices import spare


class Settings(Strict):
    """How much goes, and from where."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the scales that are below the threshold."""
    coupled: Literal["skip", "union"] = "skip"
    """Channels of residual sums. skip: they stay, and their scales do not count; union: one goes if
    every layer that is added up agrees."""
    keep_at_least: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of each layer's channels that stays whatever the threshold; never less than one."""
    target: Target | None = None
    """What is to be left of the network, in place of a ratio."""
    round_to: Annotated[int, Field(ge=1)] = 1
    """Channels that stay are brought up to a multiple of this, if there are so many."""


def prune(settings: Settings, subject: PruningContext) -> PruningDecision:
    """Whole channels below the threshold; the notes say what share of the scales that is.

    Raises PruningError if no scale decides about a channel, and for a target out of reach.
    """
    slimming = _Slimming(settings, subject)
    if settings.target is None:
        return slimming.decide(settings.ratio)
    return solve(slimming.decide, settings.target, subject).decision


class _Slimming:
    """The scales in question, and what goes with which ratio."""

    def __init__(self, settings: Settings, subject: PruningContext) -> None:
        self.settings, self.graph = settings, subject.graph
        count = len(self.graph.canonical)
        union = settings.coupled == "union"
        every = scales.norm_scales(subject.model, self.graph.fx_graph)
        judges = [scale for scale in every if scale.gates and (union or not scale.coupled)]
        entries = scales.flat_scales(subject.model, self.graph, judges)
        others = [scale for scale in every if scale not in judges]
        veto = scales.flat_scales(subject.model, self.graph, others).largest_by_channel(count)
        self.score = scales.with_selected_scales(self.graph, entries.largest_by_channel(count))
        """By root; NaN where no scale decides."""
        self.free = ~self.score.isnan() & veto.isnan() & self._movable(count, union)
        known = entries.ids.clamp_min(0)
        mine = self.free[known] & (entries.ids >= 0)
        self.scales, self.ids = entries.values[mine], known[mine]
        if not len(self.scales):
            raise PruningError(
                "pruner = 'network_slimming': no scale of a batch normalisation decides about a "
                f"channel that may go (pruners.network_slimming.coupled = {settings.coupled!r})"
            )

    def _movable(self, count: int, union: bool) -> Tensor:
        """Roots that are not locked, and without `union` those that one layer makes."""
        movable = torch.zeros(count, dtype=torch.bool)
        depthwise = {n for n, layer in self.graph.layers.items() if layer.depthwise()}
        for group in self.graph.groups:
            makers = set(group.producers) - depthwise
            if group.locked is None and (union or len(makers) == 1):
                movable[group.ids] = True
        return movable

    def decide(self, ratio: float) -> PruningDecision:
        """What goes with this ratio."""
        place = floor(Decimal(repr(ratio)) * len(self.scales))
        threshold = self.scales.sort().values[place]
        gone = self.free & (self.score < threshold)
        gone = self._spared(gone)
        chosen = {}
        for name, index in self.graph.selection(gone.nonzero().flatten()).items():
            score = self.score[self.graph.group(name).ids[index]]
            chosen[name] = index[score.argsort(stable=True)]
        channels = self.graph.removable(chosen)
        left = torch.isin(self.ids, self.graph.ids_of(channels)).sum()
        reached = float(left) / len(self.scales)
        notes = {
            "ratio_asked": ratio,
            "ratio_reached": reached,
            "threshold": float(threshold),
            "scales": float(len(self.scales)),
        }
        return PruningDecision({}, channels, notes)

    def _spared(self, gone: Tensor) -> Tensor:
        """Without the best channels of layers that would lose too many, or end between multiples.

        Round all layers, until none brings anything back: those of a sum share channels.
        """
        least = Decimal(repr(self.settings.keep_at_least))
        gone = gone.clone()
        while True:
            before = int(gone.sum())
            for roots in self.graph.output_ids().values():
                mine = roots.unique()
                floor_ = max(1, ceil(least * len(mine)))
                gone[mine] = spare(gone[mine], self.score[mine], floor_, self.settings.round_to)
            if int(gone.sum()) == before:
                return gone
