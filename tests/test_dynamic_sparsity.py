"""Penalties that prune while the network trains: schedules and masks, computed by hand."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_growing import Watcher, content, digits, fit, network, settings
from torch import nn

from secateur.base import plugin
from secateur.base.errors import SettingsError
from secateur.base.sections import Train, in_steps
from secateur.base.settings import section, validate
from secateur.penalties import gradual, rigl
from secateur.pruning import removal
from secateur.pruning.apply import apply_decision
from secateur.pruning.decision import PruningContext
from secateur.sparsity.choices import number_pruned
from secateur.training import averaging
from secateur.training.penalty import TrainingPlan


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SECATEUR_DEVICE", "cpu")


def build(name, model, decay=0.0, shape=None, **chosen):
    module = plugin.load("penalties", name)
    made = validate(module.Settings, chosen, f"penalties.{name}")
    with section(f"penalties.{name}"):
        if shape is None:
            return module.build(made, model, decay)
        return module.build(made, model, decay, shape)


def started(name, model, steps=100, decay=0.0, shape=None, how=None, **chosen):
    penalty = build(name, model, decay, shape, **chosen)
    penalty.start(TrainingPlan(how or settings(1), steps, 100))
    return penalty


def linear(weight, bias=False):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias)
    layer.weight.data = torch.tensor(weight)
    return nn.Sequential(layer)


def step(penalty, number, optimizer=None, change=None):
    """One training step in which `change` replaces the update of the optimizer."""
    penalty.before_step(number, optimizer)
    if change is not None:
        with torch.no_grad():
            change()
    penalty.after_step(number, optimizer)


class Beside(nn.Module):
    """A network with a layer `beside` that never runs."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.last = nn.Linear(64, 6), nn.Linear(5, 5), nn.Linear(6, 10)

    def forward(self, images):
        return self.last(self.first(images.flatten(1)).relu())


@pytest.mark.parametrize("layer", ["beside", "first"], ids=["unused", "frozen"])
@pytest.mark.parametrize(
    ("name", "chosen"),
    [("rigl", {"interval": 3}), ("gsm", {}), ("gradual", {"criterion": "taylor", "begin": 30})],
)
def test_a_layer_that_no_gradient_reaches_is_told_in_the_first_step(name, chosen, layer):
    """Not only when gradual uses the gradients for the first time."""
    how = Train(epochs=20, batch_size=32, keep="last", optimizer="sgd")

    def train(skip):
        model = Beside()
        model.first.requires_grad_(layer != "first")
        watcher = Watcher(model)
        penalty = build(name, model, 0.001 if name == "gsm" else 0.0, **chosen, skip=skip)
        fit(model, digits(100), how, f"{skip}", watcher=watcher, penalty=penalty)
        assert watcher.steps

    others = [other for other in ("beside", "first") if other != layer]
    words = rf"^params\.yaml: penalties\.{name}\.skip: no gradient reaches {layer}, since it never"
    with pytest.raises(SettingsError, match=words):
        train(others)
    train(["beside", "first"])


# ---- gradual -----------------------------------------------------------------------------------


def test_the_share_follows_the_cubic_of_the_paper():
    model = nn.Sequential(nn.Linear(10, 100, bias=False))
    penalty = started("gradual", model, 50, ratios=0.9, initial=0.1, begin=4, end=27, interval=5)
    by_hand = {  # 1,000 * (0.9 - 0.8 * (1 - k / 4)^3), rounded up, every 5 steps from step 4
        4: 100, 9: 563, 14: 800, 19: 888, 24: 900,
    }  # fmt: skip
    seen, last = {}, 0
    for number in range(50):
        step(penalty, number)
        zeros = int((model[0].weight == 0).sum())
        if zeros != last:
            seen[number], last = zeros, zeros
    assert seen == by_hand
    assert [row["step"] for row in penalty.trace_table()] == list(by_hand)
    assert [row["pruned"] for row in penalty.trace_table()] == pytest.approx(
        [0.1, 0.563, 0.8, 0.888, 0.9]
    )


