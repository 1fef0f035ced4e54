"""Dynamic sparsity: the base of the penalties that prune while the network trains (gradual, rigl
and gsm).

They act on gradients and weights at every step (`training.penalty.SteppingPenalty`), choose what is
pruned, and add a plain norm of the weights, times `decay`, to the loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.base.errors import ArgumentError, cut
from secateur.base.sections import Strict
from secateur.penalties._shared.formula import ClosedFormPenalty, NormPenalty, lasso
from secateur.penalties._shared.trace import Trace
from secateur.sparsity import choices
from secateur.sparsity.choices import Choices, Ranking
from secateur.training.penalty import TrainingPlan
from secateur.training.state import with_prefix

COLUMNS = ("pruned", "kept", "chosen")
"""Values of a point of the trace: share of the units that is pruned; mean |w| of kept and of
chosen weights, before the chosen ones are set to zero."""


class DynamicSparsitySettings(Strict):
    """The settings that gradual and rigl share."""

    norm: Literal["l2", "l1"] = "l2"
    """Norm that is added to the loss, times `decay`: half the sum of squares of the weights that
    may be pruned, like weight decay, or the sum of their magnitudes. With decay: 0 no norm is."""


class DynamicSparsityPenalty:
    """A penalty that prunes while the network trains; subclasses decide what and when.

    `held` are the parameters that are masked; a subclass may add parameters that the norm and the
    trace leave out. Subclasses implement `update`, which sets `choice` and is called after every
    step for which `due` returns True.
    """

    finished = False
    max_steps = 0
    """The penalty does not end the training; `start` checks that the training is long enough."""

    def __init__(
        self, model: nn.Module, name: str, norm: str, decay: float, held: Mapping[str, Tensor]
    ) -> None:
        """`name` is the penalty's name, for messages; `held` are parameters by name, not empty."""
        self.model, self.name = model, name
        self.held = dict(held)
        self._weights = list(self.held.values())
        """The weights that the norm and the trace are computed from."""
        self.choice: Choices = {}
        """Name of a weight -> True where it is pruned; empty until the first update."""
        self.updates = 0
        self.trace = Trace((len(COLUMNS),))
        """The values of `COLUMNS` at some of the updates."""
        self.trace_interval = 1
        self.keep: list[Tensor] = []
        """For each held parameter: 1 where it is kept, else 0."""
        self._term = _term(model, norm, decay, self._weights)

    def start(self, plan: TrainingPlan) -> None:
        """Called before the first step; subclasses check their schedule."""

    def due(self, step: int) -> bool:
        """Whether the choice is made anew after this step."""
        raise NotImplementedError

    def update(self, step: int, optimizer: Optimizer) -> None:
        """Make the choice anew."""
        raise NotImplementedError

    def kept(self) -> dict[str, Tensor]:
        """Name of a held parameter -> True where it is kept, broadcastable to it."""
        return {name: ~self.choice[name] for name in self.held}

    def __call__(self, step: int) -> Tensor:
        """`decay` times the norm of the weights as the forward pass sees them."""
        return self._term(step)

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Gradients stay as they are, unless a subclass changes them here."""

    def gradients(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The gradients of these parameters; ArgumentError naming a layer that gets none."""
        found = [weight.grad for weight in weights.values() if weight.grad is not None]
        if len(found) < len(weights):
            without = next(name for name, weight in weights.items() if weight.grad is None)
            raise ArgumentError(
                f"penalties.{self.name}.skip",
                f"no gradient reaches {without.rpartition('.')[0] or without}, since it never runs "
                "or is frozen; name it under skip",
            )
        return found

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Update the choice if that is due, and set the chosen weights to zero."""
        if self.due(step):
            with torch.no_grad():
                self.update(step, optimizer)
            self.updates += 1
            self.refresh()
            if self.updates % self.trace_interval == 1 % self.trace_interval:
                self.trace.add(step, self.point(self.share(), self.keep))
        self.mask()

    @torch.no_grad()
    def mask(self) -> None:
        """Set held parameters to zero where they are chosen."""
        if self.keep:
            torch._foreach_mul_(list(self.held.values()), self.keep)

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive `keep` from the choice, in the memory format of the parameters."""
        self.keep = self.as_factors(self.kept()) if self.choice else []

    def held_factors(self) -> dict[str, Tensor]:
        """Name of a held parameter -> 1 where it is kept, else 0; empty if nothing is pruned."""
        return dict(zip(self.held, self.keep, strict=True)) if self.keep else {}

    def as_factors(self, kept: Mapping[str, Tensor]) -> list[Tensor]:
        """Broadcastable masks as tensors of 1 and 0, with shape and type of the held parameters."""
        return [torch.empty_like(self.held[name]).copy_(mask) for name, mask in kept.items()]

    def metrics(self) -> dict[str, float]:
        """Share of the units that is pruned, and the number of updates so far."""
        return {"pruned": self.share(), "updates": float(self.updates)}

    def share(self) -> float:
        """Share of the ranked units that is currently chosen."""
        total = sum(choice.numel() for choice in self.choice.values())
        return sum(int(choice.sum()) for choice in self.choice.values()) / max(1, total)

    def choices(self) -> Choices:
        """What is pruned, by the parameter's name; see sparsity/choices.py."""
        return {name: choice.cpu() for name, choice in self.choice.items() if bool(choice.any())}

    def trace_table(self) -> list[dict[str, float]]:
        """A row for each point of the trace."""
        return [
            {"step": float(step), **dict(zip(COLUMNS, point.double().tolist(), strict=True))}
            for step, point in self.trace.points
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""
        return {
            "updates": torch.tensor([self.updates]),
            **self.trace.state_dict(),
            **{f"choice/{name}": choice for name, choice in self.choice.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; ValueError if it is the state of another network."""
        chosen = with_prefix(state, "choice/")
        if unknown := sorted(set(chosen) - set(self.choice_shapes())):
            raise ValueError(f"penalty: no weight {cut(unknown[0])}")
        for name, shape in self.choice_shapes().items() if chosen else ():
            found = chosen.get(name)
            if found is None or found.shape != shape or found.dtype != torch.bool:
                raise ValueError(f"penalty: choice of {name} does not fit")
        self.updates = int(state["updates"])
        self.trace.load_state_dict(state)
        device = next(iter(self.held.values())).device
        self.choice = {name: chosen[name].to(device) for name in self.choice_shapes() if chosen}
        self.refresh()

    def choice_shapes(self) -> dict[str, torch.Size]:
        """Shape of every choice, by name."""
        return {name: weight.shape for name, weight in self.held.items()}

    @torch.no_grad()
    def point(self, pruned: float, keep: Sequence[Tensor]) -> Tensor:
        """A point of the trace: `pruned`, and the mean |w| where `keep` is 1 and where it is 0."""
        pairs = list(zip(self._weights, keep, strict=False))
        sums = torch.stack([torch.stack([(w.abs() * k).sum(), w.abs().sum()]) for w, k in pairs])
        number = float(sum(k.sum() for _, k in pairs))
        total = sum(weight.numel() for weight in self._weights)
        kept, whole = sums.double().sum(0).tolist()
        means = [kept / max(1.0, number), (whole - kept) / max(1.0, total - number)]
        return torch.tensor([pruned, *means])


def _term(
    model: nn.Module, norm: str, decay: float, weights: Sequence[Tensor]
) -> Callable[[int], Tensor]:
    """`decay` times the norm of these weights, as a function of the step."""
    if not decay:
        return lambda _: torch.zeros((), device=weights[0].device)
    if norm == "l1":
        return NormPenalty(model, lasso, False, decay, weights)
    return ClosedFormPenalty(
        model, lambda w: 0.5 * w.square().sum(), torch.clone, False, decay, weights
    )


def lowest(
    scores: Mapping[str, Tensor], shares: Mapping[str, float], ranking: Ranking, least: float = 0.0
) -> Choices:
    """The choice of the units with the lowest scores, in each parameter or over all of them.

    With ranking global the shares are equal. Every weight and scale keeps at least the share
    `least`, and at least one unit; a bias may be pruned entirely.
    """
    if ranking == "layer":
        counts = {n: choices.number_pruned(shares[n], score.numel()) for n, score in scores.items()}
        chosen = {n: choices.choose_smallest(score, counts[n]) for n, score in scores.items()}
    else:
        total = sum(score.numel() for score in scores.values())
        number = choices.number_pruned(next(iter(shares.values())), total)
        chosen = {name: rank < number for name, rank in choices.ranks(scores).items()}
    for name, choice in chosen.items():
        if name.endswith("weight"):
            kept = choices.number_kept(least, choice.numel())
            chosen[name] = choices.keep_at_least(choice, scores[name], kept)
    return chosen


def check_end(last: int, plan: TrainingPlan, name: str) -> None:
    """ArgumentError unless the training reaches step `last`, counted from 0."""
    if last >= plan.steps:
        epochs = plan.settings.epochs
        steps = plan.steps // max(1, epochs)
        more = f": {math.ceil((last + 1) / steps):,} epochs" if steps else ""
        raise ArgumentError(
            "epochs",
            f"penalty {name} chooses for the last time at step {last + 1:,}, but the training has "
            f"{plan.steps:,}; it needs more{more}, or an earlier end",
            epochs,
        )
