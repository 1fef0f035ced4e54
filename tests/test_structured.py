"""Pruners of channels and groups: by hand, compared with brute force, on networks of the zoo."""

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn

from secateur.base import plugin
from secateur.base.errors import PruningError, SettingsError
from secateur.base.settings import section, validate
from secateur.channels import scales
from secateur.channels.graph import build_channel_graph
from secateur.nn import cost
from secateur.pruning import criteria, decision, removal, target
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import choices, masks

SIDE = 8
SHAPE = (3, SIDE, SIDE)


@functools.cache
def made(arch, shape, chosen):
    """A network of the zoo whose statistics and scales differ between channels."""
    torch.manual_seed(0)
    module = plugin.load("archs", arch)
    model = module.build(module.Settings(**dict(chosen)), 10, shape)
    for norm in scales.scaled_norms(model).values():
        norm.weight.data.uniform_(-1, 1)
        norm.bias.data.normal_(std=0.3)
        norm.momentum = 0.6
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, *shape))
    return model.eval()


def zoo(arch, shape=SHAPE, **chosen):
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    return copy.deepcopy(made(arch, shape, tuple(plain.items())))


def subject(model, shape=SHAPE, count=8):
    chance = torch.Generator().manual_seed(1)
    return PruningContext(
        model, torch.randn(count, *shape, generator=chance), torch.arange(count) % 3
    )


def prune(name, model, shape=SHAPE, context=None, **chosen):
    """The decision of a pruner; a given `context` of the model is reused without tracing again."""
    module = plugin.load("pruners", name)
    own = validate(module.Settings, chosen, f"pruners.{name}")
    with section(f"pruners.{name}"):
        return module.prune(own, context or subject(model, shape))


def compacted(model, found, shape=SHAPE, graph=None):
    """The compact network, after proving it equal to the masked one; `graph` is the model's."""
    model = model.double()
    batch = torch.randn(4, *shape, dtype=torch.float64)
    masks.apply(model, found.masks)
    masked = removal.mask(model, found.channels, batch, graph)
    if graph is None:
        small = removal.compact(model, found.channels, found.masks, batch[:1], dead=False)
    else:
        small = removal.remove(model, found.channels, batch[:1], found.masks, graph)
    with torch.no_grad():
        before, after = masked.eval()(batch), small.model.eval()(batch)
    assert float(before.std()) > 0
    assert float((before - after).abs().max()) <= 1e-9 * float(before.abs().max())
    return small.model


def counted(model, shape=SHAPE):
    """MACs, non-zero parameters, and bytes of a network."""
    image = torch.zeros(1, *shape, dtype=torch.float64)
    return {
        "macs": sum(c.macs for c in cost.layer_costs(model.double(), image)),
        "params": sum(int(p.count_nonzero()) for p in model.parameters()),
        "bytes": sum(
            t.numel() * (4 if t.is_floating_point() else 8) for t in model.state_dict().values()
        ),
    }


def shares(whole, small, shape=SHAPE):
    """Each count of the small network, divided by that of the whole one."""
    return {kind: left / whole[kind] for kind, left in counted(small, shape).items()}


# ---- scales --------------------------------------------------------------------------------------

INNER = {
    "resnet_cifar": ({"depth": 8}, {f"layer{s}.0.bn1" for s in (1, 2, 3)}),
    "vgg": ({"depth": 11, "pools": [1, 2, 3]}, {f"bn{n}" for n in range(1, 9)}),
    "preresnet": (
        {"depth": 11},
        {"layer1.0.bn1", *(f"layer{s}.0.{bn}" for s in (1, 2, 3) for bn in ("bn2", "bn3"))},
    ),
    "densenet": (
        {"depth": 7},
        {*(f"layer{s}.0.bn1" for s in (1, 2, 3)), "transition1.bn", "transition2.bn", "bn"},
    ),
}


@pytest.mark.parametrize("arch", INNER)
def test_inner_scales_are_those_of_channels_that_one_layer_makes_and_all_read_scaled(arch):
    chosen, names = INNER[arch]
    assert set(scales.prunable_norms(zoo(arch, **chosen), "skip")) == names


@pytest.mark.parametrize(
    ("depth", "coupled", "count"),
    [(18, "blocks", 1920), (50, "blocks", 7552), (50, "skip", 7616)],  # as in classifier-pruner
)
def test_scales_inside_blocks_are_those_of_the_original_code(depth, coupled, count):
    module = plugin.load("archs", "resnet_slim")
    with torch.device("meta"):
        model = module.build(module.Settings(depth=depth), 10, (3, 32, 32))
    found = scales.prunable_norms(model, coupled)
    assert sum(norm.num_features for norm in found.values()) == count
    assert ("bn1" in found) == (coupled == "skip" and depth == 50)


