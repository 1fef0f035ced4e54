"""GReg-1: choose units by L1 norm at the start, then grow an L2 penalty on them.

Source: H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via growing regularization, ICLR 2021,
section 3.2. The units with the smallest L1 norms in the dense network are chosen. At every update
their factor f rises by `decay`; f * w is added to their gradient, in addition to the weight decay.
The gradients of the other units are unchanged. Growth ends when the kept units of every layer are
1,000 times as large as its chosen ones (mean |w|, exponential average with 0.9 over updates), or
when f exceeds the ceiling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.base.sections import Seed
from secateur.penalties._shared.growing import GrowingPenalty, GrowthSettings, updates_until
from secateur.sparsity.choices import Pick
from secateur.training.penalty import Penalty


class Settings(GrowthSettings):
    """What is pruned, and how the penalty grows."""

    pick: Pick = "min"
    """Which units are chosen: the smallest, the largest, or random ones (the paper's controls)."""
    seed: Seed = 0
    """For pick: random."""
    jump: bool = False
    """Raise the factor to the ceiling in one update, then stabilise (the paper's ablation)."""


def build(
    settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty:
    """The growing penalty, on units chosen by the current weights of the model.

    `decay` is the growth at each update. Raises ArgumentError for ratios that do not fit the
    network, and for a growth too small to reach the ceiling.
    """
    return GReg1(settings, model, decay, shape)


class GReg1(GrowingPenalty):
    """One factor for all chosen units of a layer, none for the others."""

    def __init__(
        self, settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None
    ) -> None:
        super().__init__(model, settings, decay, "greg1", shape)
        self.jump = settings.jump
        try:
            updates = 1 if settings.jump else updates_until(settings.ceiling, decay)
        except ValueError as error:
            raise ArgumentError("decay", f"ceiling {error} (penalty greg1)", decay) from None
        self.max_steps = self.steps_for(updates)
        self.pruned.choose(settings.pick, settings.seed)

    def grow(self) -> None:
        """Raise the factor by `decay`, or to the ceiling at once."""
        if self.jump:
            self.factor[self.active] = self.settings.ceiling
        else:
            self.factor[self.active] += self.growth

    def ends(self) -> Tensor:
        """Layers over the ceiling; all layers once each of them is separated."""
        if self.jump:
            return torch.ones_like(self.active)
        return self.over_ceiling | self.separated.all()
