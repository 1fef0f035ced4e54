"""Cost: published counts of known networks, and sparse layers counted by hand."""

import copy
import gzip
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.base import plugin, timing
from secateur.nn import cost
from secateur.pruning import removal
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.pruning.target import RemainingShare
from secateur.sparsity import masks

KNOWN = {"lenet300": (266_610, 266_200), "lenet5": (431_080, 2_293_000)}  # for images of 28x28
ARCHS = ["lenet300", "lenet5"]


def network(arch, shape=(1, 28, 28)):
    module = plugin.load("archs", arch)
    return module.build(module.Settings(), 10, shape)


@pytest.mark.parametrize("arch", KNOWN)
def test_dense_networks_cost_what_the_literature_says(arch):
    model, (params, macs) = network(arch), KNOWN[arch]
    layers = cost.layer_costs(model, torch.rand(1, 1, 28, 28))
    assert cost.parameters(model) == sum(layer.params for layer in layers) == params
    assert sum(layer.macs_dense for layer in layers) == sum(layer.macs for layer in layers) == macs
    assert cost.macs(model, torch.rand(1, 1, 28, 28)) == macs
    assert sum(layer.nonzero for layer in layers) == params
    assert [layer.layer for layer in layers] == list(masks.layers(model))
    size, packed = cost.weight_bytes(model)
    assert size == 4 * params
    assert 0 < packed < 1.01 * size


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("arch", ARCHS)
def test_macs_agree_with_a_count_of_every_multiplication(arch, side):
    """Every output element takes as many products as there are weights in one filter or row."""
    model = network(arch, (1, side, side))
    counted = {}
    for name, layer in masks.layers(model).items():
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.register_forward_hook(lambda _m, _i, out, n=name: counted.update({n: out.shape}))
    layers = cost.layer_costs(model, torch.rand(1, 1, side, side))
    for layer in layers:
        module = model.get_submodule(layer.layer)
        products = module.weight[0].numel() * torch.Size(counted[layer.layer]).numel()
        assert layer.macs_dense == layer.macs == products


def test_a_sparse_linear_layer_by_hand():
    layer = nn.Linear(4, 3)
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [2, 0, 3, 0]])
    layer.bias.data = torch.tensor([0.0, 5, 0])
    held = {"0.bias": torch.tensor([True, True, False])}
    (row,) = cost.layer_costs(nn.Sequential(layer), torch.rand(1, 4), held)
    assert row == cost.LayerCost(
        layer="0",
        kind="linear",
        shape="3x4",
        params=15,
        nonzero=5,  # three weights, and two unmasked biases, one of which happens to be zero
        sparsity=1 - 5 / 15,
        filters=3,
        filters_alive=2,
        channels=4,
        channels_alive=2,
        macs_dense=12,
        macs=3,
    )


