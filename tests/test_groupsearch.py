"""The search for numbers of groups: by hand, compared with brute force, and within the budget."""

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from secateur.base import plugin
from secateur.base.errors import ArgumentError
from secateur.gconv import permutation, search
from secateur.gconv.search import Budget, Candidate, SearchSpace
from secateur.sparsity.masks import layers


def table(params=0, macs=0, **shares):
    """Layers with 1,000 weights, 10 MACs per weight, and these shares for 1, 2, 4 ... groups."""
    return SearchSpace(
        {
            name: [Candidate(2**k, s, 1000 // 2**k, 10_000 // 2**k) for k, s in enumerate(values)]
            for name, values in shares.items()
        },
        params,
        macs,
    )


def brute_force(problem, budget):
    """The largest objective among all assignments that meet the budget, or None."""
    states = [
        problem.assignment(dict(zip(problem.layers, choice, strict=True)))
        for choice in itertools.product(*problem.layers.values())
    ]
    return max((s.share for s in states if not budget.excess(s)), default=None)


def test_candidates_divide_both_sides():
    assert search.candidates(16, 24) == [1, 2, 4, 8]
    assert search.candidates(3, 16) == [1]
    assert search.candidates(16, 24, least=4) == [1, 2, 4]
    assert search.candidates(16, 24, most=3) == [1, 2]
    assert search.candidates(8, 8) == [1, 2, 4]
    assert search.candidates(8, 8, depthwise=True) == [1, 2, 4, 8]
    assert search.candidates(16, 8) == [1, 2, 4, 8]  # one input channel for two output channels


def test_local_search_by_hand():
    problem = table(a=(1.0, 0.6, 0.3), b=(1.0, 0.7, 0.5))
    # From 250 + 250: a gains 0.3 (500), then 0.4 (1000); then b 0.2 (500): 1500; then 1.0: 2000.
    for most, groups in {
        500: {"a": 4, "b": 4}, 749: {"a": 4, "b": 4}, 750: {"a": 2, "b": 4},
        1249: {"a": 2, "b": 4}, 1250: {"a": 1, "b": 4}, 1500: {"a": 1, "b": 2},
        2000: {"a": 1, "b": 1},
    }.items():  # fmt: skip
        assert search.max_cost(problem, Budget(most)).groups == groups, most


def test_knapsack_by_hand():
    problem = table(a=(1.0, 0.6, 0.3), b=(1.0, 0.7, 0.5))
    # 1000: both layers with 2 groups keep 1.3; a with 1 and b with 4 would take 1250.
    state = search.knapsack(problem, Budget(1000))
    assert state.groups == {"a": 2, "b": 2}
    assert (state.share, state.params) == (pytest.approx(0.65), 1000)


def test_what_is_not_grouped_counts_too():
    problem = table(params=70, macs=7, a=(1.0, 0.6))
    assert search.knapsack(problem, Budget(1069)).groups == {"a": 2}
    assert search.knapsack(problem, Budget(1070)).groups == {"a": 1}
    assert search.max_cost(problem, Budget(macs=10_006)).groups == {"a": 2}
    assert search.max_cost(problem, Budget(macs=10_007)).groups == {"a": 1}


@pytest.mark.parametrize("strategy", ["knapsack", "max_cost"])
def test_a_budget_that_cannot_be_met_says_by_how_much(strategy):
    problem = table(params=70, a=(1.0, 0.6), b=(1.0,))
    with pytest.raises(ArgumentError, match=r"max_params = 1,500 is exceeded by 70 \(the least is"):
        search.search(problem, Budget(1500), strategy)
    both = r"exceeded by 1 .* and max_macs = 1 is exceeded by 14,999"
    with pytest.raises(ArgumentError, match=both):
        search.search(problem, Budget(1569, 1), strategy)


def test_uniform_takes_the_fewest_groups_that_fit():
    problem = table(a=(1.0, 0.6, 0.3), b=(1.0, 0.7))
    assert search.uniform(problem, Budget(2000)).groups == {"a": 1, "b": 1}
    assert search.uniform(problem, Budget(1999)).groups == {"a": 2, "b": 2}
    assert search.uniform(problem, Budget(999)) is None  # with 4 groups, b stays dense


@st.composite
def problems(draw):
    """A few layers whose candidates keep less and cost less, and a budget."""
    rows = {}
    for k in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from([64, 96, 144, 1024])) * draw(st.sampled_from([1, 9]))
        positions = draw(st.sampled_from([1, 49, 64, 1024]))
        groups = [g for g in (1, 2, 4, 8, 16) if size % g == 0][: draw(st.integers(1, 5))]
        shares = sorted(draw(st.lists(st.floats(0, 1), min_size=5, max_size=5)), reverse=True)
        rows[f"layer{k}"] = [
            Candidate(g, s, size // g, size // g * positions)
            for g, s in zip(groups, shares, strict=False)
        ]
    problem = SearchSpace(rows, draw(st.integers(0, 500)), draw(st.integers(0, 500)))
    dense = problem.assignment({n: o[0] for n, o in rows.items()})
    kinds = draw(st.sampled_from(["params", "macs", "both"]))
    share = draw(st.floats(0.05, 1.1))
    params = int(dense.params * share) if kinds != "macs" else None
    macs = int(dense.macs * draw(st.floats(0.05, 1.1))) if kinds != "params" else None
    return problem, Budget(params, macs)


@examples(max_examples=150, deadline=None)
@given(problems())
def test_never_over_the_budget_and_knapsack_is_the_best_there_is(given):
    problem, budget = given
    most = brute_force(problem, budget)
    if most is None:
        for strategy in ("knapsack", "max_cost"):
            with pytest.raises(ArgumentError, match="search: the budget cannot be met"):
                search.search(problem, budget, strategy)
        return
    exact = search.knapsack(problem, budget)
    local = search.max_cost(problem, budget)
    even = search.uniform(problem, budget)
    for state in (exact, local, even):
        assert state is None or not budget.excess(state)
    assert exact.share == pytest.approx(most, abs=1e-6)
    assert exact.share >= local.share - 1e-6


def of_network(model, least=1):
    """The search space of a network's convolutions by magnitude, without MACs."""
    rows = {}
    default = permutation.PermutationSettings()
    for name, layer in layers(model).items():
        if isinstance(layer, torch.nn.Linear):
            continue
        criterion = permutation.kernel_magnitudes(layer.weight)
        whole, size = float(criterion.sum()), layer.weight.numel()
        rows[name] = [
            Candidate(g, permutation.find_grouping(criterion, g, default).kept(criterion) / whole,
                      size // g, size // g)
            for g in search.candidates(*layer.weight.shape[:2], least=least, most=64)
        ]  # fmt: skip
    rest = sum(p.numel() for p in model.parameters()) - sum(o[0].params for o in rows.values())
    return SearchSpace(rows, rest)


def test_preresnet164_is_searched_exactly():
    module = plugin.load("archs", "preresnet")
    torch.manual_seed(0)
    model = module.build(module.Settings(), 100, (3, 32, 32))
    start = time.monotonic()
    problem = of_network(model, least=8)
    budget = Budget(1_440_000)
    local, exact = search.max_cost(problem, budget), search.knapsack(problem, budget)
    assert time.monotonic() - start < 600  # in seconds; trying all combinations would never end
    assert exact.share >= local.share
    # the exact search stays below the budget by less than any single step
    assert 1_440_000 - 5_000 < exact.params <= 1_440_000 and local.params <= 1_440_000
