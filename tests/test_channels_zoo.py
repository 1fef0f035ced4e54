"""Channels of every architecture: which ones can be removed; the rest computes the same.

Small versions of all architectures run by default, the networks of the literature with `pytest -m
slow`.
"""

import copy
import json
import subprocess

import pytest
import torch
from cutting import at_random, check, difference, free, randomise, weights_at_random
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from workspace import ROOT, Project, warm_python

from secateur.archs import vgg
from secateur.base import plugin, settings
from secateur.base.errors import PruningError
from secateur.channels import graph as channels
from secateur.gconv import conversion
from secateur.nn import checkpoint, cost, resizing
from secateur.nn.checkpoint import Header
from secateur.nn.layers import ChannelSelect
from secateur.pruners import gconv, network_slimming
from secateur.pruning import proof, removal
from secateur.pruning.decision import PruningContext, decision_from_choices, unprunable_layers
from secateur.sparsity import masks

BC = {"bottleneck": True, "compression": 0.5}
GREG_VGG = {"bias": False, "pools": [1, 2, 3, 4]}
SMALL = [
    ("lenet300", {"hidden": [9, 7]}, (1, 8, 8)),
    ("lenet5", {"filters": [5, 6], "hidden": 8}, (1, 28, 28)),
    ("lenet5", {"filters": [5, 6], "hidden": 8}, (1, 8, 8)),
    ("resnet_cifar", {"depth": 14}, (3, 8, 8)),
    ("resnet_cifar", {"depth": 8}, (3, 7, 9)),
    ("resnet_cifar", {"depth": 8, "shortcut": "B"}, (3, 8, 8)),
    ("resnet_cifar", {"depth": 11, "block": "bottleneck"}, (3, 8, 8)),
    ("resnet_cifar", {"depth": 11, "block": "bottleneck", "shortcut": "B"}, (3, 8, 8)),
    ("preresnet", {"depth": 14, "block": "basic"}, (3, 8, 8)),
    ("preresnet", {"depth": 20}, (3, 8, 8)),
    ("resnet_slim", {"depth": 18}, (3, 8, 8)),
    ("resnext", {"depth": 11, "cardinality": 4, "base_width": 4, "widen": 1}, (3, 8, 8)),
    ("wide_resnet", {"depth": 16, "widen": 1}, (3, 8, 8)),
    ("densenet", {"depth": 10, "growth": 4}, (3, 8, 8)),
    ("densenet", {"depth": 16, "growth": 5, **BC}, (3, 8, 8)),
    ("condensenet", {"stages": [2, 1, 2], "growth": [2, 4, 8]}, (3, 8, 8)),
    ("vgg", {"depth": 11, "pools": [1, 2, 4]}, (3, 8, 8)),
    ("vgg", {"depth": 11, "batch_norm": False, "bias": False, "pools": [2, 4]}, (3, 8, 8)),
    ("airbench", {"entrance": 5, "widths": [8, 12, 9]}, (3, 9, 10)),
    ("alexnet_cifar", {}, (3, 32, 32)),
]
PUBLISHED = [
    ("airbench", {}, 17),
    ("alexnet_cifar", {}, 32),
    *(("vgg", {"depth": depth}, 32) for depth in (11, 13, 16, 19)),
    ("vgg", {"depth": 19, **GREG_VGG}, 16),
    ("vgg", {"depth": 19, "bias": False, "pools": [1, 2, 3, 5]}, 16),
    *(("resnet_cifar", {"depth": depth}, 16) for depth in (20, 32, 44, 56, 110)),
    ("resnet_cifar", {"depth": 110, "shortcut": "B"}, 16),
    ("resnet_cifar", {"depth": 164, "block": "bottleneck"}, 8),
    ("resnet_cifar", {"depth": 164, "block": "bottleneck", "shortcut": "B"}, 8),
    ("preresnet", {"depth": 110, "block": "basic"}, 8),
    ("preresnet", {"depth": 164}, 8),
    *(("resnet_slim", {"depth": depth}, 8) for depth in (18, 34, 50, 101, 152)),
    ("resnext", {"cardinality": 8}, 8),
    ("resnext", {"cardinality": 16}, 8),
    ("wide_resnet", {}, 8),
    ("densenet", {"depth": 40}, 8),
    ("densenet", {"depth": 100, **BC}, 8),
    ("densenet", {"depth": 190, "growth": 40, **BC}, 4),
    ("condensenet", {}, 8),
]
LARGE = [(arch, chosen, (3, side, side)) for arch, chosen, side in PUBLISHED]
NETWORKS = [(name, 64) for name in ("resnet18", "mobilenet_v2", "densenet121")] + [
    *((name, 64) for name in ("resnet50", "efficientnet_b0", "regnet_x_400mf")),
    *((name, 64) for name in ("regnet_y_400mf", "convnext_tiny", "resnext50_32x4d")),
]

