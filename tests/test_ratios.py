"""Ratios by layer: every notation, which layers may be pruned, and one line for every mistake."""

import math
import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.base.errors import SettingsError
from secateur.base.sections import Strict
from secateur.base.settings import section, validate
from secateur.sparsity import choices, ratios
from secateur.sparsity.layer_ratios import ratios_by_layer
from secateur.sparsity.ratios import Ratios, Skip

GROUPS = ["filter", "channel", "weight"]


class Written(Strict):
    ratios: Ratios = ratios.Rules(0.5)
    skip: Skip = ()


def block(inputs, outputs, convs=2, shortcut=True):
    made = nn.Module()
    for number in range(convs):
        conv = nn.Conv2d(inputs if number == 0 else outputs, outputs, 3)
        made.add_module(f"conv{number + 1}", conv)
    if shortcut:
        made.add_module("shortcut", nn.Sequential())
        made.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1))
    return made


def residual(blocks=(2, 2, 2), convs=2):
    """A network with the layer names of a residual network; it is never run."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 8, 3))
    for stage, count in enumerate(blocks, start=1):
        row = nn.Sequential(*(block(8, 8, convs, shortcut=q == 0) for q in range(count)))
        model.add_module(f"layer{stage}", row)
    model.add_module("fc", nn.Linear(8, 10))
    return model


def plain():
    model = nn.Sequential()
    for number in range(1, 5):
        model.add_module(f"conv{number}", nn.Conv2d(3 if number == 1 else 8, 8, 3))
    model.add_module("fc", nn.Linear(8, 10))
    return model


def resolve(model, written, kind="filter", skip=()):
    made = validate(Written, {"ratios": written, "skip": list(skip)}, "penalties.greg1")
    with section("penalties.greg1"):
        return ratios_by_layer(model, made.ratios, kind, made.skip)


def above_zero(found):
    return {name: ratio for name, ratio in found.items() if ratio}


def in_blocks(*convs, stages=(1, 2, 3), blocks=(0, 1)):
    return {f"layer{s}.{q}.{conv}" for s in stages for q in blocks for conv in convs}


NUMBER_MEANS = {
    ("residual", "filter"): in_blocks("conv1"),
    ("residual", "channel"): in_blocks("conv2"),
    ("plain", "filter"): {"conv1", "conv2", "conv3", "conv4"},
    ("plain", "channel"): {"conv2", "conv3", "conv4", "fc"},
}
MODELS = {"residual": residual, "plain": plain}


@pytest.mark.parametrize("written", [0.5, "0.5", "5e-1"])
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("model", MODELS)
def test_a_number_is_for_every_layer_that_may_be_pruned(model, kind, written):
    found = resolve(MODELS[model](), written, kind)
    wanted = NUMBER_MEANS.get((model, kind), set(found))
    assert above_zero(found) == dict.fromkeys(wanted, 0.5)
    layers = [n for n, m in MODELS[model]().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert list(found) == layers


def test_a_bottleneck_loses_filters_of_two_convolutions_and_channels_of_two():
    model = residual(convs=3)
    assert set(above_zero(resolve(model, 0.5, "filter"))) == in_blocks("conv1", "conv2")
    assert set(above_zero(resolve(model, 0.5, "channel"))) == in_blocks("conv2", "conv3")


@pytest.mark.parametrize("written", [[0, 0.75, 0.7, 0.32, 0], "[0, 0.75, 0.7, 0.32, 0]"], ids=type)
def test_one_ratio_a_stage(written):
    found = resolve(residual(), written)
    wanted = {1: 0.75, 2: 0.7, 3: 0.32}
    assert above_zero(found) == {n: wanted[int(n[5])] for n in in_blocks("conv1")}
    channels = resolve(residual(), written, "channel")
    assert above_zero(channels) == {n: wanted[int(n[5])] for n in in_blocks("conv2")}


def test_stages_of_single_weights_cover_shortcuts_stem_and_classifier():
    found = resolve(residual(), [0.1, 0.2, 0.3, 0.4, 0.5], "weight")
    assert found["conv1"] == 0.1
    assert found["layer2.0.shortcut.conv"] == found["layer2.1.conv2"] == 0.3
    assert found["fc"] == 0.5


PLACES = {"conv1": 0.5, "conv2": 0.5, "conv4": 0.2}


@pytest.mark.parametrize(
    "written",
    ["0-1:0.5, 3:0.2", "[0-1: 0.5, 3: 0.2]", ["0-1:0.5", "3:0.2"], {"0-1": 0.5, 3: 0.2}],
    ids=str,
)
def test_places_are_counted_over_convolutions_and_linear_layers(written):
    assert above_zero(resolve(plain(), written)) == PLACES


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ({"layer?.*.conv1": 0.75}, dict.fromkeys(in_blocks("conv1"), 0.75)),
        ("layer[12].*.conv1: 0.6", dict.fromkeys(in_blocks("conv1", stages=(1, 2)), 0.6)),
        ("*.conv1: 0.3, layer3.1.conv1: 0.7, layer2.*.conv1: 0", {
            **dict.fromkeys(in_blocks("conv1", stages=(1, 3)), 0.3), "layer3.1.conv1": 0.7}),
        ({"layer3.1.conv1": 0.7, "layer2.*.conv1": 0.1, "*.conv1": 0.3}, {
            **dict.fromkeys(in_blocks("conv1"), 0.3),
            **dict.fromkeys(in_blocks("conv1", stages=(2,)), 0.1), "layer3.1.conv1": 0.7}),
        ("layer3.1.conv1: 0.7, layer3.*.conv1: 0.4, 11: 0.2",
         {"layer3.1.conv1": 0.7, "layer3.0.conv1": 0.2}),
    ],
)  # fmt: skip
def test_the_most_exact_pattern_wins_whatever_the_order(written, wanted):
    if isinstance(written, dict):
        turned = dict(reversed(written.items()))
        assert resolve(residual(), turned) == resolve(residual(), written)
    assert above_zero(resolve(residual(), written)) == wanted


SKIPS = [
    (["1.0"], {"layer1.0.conv1"}),
    (["1"], in_blocks("conv1", stages=(1,))),
    (["1.0.0", "2.1"], {"layer1.0.conv1", "layer2.1.conv1"}),
    ([1.0, 2.1], {"layer1.0.conv1", "layer2.1.conv1"}),
    (["1.0.1"], set()),
    (["layer1.*"], in_blocks("conv1", stages=(1,))),
]


@pytest.mark.parametrize(("skip", "spared"), SKIPS, ids=[str(skip) for skip, _ in SKIPS])
def test_skipped_layers_keep_everything(skip, spared):
    found = resolve(residual(), 0.5, skip=skip)
    assert set(above_zero(found)) == in_blocks("conv1") - spared


def test_skip_may_be_one_text_and_a_place_in_a_plain_network():
    made = validate(Written, {"skip": "[1.0, layer2.1.conv1]"}, "x")
    assert [entry.text for entry in made.skip] == ["1.0", "layer2.1.conv1"]
    assert set(above_zero(resolve(plain(), 0.5, skip=["1", "fc"]))) == {"conv1", "conv3", "conv4"}


def test_block_3_2_is_not_block_3_20():
    deep = residual(blocks=(1, 1, 22))
    left = above_zero(resolve(deep, 0.5, skip=["3.2"]))
    assert "layer3.2.conv1" not in left
    assert {"layer3.20.conv1", "layer3.21.conv1"} <= set(left)
    assert "layer3.20.conv1" not in above_zero(resolve(deep, 0.5, skip=["3.20"]))
    with pytest.raises(SettingsError, match=r"skip: the number 3\.2 may mean block 2 or 20 .*quot"):
        resolve(deep, 0.5, skip=[3.2])


def numbered():
    """Layers named 0, 2, 5 and 10."""
    model = nn.Sequential(*(nn.Identity() for _ in range(11)))
    for place in (0, 2, 5):
        model[place] = nn.Conv2d(8, 8, 3)
    model[10] = nn.Linear(8, 8)
    return model


@pytest.mark.parametrize("given", [{"skip": ["2"]}, {"skip": [2]}, {"skip": ["10"]}], ids=str)
def test_the_name_of_one_layer_and_the_number_of_another_is_refused(given):
    with pytest.raises(SettingsError, match=r"skip: .*name.*'\[.\]0?' for the name.*number"):
        resolve(numbered(), 0.5, "weight", **given)
    with pytest.raises(SettingsError, match=r"ratios: .*'\[2\]' for the name, '2-2' for the num"):
        resolve(numbered(), {"2": 0.5}, "weight")


def test_layers_with_numbers_as_names_can_be_given_by_either():
    every = {"0", "2", "5", "10"}
    for skip, spared in (("0", "0"), ("[2]", "2"), ("2-2", "5"), ("[1]0", "10"), ("1", "2")):
        found = above_zero(resolve(numbered(), 0.5, "weight", skip=[skip]))
        assert set(found) == every - {spared}, skip
    found = resolve(numbered(), {"[2]": 0.5, "*": 0.25, "3": 0.75}, "weight")
    assert found == {"0": 0.25, "2": 0.5, "5": 0.25, "10": 0.75}


def test_skipped_layers_are_shown_as_they_were_written():
    made = validate(Written, {"skip": ["1.10", 2.1, "fc"]}, "x")
    assert str(made.skip) == "('1.10', 2.1, 'fc')"


def test_a_skipped_layer_may_be_one_that_may_not_be_pruned():
    found = resolve(residual(), "*conv*: 0.5", skip=["conv1", "*conv2", "*shortcut*"])
    assert set(above_zero(found)) == in_blocks("conv1")


BY_TEXT = [  # value, text that the message must contain
    (1, "ratios = 1: must be at least 0 and less than 1"),
    (1.5, "less than 1"),
    (-0.1, "at least 0"),
    (float("nan"), "must be"),
    (float("inf"), "must be"),
    (True, "must be"),
    (None, "a number is needed"),
    ("half", "ratios = 'half': a number is needed"),
    ([0, 0.5, 1.0, 0], "stage 2 = 1.0: must be"),
    ([0, "x", 0], "stage 1 = 'x': a number is needed"),
    ([], "empty"),
    ("[]", "empty"),
    ({}, "empty"),
    ({"a": 1.0}, "'a' = 1.0: must be"),
    ({"a": -1}, "'a' = -1: must be"),
    ({"a": None}, "'a' = None: a number is needed"),
    ("0-4: 0.5, 7", "'7': a name or a number, a colon and a ratio are needed"),
    ("0-4: nan", "'0-4' = 'nan': must be"),
    ("4-0: 0.5", "'4-0': the second number is less than the first"),
    ("a: 0.5, a: 0.6", "'a' is named twice"),
    (": 0.5", "a name or a number, a colon"),
    ([[0.5]], "a number is needed"),
]


@pytest.mark.parametrize(("written", "line"), BY_TEXT, ids=str)
def test_mistakes_that_the_text_shows_are_told_when_it_is_read(written, line):
    with pytest.raises(SettingsError, match=r"params\.yaml: penalties\.greg1\.ratios") as caught:
        validate(Written, {"ratios": written}, "penalties.greg1")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip", [3, [None], [True], [[1]], [""]], ids=str)
def test_a_skip_that_is_no_list_of_names_is_told(skip):
    with pytest.raises(SettingsError, match=r"penalties\.greg1\.skip"):
        validate(Written, {"skip": skip}, "penalties.greg1")


def test_pixels_are_pruned_only_by_name():
    """Every input of a first linear layer is a pixel; a convolution reads whole images."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
    assert resolve(net, 0.5, "channel") == {"1": 0, "3": 0.5, "4": 0.5}
    assert resolve(net, "0-1: 0.5", "channel") == {"1": 0.5, "3": 0.5, "4": 0}
    assert resolve(net, "*: 0.5", "filter", skip=["[4]"]) == {"1": 0.5, "3": 0.5, "4": 0}


