"""Sensitivity: partial evaluations give the results of the whole masked network."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from secateur.base import plugin
from secateur.base.errors import SettingsError
from secateur.base.settings import validate
from secateur.pruning import removal, sensitivity
from secateur.pruning.decision import PruningContext
from stages.sensitivity import __main__ as sensitivity_stage

SHAPE = (3, 8, 8)


def zoo(arch, **chosen):
    torch.manual_seed(0)
    module = plugin.load("archs", arch)
    return module.build(module.Settings(**chosen), 10, SHAPE).eval()


class InPlace(nn.Module):
    """Changes its inputs in place wherever possible."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 7, 3)
        self.d, self.relu, self.fc = nn.Conv2d(7, 8, 3), nn.ReLU(inplace=True), nn.Linear(8, 10)

    def forward(self, x):
        y = self.a(x)
        y += self.b(x)
        x = self.c(self.relu(y)).relu_()
        x = nn.functional.relu(self.d(x), inplace=True)
        return self.fc(x.mean((2, 3)))


MODELS = {
    "resnet": lambda: zoo("resnet_cifar", depth=8),
    "densenet": lambda: zoo("densenet", depth=7),
    "in place": lambda: InPlace().eval(),
}


def test_bn_scale_is_left_out_without_scales_and_refused_alone(capsys):
    norms = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert sensitivity_stage._criteria(("bn_scale", "l1"), norms) == ["bn_scale", "l1"]
    assert sensitivity_stage._criteria(("bn_scale", "l1"), norms[:1]) == ["l1"]
    assert capsys.readouterr().out.startswith("sensitivity: bn_scale is left out")
    with pytest.raises(SettingsError, match=r"^params\.yaml: sensitivity\.criteria = "):
        sensitivity_stage._criteria(("bn_scale",), norms[:1])


@pytest.mark.parametrize("granularity", ["filter", "group"])
@pytest.mark.parametrize("criterion", ["l1", "random"])
@pytest.mark.parametrize("ratios", [{}, {"fc1": 0.5, "a + b": 0.25}], ids=["none", "some"])
def test_every_suggestion_is_one_that_params_yaml_takes(granularity, criterion, ratios):
    found = sensitivity_stage.as_params(criterion, granularity, ratios, 1)["pruners"]["magnitude"]
    written = yaml.safe_load(yaml.safe_dump(found))
    settings = validate(plugin.load("pruners", "magnitude").Settings, written, "")
    everywhere = settings.ratios.everywhere
    assert (everywhere is None) == bool(ratios) and not everywhere


@pytest.mark.parametrize("kind", MODELS)
def test_trials_give_what_the_masked_network_gives(kind):
    model = MODELS[kind]()
    images = torch.randn(20, *SHAPE)
    with torch.no_grad():
        model.fc.bias -= model(images).mean(0)  # so that images are of different classes
        labels = model(images).argmax(1)
    context = PruningContext(copy.deepcopy(model), images, labels)
    names = sensitivity.independent_layers(context)
    made = sensitivity.ablations(context, names, ["l1", "taylor", "random"], [0.3, 0.8], 1)
    assert {(t.layer, t.criterion, t.ratio) for t in made} == {
        (n, c, r) for n in names for c in ("l1", "taylor", "random") for r in (0.3, 0.8)
    }
    parts = zip(images.split(8), labels.split(8), strict=True)
    before = copy.deepcopy(context.model.state_dict())
    runner = sensitivity.AblationRunner(context)
    ticks = []
    right = runner.count_correct(list(parts), made, lambda: ticks.append(1))
    assert len(ticks) == 3 * len(made)
    assert all(torch.equal(t, before[n]) for n, t in context.model.state_dict().items())

    def count(network):
        with torch.no_grad():
            return int((network.eval()(images).argmax(1) == labels).sum())

    wanted = [count(model)]
    graph = context.graph
    wanted += [count(removal.mask(model, t.channels, images, graph)) for t in made]
    assert right == wanted
    assert right[0] == 20 and len(set(right)) > 2