WIDE = {"resnet_slim", "vgg", "alexnet_cifar"}  # even the smallest version has hundreds of channels


def forms(rows, *marks):
    """Parametrize a test with these networks; wide ones get these marks."""
    return pytest.mark.parametrize(
        ("arch", "chosen", "shape"),
        [
            pytest.param(a, c, s, id=f"{a}-{c}-{s[1]}", marks=marks if a in WIDE else ())
            for a, c, s in rows
        ],
    )


small, narrow = forms(SMALL), forms(SMALL, pytest.mark.slow)
wide = forms([row for row in SMALL if row[0] in WIDE])


def graph(arch, chosen, shape, seed=0, classes=4):
    module = plugin.load("archs", arch)
    torch.manual_seed(seed)
    options = settings.validate(module.Settings, chosen, arch)
    return randomise(module.build(options, classes, shape).double(), seed)


def pictures(shape, count=2, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=chance).double()


def header(arch, chosen, shape, classes=4):
    names = [str(k) for k in range(classes)]
    return Header(arch, dict(chosen), names, list(shape), [0.0], [1.0], "", "prune")


def locked(found):
    return {group.name: group.locked for group in found.groups if group.locked is not None}


# ---- what can be removed -----------------------------------------------------------------------


def test_every_architecture_is_here():
    foreign = {"torchvision", "timm", "module"}
    assert {arch for arch, *_ in SMALL} | foreign == set(plugin.names("archs"))


@small
def test_only_the_image_and_the_classes_are_locked(arch, chosen, shape):
    model, found = graph_of(arch, chosen, shape)
    last = list(masks.layers(model))[-1]
    assert locked(found) == {"input": "an input of the network", last: "an output of the network"}
    sizes = {name: layer.weight.shape[0] for name, layer in masks.layers(model).items()}
    made = {n: found.canonical[layer.outputs] for n, layer in found.layers.items()}
    everything = torch.cat([group.ids for group in free(found)])
    for name, ids in made.items():
        assert len(ids.unique()) == sizes[name]
        assert bool(torch.isin(ids, everything).all()) == (name != last)


def streams(found, layer):
    """Producers and size of the group that a layer belongs to."""
    group = next(g for g in found.groups if layer in g.producers)
    return set(group.producers), group.size


def test_streams_of_shortcut_a_are_one_group_for_each_stage():
    """Known by hand: all layers that are added up in a stage; zero padding locks no channel."""
    chosen, shape = {"depth": 20}, (3, 8, 8)
    found = channels.build_channel_graph(graph("resnet_cifar", chosen, shape), pictures(shape))
    sums = {k: {f"layer{k}.{n}.conv2" for n in range(3)} for k in (1, 2, 3)}
    assert streams(found, "conv1") == (sums[1] | {"conv1"}, 16)
    assert streams(found, "layer2.1.conv2") == (sums[2] | {"layer2.0.shortcut.take"}, 32)
    assert streams(found, "layer3.1.conv2") == (sums[3] | {"layer3.0.shortcut.take"}, 64)
    inner = {f"layer{k}.{n}.conv1" for k in (1, 2, 3) for n in range(3)}
    assert {g.name for g in free(found) if len(g.producers) == 1} == inner