BY_NETWORK = [  # model, groups, ratios, skip, text that the message must contain
    ("residual", "filter", "layer9.*: 0.5", [], "layer9.* matches no layer; there are: conv"),
    ("residual", "filter", "99: 0.5", [], "99: there are 17 convolutions and linear layers"),
    ("plain", "filter", "3-5: 0.5", [], "3-5: there are 5 .* from 0 to 4"),
    ("residual", "filter", [0.1, 0.5, 0.5, 0.5, 0], [], "stage 0 = 0.1 is for layer conv1, .* sum"),
    ("residual", "filter", [0, 0.5, 0.5, 0.5, 0.1], [], "stage 4 = 0.1 is for layer fc, .*classes"),
    ("residual", "channel", [0.1, 0.5, 0.5, 0.5, 0], [], "stage 0 = 0.1 .* conv1, .*pixels"),
    ("residual", "filter", [0, 0.5, 0.5, 0], [], "4 ratios for 5 stages: the stem, layer1 to"),
    ("plain", "filter", [0, 0.5, 0], [], "does not have; give numbers"),
    ("residual", "filter", "layer1.0.conv2: 0.5", [], r"layer1\.0\.conv2, whose filters may not"),
    ("residual", "filter", "layer1.*: 0.5", [], r"layer1\.\* = 0.5 is for layer layer1\.0\.conv2"),
    ("residual", "channel", "layer1.0.conv1: 0.5", [], "whose channels may not .* residual sum"),
    ("residual", "filter", "*shortcut*: 0.5", [], r"layer1\.0\.shortcut\.conv, .* residual sum"),
    ("plain", "filter", "0-4: 0.5", [], "0-4 = 0.5 is for layer fc, .*outputs are the classes"),
    ("plain", "channel", "conv1: 0.5", [], "conv1, .* its inputs are the pixels"),
    ("plain", "filter", "conv[12]: 0.5, conv[23]: 0.4", [], "both for layer conv2, and neither"),
    ("plain", "filter", 0, [], "ratios = 0: nothing would be pruned; .*prunable: conv1, conv2"),
    ("plain", "filter", 0.5, ["0-3"], "nothing would be pruned"),
    ("plain", "filter", 0.5, ["conv9"], "skip: conv9 matches no layer"),
    ("residual", "filter", 0.5, ["4.0"], r"skip: there is no stage or block 4\.0"),
    ("residual", "filter", 0.5, ["1.7"], r"skip: there is no stage or block 1\.7"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "kind", "written", "skip", "line"), BY_NETWORK)