def test_without_blocks_all_scales_are_inside():
    model = zoo("vgg", depth=11, pools=[1, 2, 3])
    names = [set(scales.prunable_norms(model, coupled)) for coupled in ("skip", "blocks")]
    assert names[0] == names[1] != set()


def test_the_pruner_leaves_the_stem_alone_and_rounds_down_as_the_original_code():
    model = zoo("resnet_slim", depth=50)
    found = slim(model, ratio=0.3, coupled="blocks")
    assert found.notes["scales"] == 7552
    assert found.channels and all(name.startswith("layer") for name in found.channels)
    model = toy(a=tuple(0.01 * k for k in range(1, 11)), b=(1.0, 2.0, 3.0))
    left = [10 - len(slim(model, ratio=0.9, keep_at_least=0.25, keep_rounds=r).channels["conv2"])
            for r in (None, "up", "down")]  # fmt: skip
    assert left == [3, 3, 2]


class PreActivation(nn.Module):
    """The shortcut reads channels without the scales of bn1; bn scales everything that fc reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1, self.conv1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.bn, self.fc, self.shortcut = nn.BatchNorm2d(6), nn.Linear(6, 3), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        return self.fc(torch.relu(self.bn(self.shortcut(x) + y)).mean((2, 3)))


def test_scales_of_channels_that_are_also_read_unscaled_do_not_gate_them():
    model = PreActivation().eval()
    found = scales.norm_scales(model, build_channel_graph(model, torch.zeros(1, *SHAPE)).fx_graph)
    assert {s.name: s.gates for s in found} == {"bn1": False, "bn2": True, "bn": True}


class Toy(nn.Module):
    """A chain of two convolutions, then a sum of three, with scales that the tests set."""

    def __init__(self, a, b, stem, short, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, len(stem), 3, padding=1), norm(stem)
        self.conv2, self.bn2 = nn.Conv2d(len(stem), len(a), 3, padding=1), norm(a)
        self.conv3, self.bn3 = nn.Conv2d(len(a), len(stem), 3, padding=1), norm(short)
        self.conv4, self.bn4 = nn.Conv2d(len(stem), len(b), 1), norm(b)
        self.conv5, self.bn5 = nn.Conv2d(len(b), len(stem), 1), norm(c)
        self.fc = nn.Linear(len(stem), 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(x + self.bn3(self.conv3(y)))
        y = torch.relu(self.bn4(self.conv4(x)))
        x = torch.relu(x + self.bn5(self.conv5(y)))
        return self.fc(x.mean((2, 3)))


def norm(weights):
    made = nn.BatchNorm2d(len(weights))
    made.weight.data = torch.tensor(weights)
    made.bias.data.normal_()
    return made


def toy(
    a=(0.1, -0.5, 0.3, 0.9), b=(0.2, 0.05, -0.6), stem=(0.4,) * 4, short=(0.4,) * 4, c=(0.4,) * 4
):
    torch.manual_seed(0)
    return Toy(a, b, stem, short, c).eval()


def plain():
    """Three wide convolutions with norms of different scales: nearly every share can be reached."""
    torch.manual_seed(4)
    sizes = [3, 40, 50, 60]
    layers = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Conv2d(into, out, 3, padding=1), norm(torch.rand(out).tolist()), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, 3)).eval()


def gone(found):
    return {name: sorted(index.tolist()) for name, index in found.channels.items()}


def slim(model, **chosen):
    return prune("network_slimming", model, **chosen)


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [  # all seven sorted: .05 .1 .2 .3 .5 .6 .9; the threshold has index floor(7 ratio)
        (0, {}),
        (0.142, {}),
        (0.143, {"conv4": [1]}),
        (0.5, {"conv2": [0], "conv4": [0, 1]}),
        (0.8, {"conv2": [0, 1, 2], "conv4": [0, 1]}),
        (0.99, {"conv2": [0, 1, 2], "conv4": [0, 1]}),  # each layer keeps one
    ],
)
def test_the_threshold_by_hand(ratio, wanted):
    found = slim(toy(), ratio=ratio)
    assert gone(found) == wanted
    assert found.notes["ratio_asked"] == ratio
    assert found.notes["ratio_reached"] == sum(map(len, wanted.values())) / 7
    assert found.notes["scales"] == 7


def test_of_equal_scales_all_stay():
    assert gone(slim(toy(a=(0.1, 0.1, 0.2, 0.2), b=(0.2, 0.2, 0.2)), ratio=0.5)) == {
        "conv2": [0, 1]
    }


@pytest.mark.parametrize(
    ("least", "wanted"),
    [(0.01, [0, 2, 3]), (0.26, [0, 3]), (0.5, [0, 3]), (0.75, [3]), (0.99, [])],
)
def test_a_floor_keeps_the_largest_by_size_whatever_their_sign(least, wanted):
    model = toy(a=(0.02, -0.04, 0.03, 0.01), b=(1.0, 2.0, 3.0))
    assert gone(slim(model, ratio=0.6, keep_at_least=least)).get("conv2", []) == wanted


def test_rounding_keeps_multiples_where_there_are_as_many():
    model = toy(a=tuple(0.01 * k for k in range(1, 21)), b=(1.0, 2.0, 3.0))
    found = slim(model, ratio=0.5, round_to=4)  # 11 of 23 scales are below: 9 of 20 stay
    assert gone(found) == {"conv2": list(range(8))}
    assert found.notes["ratio_asked"] == 0.5
    assert found.notes["ratio_reached"] == pytest.approx(8 / 23)


class TwoScales(nn.Module):
    """A sum of two layers with their own scales, and a layer of two channels that reads it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)
        self.norm_a.weight.data = torch.tensor([0.1, 0.2, 0.9, 0.8])
        self.norm_b.weight.data = torch.tensor([0.9, 0.3, 0.1, 0.7])
        self.norm_c.weight.data = torch.tensor([0.25, 4.0])

    def forward(self, x):
        x = self.norm_a(self.a(x)) + self.norm_b(self.b(x))
        return self.head(self.norm_c(self.c(x.relu())).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [  # largest .9 .3 .9 .8 and .25 4; mean .5 .25 .5 .75 and .25 4; product .09 .06 .09 .56
        ({"ratio": 0.5}, {"a": [1], "c": [0]}),  # 5 of 10 scales are below .7: .1 .2 .1 .3 .25
        ({"ratio": 0.2, "reduce": "max"}, {"c": [0]}),  # 1 of 6 channels is below .3
        ({"ratio": 0.4, "reduce": "max"}, {"a": [1], "c": [0]}),
        ({"ratio": 0.5, "reduce": "mean"}, {"a": [1], "c": [0]}),  # ties at the threshold stay
        ({"ratio": 0.7, "reduce": "prod"}, {"a": [0, 1, 2], "c": [0]}),
        # divided by the largest of its group: .67 .33 .67 1 and .06 1
        ({"ratio": 0.4, "reduce": "mean", "normalise": "max"}, {"a": [1], "c": [0]}),
        ({"ratio": 0.7, "reduce": "mean", "normalise": "max"}, {"a": [0, 1, 2], "c": [0]}),
    ],
)
def test_scales_of_a_channel_become_one_number(chosen, wanted):
    found = prune("network_slimming", TwoScales().eval(), coupled="union", **chosen)
    gone = {name: sorted(index.tolist()) for name, index in found.channels.items()}
    assert gone == wanted
    if "reduce" in chosen:
        assert found.notes["scales"] == 6
        assert found.notes["ratio_reached"] == sum(map(len, wanted.values())) / 6


