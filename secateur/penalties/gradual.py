"""Gradual magnitude pruning: the pruned share rises along a cubic curve while the network trains.

Source: M. Zhu, S. Gupta, To prune, or not to prune: exploring the efficacy of pruning for model
compression, 2017 (workshop of ICLR 2018), equation 1: at step t the pruned share is s_f +
(s_0 - s_f) * (1 - (t - t_0) / (n * dt))^3; the choice is made anew at t_0, t_0 + dt, ...,
t_0 + n * dt. The weights with the lowest scores are pruned; in the source, the weights of the
smallest magnitude in each layer.

With `regrow`, pruned weights are zero in the forward pass only. The optimizer continues to update
their unmasked values with the gradient at the masked weights (straight-through), so that a weight
that has grown in the meantime returns at the next choice: T. Lin et al., Dynamic model pruning with
feedback, ICLR 2020. Without `regrow`, pruned weights stay zero. Filters and groups cannot regrow: a
pruned one is zero with everything that lets its output reach the loss, so that behind a ReLU its
gradient is zero; and with the rest kept, a batch norm would divide its gradient by the square root
of eps in place of a standard deviation, so that filters would return at random.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base.errors import ArgumentError
from secateur.base.sections import StepsOrShare
from secateur.penalties._shared import trace
from secateur.penalties._shared.dynamic import (
    DynamicSparsityPenalty,
    DynamicSparsitySettings,
    check_end,
    lowest,
)
from secateur.penalties._shared.filters import EntriesBehindFilters
from secateur.penalties._shared.growing import PrunedChannels
from secateur.sparsity import choices, masks
from secateur.sparsity.choices import Choices, Granularity, Ranking
from secateur.sparsity.layer_ratios import ratios_by_layer, ratios_by_parameter
from secateur.sparsity.masks import Masks
from secateur.sparsity.ratios import Ratios, Rules, Skip
from secateur.sparsity.scores import WeightCriterion, scores_of_weight
from secateur.training.penalty import TrainingPlan
from secateur.training.state import with_prefix


class Settings(DynamicSparsitySettings):
    """What is pruned, how much of it, and when."""

    granularity: Granularity | Literal["group"] = "weight"
    """weight: single weights; filter: outputs of a layer, with their bias and their scale and shift
    in the normalisation after it; channel: inputs of a layer (pixels only if `ratios` names the
    first layer, a linear one; their columns are zero); group: channels with everything that is
    coupled to them in any layer."""
    scope: masks.Scope = "weights"
    """For granularity weight: the parameters whose entries are ranked."""
    criterion: WeightCriterion = "l1"
    """How importance is measured, see pruning/criteria.py; taylor uses the gradient of the step,
    without that of the norm. Granularity group allows only l1."""
    ranking: Ranking = "layer"
    """layer: within a layer (or channel group); global: over all that have a ratio above 0."""
    ratios: Ratios = Rules(0.9)
    """Final pruned share of each layer, see sparsity/ratios.py; one number with ranking global."""
    initial: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pruned share at the first choice."""
    skip: Skip = ()
    """Layers that are not pruned: names, or stage.block."""
    keep_at_least: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each layer that is kept whatever the ranking; at least one unit."""
    begin: StepsOrShare = 0.1
    """The first choice is made after this many steps or, below 1, this share of the training."""
    end: StepsOrShare = 0.7
    """When the last choice is made, at the latest; it may be earlier by less than `interval`."""
    interval: Annotated[StepsOrShare, Field(gt=0)] = 0.01
    """Steps, or share of the training, from one choice to the next; at least one step."""
    regrow: bool = False
    """Whether pruned weights continue to train and may return; of granularity weight and channel
    only."""

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if self.ranking == "global" and self.ratios.everywhere is None:
            raise ValueError(
                "ratios: ranking global compares all layers, so it takes one number; name layers "
                "to leave alone under skip"
            )
        if self.end < self.begin and (self.end < 1) == (self.begin < 1):
            raise ValueError(f"end: {self.end:g} is before begin, {self.begin:g}")
        if self.scope != "weights" and self.granularity != "weight":
            raise ValueError(f"scope: {self.scope} needs granularity: weight")
        if self.criterion == "geometric_median" and self.granularity == "weight":
            raise ValueError("criterion: geometric_median is not defined for single weights")
        if self.criterion != "l1" and self.granularity == "group":
            raise ValueError(f"criterion: {self.criterion}; of granularity group only l1")
        if self.regrow and self.granularity not in ("weight", "channel"):
            raise ValueError(
                f"regrow: true; with granularity: {self.granularity} nothing would return, since "
                "no gradient reaches what is pruned; weight or channel is needed"
            )
        return self


def build(
    settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> DynamicSparsityPenalty:
    """The schedule for this model; `decay` is the strength of the norm that is added to the loss.

    Raises ArgumentError for ratios that do not fit the network, PruningError if it cannot be traced
    (granularity filter and group).
    """
    kind = GradualChannels if settings.granularity == "group" else Gradual
    return kind(settings, model, decay, shape)


def share_at(final: float, initial: float, progress: float) -> float:
    """The pruned share at a progress between 0, the first choice, and 1, the last choice."""
    if not progress:  # exactly; the sum below may be larger by a rounding error
        return initial
    left: float = (1 - progress) ** 3
    return final + (initial - final) * left


class GradualPenalty(DynamicSparsityPenalty):
    """The schedule, and with `regrow` the unmasked weights; subclasses choose what is pruned."""

    def __init__(
        self, settings: Settings, model: nn.Module, decay: float, held: Mapping[str, Tensor]
    ) -> None:
        super().__init__(model, "gradual", settings.norm, decay, held)
        self.settings = settings
        self.dense: list[Tensor] = []
        """The held parameters as the optimizer has left them, unmasked; empty without `regrow`."""

    def start(self, plan: TrainingPlan) -> None:
        """Convert shares of the training to steps. ArgumentError if the schedule does not fit."""
        self.first = plan.in_steps(self.settings.begin)
        end = plan.in_steps(self.settings.end)
        self.interval = max(1, plan.in_steps(self.settings.interval))
        check_end(max(end, self.first), plan, self.name)
        if end < self.first:
            raise ArgumentError(
                "epochs",
                f"penalty gradual begins after {self.first:,} of {plan.steps:,} steps and ends "
                f"after {end:,}; its end must not be before its begin",
                plan.settings.epochs,
            )
        self.count = (end - self.first) // self.interval
        self.trace_interval = trace.interval(self.count + 1)

    def due(self, step: int) -> bool:
        """At the first step, and then `count` times at regular intervals."""
        number, rest = divmod(step - self.first, self.interval)
        return rest == 0 and 0 <= number <= self.count

    def update(self, step: int, optimizer: Optimizer) -> None:
        """Choose the units for the share at this step."""
        number = (step - self.first) // self.interval
        self.choose(number / self.count if self.count else 1.0)

    def choose(self, progress: float) -> None:
        """Set the choice for the share at this progress, from 0 to 1."""
        raise NotImplementedError

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Restore the unmasked weights for the optimizer."""
        if self.dense:
            torch._foreach_copy_(list(self.held.values()), self.dense)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Store the unmasked weights before the chosen ones are set to zero."""
        if self.dense:
            torch._foreach_copy_(self.dense, [weight.detach() for weight in self.held.values()])
        elif self.settings.regrow and self.due(step):
            self.dense = [weight.detach().clone() for weight in self.held.values()]
        super().after_step(step, optimizer)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""
        dense = dict(zip(self.held, self.dense, strict=True)) if self.dense else {}
        return super().state_dict() | {f"dense/{name}": tensor for name, tensor in dense.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; ValueError if it is the state of another network."""
        super().load_state_dict(state)
        found = with_prefix(state, "dense/")
        shapes = {name: tensor.shape for name, tensor in found.items()}
        if found and shapes != {name: weight.shape for name, weight in self.held.items()}:
            raise ValueError("penalty: weights under the masks do not fit")
        if bool(found) != bool(self.settings.regrow and self.choice):
            raise ValueError("penalty: weights under the masks are missing or of no use")
        self.dense = [torch.empty_like(self.held[n]).copy_(found[n]) for n in self.held if found]


