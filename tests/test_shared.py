"""Layers that run more than once, and tensors with several names: counted, pruned, stored once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur
from secateur.channels.graph import build_channel_graph
from secateur.deploy import layer_times
from secateur.nn import checkpoint, cost
from secateur.sparsity import masks

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HEADER = checkpoint.Header("", {}, [], [], [], [], split="", stage="prune")


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Twice(nn.Module):
    """One convolution that runs on 8x8 and on 4x4 positions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.fc(self.b(functional.avg_pool2d(x, 2)).relu().mean((2, 3)))


class Tied(nn.Module):
    """Two convolutions that share a weight, and another one that does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.b2, self.c = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)
        self.b2.weight = self.b.weight
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.b2(self.b(self.a(x).relu()).relu()).relu()
        return self.fc(self.c(x).mean((2, 3)))


def aliased():
    """One block with two names."""
    same = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(conv(3, 8), same, same, *head)


def build(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("make", [Twice, Tied, aliased])
@pytest.mark.parametrize("granularity", ["group", "weight"])
def test_a_network_that_shares_tensors_is_pruned_saved_and_loaded(make, granularity, tmp_path):
    net = build(make)
    pruner = secateur.pruners.magnitude(granularity=granularity, ratios=0.5)
    result = secateur.prune(net, IMAGES, pruner)
    file = tmp_path / "model.safetensors"
    secateur.save(result, file)
    loaded = secateur.load(file, into=copy.deepcopy(net))
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert cost.parameters(loaded) == cost.parameters(result.model)  # weights are still shared


def test_a_mask_holds_under_every_name_in_the_file(tmp_path):
    net = build(Tied)
    mask = torch.rand(net.b.weight.shape) > 0.5
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, HEADER, net, {"b.weight": mask})
    stored = checkpoint.load(file).tensors
    assert torch.equal(stored["b.weight"], stored["b2.weight"])
    assert not stored["b2.weight"][~mask].any()


def test_multiplications_of_all_runs_of_a_layer_count():
    net = build(Twice)
    assert cost.output_positions(net, IMAGES[:1]) == {"a": 64, "b": 64 + 16, "fc": 1}
    assert cost.macs(net, IMAGES[:1]) == macs_of_twice(8)


def macs_of_twice(width):
    return 64 * 27 * width + (64 + 16) * 9 * width**2 + 5 * width


def test_a_weight_of_two_layers_is_listed_once_and_multiplied_twice():
    net = build(Tied)
    assert list(masks.prunable(net, "weights")) == [f"{n}.weight" for n in ("a", "b", "c", "fc")]
    assert list(masks.layers(net)) == ["a", "b", "c", "fc"]
    assert cost.macs(net, IMAGES[:1]) == 64 * (27 * 8 + 3 * 72 * 8) + 40


def test_a_target_of_macs_counts_every_run():
    net = build(Twice)
    pruner = secateur.pruners.magnitude(granularity="group", target={"macs": 0.5})
    result = secateur.prune(net, IMAGES, pruner, remove_dead=False)
    width = result.model.a.out_channels
    assert result.model.b.out_channels == width < 8
    share = macs_of_twice(width) / macs_of_twice(8)
    assert result.notes["macs_left_reached"] == pytest.approx(share)


def test_a_layer_takes_the_time_of_all_its_runs():
    net = build(Twice)
    graph = build_channel_graph(net, IMAGES[:1])
    calls = layer_times._shapes(net, graph, IMAGES[:1])
    assert [(call.input_size, call.positions) for call in calls["b"]] == [
        ((8, 8), 64),
        ((4, 4), 16),
    ]
    assert [len(calls[name]) for name in ("a", "fc")] == [1, 1]
    one = layer_times.MeasuredLayer(outputs=(4, 8), inputs=(8,), ms=((1.0,), (2.0,)), positions=64)
    other = one.model_copy(update={"ms": ((0.5,), (0.75,)), "positions": 16})
    both = layer_times._together([one, other])
    assert (both.ms, both.positions) == (((1.5,), (2.75,)), 80)


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_only_filters_that_no_shared_weight_couples_are_pruned(granularity):
    """b and b2 have one weight, so their inputs are the same channels: the outputs of a, b and b2
    go together, and only c's outputs, the inputs of fc, are free."""
    net = build(Tied)
    pruner = secateur.pruners.magnitude(granularity=granularity, ratios=0.5)
    small = secateur.prune(net, IMAGES, pruner).model
    axes = {"filter": (net.c.weight, (1, 2, 3)), "channel": (net.fc.weight, 0)}
    weight, others = axes[granularity]
    kept = weight.abs().mean(others).topk(4).indices.sort().values
    assert torch.equal(small.c.weight, net.c.weight[kept])
    assert torch.equal(small.fc.weight, net.fc.weight[:, kept])
    for name in ("a", "b", "b2"):
        assert torch.equal(getattr(small, name).weight, getattr(net, name).weight)
