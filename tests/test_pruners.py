"""Pruners and masks: exact choices by hand, and pruned entries that stay exactly zero."""

import copy
import itertools
import math
import statistics
from itertools import pairwise
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur.base import plugin
from secateur.base.errors import PruningError, SettingsError
from secateur.base.sections import Train
from secateur.base.settings import validate
from secateur.data import dataset
from secateur.nn import checkpoint, cost
from secateur.pruning.apply import apply_decision
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks
from secateur.sparsity.choices import choose
from secateur.training import loop
from secateur.training.callbacks import Callback
from secateur.training.resume import ResumeStore

NAMES = plugin.names("pruners")
GRADED = [n for n in NAMES if "sensitivity" in plugin.load("pruners", n).Settings.model_fields]
SCOPED = GRADED
ARCHS = ["lenet300", "lenet5"]
FEW = {
    "oracle": {"ratios": {"1": 0.001}},  # one filter of one layer: a hundred evaluations
    "obs": {"ratios": {"0": 0.5}},
}
NORMED = ["network_slimming"]  # reads the scales of batch norms


def subject(model, choices=None):
    shape = (3, 8, 8) if next(model.parameters()).shape[1] == 3 else (1, 8, 8)
    return PruningContext(model, torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64), choices)


def prune(name, model, **chosen):
    module = plugin.load("pruners", name)
    return module.prune(module.Settings(**chosen), subject(model)).masks


def first_outputs(model):
    """A choice as a penalty makes it: the first output of every layer."""
    layers = masks.layers(model).items()
    return {
        f"{name}.weight": (torch.arange(len(layer.weight)) < 1).view(
            -1, *[1] * (layer.weight.dim() - 1)
        )
        for name, layer in layers
    }


def network(arch, shape=(1, 8, 8)):
    torch.manual_seed(0)
    module = plugin.load("archs", arch)
    return module.build(module.Settings(), 10, shape)


def linear(weights, bias=None):
    layer = nn.Linear(len(weights[0]), len(weights), bias=bias is not None)
    layer.weight.data = torch.tensor(weights)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return nn.Sequential(layer)


def variants(name):
    """Settings of a plug-in: its defaults, and every option of each field that has a fixed list."""
    schema = plugin.load("pruners", name).Settings
    choices = [
        {key: choice}
        for key, field in schema.model_fields.items()
        if get_origin(field.annotation) is Literal
        for choice in get_args(field.annotation)
    ]
    needed = {"isomorphic": {"granularity": "group"}}
    few = FEW.get(name, {})
    return [
        schema(**few, **chosen, **next((needed[v] for v in chosen.values() if v in needed), {}))
        for chosen in [{}, *choices]
    ]


def test_threshold_keeps_what_is_as_large_as_the_threshold():
    weights = [[0.1, -0.1, 0.0999, -0.0999, 0.0, 5.0]]
    chosen = prune("threshold", linear(weights), sensitivity=0.1)
    assert chosen["0.weight"].tolist() == [[True, True, False, False, False, True]]


def test_std_takes_the_population_deviation_of_each_tensor_with_its_zeros():
    # mean 1, squared deviations 1+1+9+1+1+1+4+4: 22 / 8; the sample deviation would be 1.77
    model = linear([[0.0, 0, 4, 0], [2, 0, 3, -1]], bias=[0.3, -0.1])  # bias: mean 0.1, std 0.2
    deviation = statistics.pstdev([0, 0, 4, 0, 2, 0, 3, -1])
    assert deviation == pytest.approx(1.6583, abs=1e-4)
    chosen = prune("std", model, sensitivity=1.2)  # 1.99 and 0.24; with n - 1 it would be 2.13
    assert chosen["0.weight"].tolist() == [[False, False, True, False], [True, False, True, False]]
    assert chosen["0.bias"].tolist() == [True, False]


def test_std_keeps_what_is_exactly_one_deviation_large():
    model = linear([[1.0, -1.0, 1.0, -1.0]])  # the deviation is exactly 1
    assert prune("std", model, sensitivity=1.0)["0.weight"].all()
    assert not prune("std", model, sensitivity=1.0001)["0.weight"].any()