@pytest.mark.parametrize(
    ("given", "first", "count", "interval"),
    [
        ({"begin": 0.1, "end": 0.5, "interval": 0.05}, 20, 8, 10),
        ({"begin": 0, "end": 7, "interval": 100}, 0, 0, 100),
        ({"begin": 10, "end": 0.5, "interval": 7}, 10, 12, 7),
        ({"interval": 0.001}, 20, 120, 1),
    ],
)
def test_times_are_steps_or_below_one_shares_of_the_training(given, first, count, interval):
    penalty = started("gradual", network(), 200, **given)
    due = [number for number in range(200) if penalty.due(number)]
    assert due == [first + k * interval for k in range(count + 1)]


def test_a_schedule_that_does_not_fit_is_told():
    with pytest.raises(SettingsError, match=r"sparse_train\.epochs = 1: .* at step 31.* has 4"):
        fit(network(), digits(), settings(1), penalty=build("gradual", network(), end=30))
    with pytest.raises(SettingsError, match="a number of steps, or below 1 a share"):
        build("gradual", network(), begin=1.5)
    with pytest.raises(SettingsError, match=r"initial = 0\.5: must be less than .* 0\.3"):
        build("gradual", network(), ratios="0: 0.3, 1: 0.6", initial=0.5)
    with pytest.raises(SettingsError, match=r"gradual\.end: 0\.1 is before begin, 0\.2"):
        build("gradual", network(), begin=0.2, end=0.1)
    with pytest.raises(
        SettingsError, match="begins after 15 of 20 steps and ends after 8; its end"
    ):
        fit(
            network(), digits(), settings(5), penalty=build("gradual", network(), begin=15, end=0.4)
        )
    with pytest.raises(SettingsError, match="keep must be 'last'"):
        penalty = build("gradual", network())
        fit(network(), digits(), settings(5, keep="best"), penalty=penalty)


def test_the_smallest_go_and_without_regrowth_they_stay_zero():
    model = linear([[4.0, -1.0, 3.0, -2.0]])
    weight = model[0].weight
    penalty = started("gradual", model, ratios=0.5, begin=0, end=2, interval=1)
    step(penalty, 0)
    assert weight.tolist() == [[4, -1, 3, -2]], "nothing at the first step: initial is 0"
    step(penalty, 1, change=lambda: weight.add_(torch.tensor([[0.0, 0, 0, -2]])))
    # 0.5 * (1 - (1 - 1/2)^3) of 4 weights is 1.75, rounded up to 2
    assert weight.tolist() == [[4, 0, 0, -4]]
    step(penalty, 2, change=lambda: weight.add_(torch.tensor([[-3.9, 9, 9, 0]])))
    assert weight.tolist() == [[pytest.approx(0.1), 0, 0, -4]]
    assert penalty.choices()["0.weight"].tolist() == [[False, True, True, False]]


