"""GReg-1: choose once by L1 norm, then let an L2 penalty grow on what was chosen.

Source: H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via growing regularization, ICLR 2021,
section 3.2. The groups with the smallest L1 norms in the dense network are to go. At every update
their factor f rises by `decay`; f * w is added to their gradient, beside the weight decay, and
nothing to that of the others. It stops when in every layer the kept groups are 1,000 times as large
as the chosen ones (mean |w|, averaged exponentially with 0.9 over updates), or when f exceeds the
ceiling.
"""

import torch
from torch import Tensor, nn

from secateur.base.errors import SettingsError
from secateur.base.settings import Seed
from secateur.penalties._growing import Growing, GrowthSettings, updates_until
from secateur.sparsity.choices import Pick
from secateur.training.penalty import Penalty

WHERE = "penalties.greg1"


class Settings(GrowthSettings):
    """What goes, and how the penalty grows."""

    pick: Pick = "min"
    """Which groups go: the smallest, the largest, or any (the paper's controls)."""
    seed: Seed = 0
    """Of pick: random."""
    jump: bool = False
    """Go to the ceiling in one update, and stabilise from there (the paper's ablation)."""


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """The growing penalty on what it chooses from the model's weights as they are now.

    `decay` is the growth at each update. Raises SettingsError for ratios that do not fit the
    network, and for a growth too small to reach the ceiling.
    """
    return GReg1(settings, model, decay)


class GReg1(Growing):
    """One factor for all chosen groups of a layer, none for the others."""

    def __init__(self, settings: Settings, model: nn.Module, decay: float) -> None:
        super().__init__(model, settings, decay, WHERE)
        self.jump = settings.jump
        try:
            updates = 1 if settings.jump else updates_until(settings.ceiling, decay)
        except ValueError as error:
            raise SettingsError(
                f"params.yaml: decay = {decay:g}: {WHERE}.ceiling {error}"
            ) from None
        self.max_steps = self.steps_for(updates)
        self.pick(settings.pick, settings.seed)

    def grow(self) -> None:
        """By `decay`, or all at once."""
        if self.jump:
            self.factor[self.active] = self.settings.ceiling
        else:
            self.factor[self.active] += self.step_size

    def ends(self) -> Tensor:
        """Over the ceiling, or all layers at once when each of them is far enough apart."""
        if self.jump:
            return torch.ones_like(self.active)
        return self.over | self.large_apart.all()
