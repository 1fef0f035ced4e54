"""GReg-2: grow a small L2 penalty on all units, choose the smallest, then as GReg-1.

Source: H. Wang, C. Qin, Y. Zhang, Y. Fu, Neural pruning via growing regularization, ICLR 2021,
section 3.3: under a common penalty, weights in directions of high curvature of the loss shrink
less, so that magnitudes separate by importance. Picking: the factor of all units rises by
`pick_growth` at every update; when it reaches `pick_ceiling`, the units with the smallest L1 norms
are chosen. Then the factor of the chosen units rises by `decay`, and the factor of the kept units
is `recover`, which lets them grow back. The growth of a layer ends when its own kept units are
1,000 times as large as its chosen ones (mean |w|, exponential average with 0.9 over updates), or
when the factor exceeds the ceiling.
"""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.base.sections import Positive
from secateur.penalties._shared.growing import (
    GROWING,
    PICKING,
    GrowingPenalty,
    GrowthSettings,
    grown,
    updates_until,
)
from secateur.training.penalty import Penalty


class Settings(GrowthSettings):
    """What is pruned, and how the penalty grows."""

    pick_ceiling: Positive = 0.01
    """The units are chosen when the factor of all units has reached this."""
    pick_growth: Positive = 0.00001
    """Growth of that factor at each update."""
    recover: Annotated[float, Field(le=0)] = -0.0001
    """Factor of kept units once the choice is made: below 0, to counteract the weight decay."""

    @model_validator(mode="after")
    def _picks_below_the_ceiling(self) -> Self:
        if self.pick_ceiling >= self.ceiling:
            raise ValueError(
                f"pick_ceiling: {self.pick_ceiling:g} must be below ceiling, {self.ceiling:g}"
            )
        return self


def build(
    settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None = None
) -> Penalty:
    """The growing penalty on all layers that lose a unit.

    `decay` is the growth at each update after picking. Raises ArgumentError for ratios that do not
    fit the network, and for growths too small to reach their ceilings.
    """
    return GReg2(settings, model, decay, shape)


class GReg2(GrowingPenalty):
    """One factor for all units of a layer until some are chosen, then one for each kind."""

    def __init__(
        self, settings: Settings, model: nn.Module, decay: float, shape: Sequence[int] | None
    ) -> None:
        super().__init__(model, settings, decay, "greg2", shape)
        self.picking = settings
        self.phase = PICKING
        self.initial = self.pruned.choice_of_smallest()
        try:
            first = updates_until(settings.pick_ceiling, settings.pick_growth, reach=True)
        except ValueError as error:
            raise ArgumentError(
                "pick_growth", f"pick_ceiling {error} (penalty greg2)", settings.pick_growth
            ) from None
        try:
            second = updates_until(settings.ceiling, decay, grown(first, settings.pick_growth))
        except ValueError as error:
            raise ArgumentError("decay", f"ceiling {error} (penalty greg2)", decay) from None
        self.max_steps = self.steps_for(first + second)

    def grow(self) -> None:
        """Raise all factors equally while picking, then only those of the chosen units."""
        if self.phase == PICKING:
            self.factor += self.picking.pick_growth
            self.kept_factor.copy_(self.factor)
            if bool((self.factor >= self.picking.pick_ceiling).all()):
                self.pruned.choose()
                self.phase = GROWING
        else:
            self.factor[self.active] += self.growth
            self.kept_factor[self.active] = self.picking.recover

    def ends(self) -> Tensor:
        """Layers that are separated or over the ceiling; none before the kept units recover."""
        return (self.separated | self.over_ceiling) & (self.kept_factor <= 0)

    def metrics(self) -> dict[str, float]:
        """Also the share of chosen units that L1 norms in the dense network would choose too."""
        chosen = self.pruned.choice or self.pruned.choice_of_smallest()
        both = sum(int((chosen[n].cpu() & self.initial[n].cpu()).sum()) for n in self.pruned.names)
        return super().metrics() | {"overlap": both / sum(self.pruned.numbers.values())}