def test_a_sparse_convolution_by_hand():
    layer = nn.Conv2d(2, 3, 2, stride=2, padding=1, bias=False)  # 5x7 pixels -> 3x4
    layer.weight.data.zero_()
    layer.weight.data[0, 1, 0, 0] = 1
    layer.weight.data[2, 1] = 1
    (row,) = cost.layer_costs(nn.Sequential(layer), torch.rand(1, 2, 5, 7))
    assert row == cost.LayerCost(
        layer="0",
        kind="conv2d",
        shape="3x2x2x2",
        params=24,
        nonzero=5,
        sparsity=1 - 5 / 24,
        filters=3,
        filters_alive=2,
        channels=2,
        channels_alive=1,
        macs_dense=24 * 12,
        macs=5 * 12,
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_removing_dead_outputs_leaves_less_to_count_and_what_is_alive_alone(arch):
    model = network(arch).eval()
    first, *_, last = masks.layers(model)
    with torch.no_grad():
        model.get_submodule(first).weight[4:] = 0
        model.get_submodule(first).bias[4:] = -1
        model.get_submodule(last).weight[:, 7:] = 0
    example = torch.rand(1, 1, 28, 28)
    compact = removal.remove_dead(model, {}, example).model
    before, after = cost.layer_costs(model, example), cost.layer_costs(compact, example)
    assert after[0].filters == after[0].filters_alive == before[0].filters_alive == 4
    assert after[-1].channels == after[-1].channels_alive == before[-1].channels_alive == 7
    for old, new in zip(before, after, strict=True):
        assert new.macs <= old.macs
        assert new.macs == new.macs_dense
    assert cost.parameters(compact) == sum(row.params for row in after) < cost.parameters(model)


def test_counting_changes_nothing():
    model = network("lenet5").train()
    before = copy.deepcopy(model.state_dict())
    cost.layer_costs(model, torch.rand(1, 1, 28, 28))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_zeros_pack_well_and_the_packed_size_is_that_of_gzip():
    model = nn.Linear(100, 100)
    dense = cost.weight_bytes(model)
    with torch.no_grad():
        model.weight[:, 10:] = 0
    size, packed = cost.weight_bytes(model)
    assert size == dense[0] == 4 * 10_100
    assert packed < 0.2 * dense[1]
    raw = model.weight.detach().numpy().tobytes() + model.bias.detach().numpy().tobytes()
    assert packed == len(gzip.compress(raw, 6))


def test_a_shared_tensor_has_its_bytes_once():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    assert cost.weight_bytes(model)[0] == 4 * cost.parameters(model) == 4 * 35


class Sleeper(nn.Module):
    """A network that takes a known time and records its calls."""

    def __init__(self, name, milliseconds, turns):
        super().__init__()
        self.name, self.milliseconds, self.turns = name, milliseconds, turns

    def forward(self, batch):
        self.turns.append((self.name, self.training))
        time.sleep(self.milliseconds / 1000)
        return batch


@pytest.mark.parametrize("repeats", [3, 10, 20])
def test_latency_gives_every_model_as_many_times_in_turns_after_a_warm_up(repeats):
    turns = []
    models = {name: Sleeper(name, ms, turns).train() for name, ms in [("fast", 0), ("slow", 10)]}
    times = cost.latency(models, torch.rand(1, 2), repeats)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(models, repeats)
    assert len(turns) > 2 * repeats
    assert turns == [("fast", False), ("slow", False)] * (len(turns) // 2)
    assert all(value >= 10 for value in times["slow"])
    fast, slow = (timing.median_and_iqr(times[name])[0] for name in ("fast", "slow"))
    assert 0 < fast < slow < 60_000  # milliseconds


def test_the_spread_is_median_and_distance_of_the_quartiles():
    middle, distance = timing.median_and_iqr([1.0, 2, 3, 4, 5, 6, 7])
    assert (middle, distance) == (4, 4)  # quartiles 2 and 6
    assert timing.median_and_iqr([5.0] * 4) == (5, 0)
    assert timing.median_and_iqr([5.0]) == (5, 0)


class StandardisedConv2d(nn.Conv2d):
    """Standardises its weight to mean 0 and standard deviation 1 per filter in forward."""

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding)


def test_a_weight_that_is_standardised_in_forward_has_the_macs_of_a_plain_one():
    def network(conv):
        return nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), conv(4, 6, 3, stride=2))

    found, plain = (
        cost.layer_costs(network(conv), torch.randn(1, 3, 9, 9))
        for conv in (StandardisedConv2d, nn.Conv2d)
    )
    assert [layer.macs_dense for layer in found] == [81 * 3 * 4 * 9, 16 * 4 * 6 * 9]
    assert [layer.macs_dense for layer in plain] == [layer.macs_dense for layer in found]


class Auxiliary(nn.Module):
    """Has a linear layer that runs only in training mode."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(9, 6), nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        x = self.body(x.flatten(1)).relu()
        return self.head(x) + self.aux(x)[:, :3] if self.training else self.head(x)


def test_a_layer_that_never_runs_costs_parameters_and_no_macs():
    model, images = Auxiliary(), torch.randn(2, 1, 3, 3)
    costs = {layer.layer: layer for layer in cost.layer_costs(model, images[:1])}
    assert [layer.params for layer in costs.values()] == [60, 28, 21]
    assert [layer.macs_dense for layer in costs.values()] == [54, 0, 18]
    assert [layer.macs for layer in costs.values()] == [54, 0, 18]
    mask = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
            for name in ("aux.weight", "head.weight")}  # fmt: skip
    mask["head.weight"][0] = True
    left = RemainingShare(PruningContext(model, images))(PruningDecision(mask))
    assert left["macs"] == pytest.approx((54 + 6) / (54 + 18))
    assert left["params"] == pytest.approx((109 - 24 - 12) / 109)