def test_only_what_follows_is_computed_again():
    runner = sensitivity.AblationRunner(PruningContext(MODELS["resnet"](), torch.randn(2, *SHAPE)))
    every = len(runner.fx_graph.graph.nodes)
    context = PruningContext(runner.model, torch.randn(2, *SHAPE), torch.arange(2))
    late, early = (
        sensitivity.ablations(context, [name], ["l1"], [0.5], 0)[0]
        for name in ("layer3.0.conv1", "layer1.0.conv1")
    )
    assert len(runner.dependent_nodes(late)) < len(runner.dependent_nodes(early)) < every
    assert str(runner.dependent_nodes(late)[0].target) == "layer3.0.conv1"


@pytest.mark.parametrize(
    ("rows", "least", "ratio"),
    [
        ([(0, 0.9), (0.1, 0.89), (0.2, 0.7), (0.3, 0.9)], 0.88, 0.1),
        ([(0.3, 0.9), (0, 0.9), (0.1, 0.9), (0.2, 0.9)], 0.88, 0.3),
        ([(0, 0.9), (0.1, 0.5)], 0.88, 0),
        ([], 0.5, 0),
    ],
)
def test_the_allowed_ratio_ends_before_the_first_drop(rows, least, ratio):
    assert sensitivity.largest_ratio(rows, least) == ratio


def test_an_accuracy_may_fall_by_just_the_drop():
    for right in range(101):
        for lost in range(right + 1):
            least = sensitivity_stage.least_accuracy(right, 100, lost / 100)
            rows = [(0, right / 100), (0.5, (right - lost) / 100), (0.6, (right - lost - 1) / 100)]
            assert sensitivity.largest_ratio(rows, least) == 0.5


@pytest.mark.parametrize("granularity", ["filter", "group"])
@pytest.mark.parametrize("kind", ["resnet", "numbers"])
@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_the_pruner_removes_what_was_measured_together(criterion, kind, granularity):
    """Random outputs are those of the suggested layers; layers may have numbers as names."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.Flatten(), nn.Linear(144, 10)
    model = MODELS["resnet"]() if kind == "resnet" else nn.Sequential(*layers).eval()
    context = PruningContext(model, torch.randn(2, *SHAPE))
    settings = SimpleNamespace(granularity=granularity, ratios=[1 / 3, 0.5])
    stage = SimpleNamespace(params=SimpleNamespace(sensitivity=settings, seed=3))
    made = sensitivity_stage._ablations(stage, context, [criterion])
    *_, last = dict.fromkeys(ablation.layer for ablation in made)
    ratios = {last: 1 / 3}
    together = sensitivity_stage._together(stage, context, made, criterion, ratios)
    suggested = sensitivity_stage.as_params(criterion, granularity, ratios, 3)["pruners"]
    magnitude = plugin.load("pruners", "magnitude")
    own = validate(magnitude.Settings, suggested["magnitude"], "")
    decision = magnitude.prune(own, context)
    assert together.channels.keys() == decision.channels.keys() and decision.channels
    for name, index in decision.channels.items():
        assert together.channels[name].sort().values.equal(index.sort().values)


def test_all_suggestions_together():
    context = PruningContext(MODELS["resnet"](), torch.randn(2, *SHAPE), torch.arange(2))
    names = sensitivity.independent_layers(context)
    made = sensitivity.ablations(context, names, ["l1"], [0.5, 0.75], 0)
    both = sensitivity.combined(made, {names[0]: 0.5, names[2]: 0.75}, "l1")
    assert {name: len(index) for name, index in both.channels.items()} == {
        "layer1.0.conv1": 8, "layer3.0.conv1": 48,
    }  # fmt: skip


def test_groups_are_ablated_with_all_that_is_coupled_to_them():
    model = MODELS["resnet"]()
    images = torch.randn(6, *SHAPE)
    context = PruningContext(copy.deepcopy(model), images, torch.arange(6))
    made = sensitivity.group_ablations(context, ["l1", "random", "lamp"], [0.5], 1)
    free = {g.name: g.size for g in context.graph.groups if g.locked is None}
    assert len(free) > len(sensitivity.independent_layers(context)), "including sums"
    for ablation in made:
        (name, index), *selected = ablation.channels.items()
        assert ablation.layer == name and len(index) == free[name] // 2
        assert all(free[n] and n.endswith("shortcut") for n, _ in selected)
    assert [a.layer for a in made if a.criterion == "lamp"] == list(free)
    labels = torch.zeros(6, dtype=torch.int64)
    runner = sensitivity.AblationRunner(context)
    right = runner.count_correct([(images, labels)], made, lambda: None)
    with torch.no_grad():
        masked = [removal.mask(model, a.channels, images, context.graph) for a in made]
        whole = [network(images) for network in masked]
    assert right[1:] == [int((logits.argmax(1) == 0).sum()) for logits in whole]


class Balanced(nn.Module):
    """The outputs of `b` go into groups, which must all keep the same number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Linear(512, 10)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().flatten(1))