@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=12),
    sensitivity=st.floats(0, 3, width=16),
)
@examples(max_examples=50, deadline=None, derandomize=True)
def test_both_thresholds_agree_with_a_loop_over_plain_numbers(values, sensitivity):
    model = linear([values])
    kept = prune("threshold", model, sensitivity=sensitivity)["0.weight"][0].tolist()
    assert kept == [abs(v) >= sensitivity for v in values]
    limit = sensitivity * statistics.pstdev(values)
    by_std = prune("std", model, sensitivity=sensitivity)["0.weight"][0]
    for value, stays in zip(values, by_std, strict=True):
        if abs(abs(value) - limit) > 1e-5 * limit:  # farther from the limit than rounding
            assert bool(stays) == (abs(value) >= limit)


@pytest.mark.parametrize("name", GRADED)
def test_sensitivity_zero_prunes_nothing_not_even_zeros(name):
    model = linear([[0.0, -0.0, 1e-40], [0.0, 0.0, 0.0]], bias=[0.0, 0.0])
    assert all(bool(mask.all()) for mask in prune(name, model, sensitivity=0).values())


@pytest.mark.parametrize("name", GRADED)
def test_a_higher_sensitivity_prunes_more_and_never_brings_anything_back(name):
    model = network("lenet5")
    steps = [prune(name, model, sensitivity=s) for s in (0, 0.01, 0.02, 0.05, 0.1, 0.5, 1)]
    for weaker, stronger in pairwise(steps):
        assert all(bool((weaker[n] | ~stronger[n]).all()) for n in weaker)
    count = [sum(int(mask.sum()) for mask in step.values()) for step in steps]
    assert count == sorted(count, reverse=True)
    assert count[0] > count[-1]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SCOPED)
def test_masks_cover_exactly_the_prunable_tensors(name, arch):
    model = network(arch)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    kinds = {"weights": ["weight"], "weights_and_biases": ["weight", "bias"]}
    parameters = dict(model.named_parameters())
    for chosen in variants(name):
        found = plugin.load("pruners", name).prune(chosen, subject(model)).masks
        if chosen.scope == "weights_and_scales":
            expected = {f"{module}.weight" for module in (*layers, *norms)}
        else:
            expected = {f"{layer}.{kind}" for layer in layers for kind in kinds[chosen.scope]}
        assert set(found) == expected & set(parameters)
        for key, mask in found.items():
            assert mask.dtype == torch.bool
            assert mask.shape == parameters[key].shape


def test_only_convolutions_and_linear_layers_are_prunable():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 2))
    assert set(masks.prunable(model, "weights_and_biases")) == {"0.weight", "2.weight", "2.bias"}
    assert set(masks.prunable(model, "weights")) == {"0.weight", "2.weight"}
    scales = masks.prunable(model, "weights_and_scales")
    assert set(scales) == {"0.weight", "1.weight", "2.weight"}


@pytest.mark.parametrize("name", GRADED)
def test_small_scales_are_pruned_with_their_channels_and_the_network_stays_equal(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()  # fmt: skip
    model[1].weight.data = torch.tensor([1.0, 1e-5, -1.0, 1.0, -1e-5, 1.0])
    model[1].bias.data.normal_()
    found = prune(name, model, sensitivity=1e-3, scope="weights_and_scales")
    assert found["1.weight"].tolist() == [True, False, True, True, False, True]
    images = torch.randn(3, 1, 8, 8)
    pruned = apply_decision(model, PruningDecision(found), images)
    assert pruned.model[0].weight.shape[0] == 4, "a channel without a scale is constant"
    assert pruned.differences["difference_float64"] <= 1e-9


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", sorted({*NAMES} - {"branches", "gconv"}))  # need other networks
def test_a_pruner_changes_nothing_and_says_nothing(name, arch, capsys):
    model = two_convs() if name in NORMED else network(arch)
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, again = (
        plugin.load("pruners", name).prune(variants(name)[0], subject(model, first_outputs(model)))
        for _ in range(2)
    )
    for one, other in ((first.masks, again.masks), (first.channels, again.channels)):
        assert set(one) == set(other)
        assert all(torch.equal(one[n], other[n]) for n in one)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), chance)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", GRADED)