def test_scales_are_reduced_in_unions_alone():
    with pytest.raises(SettingsError, match="reduce: needs coupled: union"):
        prune("network_slimming", TwoScales().eval(), reduce="mean")


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("coupled", ["skip", "union"])
def test_both_couplings_against_brute_force(coupled, seed):
    chance = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple((torch.rand(n, generator=chance) * 2 - 1).tolist())  # noqa: E731
    model = toy(draw(5), draw(4), draw(3), draw(3), draw(3))
    ratio = float(torch.rand((), generator=chance)) * 0.9
    inside = {"conv2": [model.bn2.weight], "conv4": [model.bn4.weight]}
    sums = {"conv1": [model.bn1.weight, model.bn3.weight, model.bn5.weight]}
    members = inside if coupled == "skip" else inside | sums
    pool = sorted(abs(x) for norms in members.values() for w in norms for x in w.tolist())
    threshold = pool[math.floor(ratio * len(pool))]
    wanted = {}
    for name, norms in members.items():
        sizes = torch.stack(norms).abs().amax(0).tolist()  # all are below if the largest is
        below = [k for k, size in enumerate(sizes) if size < threshold]
        if len(below) == len(sizes):
            below.remove(sizes.index(max(sizes)))
        if below:
            wanted[name] = below
    found = slim(model, ratio=ratio, coupled=coupled)
    assert gone(found) == wanted
    lost = sum(len(members[name]) * len(index) for name, index in wanted.items())
    assert found.notes["ratio_reached"] == pytest.approx(lost / len(pool))


