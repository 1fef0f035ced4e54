"""Pruner gconv: groups from settings, a file, or a budget; one-line errors for mistakes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from secateur.base import plugin
from secateur.base.errors import ArgumentError, PruningError, SettingsError
from secateur.gconv import config, permutation
from secateur.nn import cost
from secateur.pruners import gconv
from secateur.pruning.decision import PruningContext
from secateur.sparsity import masks

ROOT = Path(__file__).resolve().parents[1]


def network(arch="preresnet", shape=(3, 8, 8), classes=10, **settings):
    torch.manual_seed(0)
    module = plugin.load("archs", arch)
    return module.build(module.Settings(**settings), classes, shape).eval()


def small(**settings):
    return network("preresnet", depth=20, **settings)


def subject(model, side=8):
    torch.manual_seed(1)
    return PruningContext(model, torch.randn(6, 3, side, side), torch.arange(6))


def prune(model, **chosen):
    if not {"groups"} & set(chosen):
        chosen["groups"] = None
    return gconv.prune(gconv.Settings(**chosen), subject(model))


def groups_of(decision):
    """Number of groups by layer, read from the masks."""
    return {
        name.removesuffix(".weight"): permutation.grouping_from_mask(mask).groups
        for name, mask in decision.masks.items()
    }


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A working folder with recipes/groups/ in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/groups").mkdir(parents=True)
    return tmp_path / "recipes/groups"


@pytest.mark.parametrize("groups", [2, 4, 8, 16])
def test_every_layer_whose_channels_divide_gets_that_many_groups(groups):
    model = small()
    decision = prune(model, groups=groups)
    convolutions = config.convolutions(model)
    assert groups_of(decision) == {n: groups for n in convolutions if n != "conv1"}
    assert decision.notes["dense_layers"] == 1
    assert "left dense: conv1" in decision.lines
    for name, mask in decision.masks.items():
        assert mask.shape == model.get_parameter(name).shape
        pairs = mask[:, :, 0, 0]
        assert (pairs.sum(dim=0) == mask.shape[0] // groups).all()
        assert (pairs.sum(dim=1) == mask.shape[1] // groups).all()


def test_what_stays_weighs_the_most():
    model = small()
    weights = {
        how: sum(
            float(model.get_parameter(name).detach().flatten(2).norm(dim=2)[m[:, :, 0, 0]].sum())
            for name, m in prune(model, groups=4, **chosen).masks.items()
        )
        for how, chosen in {
            "same": {"permutation": "same"},
            "grps": {},
            "refined": {"refine": "swap"},
            "restarts": {"refine": "assignment", "restarts": 3},
        }.items()
    }
    assert list(weights.values()) == sorted(weights.values())


def test_same_keeps_neighbours_together():
    mask = prune(small(), groups=2, permutation="same").masks["layer1.0.conv2.weight"]
    blocks = mask[:, :, 0, 0].reshape(2, 8, 2, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()  # neighbours; blocks are matched afterwards


def test_channels_per_group_are_those_of_the_wider_side():
    found = groups_of(prune(small(), channels_per_group=16))
    # 16 channels make one group; 64 outputs of 16 inputs, and the reverse, make four
    assert "layer1.0.conv2" not in found
    assert {found["layer1.0.conv3"], found["layer1.1.conv1"]} == {4}
    assert (found["layer2.0.conv2"], found["layer3.0.conv3"]) == (2, 16)


def test_a_layer_that_is_skipped_is_left_alone():
    names = ("layer1.0.conv1", "layer1.0.shortcut")
    assert not {*names} & set(groups_of(prune(small(), groups=2, skip=names)))
    with pytest.raises(SettingsError, match=r"skip = 'layer9': there is no such convolution"):
        prune(small(), groups=2, skip=["layer9"])


def test_nothing_to_divide_is_said():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    with pytest.raises(ArgumentError, match="no convolution, or all are skipped"):
        chosen = gconv.Settings(groups=2, criterion="taylor")
        gconv.prune(chosen, PruningContext(linear, torch.randn(2, 3, 4, 4), torch.tensor([0, 1])))
    with pytest.raises(ArgumentError, match="search: the network already meets the budget"):
        prune(small(), search={"max_params": 10**9})


def test_taylor_is_the_gradient_times_the_weight():
    model = small()
    one = subject(model)
    decision = gconv.prune(gconv.Settings(groups=2, criterion="taylor"), one)
    copied = copy.deepcopy(model)
    nn.functional.cross_entropy(copied(one.images), one.labels).backward()
    for name, mask in decision.masks.items():
        weight = copied.get_parameter(name)
        criterion = (weight * weight.grad).detach().abs().sum(dim=(2, 3)).double()
        expected = permutation.find_grouping(criterion, 2, permutation.PermutationSettings())
        assert torch.equal(mask[:, :, 0, 0], expected.mask())
    without = PruningContext(model, one.images)
    with pytest.raises(PruningError, match="labels: criterion taylor needs one for each image"):
        gconv.prune(gconv.Settings(groups=2, criterion="taylor"), without)


def test_nothing_is_changed_and_twice_is_the_same(capsys):
    model = small()
    before = copy.deepcopy(model.state_dict())
    for chosen in ({"refine": "swap", "restarts": 1}, {"criterion": "taylor"}):
        one = subject(model)
        chance = torch.get_rng_state()
        first, again = (gconv.prune(gconv.Settings(**chosen), one) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), chance)
        assert all(torch.equal(first.masks[n], again.masks[n]) for n in first.masks)
        assert first.files == again.files
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert capsys.readouterr() == ("", "")


def test_biases_dilation_and_padding_modes_make_no_difference():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(8, 300 * 8, 1),
    )
    decision = gconv.prune(gconv.Settings(groups=4), PruningContext(model, torch.zeros(1, 3, 8, 8)))
    assert groups_of(decision) == {"1": 4, "2": 4}
    assert set(decision.masks) == {"1.weight", "2.weight"}  # biases are not masked


def test_more_groups_than_a_byte_can_count():
    model = nn.Sequential(nn.Conv2d(600, 600, 1))
    decision = gconv.prune(
        gconv.Settings(groups=300), PruningContext(model, torch.zeros(1, 600, 2, 2))
    )
    assert groups_of(decision) == {"0": 300}


def test_groups_that_are_there_are_divided_further():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, groups=2, padding=1), nn.Conv2d(32, 32, 1, groups=32)
    )
    decision = gconv.prune(
        gconv.Settings(groups=4), PruningContext(model, torch.zeros(1, 16, 8, 8))
    )
    assert set(decision.masks) == {"0.weight"}  # a depthwise convolution cannot be divided
    mask = decision.masks["0.weight"][:, :, 0, 0]
    whole = permutation.expand_groups(mask, 2)
    assert permutation.grouping_from_mask(whole).groups == 4
    assert torch.equal(permutation.extract_groups(whole, 2), mask)
    upper = permutation.kernel_magnitudes(model[0].weight)[:16]
    assert torch.equal(
        mask[:16], permutation.find_grouping(upper, 2, permutation.PermutationSettings()).mask()
    )


# ---- files -----------------------------------------------------------------------------------


def entry(groups, outputs, inputs):
    return {"G": groups, "F": outputs, "C": inputs, "id": 7}


def test_a_file_is_read_with_and_without_the_prefix(inside):
    config = {
        "module.layer1.0.conv2": entry(4, 16, 16),
        "layer1.0.conv3": entry(2, 64, 16),
        "module.layer2.0.downsample.0": entry(8, 128, 64),
        "module.layer3.downsample.0": entry(1, 256, 128),
    }
    (inside / "mine.json").write_text(json.dumps(config))
    expected = {"layer1.0.conv2": 4, "layer1.0.conv3": 2, "layer2.0.shortcut": 8}
    assert groups_of(prune(small(), config="mine.json")) == expected
    assert groups_of(prune(small(), config="recipes/groups/mine.json")) == expected


def test_what_is_written_can_be_read(inside):
    model = small()
    first = prune(model, channels_per_group=16)
    (inside / "found.json").write_text(first.files["groups.json"])
    again = prune(model, config="found.json")
    assert groups_of(again) == groups_of(first)
    assert again.files["groups.json"] == first.files["groups.json"]
    entries = json.loads(first.files["groups.json"])
    assert list(entries) == [f"module.{name}" for name in config.convolutions(model)]
    assert entries["module.layer1.0.conv3"] == entry(4, 64, 16) | {
        "id": 1 + [n for n, _ in model.named_modules()].index("layer1.0.conv3")
    }
    rows = first.files["groups.csv"].splitlines()
    assert rows[0] == "layer,outputs,inputs,groups,kept_share"
    assert rows[1] == "conv1,16,3,1,1.000000" and len(rows) == 1 + len(entries)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"layer1.0.conv4": entry(2, 16, 16)},
            r"no such convolution; did you mean layer1\.0\.conv",
        ),
        (
            {"layer1.0.conv2": entry(2, 16, 32)},
            r"F = 16, C = 32, but layer1.0.conv2 has 16 outputs",
        ),
        ({"layer1.0.conv2": entry(1, 32, 16)}, "the file is for another network"),
        ({"layer1.0.conv2": entry(3, 16, 16)}, "G = 3 does not divide F = 16"),
        (
            {"layer1.0.conv2": entry(-1, 16, 16)},
            "G = -1: must be at least 1; the file is a template",
        ),
        ({"layer1.0.conv2": entry(2.5, 16, 16)}, "G = 2.5: a whole number is needed"),
        ({"layer1.0.conv2": {"G": 2}}, "F = None: a whole number is needed"),
        ({"layer1.0.conv2": 4}, "must be an object with G, F and C"),
        ([], "must be an object of layers"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(inside, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (inside / "bad.json").write_text(text)
    with pytest.raises(SettingsError, match=rf"recipes/groups/bad.json: .*{message}"):
        prune(small(), config="bad.json")


def test_a_file_must_be_there_and_in_its_folder(inside):
    with pytest.raises(SettingsError, match=r"config = 'none\.json': .*groups/none\.json: missing"):
        prune(small(), config="none.json")
    with pytest.raises(SettingsError, match=r"must be a file in the folder recipes/groups/$"):
        prune(small(), config="../params.json")


# ---- settings and budgets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"groups": None}, "nothing"),
        ({"groups": 2, "config": "a.json"}, "groups, config"),
        ({"groups": 2, "search": {"max_params": 9}}, r"groups, search\.max_params"),
    ],
)
def test_there_is_one_way_to_say_how_many(chosen, said):
    with pytest.raises(ValidationError, match=f"groups: the number is given by {said}; set one of"):
        gconv.Settings(**chosen)


def test_no_layer_that_can_have_groups_is_an_error():
    with pytest.raises(ArgumentError, match="groups = 7: no convolution can have these groups"):
        prune(small(), groups=7)


def grouped_cost(model, masked):
    """Parameters and MACs of a network with these masks, from counting non-zero weights."""
    pruned = copy.deepcopy(model)
    for parameter in pruned.parameters():
        nn.init.ones_(parameter)
    masks.apply(pruned, masked)
    rows = cost.layer_costs(pruned, torch.zeros(1, 3, 8, 8))
    params = sum(int(p.count_nonzero()) for p in pruned.parameters())
    return params, sum(row.macs for row in rows)


@pytest.mark.parametrize("strategy", ["knapsack", "max_cost"])
@pytest.mark.parametrize("kind", ["max_params", "max_macs", "both"])
def test_the_search_counts_as_the_project_does_and_meets_the_budget(strategy, kind):
    model = small()
    rows = cost.layer_costs(model, torch.zeros(1, 3, 8, 8))
    limits = {
        "max_params": int(cost.parameters(model) * 0.45),
        "max_macs": int(sum(r.macs_dense for r in rows) * 0.45),
    }
    budget = limits if kind == "both" else {kind: limits[kind]}
    decision = prune(model, search={**budget, "strategy": strategy, "min_channels_per_group": 4})
    params, macs = grouped_cost(model, decision.masks)
    assert (params, macs) == (decision.notes["search_params"], decision.notes["search_macs"])
    assert params <= budget.get("max_params", params) and macs <= budget.get("max_macs", macs)
    uniform = prune(model, groups=int(decision.notes["uniform_groups"]))
    even = (decision.notes["uniform_params"], decision.notes["uniform_macs"])
    assert grouped_cost(model, uniform.masks) == even
    for mask in decision.masks.values():
        assert (
            min(
                permutation.grouping_from_mask(mask).outputs.shape[1],
                permutation.grouping_from_mask(mask).inputs.shape[1],
            )
            >= 4
        )


def test_knapsack_keeps_at_least_what_the_others_keep():
    model = small()
    for share in (0.2, 0.5, 0.8):
        most = int(cost.parameters(model) * share)
        shares = {
            strategy: prune(model, search={"max_params": most, "strategy": strategy}).notes
            for strategy in ("knapsack", "max_cost")
        }
        best = shares["knapsack"]["search_share"]
        assert best >= shares["max_cost"]["search_share"]
        assert best >= shares["knapsack"]["uniform_share"] - 1e-9


def test_a_budget_that_cannot_be_met_says_by_how_much():
    with pytest.raises(ArgumentError, match=r"max_params = 5,000 is exceeded by [\d,]+"):
        prune(small(), search={"max_params": 5_000})


def test_no_uniform_choice_is_said():
    model = small()
    least = prune(model, groups=16)
    params, _ = grouped_cost(model, least.masks)
    decision = prune(model, search={"max_params": params - 1, "depthwise": True})
    assert any("no number of groups" in line for line in decision.lines)
    assert "uniform_groups" not in decision.notes
