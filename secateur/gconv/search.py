"""Search for the number of groups of each convolution, so that a network fits a budget.

Every layer has candidates: numbers of groups, each with the share of the layer's importance that is
kept, its parameters and its MACs. The objective is the mean share over all layers.

Source: R. Zhao, W. Luk, Efficient structured pruning and architecture searching for group
convolution, ICCV workshops 2019. `max_cost` is the local search of the paper. Since the objective
is a sum over layers, the problem is a multiple-choice knapsack, which `knapsack` solves exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from secateur.base.errors import ArgumentError, PruningError

Strategy = Literal["knapsack", "max_cost"]


@dataclass(frozen=True)
class Candidate:
    """One number of groups for one layer."""

    groups: int
    share: float
    """Share of the layer's importance that is kept, 0 to 1."""
    params: int
    """Entries of the weight."""
    macs: int


@dataclass(frozen=True)
class SearchSpace:
    """All candidates, and the cost of the rest of the network."""

    layers: Mapping[str, Sequence[Candidate]]
    """By layer, with ascending groups; at least one each."""
    params: int = 0
    """Parameters of the network without the weights of these layers."""
    macs: int = 0

    def assignment(self, chosen: Mapping[str, Candidate]) -> "Assignment":
        """Cost and objective with one candidate for every layer."""
        values = chosen.values()
        return Assignment(
            {name: candidate.groups for name, candidate in chosen.items()},
            sum(c.share for c in values) / max(len(chosen), 1),
            self.params + sum(c.params for c in values),
            self.macs + sum(c.macs for c in values),
        )


@dataclass(frozen=True)
class Assignment:
    """A number of groups for every layer, with cost and objective."""

    groups: dict[str, int]
    share: float
    """Mean over the layers of the share of the importance that is kept: the objective."""
    params: int
    macs: int


@dataclass(frozen=True)
class Budget:
    """Upper limits for the whole network; None: no limit."""

    params: int | None = None
    macs: int | None = None

    def excess(self, assignment: Assignment) -> dict[str, int]:
        """Parameters and MACs by which an assignment exceeds the budget; empty if it does not."""
        over = {}
        if self.params is not None and assignment.params > self.params:
            over["max_params"] = assignment.params - self.params
        if self.macs is not None and assignment.macs > self.macs:
            over["max_macs"] = assignment.macs - self.macs
        return over


def candidates(
    outputs: int, inputs: int, least: int = 1, most: int | None = None, depthwise: bool = False
) -> list[int]:
    """Numbers of groups that divide both numbers of channels, ascending; 1 is always among them.

    `least`: fewest channels of a group on either side. `most`: highest number of groups. Without
    `depthwise`, as many groups as inputs and outputs are left out.
    """
    common = gcd(outputs, inputs)
    return [
        groups
        for groups in range(1, common + 1)
        if common % groups == 0
        and (
            groups == 1
            or (
                (most is None or groups <= most)
                and min(outputs, inputs) // groups >= least
                and (depthwise or not outputs == inputs == groups)
            )
        )
    ]


def cheapest(space: SearchSpace, budget: Budget) -> Assignment:
    """The most groups in every layer; ArgumentError with the excess if that exceeds the budget."""
    assignment = space.assignment({name: options[-1] for name, options in space.layers.items()})
    over = budget.excess(assignment)
    if over:
        limits = {"max_params": budget.params, "max_macs": budget.macs}
        has = {"max_params": assignment.params, "max_macs": assignment.macs}
        reasons = " and ".join(
            f"{key} = {limits[key]:,} is exceeded by {by:,} (the least is {has[key]:,})"
            for key, by in over.items()
        )
        raise ArgumentError(
            "search",
            f"the budget cannot be met: with the most groups that every layer may have, {reasons}; "
            "allow more, or more groups (max_groups, min_channels_per_group, depthwise)",
        )
    return assignment


def max_cost(space: SearchSpace, budget: Budget) -> Assignment:
    """The paper's local search: start with the most groups, then repeatedly reduce the groups of
    the layer that gains most by it.

    Each step moves one layer by one candidate; of equal gains, the first layer. The search ends
    before the first step that would exceed the budget. Raises ArgumentError as `cheapest` does.
    """
    assignment = cheapest(space, budget)
    place = {name: len(options) - 1 for name, options in space.layers.items()}
    while True:
        gains = {
            name: space.layers[name][at - 1].share - space.layers[name][at].share
            for name, at in place.items()
            if at > 0
        }
        if not gains:
            return assignment
        name = max(gains, key=gains.__getitem__)
        place[name] -= 1
        after = space.assignment({n: space.layers[n][at] for n, at in place.items()})
        if budget.excess(after):
            return assignment
        assignment = after


def knapsack(space: SearchSpace, budget: Budget) -> Assignment:
    """The optimum: a multiple-choice knapsack, solved by HiGHS to optimality.

    Raises ArgumentError as `cheapest` does.
    """
    if not budget.excess(best := space.assignment({n: o[0] for n, o in space.layers.items()})):
        return best
    cheapest(space, budget)
    options = [(name, candidate) for name, o in space.layers.items() for candidate in o]
    owner = {name: row for row, name in enumerate(space.layers)}
    rows = [owner[name] for name, _ in options]
    every = csr_array((np.ones(len(options)), (rows, range(len(options)))))
    once = LinearConstraint(every, 1, 1)
    limits = [
        (np.array([getattr(c, kind) for _, c in options], dtype=np.int64), limit - rest)
        for kind, limit, rest in (
            ("params", budget.params, space.params),
            ("macs", budget.macs, space.macs),
        )
        if limit is not None
    ]
    margins = [0] * len(limits)  # by which the solver's tolerance exceeded the limits
    for _ in range(20):
        constraints = [once]
        for (costs, limit), margin in zip(limits, margins, strict=True):
            unit = int(np.gcd.reduce(costs))  # small integers keep the solver exact
            constraints.append(LinearConstraint(costs // unit, ub=(limit - margin) // unit))
        found = milp(
            -np.array([c.share for _, c in options]),
            integrality=np.ones(len(options)),
            bounds=(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        taken = np.flatnonzero(np.round(found.x))
        over = [int(costs[taken].sum()) - limit for costs, limit in limits]
        if max(over) <= 0 and len(taken) == len(owner):
            return space.assignment({options[k][0]: options[k][1] for k in taken})
        margins = [margin + max(by, 0) for margin, by in zip(margins, over, strict=True)]
    raise PruningError("the solver found no choice of groups; take strategy: max_cost")


def uniform(space: SearchSpace, budget: Budget) -> Assignment | None:
    """The assignment with the smallest number of groups, the same for all layers, that meets the
    budget; None if there is none.

    Layers that cannot have that number get the fewest groups they can have.
    """
    numbers = sorted({c.groups for options in space.layers.values() for c in options})
    for groups in numbers:
        chosen = {
            name: next((c for c in options if c.groups == groups), options[0])
            for name, options in space.layers.items()
        }
        if not budget.excess(assignment := space.assignment(chosen)):
            return assignment
    return None


def search(space: SearchSpace, budget: Budget, strategy: Strategy) -> Assignment:
    """The assignment found by this strategy. Raises ArgumentError as `cheapest` does."""
    return {"knapsack": knapsack, "max_cost": max_cost}[strategy](space, budget)