def test_what_is_read_unscaled_stays_whatever_its_scale():
    model = zoo("preresnet", depth=11)
    for name in ("layer1.0.bn1", "layer2.0.bn1"):
        model.get_submodule(name).weight.data[:] = 0
    for coupled in ("skip", "union"):
        assert not {"conv1", "layer1.0.conv3"} & set(
            prune("network_slimming", model, coupled=coupled, ratio=0.9).channels
        )


def test_a_network_without_scales_is_refused():
    with pytest.raises(SettingsError, match=r"coupled = 'skip': no scale of a batch normalisation"):
        prune("network_slimming", zoo("lenet5", (1, 16, 16)), (1, 16, 16))
    module = plugin.load("penalties", "network_slimming")
    with pytest.raises(SettingsError, match=r"coupled = 'skip': this network has no batch"):
        module.build(module.Settings(), zoo("lenet5", (1, 16, 16)), 0.1)


@pytest.mark.parametrize(
    ("coupled", "touched", "value"),
    [
        ("skip", {"bn2", "bn4"}, 1.8 + 0.85),
        ("include", {f"bn{n}" for n in range(1, 6)}, 2.65 + 4.8),
    ],
)
def test_the_penalty_by_hand(coupled, touched, value):
    model = toy()
    module = plugin.load("penalties", "network_slimming")
    penalty = module.build(module.Settings(coupled=coupled), model, 0.5)
    total = penalty(0)
    assert float(total.detach()) == pytest.approx(0.5 * value)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {f"{name}.weight" for name in touched}
    assert grads["bn2.weight"].tolist() == [0.5, -0.5, 0.5, 0.5]


# ---- both pruners on real networks ---------------------------------------------------------------

NETWORKS = {
    "resnet": ("resnet_cifar", {"depth": 8}),
    "resnet with 1x1": ("resnet_cifar", {"depth": 11, "block": "bottleneck", "shortcut": "B"}),
    "preresnet": ("preresnet", {"depth": 11}),
    "densenet": ("densenet", {"depth": 10}),
    "wide": ("wide_resnet", {"depth": 10, "widen": 1}),
    "resnext": ("resnext", {"depth": 11, "cardinality": 4, "base_width": 4, "widen": 1}),
}
WAYS = {
    "slimming": ("network_slimming", {"ratio": 0.6}),
    "slimming union": ("network_slimming", {"ratio": 0.8, "coupled": "union"}),
    "slimming round": ("network_slimming", {"ratio": 0.8, "round_to": 4}),
    "filters": ("magnitude", {"ratios": 0.6}),
    "channels": ("magnitude", {"granularity": "channel", "ratios": 0.5, "criterion": "l2"}),
    "weights": (
        "magnitude",
        {"granularity": "weight", "ratios": 0.8, "ranking": "global", "criterion": "lamp"},
    ),
    "global": (
        "magnitude",
        {"ratios": 0.5, "ranking": "global", "round_to": 4, "criterion": "taylor"},
    ),
    "groups": ("magnitude", {"granularity": "group", "ratios": 0.5, "ranking": "global"}),
}


@functools.cache
def known(build):
    """Of a network that is only read: its context, the remaining shares, and its counts."""
    context, whole = subject(build()), build()
    counts = counted(whole)
    assert counts["params"] == sum(p.numel() for p in whole.parameters())
    return context, target.RemainingShare(context), counts