def test_an_emptied_layer_is_refused_by_name_with_what_was_asked(name):
    model = network("lenet300")
    with pytest.raises(PruningError, match=r"layer fc1 .* by sensitivity 9: .*19200 weights"):
        masks.refuse_empty(model, prune(name, model, sensitivity=9), "sensitivity 9", {})


def test_one_weight_is_enough_and_none_is_too_few():
    model = network("lenet300")
    model.fc2.weight.data[0, 0] = 0.25  # all others are at most 1 / sqrt(300)
    everything = {"fc1.weight": torch.ones(300, 64, dtype=torch.bool)}
    masks.refuse_empty(model, everything | {"fc2.weight": model.fc2.weight >= 0.25}, "0.25", {})
    with pytest.raises(PruningError, match=r"layer fc2 .*largest is 0\.25"):
        masks.refuse_empty(model, everything | {"fc2.weight": model.fc2.weight > 0.25}, "more", {})


def test_a_layer_may_lose_all_its_biases():
    model = linear([[1.0, 1.0]], bias=[0.0])
    masks.refuse_empty(model, prune("threshold", model, sensitivity=0.5), "0.5", {})


def two_convs():
    """The filters of the first convolution are read only by the second."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 5, 2)
    return nn.Sequential(
        first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.Flatten(), nn.Linear(180, 2)
    )


SINGLE = torch.arange(48).view(4, 3, 2, 2) < 7
CHOICES = {  # choices -> masks (number of kept entries), channels
    "filters": (
        {"0.weight": torch.tensor([True, False, False, True]).view(4, 1, 1, 1)}, {}, [0, 3]
    ),
    "inputs that nobody else reads": (
        {"3.weight": torch.tensor([False, True, False, False]).view(1, 4, 1, 1)}, {}, [1]
    ),
    "pixels": (
        {"0.weight": torch.tensor([True, False, False]).view(1, 3, 1, 1)}, {"0.weight": 32}, []
    ),
    "weights": ({"0.weight": SINGLE}, {"0.weight": 41}, []),
    "both ends of a channel": (
        {
            "0.weight": torch.tensor([True, True, False, False]).view(4, 1, 1, 1),
            "3.weight": torch.tensor([False, True, True, False]).view(1, 4, 1, 1),
        },
        {},
        [0, 1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHOICES)
def test_chosen_takes_exactly_what_was_chosen(kind):
    choices, stays, channels = CHOICES[kind]
    module = plugin.load("pruners", "chosen")
    model = two_convs()
    found = module.prune(module.Settings(), subject(model, choices))
    assert {name: int(mask.sum()) for name, mask in found.masks.items()} == stays
    for name, mask in found.masks.items():
        assert torch.equal(~mask, choices[name].expand_as(mask))
    assert {name: gone.tolist() for name, gone in found.channels.items()} == (
        {"0": channels} if channels else {}
    )


def summed():
    """A network that adds the filters of two convolutions."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc((self.a(x) + self.b(x)).mean((2, 3)))

    torch.manual_seed(0)
    return Sum()


def test_chosen_filters_that_others_have_a_say_in_are_masked():
    gone = torch.tensor([True, False, True, False]).view(4, 1, 1, 1)
    module = plugin.load("pruners", "chosen")
    alone = module.prune(module.Settings(), subject(summed(), {"a.weight": gone}))
    assert not alone.channels
    assert {name: int(mask.sum()) for name, mask in alone.masks.items()} == {
        "a.weight": 6,
        "a.bias": 2,
    }
    other = torch.tensor([True, True, False, False]).view(4, 1, 1, 1)
    both = module.prune(module.Settings(), subject(summed(), {"a.weight": gone, "b.weight": other}))
    assert {name: index.tolist() for name, index in both.channels.items()} == {"a": [0]}
    assert int(both.masks["a.weight"].sum()) == int(both.masks["b.weight"].sum()) == 6


def test_chosen_without_a_choice_or_with_that_of_another_network_is_refused():
    module = plugin.load("pruners", "chosen")
    with pytest.raises(PruningError, match=r"carries no choice; .*greg1, greg2, gradual"):
        prune("chosen", network("lenet300"))
    wrong = {"0.weight": torch.ones(5, 1, 1, 1) > 0}
    with pytest.raises(PruningError, match=r"0\.weight has shape \(5, 1, 1, 1\)"):
        module.prune(module.Settings(), subject(two_convs(), wrong))