def test_with_regrowth_the_gradient_at_the_masked_weights_moves_the_hidden_ones():
    model = linear([[4.0, -1.0, 3.0, -2.0]])
    penalty = started("gradual", model, ratios=0.5, begin=0, end=2, interval=1, regrow=True)
    weight, hidden = model[0].weight, torch.tensor([[4.0, -1.0, 3.0, -2.0]])
    optimizer = torch.optim.SGD([weight], lr=0.5)
    inputs = torch.tensor([[1.0, 2, -1, 1]])
    for number in range(8):  # by hand: the mask changes only the forward pass
        optimizer.zero_grad()
        seen = weight.detach().clone()
        (model(inputs).sum() - 1).square().backward()
        hidden -= 0.5 * 2 * ((seen * inputs).sum() - 1) * inputs
        penalty.before_step(number, optimizer)
        optimizer.step()
        penalty.after_step(number, optimizer)
        torch.testing.assert_close(penalty.dense[0], hidden, rtol=1e-5, atol=1e-5)
        count = [0, 2, 2][min(number, 2)]
        if number < 3:
            gone = hidden.abs().flatten().argsort()[:count].tolist()
        masked = hidden.clone()
        masked[0, gone] = 0
        torch.testing.assert_close(weight.detach(), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_what_has_grown_meanwhile_comes_back(granularity):
    model = nn.Sequential(nn.Linear(2, 4), *linear([[4.0, -1.0, 3.0, -2.0]]))
    penalty = started(
        "gradual", model, granularity=granularity, ratios=0.5, begin=0, end=4, interval=2,
        regrow=True,
    )  # fmt: skip
    weight = model[1].weight
    for number in range(3):
        step(penalty, number)
    assert weight.tolist() == [[4, 0, 3, 0]]
    step(penalty, 3, change=lambda: weight.add_(torch.tensor([[0.0, -9, 0, 0]])))
    assert weight.tolist() == [[4, 0, 3, 0]], "unchanged until the next choice"
    step(penalty, 4)
    assert weight.tolist() == [[4, -10, 0, 0]]


def test_a_global_ranking_takes_biases_and_layers_together_and_leaves_none_empty():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1).view(parameter.shape))
            parameter.mul_((1, -100, 1e-3, 100)[place])
    penalty = started(
        "gradual", model, ratios=0.5, ranking="global", scope="weights_and_biases", begin=0, end=0
    )
    step(penalty, 0)
    # 12 + 3 + 6 + 2 entries; the lowest 12 are 0.001 to 0.006, of which one must stay, and 1 to 6
    chosen = penalty.choices()
    assert set(chosen) == {"0.weight", "1.weight"}
    assert chosen["1.weight"].tolist() == [[True, True, True], [True, True, False]]
    assert chosen["0.weight"].flatten().tolist() == [True] * 6 + [False] * 6
    context = PruningContext(model, torch.zeros(1, 4))
    masks = plugin.load("pruners", "chosen")
    context.choices = {**chosen, "0.bias": torch.tensor([True, False, False])}
    decision = masks.prune(masks.Settings(), context)
    assert decision.masks["0.bias"].tolist() == [False, True, True]
    assert torch.equal(decision.masks["1.weight"], ~chosen["1.weight"])


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_whole_filters_and_channels_go_with_the_lowest_mean_magnitude(granularity, ranking):
    model = network()
    with torch.no_grad():
        for layer in (model[0], model[3], model[6]):  # the same mean magnitude in all layers
            layer.weight /= layer.weight.abs().mean()
    penalty = started(
        "gradual", model, shape=(1, 8, 8), granularity=granularity, ranking=ranking, ratios=0.5,
        begin=0, end=0,
    )  # fmt: skip
    axis = {"filter": 0, "channel": 1}[granularity]
    before = {n: model.get_parameter(n).detach().clone() for n in penalty.ranked}
    means = {n: w.abs().transpose(0, axis).flatten(1).mean(1) for n, w in before.items()}
    step(penalty, 0)
    if ranking == "layer":
        limits = {n: m.sort().values[number_pruned(0.5, len(m)) - 1] for n, m in means.items()}
    else:
        every = torch.cat(list(means.values())).sort().values
        limits = dict.fromkeys(means, every[number_pruned(0.5, len(every)) - 1])
    for name, mean in means.items():
        gone = mean <= limits[name]
        assert 0 < int(gone.sum()) < len(mean)
        after = model.get_parameter(name).detach().transpose(0, axis).flatten(1)
        assert torch.equal((after == 0).all(1), gone)
        assert torch.equal(penalty.choices()[name].flatten(), gone)
        if granularity == "filter":
            bias = model.get_parameter(name.replace("weight", "bias"))
            assert torch.equal(bias == 0, gone)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_taylor_ranks_by_the_loss_without_the_norm(norm, granularity):
    """(w * dL/dw)^2 of P. Molchanov et al., CVPR 2019, equation 8, L being the cross-entropy."""
    torch.manual_seed(0)
    model = network().double()
    penalty = started(
        "gradual", model, decay=0.05, norm=norm, shape=(1, 8, 8), granularity=granularity,
        criterion="taylor", ratios=0.5, begin=1, end=1,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(64, 1, 8, 8, dtype=torch.float64)
    for number in range(2):
        loss = F.cross_entropy(model(images), torch.arange(64) % 10)
        weights = [model.get_parameter(name) for name in penalty.ranked]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        optimizer.zero_grad()
        (loss + penalty(number)).backward()
        assert not torch.allclose(weights[0].grad, gradients[0]), "the norm has a gradient"
        penalty.before_step(number, optimizer)
        optimizer.step()
        now = [weight.detach().clone() for weight in weights]
        penalty.after_step(number, optimizer)
    for name, weight, gradient in zip(penalty.ranked, now, gradients, strict=True):
        score = weight * gradient
        score = score.flatten(1).sum(1).abs() if granularity == "filter" else score.abs().flatten()
        gone = torch.zeros(len(score), dtype=torch.bool)
        gone[score.argsort()[: number_pruned(0.5, len(score))]] = True
        assert torch.equal(penalty.choice[name].flatten(), gone), name


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.outer(F.relu(self.inner(x)))) + x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("ranking", "counts"), [("layer", [0, 2 + 2, 3 + 4]), ("global", [0, 4, 6, 7])]
)
def test_groups_of_coupled_channels_are_removed_without_a_difference(ranking, counts):
    # 6 and 8 channels; shares 0, 0.244, 0.392, 0.468, 0.496, 0.5, rounded up
    torch.manual_seed(0)
    model = Residual().double()
    penalty = started(
        "gradual", model, 20, shape=(1, 8, 8), granularity="group", ranking=ranking, ratios=0.5,
        begin=0, end=10, interval=2,
    )  # fmt: skip
    seen = []
    for number in range(12):
        step(penalty, number)
        seen.append(round(penalty.share() * 14))
    assert sorted(set(seen)) == counts
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = model.eval()(images)
    context = PruningContext(model, images, choices=penalty.choices())
    chosen = plugin.load("pruners", "chosen")
    decision = chosen.prune(chosen.Settings(), context)
    assert not decision.masks
    small = removal.remove(model, decision.channels, images).model
    assert small.stem.out_channels + small.inner.out_channels == 7
    torch.testing.assert_close(small(images), expected, rtol=1e-9, atol=1e-9)