BUILDS = {name: functools.partial(zoo, arch, **built) for name, (arch, built) in NETWORKS.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_masked_equals_compact_and_less_is_left(network, way):
    pruner, chosen = WAYS[way]
    context, remaining, whole = known(BUILDS[network])
    found = prune(pruner, context.model, context=context, **chosen)
    predicted = remaining(found)
    small = compacted(BUILDS[network](), found, graph=context.graph)
    real = shares(whole, small)
    assert predicted["macs"] == pytest.approx(real["macs"], rel=1e-9)
    assert predicted["params"] == pytest.approx(real["params"], rel=1e-9)
    assert predicted["bytes"] == pytest.approx(real["bytes"], rel=1e-9)
    assert real["params"] < 1
    for name, layer in masks.layers(small).items():
        assert layer.weight.numel(), name


@pytest.mark.parametrize("pruner", ["magnitude", "network_slimming"])
def test_depthwise_convolutions_follow_the_layer_before_them(pruner):
    torch.manual_seed(5)
    expand, depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
    layers = [expand, norm([0.1 * k for k in range(1, 9)]), nn.ReLU(), depthwise]
    layers += [norm([0.1] * 8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(180, 3)]
    model = nn.Sequential(*layers).eval()
    chosen = {"ratios": {"0": 0.5}} if pruner == "magnitude" else {"ratio": 0.7}
    found = prune(pruner, model, **chosen)  # the twelfth of 16 scales is 0.4
    assert not found.masks
    left = 4 if pruner == "magnitude" else 5
    small = compacted(model, found)
    assert [small[0].out_channels, small[3].groups, small[6].in_channels] == [left] * 3


R56 = {  # ratios -> parameters and operations (twice the MACs) of convolutions and classifier
    (0, 0.75, 0.75, 0.32, 0): (485_210, 98_243_840),
    0.5: (425_018, 125_928_704),
    0.7: (248_330, 69_858_560),
    0.9: (79_274, 21_677_312),
    0.925: (54_074, 16_516_352),
    0.95: (38_954, 12_645_632),
}


CIFAR = (3, 32, 32)


@functools.cache
def published(arch, classes, **chosen):
    """A network of the literature with new weights, as a context that pruners only read."""
    module = plugin.load("archs", arch)
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}
    return subject(module.build(module.Settings(**chosen), classes, CIFAR).eval(), CIFAR)


@pytest.mark.parametrize("ratios", R56, ids=str)
def test_resnet_56_has_the_published_counts(ratios):
    context = published("resnet_cifar", 10, depth=56)
    written = list(ratios) if isinstance(ratios, tuple) else ratios
    found = prune("magnitude", context.model, context=context, ratios=written)
    assert not found.masks, "only whole filters"
    image = torch.zeros(1, *CIFAR)
    small = removal.remove(context.model, found.channels, image, {}, context.graph).model
    costs = cost.layer_costs(small, image)
    params, operations = R56[ratios]
    assert sum(c.params for c in costs) == params
    assert 2 * sum(c.macs_dense for c in costs) == operations
    if ratios == (0, 0.75, 0.75, 0.32, 0):
        assert round(250_971_392 / operations, 2) == 2.55


@pytest.mark.parametrize(
    ("ratio", "sparsity", "speedup"),
    [(0.5, 74.87, 3.60), (0.7, 90.98, 8.84), (0.9, 98.96, 44.22)],
)
def test_vgg_19_has_the_published_sparsity_and_speed_up(ratio, sparsity, speedup):
    """All convolutions but the first; 45.5 where 44.2 was published, the others within 1 %."""
    context = published("vgg", 100, depth=19, bias=False, pools=(1, 2, 3, 4))
    found = prune("magnitude", context.model, context=context, ratios={"1-15": ratio})
    left = target.RemainingShare(context)(found)
    assert 1 / left["macs"] == pytest.approx(speedup, rel=0.03)
    assert 100 * (1 - left["params"]) == pytest.approx(sparsity, abs=0.03)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("pruner", "chosen"),
    [
        ("magnitude", {}),
        ("magnitude", {"ranking": "global", "criterion": "l2"}),
        ("magnitude", {"granularity": "weight"}),
        ("network_slimming", {}),
        ("network_slimming", {"coupled": "union"}),
    ],
    ids=str,
)
def test_targets_are_reached(pruner, chosen, wanted, kind):
    context, _, whole = known(plain)
    found = prune(pruner, context.model, context=context, target={kind: wanted}, **chosen)
    assert found.notes[f"{kind}_left_asked"] == wanted
    reached = found.notes[f"{kind}_left_reached"]
    assert reached == pytest.approx(wanted, abs=0.015)
    real = shares(whole, compacted(plain(), found, graph=context.graph))
    assert real[kind] == pytest.approx(reached, rel=1e-9)


def test_the_nearest_reachable_value_against_all_of_them():
    model = toy()
    context = subject(model, SHAPE)
    left = target.RemainingShare(context)
    found = [slim(model, context=context, ratio=k / 100) for k in range(100)]
    reachable = [left(decision)["params"] for decision in found]
    for wanted in (0.6, 0.7, 0.8, 0.95):
        found = slim(model, context=context, target={"params": wanted})
        nearest = min(abs(share - wanted) for share in reachable)
        assert abs(left(found)["params"] - wanted) == pytest.approx(nearest, abs=1e-9)


def test_with_a_target_the_ratios_are_proportions():
    found = prune("magnitude", plain(), SHAPE, ratios="1: 0.6, 2: 0.3", target={"macs": 0.6})
    assert set(found.channels) == {"3", "6"}
    assert len(found.channels["3"]) / 50 == pytest.approx(
        2 * len(found.channels["6"]) / 60, abs=0.03
    )


@pytest.mark.parametrize("pruner", ["magnitude", "network_slimming"])
def test_a_target_out_of_reach_is_told_with_what_can_be_reached(pruner):
    with pytest.raises(PruningError, match=r"target\.macs = 0\.001 cannot be reached: .* is left"):
        prune(pruner, toy(), SHAPE, target={"macs": 0.001})


