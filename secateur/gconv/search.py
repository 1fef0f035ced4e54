"""How many groups each convolution gets, so that a network fits a budget and keeps the most.

Every layer has candidates: numbers of groups, each with the share of its criterion that is kept,
the parameters and the MACs. The objective is the mean share over all layers.

Source: R. Zhao, W. Luk, Efficient structured pruning and architecture searching for group
convolution, ICCV workshops 2019. `max_cost` is its local search. The objective is a sum over
layers, so that the best choice is a multiple-choice knapsack, which `knapsack` solves exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from secateur.base.errors import PruningError

Strategy = Literal["knapsack", "max_cost"]


@dataclass(frozen=True)
class Candidate:
    """One number of groups for one layer."""

    groups: int
    share: float
    """Of the layer's criterion that is kept, 0 to 1."""
    params: int
    """Entries of the weight."""
    macs: int


@dataclass(frozen=True)
class Table:
    """All candidates, and what the rest of the network costs."""

    layers: Mapping[str, Sequence[Candidate]]
    """By layer, groups rising; at least one each."""
    params: int = 0
    """Of everything but the weights of these layers."""
    macs: int = 0

    def state(self, chosen: Mapping[str, Candidate]) -> "State":
        """What a choice for every layer comes to."""
        values = chosen.values()
        return State(
            {name: candidate.groups for name, candidate in chosen.items()},
            sum(c.share for c in values) / max(len(chosen), 1),
            self.params + sum(c.params for c in values),
            self.macs + sum(c.macs for c in values),
        )


@dataclass(frozen=True)
class State:
    """A number of groups for every layer, and what it comes to."""

    groups: dict[str, int]
    share: float
    """Mean over the layers of the share of the criterion that is kept: the objective."""
    params: int
    macs: int


@dataclass(frozen=True)
class Budget:
    """Most that the whole network may have; None: any number."""

    params: int | None = None
    macs: int | None = None

    def excess(self, state: State) -> dict[str, int]:
        """By how much a state exceeds the budget: of parameters, of MACs; empty if it does not."""
        over = {}
        if self.params is not None and state.params > self.params:
            over["max_params"] = state.params - self.params
        if self.macs is not None and state.macs > self.macs:
            over["max_macs"] = state.macs - self.macs
        return over


def candidates(
    outputs: int, inputs: int, least: int = 1, most: int | None = None, depthwise: bool = False
) -> list[int]:
    """Numbers of groups that divide both, rising; 1 is always among them.

    `least`: channels that a group must have on either side. `most`: groups. Without `depthwise`, as
    many groups as inputs and outputs are left out.
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


def most_groups(table: Table, budget: Budget) -> State:
    """The most groups in every layer; PruningError saying by how much if that is not enough."""
    state = table.state({name: options[-1] for name, options in table.layers.items()})
    over = budget.excess(state)
    if over:
        limits = {"max_params": budget.params, "max_macs": budget.macs}
        has = {"max_params": state.params, "max_macs": state.macs}
        reasons = " and ".join(
            f"{key} = {limits[key]:,} is exceeded by {by:,} (the least is {has[key]:,})"
            for key, by in over.items()
        )
        raise PruningError(
            f"the budget cannot be met: with the most groups that every layer may have, {reasons}; "
            "allow more, or more groups (max_groups, min_channels_per_group, depthwise)"
        )
    return state


def max_cost(table: Table, budget: Budget) -> State:
    """The paper's local search: from the most groups on, the layer next that gains most.

    One candidate at a time; of equal gains the first layer. It ends before the first step that
    would exceed the budget. Raises PruningError as `most_groups` does.
    """
    state = most_groups(table, budget)
    place = {name: len(options) - 1 for name, options in table.layers.items()}
    while True:
        gains = {
            name: table.layers[name][at - 1].share - table.layers[name][at].share
            for name, at in place.items()
            if at > 0
        }
        if not gains:
            return state
        name = max(gains, key=gains.__getitem__)
        place[name] -= 1
        after = table.state({n: table.layers[n][at] for n, at in place.items()})
        if budget.excess(after):
            return state
        state = after


def knapsack(table: Table, budget: Budget) -> State:
    """The best choice there is: a multiple-choice knapsack, solved by HiGHS without a gap.

    Raises PruningError as `most_groups` does.
    """
    if not budget.excess(best := table.state({n: o[0] for n, o in table.layers.items()})):
        return best
    most_groups(table, budget)
    options = [(name, candidate) for name, o in table.layers.items() for candidate in o]
    owner = {name: row for row, name in enumerate(table.layers)}
    rows = [owner[name] for name, _ in options]
    every = csr_array((np.ones(len(options)), (rows, range(len(options)))))
    once = LinearConstraint(every, 1, 1)
    limits = [
        (np.array([getattr(c, kind) for _, c in options], dtype=np.int64), limit - rest)
        for kind, limit, rest in (
            ("params", budget.params, table.params),
            ("macs", budget.macs, table.macs),
        )
        if limit is not None
    ]
    spare = [0] * len(limits)  # what the solver's tolerance has let it exceed
    for _ in range(20):
        constraints = [once]
        for (costs, limit), less in zip(limits, spare, strict=True):
            unit = int(np.gcd.reduce(costs))  # whole numbers as small as they can be
            constraints.append(LinearConstraint(costs // unit, ub=(limit - less) // unit))
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
            return table.state({options[k][0]: options[k][1] for k in taken})
        spare = [less + max(by, 0) for less, by in zip(spare, over, strict=True)]
    raise PruningError("the solver found no choice of groups; take strategy: max_cost")


def uniform(table: Table, budget: Budget) -> State | None:
    """The fewest groups, the same in all layers that can have so many, that meet the budget.

    None if no number does. Layers that cannot have so many keep the fewest they can have.
    """
    numbers = sorted({c.groups for options in table.layers.values() for c in options})
    for groups in numbers:
        chosen = {
            name: next((c for c in options if c.groups == groups), options[0])
            for name, options in table.layers.items()
        }
        if not budget.excess(state := table.state(chosen)):
            return state
    return None


def search(table: Table, budget: Budget, strategy: Strategy) -> State:
    """A number of groups for every layer, by the strategy of that name."""
    return {"knapsack": knapsack, "max_cost": max_cost}[strategy](table, budget)