class Mobile(nn.Module):
    """Norms that read one layer, a depthwise layer, a sum, and two concatenated layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 8, 1, bias=False)
        self.right, self.norm3 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.norm4, self.norm5 = nn.BatchNorm2d(8), nn.BatchNorm2d(14)
        self.fc = nn.Linear(14, 10)

    def forward(self, x):
        x = F.relu(self.norm2(self.deep(F.relu(self.norm1(self.stem(x))))))
        y = F.relu(self.norm4(self.left(x) + self.norm3(self.right(x))))
        return self.fc(F.relu(self.norm5(torch.cat((x, y), 1))).mean((2, 3)))


def test_filters_that_are_zero_have_no_shift_either_so_that_removing_them_changes_nothing():
    torch.manual_seed(0)
    model = Mobile()
    with torch.no_grad():  # so the same filters of both layers are pruned
        model.left.weight[:4] *= 0.01
        model.right.weight[:4] *= 0.01
    penalty = build(
        "gradual", model, shape=(1, 8, 8), granularity="filter", ratios=0.5, begin=2, end=10,
        interval=3,
    )  # fmt: skip
    fit(model, digits(), settings(4), penalty=penalty)
    gone = penalty.choices()["right.weight"].flatten()
    assert gone.tolist() == [True] * 4 + [False] * 4
    assert not model.norm3.bias[gone].any() and not model.norm4.bias[gone].any()
    assert model.norm3.bias[~gone].all() and model.norm4.weight[~gone].all()
    images = torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        expected = model.eval()(images)
    context = PruningContext(model, images, choices=penalty.choices())
    chosen = plugin.load("pruners", "chosen")
    small = apply_decision(model, chosen.prune(chosen.Settings(), context), images).model
    assert (small.stem.out_channels, small.left.out_channels) == (3, 4)
    torch.testing.assert_close(small(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["filter", "group"])
def test_no_gradient_reaches_what_filters_and_groups_have_lost_so_that_none_can_regrow(granularity):
    """Behind a batch norm and a ReLU; so regrowth is refused."""
    torch.manual_seed(0)
    model, chosen = network(), {"granularity": granularity, "ratios": 0.5}
    penalty = started("gradual", model, shape=(1, 8, 8), begin=0, end=0, **chosen)
    step(penalty, 0)
    F.cross_entropy(model(torch.randn(64, 1, 8, 8)), torch.arange(64) % 10).backward()
    kept = penalty.held_factors()
    for name in ("0.weight", "3.weight"):
        gone = kept[name].flatten(1).sum(1) == 0
        assert gone.any() and not model.get_parameter(name).grad[gone].any()
        assert model.get_parameter(name).grad[~gone].any()
    with pytest.raises(SettingsError) as error:
        validate(gradual.Settings, chosen | {"regrow": True}, "penalties.gradual")
    assert re.match(
        rf"params\.yaml: penalties\.gradual\.regrow: true; with granularity: {granularity} nothing "
        r"would return, .* weight or channel is needed$",
        str(error.value),
    )


@pytest.mark.parametrize("granularity", ["filter", "channel", "weight"])
@pytest.mark.parametrize("criterion", ["l1", "geometric_median", "taylor", "lamp"])
def test_a_ratio_includes_what_masks_of_earlier_rounds_prune(criterion, granularity):
    if (criterion, granularity) == ("geometric_median", "weight"):
        return  # not defined
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(),
                          nn.Linear(8, 3))  # fmt: skip
    model[2].weight.data.mul_(0.1).add_(0.5)  # rows that are close to each other, far from 0
    mask = torch.ones(8, 12, dtype=torch.bool)
    mask[6:] = mask[:, 10:] = False
    model[2].weight.data *= mask
    penalty = build("gradual", model, shape=(64,), granularity=granularity, criterion=criterion,
                    ratios={"[2]": 0.5}, begin=0, end=0, interval=1)  # fmt: skip
    penalty.start(TrainingPlan(settings(1), 10, 100, {"2.weight": mask}))
    (0.0 * model(torch.rand(5, 64)).sum()).backward()  # with taylor, all have the lowest score
    step(penalty, 0)
    held = ~mask if granularity == "weight" else ~mask.any(
        1 if granularity == "filter" else 0, keepdim=True
    )  # fmt: skip
    choice = penalty.choice["2.weight"]
    assert choice[held].all() and int(choice.sum()) == choice.numel() // 2


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_decay_multiplies_the_norm_of_what_may_be_pruned(norm):
    model = linear([[3.0, -4.0]])
    penalty = build("gradual", model, 0.5, norm=norm)
    value = penalty(0)
    value.backward()
    assert float(value.detach()) == (3.5 if norm == "l1" else 6.25)
    assert model[0].weight.grad.tolist() == ([[0.5, -0.5]] if norm == "l1" else [[1.5, -2.0]])


# ---- rigl --------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.6, 0.95])
def test_erk_is_the_formula_solved_for_the_total(density):
    shapes = {"a": (20, 1, 5, 5), "b": (50, 20, 5, 5), "c": (500, 800), "d": (10, 500), "e": (3, 4)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    low, high = 0.0, 1e6  # brute force: the one scale at which the capped shares give the total
    for _ in range(200):
        scale = (low + high) / 2
        total = sum(min(1.0, scale * raw[name]) * sizes[name] for name in shapes)
        low, high = (scale, high) if total < density * sum(sizes.values()) else (low, scale)
    expected = {name: min(1.0, scale * raw[name]) for name in shapes}
    found = rigl.erdos_renyi_kernel({n: torch.Size(s) for n, s in shapes.items()}, density)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("allocation", ["erk", "uniform"])
@pytest.mark.parametrize("ratio", [0.7, 0.93, 0.985])
def test_masks_that_the_training_holds_take_nothing_from_the_share_of_the_network(
    allocation, ratio
):
    """By brute force: the one scale at which the shares, capped by the masks, give the total. The
    masks allow 20 % of the weights, so that a ratio of 0.7 keeps all that they allow."""
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 50), nn.Linear(50, 10))
    shapes = {f"{place}.weight": layer.weight.shape for place, layer in enumerate(model)}
    limits = {"0.weight": 200, "1.weight": 1_500, "2.weight": 200}
    masks = {n: (torch.arange(s.numel()) < limits[n]).view(s) for n, s in shapes.items()}
    penalty = build("rigl", model, ratio=ratio, allocation=allocation)
    penalty.start(TrainingPlan(settings(1), 1_000, 100, masks))
    wanted = min((1 - ratio) * 9_500, 1_900)

    def numbers(scale):  # ERK: inputs + outputs per weight of a layer; uniform: as many of each
        own = {n: sum(s) if allocation == "erk" else s.numel() for n, s in shapes.items()}
        return {name: min(limits[name], scale * own[name]) for name in shapes}

    low, high = 0.0, 1e3
    for _ in range(200):
        scale = (low + high) / 2
        low, high = (scale, high) if sum(numbers(scale).values()) < wanted else (low, scale)
    assert penalty.numbers == pytest.approx(numbers(high), abs=0.51)
    assert sum(penalty.numbers.values()) == pytest.approx(wanted, abs=2)
    for name, mask in masks.items():
        kept = ~penalty.choice[name]
        assert int(kept.sum()) == penalty.numbers[name] and not kept[~mask].any()


def test_which_weights_drop_and_which_grow_on_a_layer_by_hand():
    model = linear([[5.0, -4.0, 0.5, 3.0, 0.1, -0.2, 0.3, 0.4]])
    weight = model[0].weight
    penalty = started(
        "rigl", model, 20, ratio=0.5, allocation="uniform", fraction=0.8, interval=4, until=16
    )
    assert weight.tolist() == [[5, -4, 0.5, 3, 0, 0, 0, 0]], "the network's largest weights stay"
    optimizer = torch.optim.SGD([weight], lr=0.0, momentum=0.5)
    gradient = torch.tensor([[1.0, 1, 1, 1, 9, -8, 7, 0.5]])
    for number in range(4):
        weight.grad = gradient.clone()
        penalty.before_step(number, optimizer)
        assert weight.grad.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]], "gradients of kept weights only"
        optimizer.step()
        penalty.after_step(number, optimizer)
    optimizer.state[weight]["momentum_buffer"].fill_(2.0)
    # 0.4 * (1 + cos(pi * 4 / 16)) of 4 is 2.73: 0.5 and 3 are dropped; gradients 9 and -8 win
    weight.grad = gradient.clone()
    step(penalty, 4, optimizer)
    assert penalty.choices()["0.weight"].tolist() == [[False] * 2 + [True] * 2 + [False] * 2
                                                      + [True] * 2]  # fmt: skip
    assert weight.tolist() == [[5, -4, 0, 0, 0, 0, 0, 0]], "grown weights start at zero"
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [[2, 2, 2, 2, 0, 0, 2, 2]]
    # 0.4 * (1 + cos(pi * 8 / 16)) of 4 is 1.6: one of the zeros is dropped, and 9 grows it again
    with torch.no_grad():
        weight.add_(torch.tensor([[0.0, 0, 0, 0, 0.25, 1, 0, 0]]))
    weight.grad = gradient.clone()
    step(penalty, 8, optimizer)
    assert weight.tolist() == [[5, -4, 0, 0, 0.25, 1, 0, 0]], "dropped and grown again at once"
    for number in (12, 16, 20):
        weight.grad = torch.zeros_like(weight)
        step(penalty, number, optimizer)
    assert penalty.updates == 3, "updates at 4, 8 and 12, before step 16"


def test_connections_that_would_never_move_are_refused():
    for given in ({"interval": 40}, {"interval": 0.4, "until": 0.4}, {"interval": 80, "until": 90}):
        with (
            pytest.raises(SettingsError, match=r": penalties\.rigl\.interval = .* none after st"),
            section("sparse_train"),
        ):
            started("rigl", network(), 50, **given)
    penalty = started("rigl", network(), 50, interval=100, until=0)
    assert not any(penalty.due(number) for number in range(50))
    assert started("rigl", network(), 50, interval=36).due(36)


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_layer_keeps_its_number_of_weights_and_some_of_them_move(growth, optimizer):
    model = network()
    held = {"6.weight": torch.arange(1280).view(10, 128) % 4 > 0}
    penalty = build("rigl", model, ratio=0.8, growth=growth, interval=2, until=0.9,
                    initial="random")  # fmt: skip
    seen = []

    def look(number):
        seen.append({n: ~c for n, c in penalty.choice.items()})
        for name, kept in seen[-1].items():
            assert int(kept.sum()) == penalty.numbers[name]
            assert not model.get_parameter(name)[~kept].any()

    how = settings(5, optimizer=optimizer)
    fit(model, digits(), how, watcher=Watcher(look=look), penalty=penalty, masks=held)
    total = sum(penalty.numbers.values())
    assert total == pytest.approx(0.2 * (6 * 9 + 8 * 6 * 9 + 1280), abs=3)
    assert not seen[-1]["6.weight"][~held["6.weight"]].any(), "nothing grows where masks are held"
    for name in seen[0]:
        moved = int((seen[0][name] ^ seen[-1][name]).sum())
        assert (moved > 0) == (penalty.numbers[name] < seen[0][name].numel()), name


def test_random_growth_has_a_seed_of_its_own():
    def moved(seed):
        model = network()
        penalty = build("rigl", model, ratio=0.8, growth="random", interval=2, seed=seed)
        fit(model, digits(), settings(3), f"seed {seed}", penalty=penalty)
        return penalty.choices()["6.weight"]

    assert not torch.equal(moved(1), moved(2))


# ---- gsm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranking", "active"), [("global", [(1, 0, 1, 0), (1,)]), ("layer", [(1, 0, 1, 1), (1,)])]
)
def test_only_the_weights_that_matter_most_get_the_gradient_of_the_loss(ranking, active):
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -1.0, 0.5, 4.0]])
    model[1].weight.data = torch.tensor([[-2.0]])
    given = torch.tensor([[3.0, -0.25, -8.0, 0.125]]), torch.tensor([[1.0]])
    # |w * gradient|: 3, 0.25, 4, 0.5 and 2; three of all five stay, or three of the first four
    ratio = 0.4 if ranking == "global" else 0.25
    penalty = started("gsm", model, decay=0.5, ratios=ratio, ranking=ranking)
    weights = [model[0].weight, model[1].weight]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    buffers = [torch.zeros_like(weight) for weight in before]
    for number in range(2):
        for weight, gradient in zip(weights, given, strict=True):
            weight.grad = gradient.clone()
        value = penalty(number)
        expected = 0.25 * sum(float(weight.square().sum()) for weight in before)
        assert float(value) == pytest.approx(expected)
        assert not value.requires_grad
        penalty.before_step(number, optimizer)
        optimizer.step()
        penalty.after_step(number, optimizer)
        for k, which in enumerate(active):
            factor = torch.tensor([which]).float()
            buffers[k] = 0.9 * buffers[k] + 0.5 * before[k] + factor * given[k]
            before[k] = before[k] - 0.1 * buffers[k]
            torch.testing.assert_close(weights[k].detach(), before[k])
        if number == 0:
            assert len(penalty.trace_table()) == 1


def test_gsm_prunes_what_has_become_small_and_needs_the_momentum_of_sgd():
    model, prepared = network(), digits()
    penalty = build("gsm", model, decay=0.05, ratios=0.8)
    result = fit(model, prepared, settings(50, momentum=0.95, lr=0.02, weight_decay=0.0),
                 penalty=penalty)  # fmt: skip
    chosen = penalty.choices()
    size = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in penalty.held])
    gone = torch.cat([chosen[n].flatten() for n in penalty.held])
    assert int(gone.sum()) == number_pruned(0.8, len(size))
    assert size[gone].max() <= size[~gone].min()
    assert result.history[-1]["magnitude_ratio"] > 10 * result.history[0]["magnitude_ratio"]
    with pytest.raises(SettingsError, match=r"sparse_train\.optimizer = 'adam': penalty gsm works"):
        fit(model, prepared, settings(1, optimizer="adam"), "b", penalty=penalty)
    with pytest.raises(
        SettingsError, match=r"penalty gsm shrinks weights by it, .* greater than 0"
    ):
        build("gsm", model, 0.0)


COURSES = {
    "rigl": {"interval": 3, "ratio": 0.7},
    "rigl random": {"interval": 3, "ratio": 0.7, "growth": "random", "initial": "random"},
    "gsm": {"ratios": 0.7},
    "gradual": {"begin": 2, "end": 14, "interval": 3, "ratios": 0.7},
    "gradual regrow": {"begin": 2, "end": 14, "interval": 3, "ratios": 0.7, "regrow": True},
    "gradual filter": {"begin": 2, "end": 14, "interval": 3, "granularity": "filter",
                       "ratios": 0.5, "shape": (1, 8, 8)},
}  # fmt: skip


@pytest.mark.parametrize("case", COURSES)
def test_killed_at_any_step_it_ends_with_the_same_bytes(case):
    name, prepared, how = case.split()[0], digits(), settings(6)  # 4 steps per epoch

    def trained(run, watcher=None):
        model = network()
        penalty = build(name, model, 1e-3, **COURSES[case])
        result = fit(model, prepared, how, run, watcher, penalty)
        return content(model), result.history, penalty.choices(), penalty.trace_table()

    alone = trained("alone")
    for stop in (1, 5, 9, 13, 16, 22):
        with pytest.raises(KeyboardInterrupt):
            trained("killed", Watcher(stop=stop))
    killed = trained("killed")
    assert killed[0] == alone[0]
    assert killed[1] == alone[1]
    assert killed[3] == alone[3]
    assert killed[2].keys() == alone[2].keys()
    assert all(torch.equal(killed[2][n], alone[2][n]) for n in alone[2])


@pytest.mark.parametrize("case", sorted(set(COURSES) - {"gsm"}))  # gsm's state has no weights
def test_the_state_of_another_network_is_refused(case):
    name = case.split()[0]
    first = network()
    penalty = build(name, first, 1e-3, **COURSES[case])
    fit(first, digits(), settings(5), penalty=penalty)
    state = penalty.state_dict()
    other = started(name, nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(180, 3)),
                    decay=1e-3, **COURSES[case])  # fmt: skip
    with pytest.raises(ValueError, match="penalty: "):
        other.load_state_dict(state)


def test_steps_of_the_training_are_shares_rounded_down():
    plan = TrainingPlan(settings(1), 10, 100)
    given = (0, 0.05, 0.999, 1, 10_000.0)
    assert [plan.in_steps(value) for value in given] == [0, 0, 9, 1, 10_000]


def test_every_share_of_whole_percents_is_its_number_of_steps_and_zeros():
    """k / 100 of 100 steps are k; the average begins, and the first choice prunes, as many."""
    plan, model = TrainingPlan(settings(1), 100, 100), nn.Sequential(nn.Linear(10, 10, bias=False))
    for percent in range(100):
        share = percent / 100
        assert plan.in_steps(share) == percent
        average = {"kind": "ema", "start": share, "recalibrate": 0}
        how = Train(epochs=4, average=average)
        assert averaging.WeightAverage(how, model, 25).start == percent
        penalty = started("gradual", model, ratios=0.999, initial=share, begin=0, end=50)
        step(penalty, 0)
        assert int(penalty.choice["0.weight"].sum()) == percent
    assert [in_steps(1 / steps, 7 * steps) for steps in range(2, 99)] == [7] * 97
    assert in_steps(0.289999, 100) == 28