@pytest.mark.parametrize("written", [{}, {"macs": 0.5, "params": 0.5}])
def test_a_target_is_one_of_two(written):
    with pytest.raises(SettingsError, match="one of macs, params, bytes and latency is needed"):
        prune("magnitude", toy(), SHAPE, target=written)


@pytest.mark.parametrize("share", [0, 1, 1.5, -1])
def test_a_target_is_a_share(share):
    with pytest.raises(SettingsError, match=r"target\.macs = "):
        prune("network_slimming", toy(), SHAPE, target={"macs": share})


# ---- magnitude -----------------------------------------------------------------------------------


def chain():
    """Two convolutions with norms, and a linear layer."""
    torch.manual_seed(3)
    first, second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
    layers = first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.BatchNorm2d(5), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).eval()


def magnitude(model, **chosen):
    return prune("magnitude", model, **chosen)


def groups_of(weight, groups):
    """One tensor per group, in order."""
    if groups == "weight":
        return list(weight.flatten())
    return [
        weight[k] if groups == "filter" else weight[:, k]
        for k in range(weight.shape[groups == "channel"])
    ]


def loop(criterion, weight, gradient, groups):
    """The criterion as in its source, with a loop over plain numbers."""
    parts = [p.double() for p in groups_of(weight, groups)]
    slopes = [p.double() for p in groups_of(gradient, groups)]
    if criterion == "l1":
        return [float(p.abs().mean()) for p in parts]
    if criterion == "l2":
        return [math.sqrt(float(p.square().mean())) for p in parts]
    if criterion == "taylor":
        return [float((p * g).sum()) ** 2 for p, g in zip(parts, slopes, strict=True)]
    if criterion == "lamp":
        squares = [float(p.square().mean()) for p in parts]
        return [s / sum(t for t in squares if t >= s) for s in squares]
    distances = [[float((p - q).square().sum().sqrt()) for q in parts] for p in parts]
    return [sum(row) / (len(row) - 1) / math.sqrt(parts[0].numel()) for row in distances]


@pytest.mark.parametrize("groups", ["filter", "channel", "weight"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "lamp", "geometric_median"])
def test_criteria_against_loops_over_plain_numbers(criterion, groups):
    if criterion in criteria.NOT_FOR_WEIGHTS and groups == "weight":
        pytest.skip("knows no single weights")
    model = chain().double()
    own = subject(model, SHAPE)
    own.images = own.images.double()
    found = criteria.scores(own, ["3", "8"], groups, criterion)
    nn.functional.cross_entropy(model(own.images), own.labels).backward()
    for name, score in found.items():
        weight = model.get_parameter(name)
        wanted = loop(criterion, weight.detach(), weight.grad, groups)
        assert choices.fits(score > 0, weight)
        # a distance near 0 is the square root of a difference, so half of the digits are lost
        digits = 1e-7 if criterion == "geometric_median" else 1e-9
        assert score.flatten().tolist() == pytest.approx(wanted, rel=digits, abs=1e-15)


def test_taylor_is_the_loss_that_a_filter_would_change():
    """To first order: exact in the limit of small changes."""
    model = chain().double()
    own = PruningContext(
        model, torch.randn(8, 3, SIDE, SIDE, dtype=torch.float64), torch.arange(8) % 3
    )
    score = criteria.scores(own, ["3"], "filter", "taylor")["3.weight"].flatten()
    loss = lambda: float(nn.functional.cross_entropy(model(own.images), own.labels))  # noqa: E731
    with torch.no_grad():
        before = loss()
        for number in range(5):
            kept = model[3].weight[number].clone()
            model[3].weight[number] *= 1 - 1e-6
            slope = (before - loss()) / 1e-6
            model[3].weight[number] = kept
            assert slope**2 == pytest.approx(float(score[number]), rel=1e-3, abs=1e-10)


def test_bn_scale_orders_by_the_norm_behind_filters_and_before_channels():
    model = chain()
    model[1].weight.data = torch.tensor([0.5, -0.1, 0.3, -0.9, 0.2, 0.4])
    by_filter = magnitude(model, criterion="bn_scale", ratios={"0": 0.5})
    assert gone(by_filter) == {"0": [1, 2, 4]}
    by_channel = magnitude(model, criterion="bn_scale", granularity="channel", ratios={"1": 0.5})
    assert gone(by_channel) == {"0": [1, 2, 4]}
    with pytest.raises(SettingsError, match=r".bn_scale.: filters of layer 0 have no batch"):
        bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
        magnitude(bare, criterion="bn_scale")


