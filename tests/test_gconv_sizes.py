"""Sizes, compared with those published for gconv-prune and those measured on its networks."""

import functools

import pytest

from benchmarks import gconv_sizes as sizes
from secateur.base import plugin
from secateur.nn import cost

# millions of parameters and of operations: dense, then 2, 4 and 8 groups
UNIFORM = {
    "preresnet164-c10": [(1.7033, 504.7), (0.8652, 257.5), (0.4462, 133.9), (0.2367, 72.1)],
    "preresnet164-c100": [(1.7264, 504.8), (0.8884, 257.6), (0.4694, 134.0), (0.2599, 72.2)],
    "resnet110-c10": [(1.7307, 509.5), (0.8700, 256.8), (0.4397, 130.4), (0.2245, 67.2)],
    "resnet110-c100": [(1.7366, 509.5), (0.8759, None), (0.4456, None), (0.2304, None)],
    "densenet40-c10": [(1.0197, 536.4), (0.5214, 272.0), (0.2722, 139.9), (0.9165, None)],
    "densenet40-c100": [(1.0601, 536.5), (0.5618, None), (0.3126, None), (0.9569, None)],
    "condensenet86-c10": [(1.9596, 506.0), (1.0000, 258.2), (0.5202, 134.4), (0.2803, 72.4)],
    "condensenet86-c100": [(2.0317, 506.1), (1.0721, 258.4), (0.5923, 134.5), (0.3524, 72.6)],
    "resnet18": [(11.6895, 3635.8), (6.1108, 1940.3), (3.3214, 1092.5), (1.9267, 668.6)],
    "resnet34": [(21.7977, 7339.0), (11.1686, 3793.7)],
    "resnet50": [(25.5570, 8210.6), (13.8343, 4241.5), (7.9729, 2256.9)],
    "resnet101": [(44.5492, 15650.4), (23.3565, 7969.1)],
}
LARGE = ("resnet50", "resnet101")
NETS = [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in UNIFORM]
build = functools.lru_cache(len(UNIFORM) - len(LARGE))(sizes.build)


@functools.cache
def divided(net, **how):
    """Number of groups of every convolution; none for the dense network."""
    return {} if how == {"groups": 1} else sizes.divided(*build(net), **how)


@pytest.mark.parametrize("net", NETS)
def test_parameters_with_the_same_number_of_groups_everywhere(net):
    model, _ = build(net)
    for groups, (millions, _) in zip((1, 2, 4, 8), UNIFORM[net], strict=False):
        found = divided(net, groups=groups)
        assert round(sizes.parameters(model, found) / 1e6, 4) == millions, groups


@pytest.mark.parametrize("net", [n for n in NETS if n.values[0] != "resnet110-c100"])
def test_operations_as_they_were_counted(net):
    model, image = build(net)
    for groups, (_, operations) in zip((1, 4), UNIFORM[net][::2], strict=False):
        found = divided(net, groups=groups)
        if operations is not None:
            # except for small differences in pooling, for which gconv-prune uses other modules
            assert sizes.published(model, image, found) / 1e6 == pytest.approx(operations, abs=0.16)


@pytest.mark.parametrize(
    ("channels", "millions", "operations"),
    [(64, 1.1919, 405.7), (32, 0.7249, 293.2), (16, 0.4085, 194.5), (8, 0.2294, 102.5)],
)
def test_channels_per_group(channels, millions, operations):
    model, image = build("preresnet164-c100")
    found = divided("preresnet164-c100", channels_per_group=channels)
    assert round(sizes.parameters(model, found) / 1e6, 4) == millions
    assert sizes.published(model, image, found) / 1e6 == pytest.approx(operations, abs=0.06)


@pytest.mark.parametrize(
    ("config", "millions", "operations"),
    [("A", 17.3607, 3479.0), ("B", 9.0473, 1891.1), ("D", 0.7794, 336.7)],
)
def test_resnet34_by_its_files(config, millions, operations):
    model, image = build("resnet34")
    found = divided("resnet34", config=f"resnet34_{config}.json")
    assert round(sizes.parameters(model, found) / 1e6, 4) == millions
    assert sizes.published(model, image, found) / 1e6 == pytest.approx(operations, abs=0.06)


def test_a_condensenet_that_was_trained_in_groups_has_the_same_size():
    module = plugin.load("archs", "condensenet")
    for groups, millions in ((2, 1.0), (4, 0.5202), (8, 0.2803)):
        model = module.build(module.Settings(groups=groups), 10, (3, 32, 32))
        assert round(cost.parameters(model) / 1e6, 4) == millions


def test_multiply_accumulates_are_those_of_this_project():
    model, image = build("preresnet164-c10")
    assert sizes.macs(model, image, {}) == 247_646_720
    found = divided("preresnet164-c10", groups=2)
    stem, classifier = 16 * 27 * 32 * 32, 256 * 10
    assert sizes.macs(model, image, found) == (247_646_720 + stem + classifier) // 2
