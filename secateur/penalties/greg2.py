"""GReg-2: let a small L2 penalty grow on everything, choose by what withstands it, then as GReg-1.

Source: H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via growing regularization, ICLR 2021,
section 3.3: under a common penalty, weights where the loss curves strongly shrink less, so that
magnitudes separate by importance. Picking: the factor of all groups rises by `pick_growth` at every
update; at `pick_ceiling` those with the smallest L1 norms are chosen. Then the factor of the chosen
rises by `decay`, and that of the others is `recover`, which lets them grow back. A layer stops when
its own kept groups are 1,000 times as large as its chosen ones (mean |w|, averaged exponentially
with 0.9 over updates), or when the factor exceeds the ceiling.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.errors import SettingsError
from secateur.base.settings import Positive
from secateur.penalties._growing import (
    GROWING,
    PICKING,
    Growing,
    GrowthSettings,
    grown,
    updates_until,
)
from secateur.sparsity import choices as grouping
from secateur.training.penalty import Penalty

WHERE = "penalties.greg2"


class Settings(GrowthSettings):
    """What goes, and how the penalty grows."""

    pick_ceiling: Positive = 0.01
    """Choose when the factor of all groups has reached this."""
    pick_growth: Positive = 0.00001
    """How much that factor grows at an update."""
    recover: Annotated[float, Field(le=0)] = -0.0001
    """Factor of what is kept, once the choice is made: below 0, against the weight decay."""

    @model_validator(mode="after")
    def _picks_below_the_ceiling(self) -> Self:
        if self.pick_ceiling >= self.ceiling:
            raise ValueError(
                f"pick_ceiling: {self.pick_ceiling:g} must be below ceiling, {self.ceiling:g}"
            )
        return self


def build(settings: Settings, model: nn.Module, decay: float) -> Penalty:
    """The growing penalty on all layers that lose something.

    `decay` is the growth at each update after picking. Raises SettingsError for ratios that do not
    fit the network, and for growths too small to reach their ceilings.
    """
    return GReg2(settings, model, decay)


class GReg2(Growing):
    """One factor for all groups of a layer until it picks, then two."""

    def __init__(self, settings: Settings, model: nn.Module, decay: float) -> None:
        super().__init__(model, settings, decay, WHERE)
        self.picking = settings
        self.phase = PICKING
        self.initial = self._now()
        ceiling, growth = "pick_ceiling", settings.pick_growth
        try:
            first = updates_until(settings.pick_ceiling, growth, reach=True)
            ceiling, growth = "ceiling", decay
            second = updates_until(settings.ceiling, growth, grown(first, settings.pick_growth))
        except ValueError as error:
            key = f"{WHERE}.pick_growth" if ceiling == "pick_ceiling" else "decay"
            raise SettingsError(
                f"params.yaml: {key} = {growth:g}: {WHERE}.{ceiling} {error}"
            ) from None
        self.max_steps = self.steps_for(first + second)

    def grow(self) -> None:
        """All groups alike, until the choice is made; in the same update nothing else changes."""
        if self.phase == PICKING:
            self.factor += self.picking.pick_growth
            self.others.copy_(self.factor)
            if bool((self.factor >= self.picking.pick_ceiling).all()):
                self.pick()
                self.phase = GROWING
        else:
            self.factor[self.active] += self.step_size
            self.others[self.active] = self.picking.recover

    def ends(self) -> Tensor:
        """Far enough apart, or over the ceiling; not before what is kept recovers."""
        return (self.large_apart | self.over) & (self.others <= 0)

    def metrics(self) -> dict[str, float]:
        """Also the share of the choice that L1 norms of the dense network would have made too."""
        chosen = self.choice or self._now()
        both = sum(int((chosen[n].cpu() & self.initial[n].cpu()).sum()) for n in self.names)
        return super().metrics() | {"overlap": both / sum(self.numbers.values())}

    def _now(self) -> grouping.Choices:
        """What would be chosen by the weights as they are now."""
        return {
            name: grouping.smallest_choice(
                grouping.scores(weight, self.settings.granularity), self.numbers[name]
            ).cpu()
            for name, weight in zip(self.names, self.weights, strict=True)
        }