def test_what_does_not_fit_the_network_is_told_by_layer_or_pattern(
    model, kind, written, skip, line
):
    with pytest.raises(
        SettingsError, match=rf"^params\.yaml: penalties\.greg1\..*{line}"
    ) as caught:
        resolve(MODELS[model](), written, kind, skip)
    assert "\n" not in str(caught.value)


def test_grouped_convolutions_lose_single_weights_only():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert set(above_zero(resolve(model, 0.5, "filter"))) == {"0"}
    assert set(above_zero(resolve(model, 0.5, "weight"))) == {"0", "1", "2"}
    with pytest.raises(SettingsError, match=r"layer 1, whose filters .*: a grouped convolution"):
        resolve(model, "1: 0.5")


COUNTS = [(0.3, 10, 3), (0.55, 100, 55), (0.7, 10, 7), (0.1, 30, 3), (0.29, 100, 29),
          (0.07, 100, 7), (0.57, 100, 57), (0.925, 16, 15), (0.95, 16, 15), (0.99, 16, 15),
          (0.01, 16, 1), (0.0, 16, 0), (0.5, 1, 0), (0.5, 2, 1), (0.9999999, 3, 2),
          (1e-9, 5, 1), (0.827, 1000, 827)]  # fmt: skip


@pytest.mark.parametrize(("ratio", "number", "gone"), COUNTS)
def test_counts_are_rounded_up_and_leave_one(ratio, number, gone):
    assert choices.number_pruned(ratio, number) == gone