def toy_data(shape=(2, 9, 9), count=64):
    chance = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 256, (count, *shape), generator=chance, dtype=torch.uint8)
    split = dataset.InMemoryImages(images, labels)
    images = dataset.Images(split, split, ["a", "b", "c"], (0.5,) * shape[0], (0.5,) * shape[0])
    return dataset.prepare("toy", images, 0, 0)


def toy_network(kind):
    torch.manual_seed(2)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(162, 8), nn.ReLU(), nn.Linear(8, 3))
    conv = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    return nn.Sequential(*conv, nn.Linear(36, 3))


class Looker(Callback):
    """Checks after every step that pruned entries are zero."""

    def __init__(self, model, chosen):
        self.model, self.chosen, self.looks = model, chosen, 0

    def on_train_start(self, epochs, steps_per_epoch, history):
        self.on_step_end(0, 0)

    def on_step_end(self, epoch, step):
        self.looks += 1
        for name, mask in self.chosen.items():
            assert not self.model.get_parameter(name).detach().cpu()[~mask].any(), name


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_what_is_pruned_is_zero_after_every_step_and_positive_in_the_file(
    optimizer, kind, tmp_path
):
    model, prepared = toy_network(kind), toy_data()
    chosen = prune("std", model, sensitivity=0.8)
    before = copy.deepcopy(model.state_dict())
    looker = Looker(model, chosen)
    settings = Train(
        epochs=3, batch_size=10, optimizer=optimizer, lr=0.02, momentum=0.9, weight_decay=0.1
    )
    loop.fit(model, prepared, settings, 1, ResumeStore(tmp_path, []), [looker], masks=chosen)
    assert looker.looks == 1 + 3 * 7
    for name, mask in chosen.items():  # kept entries have changed, so pruned ones could have, too
        assert (~mask).any()
        assert (model.get_parameter(name).cpu() != before[name])[mask].any()
    info = prepared.info
    header = checkpoint.Header(
        "toy", {}, info.classes, info.shape, info.mean, info.std, info.hash, "finetune"
    )
    checkpoint.save(tmp_path / "model.safetensors", header, model, chosen)
    saved = checkpoint.load(tmp_path / "model.safetensors")
    assert set(saved.masks) == set(chosen)
    for name, mask in chosen.items():
        pruned = saved.tensors[name][~mask]
        assert not pruned.any()
        assert not pruned.signbit().any()
        assert torch.equal(saved.masks[name], mask)


def test_masked_entries_change_in_a_training_without_masks(tmp_path):
    model = toy_network("linear")
    chosen = prune("std", model, sensitivity=0.8)
    masks.apply(model, chosen)
    with pytest.raises(AssertionError, match="weight"):
        looker = Looker(model, chosen)
        loop.fit(model, toy_data(), Train(epochs=1), 1, ResumeStore(tmp_path, []), [looker])


def test_apply_zeroes_what_goes_and_leaves_the_rest_bit_for_bit():
    model = linear([[1.0, -2.0, 3.0]], bias=[4.0])
    masks.apply(model, {"0.weight": torch.tensor([[True, False, True]])})
    assert model[0].weight.tolist() == [[1, 0, 3]]
    assert not model[0].weight.signbit().any()
    assert model[0].bias.tolist() == [4]


def small_classifier(seed=0):
    """Two convolutions of four filters, whose importance differs by a factor of hundreds."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 3),
    ).eval().double()  # fmt: skip
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model


def loss_without(model, first, second, images, labels):
    """The loss with zeros in every tensor of these filters, written out for this network."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for number in first:
            for tensor in (copied[0].weight, copied[0].bias, copied[1].weight, copied[1].bias):
                tensor[number] = 0
        for number in second:
            copied[3].weight[number], copied[3].bias[number] = 0, 0
        return float(nn.functional.cross_entropy(copied(images), labels))


