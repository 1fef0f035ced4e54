"""The search space: schema of ranges and of `search` in studies/<name>.yaml.

axes:
  decay: {low: 1e-5, high: 1e-3, log: true}        # numbers of a range
  pruners.magnitude.criterion: [l1, l2, taylor]    # or values of a list, or labels with settings
search: {trials: 40, sampler: tpe, objectives: [accuracy, macs]}
"""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from secateur.pipeline.params_file import as_number

Objective = Literal["accuracy", "params", "macs"]
"""Accuracy on the validation images; remaining share of the dense network's parameters or MACs,
counting only non-zeros."""
MAXIMISED = ("accuracy",)

Number = Annotated[int | float, BeforeValidator(as_number), Field(allow_inf_nan=False)]


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; whole numbers if both are whole."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    low: Number
    high: Number
    step: Number | None = None
    """Distance between the numbers; without it, any (whole) number of the range."""
    log: bool = False
    """Sample evenly on a log scale."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low > 0 and goes without step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step = {self.step}: more than 0, at most high - low")
        if self.whole and isinstance(self.step, float):
            raise ValueError(f"step = {self.step}: a whole number, as low and high are")
        return self

    @property
    def whole(self) -> bool:
        """Whether it has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def highest(self) -> int | float:
        """The highest number, which is below `high` if no number of steps leads there."""
        if self.step is None:
            return self.high
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        end = low + (high - low) // step * step
        return int(end) if self.whole else float(end)


class Search(BaseModel):
    """How values are chosen, and the objectives."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    trials: Annotated[int, Field(ge=1, le=100_000)]
    """Total number of trials; it can be raised later."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of one call of the command after which no further trial is started."""
    sampler: Literal["random", "tpe", "nsga2"] = "tpe"
    objectives: Annotated[list[Objective], Field(min_length=1)] = ["accuracy", "params"]
    batch: Annotated[int, Field(ge=1, le=1000)] = 4
    """Trials that are proposed together, so that they can run at the same time; the proposals
    depend on this number, not on the number of workers."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the sampler."""

    @model_validator(mode="after")
    def _check(self) -> "Search":
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives = {self.objectives}: each only once")
        return self