@pytest.mark.parametrize(("pick", "wanted"), [("min", [1, 4]), ("max", [0, 3]), ("random", None)])
def test_pick(pick, wanted):
    model = chain()
    with torch.no_grad():
        for number, size in enumerate([6.0, 1.0, 3.0, 5.0, 2.0, 4.0]):
            model[0].weight[number] = size * torch.ones(3, 3, 3)
    found = gone(magnitude(model, pick=pick, ratios={"0": 0.3}))["0"]
    if wanted:
        assert found == wanted
        return
    how = {"context": subject(model), "pick": pick, "ratios": {"0": 0.3}}
    drawn = [gone(magnitude(model, seed=seed, **how))["0"] for seed in range(40)]
    assert drawn[0] == found
    assert all(len(d) == 2 for d in drawn)
    assert {k for d in drawn for k in d} == set(range(6))


def test_random_filters_are_those_that_greg_would_draw():
    layer = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Flatten(), nn.Linear(432, 3))
    found = magnitude(layer, pick="random", ratios=0.4, seed=5)
    drawn = choices.choose(torch.rand(12), 5, "random", 5)
    assert gone(found) == {"0": drawn.nonzero().flatten().tolist()}


def test_global_compares_all_layers_and_empties_none():
    model = chain()
    with torch.no_grad():
        for number in range(6):
            model[0].weight[number] = 0.001 * (number + 1)  # all smaller than those of layer 3
    found = magnitude(model, ranking="global", ratios=0.6)  # 7 of 11 filters would be pruned
    assert len(gone(found)["0"]) == 5 and 5 not in gone(found)["0"]
    assert len(gone(found)["3"]) == 1
    assert found.notes["ratio_asked"] == 0.6
    assert found.notes["ratio_reached"] == pytest.approx(6 / 11)
    smallest = int(model[3].weight.detach().abs().mean((1, 2, 3)).argmin())
    assert gone(found)["3"] == [smallest]


def test_global_single_weights_against_one_sort():
    model = chain()
    found = magnitude(model, granularity="weight", ranking="global", ratios=0.7)
    every = torch.cat([m.weight.detach().abs().flatten() for m in masks.layers(model).values()])
    limit = every.sort().values[math.ceil(0.7 * len(every)) - 1]
    assert not found.channels
    for name, mask in found.masks.items():
        assert torch.equal(mask, model.get_parameter(name).detach().abs() > limit)


@pytest.mark.parametrize(
    ("ratio", "to", "left"), [(0.5, 1, 10), (0.5, 8, 16), (0.6, 8, 8), (0.95, 8, 8), (0.5, 32, 20)]
)
def test_filters_left_are_brought_up_to_multiples(ratio, to, left):
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(720, 3))
    found = magnitude(model, ratios=ratio, round_to=to)
    assert 20 - len(gone(found).get("0", [])) == left
    size = model[0].weight.detach().abs().mean((1, 2, 3))
    assert gone(found).get("0", []) == sorted(size.argsort()[: 20 - left].tolist())