@given(share=st.integers(0, 999), number=st.integers(1, 5000))
@examples(max_examples=200, deadline=None, derandomize=True)
def test_counts_agree_with_whole_numbers(share, number):
    assert choices.number_pruned(share / 1000, number) == min(
        -(-share * number // 1000), number - 1
    )


def test_what_is_written_comes_back_as_text_that_means_the_same():
    for written in (0.5, [0, 0.75, 0.75, 0.32, 0], "0-1: 0.5, 3: 0.2", {"conv?": 0.25}):
        rules = ratios.parse_ratios(written)
        assert ratios.parse_ratios(str(rules)) == rules
        assert ratios.parse_ratios(yaml.safe_load(yaml.safe_dump({"r": str(rules)}))["r"]) == rules


SCORE = torch.tensor([[3.0, 1.0, 2.0, 1.0, 5.0]])


@pytest.mark.parametrize(
    ("pick", "number", "gone"),
    [("min", 0, []), ("min", 1, [1]), ("min", 2, [1, 3]), ("min", 3, [1, 2, 3]),
     ("max", 1, [4]), ("max", 2, [0, 4])],
)  # fmt: skip
def test_the_smallest_or_largest_are_chosen_and_of_equals_the_first(pick, number, gone):
    choice = choices.choose(SCORE, number, pick)
    assert choice.shape == SCORE.shape
    assert choice[0].nonzero().flatten().tolist() == gone


def test_a_random_choice_depends_on_its_seed_alone():
    score = torch.rand(1000)
    state = torch.get_rng_state()
    one, again, other = (choices.choose(score, 300, "random", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.sum() == other.sum() == 300


def test_scores_are_mean_sizes_with_the_shape_of_a_choice():
    weight = torch.tensor([[[[1.0, -3.0]], [[0.0, 4.0]]]])  # one filter, two channels
    assert choices.magnitude_scores(weight, "filter").tolist() == [[[[2.0]]]]
    assert choices.magnitude_scores(weight, "channel").tolist() == [[[[2.0]], [[2.0]]]]
    assert torch.equal(choices.magnitude_scores(weight, "weight"), weight.abs())


class Calls(TorchFunctionMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", range(6))
def test_of_equal_scores_the_first_are_the_smallest(number):
    score = torch.tensor([[2.0, 1], [2, 2], [1, 3]])
    chosen = choices.choose_smallest(score, number)
    assert torch.equal(chosen, choices.choose(score, number)) and int(chosen.sum()) == number


def test_two_million_weights_are_chosen_from_at_once():
    layer = nn.Linear(2048, 1000)
    with Calls() as calls:
        choice = choices.choose(
            choices.magnitude_scores(layer.weight, "weight"),
            choices.number_pruned(0.827, 2_048_000),
        )
        same = choices.choose_smallest(
            choices.magnitude_scores(layer.weight, "weight"),
            choices.number_pruned(0.827, 2_048_000),
        )
    assert choice.sum() == math.ceil(0.827 * 2_048_000)
    assert layer.weight[choice].abs().max() <= layer.weight[~choice].abs().min()
    assert torch.equal(choice, same)
    assert 0 < calls.count < 1000  # there is no loop over weights


def test_patterns_stay_one_line_when_there_are_many_layers():
    with pytest.raises(SettingsError) as caught:
        resolve(residual(blocks=(9, 9, 9)), "nobody: 0.5")
    assert re.search(r"\.\.\. \(59 in all\)", str(caught.value))