def test_filters_that_a_balance_holds_back_are_masked():
    torch.manual_seed(0)
    model, images = Balanced().eval(), torch.randn(60, *SHAPE)
    with torch.no_grad():
        model.fc.bias -= model(images).mean(0)
        labels = model(images).argmax(1)
    context = PruningContext(copy.deepcopy(model), images, labels)
    ratios = [0.25, 0.5, 0.75]
    made = sensitivity.ablations(context, ["a", "b"], ["l1"], ratios, 0)
    assert any(ablation.masks and not ablation.channels for ablation in made)
    together = sensitivity.combined(made, {"a": 0.5, "b": 0.25}, "l1")

    def by_hand(ratio_by_layer):
        pruned = copy.deepcopy(model)
        for name, ratio in ratio_by_layer.items():
            layer = pruned.get_submodule(name)
            norms = layer.weight.detach().abs().sum((1, 2, 3))
            lowest = norms.argsort()[: round(ratio * len(norms) + 0.49)]
            layer.weight.data[lowest] = layer.bias.data[lowest] = 0
        with torch.no_grad():
            return int((pruned(images).argmax(1) == labels).sum())

    wanted = [by_hand({name: ratio}) for name in ("a", "b") for ratio in ratios]
    nothing = sensitivity.combined(made, {}, "l1")
    runner = sensitivity.AblationRunner(context)
    before = copy.deepcopy(context.model.state_dict())
    tried = [*made, together, nothing]
    right = runner.count_correct([(images, labels)], tried, lambda: None)
    assert right[1:] == [*wanted, by_hand({"a": 0.5, "b": 0.25}), 60]
    assert len(set(right)) > 3
    alone = [runner.count_correct([(images, labels)], [one], lambda: None)[1] for one in tried]
    assert right[1:] == alone
    assert all(torch.equal(t, before[n]) for n, t in context.model.state_dict().items())


def test_bn_scale_is_for_the_layers_that_have_scales(capsys):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 6), nn.Linear(6, 5)
    model = nn.Sequential(*layers).eval()
    nn.init.uniform_(model[1].weight)
    context = PruningContext(model, torch.randn(2, *SHAPE), torch.arange(2))
    settings = SimpleNamespace(granularity="filter", ratios=[0.5])
    params = SimpleNamespace(sensitivity=settings, seed=0)
    stage = SimpleNamespace(params=params)
    made = sensitivity_stage._ablations(stage, context, ["l1", "bn_scale"])
    assert [(t.layer, t.criterion) for t in made] == [
        ("0", "l1"), ("3", "l1"), ("0", "bn_scale"),
    ]  # fmt: skip
    lowest = model[1].weight.argsort()[:2].sort().values
    assert made[2].channels["0"].sort().values.equal(lowest)
    assert capsys.readouterr().out.splitlines() == [
        "sensitivity: bn_scale is left out for 3: no scales"
    ]