def test_channels_on_both_sides_of_shortcut_a_go_by_themselves():
    chosen, shape = {"depth": 8}, (3, 8, 8)
    model, batch = graph("resnet_cifar", chosen, shape), pictures(shape)
    found = channels.build_channel_graph(model, batch)
    # channel 2 of the first stage is channel 10 of the second; there, 0 and 31 meet zeros, and 9
    # meets channel 1
    second = next(g.name for g in found.groups if "layer2.0.conv2" in g.producers)
    selection = {"conv1": torch.tensor([2]), second: torch.tensor([0, 9, 31])}
    assert {n: i.tolist() for n, i in found.removable(selection).items()} == {
        "conv1": [2],
        second: [0, 9, 31],
    }
    _, compact = check(model, found, selection, batch)
    index = compact.model.get_submodule("layer2.0.shortcut.take").index.tolist()
    assert index == [-1] * 7 + [0, -1] + list(range(2, 15)) + [-1] * 7
    assert compact.model.get_submodule("layer2.0.conv2").weight.shape[:2] == (29, 32)
    assert compact.model.get_submodule("layer1.0.conv2").weight.shape[:2] == (15, 16)


def test_entrances_of_pre_activation_blocks_are_channels_of_their_own():
    chosen, shape = {"depth": 20}, (3, 8, 8)
    found = channels.build_channel_graph(graph("preresnet", chosen, shape), pictures(shape))
    entrances = [g for g in found.groups if g.name.endswith("take")]
    assert [g.name for g in entrances] == [
        *(f"layer{k}.{n}.take" for k in (1, 2, 3) for n in (0, 1)),
        "take",
    ]
    assert [g.size for g in entrances] == [16, 64, 64, 128, 128, 256, 256]
    for group in entrances[:-1]:
        block = group.name.removesuffix(".take")
        assert group.producers == (group.name,)
        assert group.consumers == (f"{block}.conv1",)
        norm = {"weight", "bias", "running_mean", "running_var"}
        assert {member.tensor for member in group.members} == {
            f"{block}.take.index",
            *(f"{block}.bn1.{kind}" for kind in norm),
            f"{block}.conv1.weight",
        }
    sums = [g for g in free(found) if len(g.producers) > 1 or g.name == "conv1"]
    assert not any("bn" in member.tensor for group in sums for member in group.members)