@pytest.mark.parametrize("seed", range(4))
def test_oracle_finds_the_lowest_loss_of_all_choices(seed):
    model = small_classifier(seed)
    images = torch.randn(20, 1, 8, 8, dtype=torch.float64)
    labels = torch.arange(20) % 3
    module = plugin.load("pruners", "oracle")
    wanted = module.Settings(ratios={"0": 0.5, "1": 0.25})
    decision = module.prune(wanted, PruningContext(model, images, labels))
    losses = {
        (first, second): loss_without(model, first, (second,), images, labels)
        for first in itertools.combinations(range(4), 2)
        for second in range(4)
    }
    best = min(losses, key=losses.get)
    found = [tuple(channels.tolist()) for channels in decision.channels.values()]
    assert found == [best[0], (best[1],)]
    assert decision.notes["trials"] == len(losses) == 24
    assert decision.notes["loss"] == pytest.approx(losses[best], abs=1e-12)


def test_a_choice_whose_loss_is_not_a_number_is_never_the_best():
    """Without the first filter an output overflows, and the loss is NaN."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[2].weight.copy_(torch.tensor([[-3e38, 3e38, 3e38], [0, 0, 0]]))
    context = PruningContext(model.eval(), torch.ones(2, 1, 1, 1), torch.ones(2, dtype=torch.int64))
    oracle = plugin.load("pruners", "oracle")
    found = oracle.prune(oracle.Settings(ratios={"0": 0.3}), context)
    assert found.channels["0"].tolist() == [1]
    assert found.notes["loss"] == pytest.approx(math.log(2))


def test_oracle_refuses_more_choices_than_it_may_try_before_any_is_tried():
    module = plugin.load("pruners", "oracle")
    with pytest.raises(SettingsError, match=r"ratios: more than 10,000 choices of filters"):
        module.prune(module.Settings(), subject(network("lenet5")))
    with pytest.raises(PruningError, match="labels: pruner oracle needs one for each image"):
        model = small_classifier().float()
        module.prune(module.Settings(), PruningContext(model, torch.zeros(1, 1, 8, 8)))


def thin(kind):
    """A network with a layer in which a filter or a channel is a single weight."""
    torch.manual_seed(3)
    if kind == "one input":
        layers = nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    else:  # one output
        inner = nn.Linear(36, 6), nn.LayerNorm(6), nn.Linear(6, 1)
        layers = nn.Flatten(), *inner, nn.Linear(1, 3)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("pruner", ["magnitude", "chosen"])
@pytest.mark.parametrize(("kind", "layer"), [("one input", "0"), ("one output", "3")])
def test_single_weights_go_alone_where_a_filter_or_a_channel_is_one(kind, layer, pruner):
    model, images = thin(kind), torch.randn(8, 1, 6, 6)
    nn.init.constant_(model.get_submodule(layer).bias, 1.0)
    weight = model.get_parameter(f"{layer}.weight")
    lowest = choose(weight.detach().abs(), 3)
    context = PruningContext(model, images, choices={f"{layer}.weight": lowest})
    module = plugin.load("pruners", pruner)
    chosen = (
        {"granularity": "weight", "ratios": {f"[{layer}]": 0.5}} if pruner == "magnitude" else {}
    )
    found = module.prune(validate(module.Settings, chosen, pruner), context)
    small = apply_decision(model, found, images).model
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        by_hand.get_parameter(f"{layer}.weight")[lowest] = 0
        torch.testing.assert_close(small(images), by_hand(images))
    assert found.masks.keys() == {f"{layer}.weight"} and not found.channels
    assert (cost.parameters(small) < cost.parameters(model)) == (kind == "one input")


@pytest.mark.parametrize("pruner", ["magnitude", "chosen"])
def test_filters_of_one_weight_go_whole_where_filters_are_chosen(pruner):
    model, images = thin("one input"), torch.randn(8, 1, 6, 6)
    nn.init.constant_(model[0].bias, 1.0)
    lowest = {
        f"{name}.weight": choose(model[name].weight.detach().abs().mean((1, 2, 3), True), count)
        for name, count in ((0, 3), (2, 2))
    }
    module = plugin.load("pruners", pruner)
    chosen = {"ratios": {"[02]": 0.5}} if pruner == "magnitude" else {}
    context = PruningContext(model, images, choices=lowest)
    found = module.prune(validate(module.Settings, chosen, pruner), context)
    small = apply_decision(model, found, images, remove_dead=False).model
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name in (0, 2):
            gone = lowest[f"{name}.weight"].flatten()
            by_hand[name].weight[gone] = by_hand[name].bias[gone] = 0
        torch.testing.assert_close(small(images), by_hand(images))
    assert not found.masks and [len(small[name].weight) for name in (0, 2)] == [3, 2]


@pytest.mark.parametrize("pick", ["min", "max", "random"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_further_round_chooses_what_was_pruned_before(pick, ranking, granularity):
    """A ratio of 0.8 leaves a fifth, whichever units the round before has pruned."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)).double()
    shape = (40, 64) if granularity == "weight" else (40, 1)
    held = {"1.weight": (torch.rand(shape) < 0.5).expand(40, 64)}
    context = PruningContext(model, torch.zeros(2, 1, 8, 8).double(), masks=held)
    magnitude = plugin.load("pruners", "magnitude")
    chosen = {"granularity": granularity, "pick": pick, "ranking": ranking, "seed": 5}
    settings = magnitude.Settings(**chosen, ratios=0.8, skip=["[3]"])
    found = magnitude.prune(settings, context)
    if granularity == "weight":
        left = found.masks["1.weight"]
    else:
        left = torch.ones(40, 1, dtype=torch.bool)
        left[next(iter(found.channels.values()))] = False
    assert int(left.sum()) == left.numel() // 5
    assert not (left & ~held["1.weight"][:, : left.shape[1]]).any()