class Gradual(GradualPenalty):
    """Single weights, filters or channels of layers."""

    def __init__(
        self, settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None
    ) -> None:
        if settings.granularity == "weight":
            ratios = ratios_by_parameter(model, settings.ratios, settings.scope, settings.skip)
        else:
            assert settings.granularity != "group"
            by_layer = ratios_by_layer(
                model, settings.ratios, settings.granularity, settings.skip
            ).items()
            ratios = {f"{name}.weight": ratio for name, ratio in by_layer if ratio > 0}
        self.granularity: Granularity = settings.granularity
        self.ranked = {name: model.get_parameter(name) for name in ratios}
        self.ratios = ratios
        _check_initial(settings, ratios)
        held: dict[str, Tensor] = dict(self.ranked)
        self.behind: EntriesBehindFilters | None = None
        """Entries of other parameters pruned with a filter; None for other granularities."""
        if settings.granularity == "filter":  # a pruned filter has no bias either
            biases = (f"{name.removesuffix('weight')}bias" for name in ratios)
            own = dict(model.named_parameters())
            held |= {name: own[name] for name in biases if name in own}
            self.behind = EntriesBehindFilters(model, shape)
        super().__init__(settings, model, decay, held)
        if self.behind is not None:  # not in the norm that is added to the loss
            names = self.behind.concerned(self.ranked)
            self.held |= {name: model.get_parameter(name) for name in names}
        self._gradients: dict[str, Tensor] = {}
        """For criterion taylor, within a step with a choice: gradients of the loss alone."""
        self.masks: Masks = {}
        """Masks that the training holds, of ranked weights; a ratio includes what they prune."""

    def start(self, plan: TrainingPlan) -> None:
        """Also note the masks that the training holds."""
        super().start(plan)
        self.masks = {name: plan.masks[name] for name in self.ranked if name in plan.masks}

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Store what the choice needs, while weights and gradients are those of the step."""
        if self.settings.criterion == "taylor":
            if step == 0:
                self.gradients(self.ranked)  # tells of a layer without any before long work
            if self.due(step):
                self._gradients = self._without_norm(step)
        super().before_step(step, optimizer)

    def choose(self, progress: float) -> None:
        """Choose the lowest scores by layer or globally; without `regrow` for good."""
        scores = {name: self._scores(name, weight) for name, weight in self.ranked.items()}
        scores = choices.masked_first(scores, self.masks)
        shares = {n: share_at(r, self.settings.initial, progress) for n, r in self.ratios.items()}
        self.choice = lowest(scores, shares, self.settings.ranking, self.settings.keep_at_least)
        self._gradients = {}

    def kept(self) -> dict[str, Tensor]:
        """Masks, including biases of pruned filters and their entries in normalisations."""
        found = {name: ~choice for name, choice in self.choice.items()}
        if self.behind is not None:
            found = self.behind.kept(self.choice) | found
        return {name: found[name] for name in self.held}

    def choice_shapes(self) -> dict[str, torch.Size]:
        """Shape of every choice, by name."""
        return {
            name: choices.magnitude_scores(weight, self.granularity).shape
            for name, weight in self.ranked.items()
        }

    def _without_norm(self, step: int) -> dict[str, Tensor]:
        """Gradients of the loss without the norm that was added to it, by name of the weight."""
        weights, found = self.ranked.values(), self.gradients(self.ranked)
        with torch.enable_grad():
            norm = self(step)
        if norm.requires_grad:
            own = torch.autograd.grad(norm, list(weights))
            found = [whole - part for whole, part in zip(found, own, strict=True)]
        return dict(zip(self.ranked, found, strict=True))

    def _scores(self, name: str, weight: Tensor) -> Tensor:
        score = scores_of_weight(
            weight.detach(),
            self.granularity,
            self.settings.criterion,
            self._gradients.get(name),
        )
        if name in self.choice and not self.settings.regrow:
            score = score.masked_fill(self.choice[name], -torch.inf)
        return score


class GradualChannels(GradualPenalty):
    """Channels with everything that is coupled to them."""

    def __init__(
        self, settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None
    ) -> None:
        self.pruned = PrunedChannels(model, settings, shape)
        _check_initial(settings, self.pruned.ratios)
        super().__init__(settings, model, decay, self.pruned.coupled.weights)

    def choose(self, progress: float) -> None:
        """Choose the channels of the smallest mean magnitude by group or globally."""
        pruned, settings = self.pruned, self.settings
        scores = pruned.unit_scores()
        if settings.ranking == "layer":
            wanted = {
                name: choices.number_pruned(
                    share_at(ratio, settings.initial, progress), len(scores[name])
                )
                for name, ratio in pruned.ratios.items()
            }
        else:
            ranks, total = choices.ranks(scores), sum(len(score) for score in scores.values())
            ratio = next(iter(pruned.ratios.values()))
            number = choices.number_pruned(share_at(ratio, settings.initial, progress), total)
            wanted = {name: int((rank < number).sum()) for name, rank in ranks.items()}
        for name, score in scores.items():
            least = choices.number_kept(settings.keep_at_least, len(score))
            pruned.numbers[name] = min(wanted[name], len(score) - least)
        pruned.choose()
        self.choice = pruned.choice

    def kept(self) -> dict[str, Tensor]:
        """Masks: a weight is pruned if either of the two channels that it connects is chosen."""
        ones, zeros = torch.ones(len(self.pruned.names)), torch.zeros(len(self.pruned.names))
        factors = self.pruned.expand(ones, zeros)
        return {name: factor == 0 for name, factor in zip(self.held, factors, strict=True)}

    def choices(self) -> Choices:
        """The chosen channels, as outputs of the layers that produce them."""
        return self.pruned.as_choices()

    def choice_shapes(self) -> dict[str, torch.Size]:
        """Shape of every choice, by the name of the channel group."""
        return {name: ids.shape for name, ids in self.pruned.channels.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; ValueError if it is the state of another network."""
        self.pruned.choice = {n: c.clone() for n, c in with_prefix(state, "choice/").items()}
        super().load_state_dict(state)


def _check_initial(settings: Settings, ratios: Mapping[str, float]) -> None:
    """ArgumentError if a layer would not lose more at the end than at the beginning."""
    if settings.initial >= min(ratios.values()):
        raise ArgumentError(
            "initial",
            f"must be less than the share pruned in the end, {min(ratios.values()):g}",
            settings.initial,
        )