class TwoReaders(nn.Module):
    """Two layers read the output of the stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.cat([self.a(x), self.b(x)], 1).mean((2, 3)))


def test_inputs_that_several_layers_read_are_masked_in_the_one_that_chose_them():
    model = TwoReaders().eval()
    one = prune("magnitude", model, granularity="channel", ratios={"a": 0.5})
    assert not one.channels
    assert set(one.masks) == {"a.weight"}
    assert one.masks["a.weight"].sum() == 4 * 3
    assert not compacted(model, one).a.weight[:, ~one.masks["a.weight"][0, :, 0, 0]].any()


def test_inputs_that_one_dense_layer_takes_go_for_it_alone():
    model = zoo("densenet", depth=10)
    one = prune("magnitude", model, granularity="channel", ratios={"layer1.1.conv1": 0.5})
    assert not one.masks
    small = compacted(model, one)
    for name, layer in masks.layers(model).items():
        left = small.get_submodule(name).weight.shape[1]
        assert left == layer.weight.shape[1] // (2 if name == "layer1.1.conv1" else 1)


@pytest.mark.parametrize(
    ("arch", "chosen", "layer", "groups", "reason"),
    [
        ({"depth": 8}, {}, "layer1.0.conv2", "filter", "outputs are part of a residual sum"),
        ({"depth": 8}, {}, "conv1", "filter", "outputs are part of a residual sum"),
        ({"depth": 8}, {}, "fc", "filter", "an output of the network"),
        ({"depth": 8}, {}, "conv1", "channel", "an input of the network"),
        ({"depth": 8}, {}, "layer2.0.conv1", "channel", "inputs are part of a residual sum"),
    ],
)
def test_a_ratio_for_a_layer_that_may_not_be_pruned_names_it(arch, chosen, layer, groups, reason):
    model = zoo("resnet_cifar", **arch)
    with pytest.raises(SettingsError, match=rf"{layer} = 0\.3 is for layer {layer}, .*{reason}"):
        prune("magnitude", model, granularity=groups, ratios={layer: 0.3}, **chosen)
    passed = prune("magnitude", model, granularity=groups, ratios=0.3)
    assert not passed.masks, "only whole channels"
    assert groups == "channel" or layer not in passed.channels


MISTAKES = {
    "ratio of 1": ({"ratios": {"0": 1}}, "'0' = 1: must be at least 0 and less than 1"),
    "no such layer": ({"ratios": {"conv*": 0.5}}, r"conv\* matches no layer; there are: 0, 3, 8"),
    "no such place": ({"ratios": {"0-7": 0.5}}, "there are 3 convolutions and linear layers"),
    "nothing goes": ({"ratios": 0}, "nothing would be pruned; at least one layer"),
    "nothing to skip": ({"skip": ["head"]}, "head matches no layer"),
    "grouped": (
        {"granularity": "weight", "criterion": "geometric_median"},
        "is not defined for single weights; granularity must be filter or channel",
    ),
    "several ratios": ({"ranking": "global", "ratios": {"0": 0.5}}, "ranking global compares all"),
    "unknown criterion": ({"criterion": "l3"}, "criterion = 'l3'"),
    "no width": ({"round_to": 0}, "round_to = 0"),
    "width of weights": (
        {"granularity": "weight", "round_to": 8},
        "round_to: is a multiple of filters or channels",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_before_any_work(case):
    chosen, line = MISTAKES[case]
    with pytest.raises(SettingsError, match=line) as caught:
        magnitude(chain(), **chosen)
    assert "\n" not in str(caught.value)
    assert "params.yaml: pruners.magnitude" in str(caught.value)


@pytest.mark.parametrize("ratio", [1, -0.1, 1.5, True])
def test_slimming_refuses_ratios_that_are_none(ratio):
    with pytest.raises(SettingsError, match=r"pruners\.network_slimming\.ratio = "):
        slim(toy(), ratio=ratio)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
@pytest.mark.parametrize("labels", [None, torch.zeros(1, dtype=torch.int64)])
def test_criteria_of_the_loss_need_a_label_for_every_image(criterion, labels):
    module = plugin.load("pruners", "magnitude")
    context = PruningContext(chain(), torch.zeros(2, 3, 8, 8), labels)
    wanted = f"labels: criterion {criterion} needs one for each image"
    with pytest.raises(PruningError, match=wanted):
        module.prune(module.Settings(criterion=criterion), context)


@pytest.mark.parametrize(
    ("score", "taken", "least", "multiple", "left"),
    [
        ([3.0, 1, 2, 4], [0, 1, 2], 1, 1, [3]),
        ([3.0, 1, 2, 4], [0, 1, 2, 3], 1, 1, [3]),
        ([3.0, 1, 2, 4], [0, 1, 2], 2, 1, [0, 3]),
        ([3.0, 1, 2, 4], [1], 1, 2, [0, 1, 2, 3]),
        ([3.0, 1, 2, 4], [0, 1, 2], 1, 3, [0, 2, 3]),
        ([3.0, 1, 2, 4], [0, 1, 2], 1, 5, [0, 1, 2, 3]),
        ([1.0, 1, 1, 1], [0, 1, 2, 3], 1, 1, [3]),
    ],
)
def test_what_is_spared_by_hand(score, taken, least, multiple, left):
    chosen = torch.zeros(4, dtype=torch.bool)
    chosen[taken] = True
    found = choices.keep_at_least(chosen, torch.tensor(score), least, multiple)
    assert (~found).nonzero().flatten().tolist() == left


def test_left_counts_zeros_among_single_weights():
    model = chain()
    own = subject(model, SHAPE)
    mask = {"3.weight": torch.rand(5, 6, 3, 3) > 0.3}
    left = target.RemainingShare(own)(PruningDecision(mask, {"0": torch.tensor([1, 4])}))
    stays = int(mask["3.weight"][:, [0, 2, 3, 5]].sum())
    macs = [6 * 27 * 36, 5 * 54 * 16, 15]
    assert left["macs"] == pytest.approx((4 * 27 * 36 + stays * 16 + 15) / sum(macs))
    params = sum(p.numel() for p in model.parameters())
    lost = 2 * 27 + 2 + 2 * 2 + 270 - stays
    assert left["params"] == pytest.approx((params - lost) / params)


def test_refusals_of_single_weights_are_none():
    assert (
        decision.unprunable_layers(
            build_channel_graph(toy(), torch.zeros(1, 3, SIDE, SIDE)), "weight"
        )
        == {}
    )