@pytest.mark.parametrize("of", ["given", "dense"])
@pytest.mark.parametrize("pick", ["min", "random"])
def test_a_target_counts_what_earlier_masks_have_removed(of, pick):
    """400 weights, of which masks hold 300 at zero: half of the rest are 50, a fifth of all 80."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 25, bias=False))
    held = {"1.weight": torch.randperm(400).view(25, 16) < 100}
    images = torch.zeros(2, 1, 4, 4)
    context = PruningContext(model, images, dense=copy.deepcopy(model), masks=held)
    magnitude = plugin.load("pruners", "magnitude")
    wanted = {"params": 0.5} if of == "given" else {"params": 0.2, "of": "dense"}
    chosen = {"granularity": "weight", "pick": pick, "seed": 2}
    found = magnitude.prune(magnitude.Settings(**chosen, target=wanted), context)
    left = found.masks["1.weight"] & held["1.weight"]
    assert int(left.sum()) == (50 if of == "given" else 80)
    assert found.notes["params_left_reached"] == wanted["params"]


def test_obs_leaves_zeros_at_zero():
    """A ratio below the share of zeros removes zeros alone, which changes no other weight."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30))
    layer = model[1].weight.data
    layer[torch.rand(30, 64) < 0.7] = 0
    zeros = layer == 0
    obs = plugin.load("pruners", "obs")
    context = PruningContext(model, torch.randn(200, 1, 8, 8))
    found = obs.prune(obs.Settings(ratios=0.5), context)
    assert torch.equal(found.weights["1.weight"] == 0, zeros)
    assert torch.allclose(found.weights["1.weight"], layer)


@pytest.mark.parametrize("target", [None, {"macs": 0.4}])
def test_pixels_are_pruned_where_a_ratio_names_the_first_linear_layer(target):
    """The columns of the lowest norms are zero, so that these pixels have no effect."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4))
    images = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    pruner = secateur.pruners.magnitude(granularity="channel", ratios="[1]: 0.75", target=target)
    model = secateur.prune(net, images, pruner).model
    norms = net[1].weight.detach().abs().sum(0)
    left = 9 if target is None else int((0.4 * (36 * 12 + 48) - 48) / 12)
    pruned = norms.sort().indices[: 36 - left]
    wanted = net[1].weight.detach().clone()
    wanted[:, pruned] = 0
    assert torch.equal(model.get_parameter("1.weight"), wanted)
    changed = images.flatten(1).clone()
    changed[:, pruned] = 7.0
    with torch.no_grad():
        assert torch.equal(model(changed.view_as(images)), model(images))
    everywhere = secateur.pruners.magnitude(granularity="channel", ratios=0.75)
    small = secateur.prune(net, images, everywhere).model
    assert [m.in_features for m in small.modules() if isinstance(m, nn.Linear)] == [36, 3]