@pytest.mark.parametrize(
    ("arch", "chosen"),
    [
        ("preresnet", {"depth": 20}),
        ("preresnet", {"depth": 14, "block": "basic"}),
        ("wide_resnet", {"depth": 16, "widen": 1}),
        ("densenet", {"depth": 10, "growth": 4}),
        ("condensenet", {"stages": [2, 1, 2], "growth": [2, 4, 8]}),
    ],
)
def test_a_channel_that_goes_takes_its_entrances_along(arch, chosen):
    """In all blocks of its stage, unless a projection comes in between."""
    shape = (3, 8, 8)
    model, batch = graph(arch, chosen, shape), pictures(shape)
    found = channels.build_channel_graph(model, batch)
    first = next(g for g in found.groups if "conv1" in g.producers)
    selection = found.removable({first.name: torch.tensor([1, 3])})
    _, compact = check(model, found, selection, batch)
    for name, module in compact.model.named_modules():
        if isinstance(module, ChannelSelect):
            assert bool((module.index >= 0).all()), name
            assert torch.equal(module.index, torch.arange(len(module.index))), name
    before, after = (
        {n: m.num_features for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for net in (model, compact.model)
    )
    readers = {n for n, size in before.items() if after[n] < size}
    assert "layer1.0.bn1" in readers
    assert ("layer1.1.bn1" in readers) == (arch != "preresnet" or chosen["depth"] == 14)
    assert all(before[n] - after[n] == 2 for n in readers)


def test_an_entrance_never_loses_its_last_channel_to_others():
    chosen, shape = {"depth": 14, "block": "basic"}, (3, 8, 8)
    model, batch = graph("preresnet", chosen, shape), pictures(shape)
    found = channels.build_channel_graph(model, batch)
    alone = {"layer1.1.take": torch.tensor([k for k in range(16) if k not in (3, 5)])}
    narrow = removal.remove(model, found.removable(alone), batch).model
    found = channels.build_channel_graph(narrow, batch)
    selection = found.removable({"conv1": torch.tensor([3, 5, 7])})
    _, compact = check(narrow, found, selection, batch)
    assert len(compact.model.get_submodule("layer1.1.take").index) == 1
    assert len(compact.model.get_submodule("layer1.0.take").index) == 13


@pytest.mark.parametrize(("arch", "chosen"), [("preresnet", {"depth": 20}), ("densenet", BC)])
def test_scales_of_zero_select_channels_at_the_entrance_of_every_block(arch, chosen):
    """Network Slimming with all norms: each norm selects which channels its block reads."""
    chosen = chosen | ({"depth": 16, "growth": 5} if arch == "densenet" else {})
    shape = (3, 8, 8)
    model, batch = graph(arch, chosen, shape), pictures(shape)
    chance, left = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for name, norm in model.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                scale = torch.rand(norm.num_features, generator=chance) > 0.4
                scale[0], left[name] = True, int(scale.sum()) + int(not scale[0])
                norm.weight[~scale], norm.bias[~scale] = 0, 0
    compact = removal.remove_dead(model, {}, batch)
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    widths = {
        name: norm.num_features
        for name, norm in compact.model.named_modules()
        if isinstance(norm, nn.BatchNorm2d)
    }
    assert widths == left
    for name, layer in masks.layers(compact.model).items():
        if name.endswith("conv1") and "." in name:
            assert layer.weight.shape[1] == left[f"{name.removesuffix('conv1')}bn1"]


def test_layers_that_may_choose_their_own_filters_or_inputs():
    """Filters of a sum may not, even if only a shortcut without weights is added to them."""
    shape = (3, 8, 8)
    found = channels.build_channel_graph(
        graph("resnet_cifar", {"depth": 8}, shape), pictures(shape)
    )
    assert set(unprunable_layers(found, "filter")) == {
        "conv1",
        "fc",
        *(f"layer{k}.0.conv2" for k in (1, 2, 3)),
    }
    found = channels.build_channel_graph(graph("preresnet", {"depth": 20}, shape), pictures(shape))
    inner = {n for n in found.layers if n.endswith(("conv1", "conv2", "conv3")) and n != "conv1"}
    assert inner | {"fc"} <= set(found.layers) - set(unprunable_layers(found, "channel"))
    model = graph("resnet_cifar", {"depth": 8}, shape)
    rows = torch.zeros(32, 1, 1, 1, dtype=torch.bool)
    rows[4] = True
    decision = decision_from_choices(
        PruningContext(model, pictures(shape)), {"layer2.0.conv2.weight": rows}
    )
    assert decision.channels == {}
    assert int((~decision.masks["layer2.0.conv2.weight"]).sum()) == 32 * 9


def slimmed(arch, chosen, coupled):
    shape = (3, 8, 8)
    model, batch = graph(arch, chosen, shape), pictures(shape)
    options = network_slimming.Settings(ratio=0.5, coupled=coupled)
    subject = PruningContext(model, batch)
    decision = network_slimming.prune(options, subject)
    check(model, subject.graph, decision.channels, batch)
    return model, subject.graph, decision


def test_network_slimming_chooses_at_the_entrances_of_residual_blocks_with_union_only():
    chosen = {"depth": 20}
    model, _, inner = slimmed("preresnet", chosen, "skip")
    # at the entrance of the first block, nothing has been added up yet
    assert {name for name in inner.channels if name.endswith("take")} == {"layer1.0.take"}
    _, found, union = slimmed("preresnet", chosen, "union")
    gammas = {n: p.detach().abs() for n, p in model.named_parameters() if ".bn1.w" in n}
    for name, gamma in gammas.items():
        gone = set((gamma < union.notes["threshold"]).nonzero().flatten().tolist())
        mine = set(union.channels[name.replace("bn1.weight", "take")].tolist())
        assert mine == gone
    assert union.notes["scales"] == sum(
        m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    )
    assert not any(len(g.producers) > 1 for g in found.groups if g.name in union.channels)


def test_network_slimming_lets_every_layer_of_a_densenet_choose_what_it_reads():
    model, _, decision = slimmed("densenet", {"depth": 10, "growth": 4}, "skip")
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert decision.notes["scales"] == norms
    assert all("take" in name for name in decision.channels)


def test_union_asks_the_shortcut_too():
    """A channel of the second stage stays if that of the first stage added to it is large."""
    chosen, shape = {"depth": 8}, (3, 8, 8)
    model, batch = graph("resnet_cifar", chosen, shape), pictures(shape)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.fill_(1)
        model.get_submodule("layer2.0.bn2").weight[:12] = 0.001  # 0-7 meet zeros of the shortcut
        model.get_submodule("bn1").weight[2], model.bn1.weight[3] = 0.001, 0.001
        model.get_submodule("layer1.0.bn2").weight[2] = 0.001
    subject = PruningContext(model, batch)
    scales = 16 * 3 + 32 * 2 + 64 * 2
    options = network_slimming.Settings(ratio=(12 + 3) / scales, coupled="union")
    gone = network_slimming.prune(options, subject).channels
    second = next(g.name for g in subject.graph.groups if "layer2.0.conv2" in g.producers)
    found = {name: sorted(index.tolist()) for name, index in gone.items()}
    # 10 meets channel 2 of the first stage, whose scales are both small; 8, 9 and 11 do not
    assert found == {"conv1": [2], second: [*range(8), 10]}


def test_a_channel_of_the_stream_goes_when_no_block_reads_it_any_more():
    chosen, shape = {"depth": 14, "block": "basic"}, (3, 8, 8)
    model, batch = graph("preresnet", chosen, shape), pictures(shape)
    with torch.no_grad():
        for name in ("layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"):
            norm = model.get_submodule(name)
            norm.weight[4], norm.bias[4] = 0, 0
    kept = removal.remove_dead(model, {}, batch).kept
    assert len(kept["conv1"]) == 16  # the shortcut still reads it
    with torch.no_grad():
        model.get_submodule("layer2.0.shortcut").weight[:, 4] = 0
    compact = removal.remove_dead(model, {}, batch)
    for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2"):
        assert 4 not in compact.kept[name].tolist()
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9


def test_groups_of_resnext_go_whole_or_lose_the_same_number():
    chosen = {"depth": 11, "cardinality": 4, "base_width": 4, "widen": 1}
    shape = (3, 8, 8)
    model, batch = graph("resnext", chosen, shape), pictures(shape)
    found = channels.build_channel_graph(model, batch)
    one, three = "layer1.0.conv1", "layer1.0.conv2"
    third = torch.arange(8, 12)
    whole = found.removable({one: third, three: third})
    _, compact = check(model, found, whole, batch)
    layer = compact.model.get_submodule(three)
    assert (layer.groups, tuple(layer.weight.shape[:2])) == (3, (12, 4))
    even = found.removable({one: torch.tensor([0, 1, 5, 9, 10, 15])})
    assert even[one].tolist() == [0, 5, 9, 15]
    _, compact = check(model, found, even, batch)
    layer = compact.model.get_submodule(three)
    assert (layer.groups, tuple(layer.weight.shape[:2])) == (4, (16, 3))
    assert found.removable({one: torch.tensor([0, 1, 2])}) == {}


# ---- masked equals compact ---------------------------------------------------------------------


def proved(arch, chosen, shape, seed, model, found, selection):
    """Equality in float64, and within rounding in float32; returns the compact network."""
    batch = pictures(shape, seed=seed)
    masked, compact = check(model, found, selection, batch)
    single = compact.to(torch.float32)
    assert difference(masked.float(), single.model, batch.float()) < 1e-4
    return single


FOUND = {}


def graph_of(arch, chosen, shape):
    """A network with random weights and its channel graph, cached; VGG is a quarter as wide."""
    key = json.dumps([arch, chosen, shape])
    if key not in FOUND:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vgg, "WIDTHS", tuple(width // 4 for width in vgg.WIDTHS))
            model = graph(arch, chosen, shape)
        FOUND[key] = model, channels.build_channel_graph(model, pictures(shape))
    return FOUND[key]


@wide
def test_masked_equals_compact_once(arch, chosen, shape):
    model, found = graph_of(arch, chosen, shape)
    randomise(model, 11)
    proved(arch, chosen, shape, 11, model, found, at_random(found, 11))


@narrow
@given(seed=st.integers(0, 10**6))
@examples(max_examples=10, deadline=None, derandomize=True)
def test_masked_equals_compact(arch, chosen, shape, seed):
    model, found = graph_of(arch, chosen, shape)
    randomise(model, seed)
    proved(arch, chosen, shape, seed, model, found, at_random(found, seed))


@pytest.mark.slow
@small
@given(seed=st.integers(0, 10**6))
@examples(max_examples=150, deadline=None, derandomize=True)
def test_masked_equals_compact_many_times(arch, chosen, shape, seed):
    model, found = graph_of(arch, chosen, shape)
    randomise(model, seed)
    proved(arch, chosen, shape, seed, model, found, at_random(found, seed))


@narrow
def test_every_group_alone(arch, chosen, shape):
    model, found = graph_of(arch, chosen, shape)
    randomise(model, 1)
    batch = pictures(shape)
    bound = {name for b in found.balances for part in b.parts for name, _ in part}
    for number, group in enumerate(free(found)):
        tries = (at_random(found, seed, {group.name}) for seed in range(number, number + 20))
        selection = next((s for s in tries if group.name in s), None)
        if selection is None:  # groups of a convolution, with no balanced selection among the tries
            assert group.name in bound
            selection = found.removable({group.name: torch.arange(group.size)})
            assert selection[group.name].numel()
        check(model, found, selection, batch)


@wide
def test_dead_channels_go_once(arch, chosen, shape):
    without_dead_channels(arch, chosen, shape, 12)


@narrow
@given(seed=st.integers(0, 10**6))
@examples(max_examples=8, deadline=None, derandomize=True)
def test_dead_channels_go_and_nothing_changes(arch, chosen, shape, seed):
    without_dead_channels(arch, chosen, shape, seed)


def without_dead_channels(arch, chosen, shape, seed):
    model, found = graph_of(arch, chosen, shape)
    batch = pictures(shape, seed=seed)
    randomise(model, seed)
    mask = weights_at_random(model, found, seed)
    masks.apply(model, mask)
    try:
        compact = removal.remove_dead(model, mask, batch[:1], found)
    except PruningError as error:
        assert_idle(model, shape, error)
        return
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    assert cost.parameters(compact.model) <= cost.parameters(model)
    for name, left in compact.masks.items():
        assert left.shape == compact.model.get_parameter(name).shape
        assert not compact.model.get_parameter(name)[~left].any()
    single = compact.to(torch.float32)
    assert difference(copy.deepcopy(model).float(), single.model, batch.float()) < 1e-4


def assert_idle(model, shape, error):
    assert "has no living output left" in str(error)
    with torch.no_grad():
        moved = model(pictures(shape, seed=1)) - model(pictures(shape, seed=2))
    assert float(moved.abs().max()) < 1e-9, "something still depends on the image"


@small
def test_what_was_masked_by_channels_is_found_dead(arch, chosen, shape):
    model, found = graph_of(arch, chosen, shape)
    randomise(model, 2)
    batch = pictures(shape)
    selection = at_random(found, 3)
    direct = removal.remove(model, selection, batch, {}, found).model
    masked = removal.mask(model, selection, batch, found)
    try:
        dead = removal.remove_dead(masked, {}, batch, found).model
    except PruningError as error:  # entrances that read only removed channels
        assert any(isinstance(module, ChannelSelect) for module in model.modules())
        assert_idle(masked, shape, error)
        return
    assert cost.parameters(dead) <= cost.parameters(direct)


# ---- files -------------------------------------------------------------------------------------

LOAD = """
import json, sys
from importlib.util import find_spec
from pathlib import Path
import torch
from secateur.nn import checkpoint
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = checkpoint.load(folder / "model.safetensors").model().eval()
    images, expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        assert torch.equal(model(images), expected), folder
rooms = ["secateur.pruning", "secateur.channels", "secateur.gconv"]
rooms += ["secateur.pruners", "secateur.penalties"]
used = [name for name in sys.modules if name.startswith(tuple(rooms))]
assert all(map(find_spec, rooms))
print(json.dumps(used))
"""


def in_groups(model, batch):
    """The network with group convolutions and index layers in place of masks."""
    masked = copy.deepcopy(model).float()
    found = gconv.prune(gconv.Settings(groups=4), PruningContext(masked, batch.float())).masks
    masks.apply(masked, found)
    grouped = conversion.convert(masked, found, batch[:1].float()).model
    assert conversion.group_convolution_counts(grouped)["index_layers"] > 0
    return grouped


def test_compact_networks_come_back_without_the_code_that_pruned_them(tmp_path):
    grouped = ("preresnet", {"depth": 20}, (3, 8, 8))
    for number, (arch, chosen, shape) in enumerate([*SMALL, grouped]):
        model, found = graph_of(arch, chosen, shape)
        randomise(model, number)
        if number < len(SMALL):
            chosen_at_random = at_random(found, number)
            compact = removal.remove(model, chosen_at_random, pictures(shape), {}, found)
            small = compact.to(torch.float32).model
        else:
            small = in_groups(model, pictures(shape))
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint.save(folder / "model.safetensors", header(arch, chosen, shape), small, {})
        images = pictures(shape, 3).float()
        with torch.no_grad():
            torch.save((images, small(images)), folder / "expected.pt")
    done = subprocess.run(
        [warm_python(), "-c", LOAD, *map(str, sorted(tmp_path.iterdir()))],
        cwd=ROOT, env=Project(ROOT).env(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@small
def test_compact_networks_are_pruned_once_more_and_trained(arch, chosen, shape, tmp_path):
    model, found = graph_of(arch, chosen, shape)
    randomise(model, 4)
    batch = pictures(shape, 4)
    compact = removal.remove(model, at_random(found, 4), batch, {}, found).model
    again = channels.build_channel_graph(compact, batch)
    assert set(locked(again)) == set(locked(found))
    check(compact, again, at_random(again, 5), batch)
    resizing.reset_parameters(compact)
    compact.train()(batch).sum().backward()
    assert all(p.grad is not None for p in compact.parameters())


# ---- the networks of the literature ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "chosen", "shape"), LARGE, ids=[f"{a}-{c}-{s[1]}" for a, c, s in LARGE]
)
def test_networks_of_full_size(arch, chosen, shape):
    model, batch = graph(arch, chosen, shape), pictures(shape)
    found = channels.build_channel_graph(model, batch)
    assert len(locked(found)) == 2
    selection = at_random(found, 1)
    masked, compact = check(model, found, selection, batch)
    dead = removal.remove_dead(masked, {}, batch)
    assert proof.verify(masked, dead, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    single = copy.deepcopy(compact.model).float()
    assert difference(masked.float(), single, batch.float()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), NETWORKS)
def test_networks_of_torchvision_through_the_architecture(name, side, tmp_path):
    chosen, shape = {"name": name}, (3, side, side)
    model, batch = graph("torchvision", chosen, shape), pictures(shape)
    found = channels.build_channel_graph(model, batch)
    reasons = {why.split(" by ")[0] for why in locked(found).values()}
    normalised = {"normalised together with all channels"} if name.startswith("convnext") else set()
    assert reasons == {"an input of the network", "an output of the network", *normalised}
    selection = at_random(found, 1)
    masked, compact = check(model, found, selection, batch)
    single = compact.to(torch.float32).model
    assert difference(masked.float(), single, batch.float()) < 1e-4
    checkpoint.save(tmp_path / "m.safetensors", header("torchvision", chosen, shape), single, {})
    again = checkpoint.load(tmp_path / "m.safetensors").model()
    assert difference(single, again, batch.float()) == 0
