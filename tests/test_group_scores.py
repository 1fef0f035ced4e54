"""Scores of channel groups by hand, selections compared with brute force, and pruned networks."""

import itertools
from decimal import Decimal
from math import ceil

import pytest
import torch
from torch import nn

from secateur.base import plugin
from secateur.base.errors import PruningError, SettingsError
from secateur.base.settings import section, validate
from secateur.nn import cost
from secateur.nn.layers import IndexedConv2d
from secateur.pruning import criteria, group_scores, removal
from secateur.pruning.decision import PruningContext, unprunable_layers
from secateur.pruning.group_scores import GroupRanking, score_groups
from secateur.sparsity import masks

SIDE = 6


class Residual(nn.Module):
    """A stem, and residual blocks of two 1x1 convolutions."""

    def __init__(self, width=2, inner=(3,)):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 1, bias=False), nn.BatchNorm2d(width)
        self.first = nn.ModuleList(nn.Conv2d(width, n, 1, bias=False) for n in inner)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in inner)
        self.second = nn.ModuleList(nn.Conv2d(n, width, 1, bias=False) for n in inner)
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        for first, norm, second in zip(self.first, self.norms, self.second, strict=True):
            x = x + second(torch.relu(norm(first(x))))
        return self.fc(x.mean((2, 3)))


def by_hand():
    """Sums of |w| for the two channels of the sum: stem 1 2, norm .5 3, first 3 5, second 4 4, fc 2
    6; for the three of the block: first 1 3 4, norm 1 2 1, second 1 4 3."""
    model = Residual().eval()
    weights = {
        "stem": [[1.0], [-2.0]], "first.0": [[1.0, 0], [2, -1], [0, 4]],
        "second.0": [[1.0, -1, 2], [0, 3, 1]], "fc": [[2.0, 1], [0, -5]],
        "norm": [0.5, 3.0], "norms.0": [1.0, 2, -1],
    }  # fmt: skip
    for name, values in weights.items():
        own = model.get_parameter(f"{name}.weight")
        own.data = torch.tensor(values).view(own.shape)
    return model


def context(model, channels=1, count=3):
    chance = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, SIDE, SIDE, generator=chance)
    return PruningContext(model.eval(), images, torch.arange(count) % 2)


def scores(model, criterion="l1", reduction="mean", normalisation="none", channels=1):
    found, refused = score_groups(context(model, channels), criterion, reduction, normalisation)
    return {group.groups[0]: group.scores.tolist() for group in found}, refused


def prune(model, channels=1, **chosen):
    module = plugin.load("pruners", "magnitude")
    given = {"granularity": "group", **chosen}
    settings = validate(module.Settings, given, "pruners.magnitude")
    with section("pruners.magnitude"):
        return module.prune(settings, context(model, channels))


def gone(found):
    return {name: sorted(index.tolist()) for name, index in found.channels.items()}


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "stem", "block"),
    [
        ("sum", [10.5, 20], [3, 9, 8]),
        ("mean", [2.1, 4], [1, 3, 8 / 3]),
        ("max", [4, 6], [1, 4, 4]),
        ("prod", [12, 720], [1, 24, 12]),
    ],
)
def test_reductions_by_hand(reduction, stem, block):
    found, refused = scores(by_hand(), reduction=reduction)
    assert found == {"stem": pytest.approx(stem), "first.0": pytest.approx(block)}
    assert refused == {"input": "an input of the network", "fc": "an output of the network"}


@pytest.mark.parametrize(
    ("normalisation", "stem"),
    [
        ("sum", [2.1 / 6.1, 4 / 6.1]),
        ("mean", [2.1 / 3.05, 4 / 3.05]),
        ("max", [2.1 / 4, 1]),
        ("standard", [-1, 1]),
        ("lamp", [2.1 / 6.1, 1]),
    ],
)
def test_normalisations_by_hand(normalisation, stem):
    assert scores(by_hand(), normalisation=normalisation)[0]["stem"] == pytest.approx(stem)


@pytest.mark.parametrize("normalisation", ["sum", "mean", "max", "standard", "lamp"])
def test_a_group_of_zeros_has_scores_of_zero(normalisation):
    model = by_hand()
    for parameter in (model.first[0].weight, model.norms[0].weight, model.second[0].weight):
        parameter.data.zero_()
    assert scores(model, normalisation=normalisation)[0]["first.0"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("criterion", "block"),
    [
        ("l2", [(1 + 1 + 1) / 3, (5 + 4 + 10) / 3, (16 + 1 + 5) / 3]),
        ("bn_scale", [1, 2, 1]),
        # rows of first (1 0) (2 -1) (0 4), columns of second (1 0) (-1 3) (2 1)
        (
            "geometric_median",
            [
                (2**0.5 + 17**0.5 + 13**0.5 + 2**0.5) / 4,
                (2**0.5 + 29**0.5 + 13**0.5 + 13**0.5) / 4,
                (17**0.5 + 29**0.5 + 2**0.5 + 13**0.5) / 4,
            ],
        ),
    ],
)
def test_criteria_by_hand(criterion, block):
    assert scores(by_hand(), criterion)[0]["first.0"] == pytest.approx(block)


def loss_gradient(model, subject, name, images):
    model.zero_grad()
    logits = model(subject.images[images])
    nn.functional.cross_entropy(logits, subject.labels[images]).backward()
    return model.get_parameter(name).grad


def test_taylor_and_fisher_are_made_of_gradients_of_all_and_of_single_images():
    model = by_hand()
    subject = context(model)
    names = ["first.0.weight", "norms.0.weight", "second.0.weight"]
    taylor, fisher = torch.zeros(3), torch.zeros(3)
    for name in names:
        weight = model.get_parameter(name).detach().flatten(1) if "norms" not in name else None
        axis = 0 if "second" in name else 1
        gradient = loss_gradient(model, subject, name, slice(None))
        if weight is None:
            weight = model.get_parameter(name).detach()
            taylor += (weight * gradient).square() / 3
            squares = [loss_gradient(model, subject, name, [i]).square() for i in range(3)]
            fisher += weight.square() * sum(squares) / 3 / 2 / 3
        else:
            taylor += (weight * gradient.flatten(1)).sum(axis).square() / 3
            squares = [loss_gradient(model, subject, name, [i]).flatten(1) ** 2 for i in range(3)]
            fisher += (weight**2 * sum(squares) / 3 / 2).sum(axis) / 3
    assert scores(model, "taylor")[0]["first.0"] == pytest.approx(taylor.tolist(), rel=1e-4)
    assert scores(model, "fisher")[0]["first.0"] == pytest.approx(fisher.tolist(), rel=1e-4)


class Grouped(nn.Module):
    """A convolution with two groups between two plain ones."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 6, 1)
        self.b = nn.Conv2d(6, 4, 3, groups=2)
        self.c, self.fc = nn.Conv2d(4, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean((2, 3)))


@pytest.mark.parametrize("granularity", ["filter", "channel", "weight"])
def test_wanda_and_fisher_of_single_layers_by_their_definitions(granularity):
    torch.manual_seed(1)
    model = Grouped()
    subject = context(model)
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _m, x, _y, n=name: seen.update({n: x[0].detach()}))
        for name, layer in masks.layers(model).items()
    ]
    with torch.no_grad():
        model(subject.images)
    for hook in hooks:
        hook.remove()
    found = criteria.scores(subject, ["a", "b", "fc"], granularity, "wanda")
    fisher = criteria.scores(subject, ["b"], granularity, "fisher")["b.weight"]
    squares = [loss_gradient(model, subject, "b.weight", [i]) ** 2 for i in range(3)]
    increase = model.b.weight.detach() ** 2 * sum(squares) / 3 / 2
    products = {"b.weight": torch.zeros_like(model.b.weight)}
    for row, column in itertools.product(range(4), range(3)):
        entry = seen["b"][:, 3 * (row // 2) + column].norm()
        products["b.weight"][row, column] = model.b.weight[row, column].detach().abs() * entry
    products["fc.weight"] = model.fc.weight.detach().abs() * seen["fc"].norm(dim=0)
    products["a.weight"] = model.a.weight.detach().abs() * seen["a"].norm()
    for name, product in {**products, "fisher": increase}.items():
        axis = {"filter": 0, "channel": 1}.get(granularity)
        if axis is not None:
            others = [a for a in range(product.dim()) if a != axis]
            product = product.mean(others, keepdim=True)
        own = fisher if name == "fisher" else found[name]
        torch.testing.assert_close(own, product, rtol=1e-5, atol=1e-9)


class Unused(nn.Module):
    """One layer that runs in eval mode, and one that does not."""

    def __init__(self):
        super().__init__()
        self.a, self.aux = nn.Conv2d(1, 3, SIDE), nn.Conv2d(1, 3, SIDE)

    def forward(self, x):
        return (self.a(x) + self.aux(x) if self.training else self.a(x)).flatten(1)


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "fisher"])
def test_a_layer_that_never_runs_has_scores_of_zero_and_changes_no_others(criterion):
    subject = context(Unused())
    found = criteria.scores(subject, ["a", "aux"], "weight", criterion)
    alone = context(nn.Sequential(subject.model.a, nn.Flatten()))
    wanted = criteria.scores(alone, ["0"], "weight", criterion)["0.weight"]
    assert found["a.weight"].equal(wanted) and wanted.all()
    assert found["aux.weight"].equal(torch.zeros(3, 1, SIDE, SIDE))


class Cut(nn.Module):
    """The loss depends on `a`, but no gradient reaches it."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(1, 3, 3), nn.Linear(3, 2), how

    def forward(self, x):
        if self.how == "detach":
            return self.b(self.a(x).detach().relu().mean((2, 3)))
        with torch.set_grad_enabled(False):
            y = nn.functional.conv2d(x, self.a.weight, self.a.bias).relu().mean((2, 3))
            if self.how == "all":
                return self.b(y)
        return self.b(y)


@pytest.mark.parametrize("how", ["detach", "no_grad", "all"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_layers_that_no_gradient_reaches_are_refused_by_name(criterion, how):
    torch.manual_seed(1)
    subject = context(Cut(how))
    where = rf"criterion {criterion}: no gradient of the loss reaches a\.weight"
    with pytest.raises(PruningError, match=where):
        criteria.scores(subject, ["a"], "filter", criterion)
    with pytest.raises(PruningError, match=where):
        score_groups(subject, criterion)
    before = subject.loss(subject.model, "the test")
    with torch.no_grad():
        subject.model.a.weight[0] += 0.1
    assert abs(subject.loss(subject.model, "the test") - before) > 1e-6  # it is not zero
    if how != "all":
        assert bool(criteria.scores(subject, ["b"], "filter", criterion)["b.weight"].all())


def test_wanda_takes_the_inputs_that_an_indexed_convolution_multiplies():
    torch.manual_seed(0)
    scale, plain = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1, groups=2)
    order, after = torch.tensor([3, 1, 0, 2]), torch.tensor([5, 0, 3, 1, 4, 2])
    scale.weight.data = torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1, 1)
    indexed = IndexedConv2d.from_conv(plain, plain.weight.detach(), None, 2, order, after)
    own = context(nn.Sequential(scale, indexed))
    found = criteria.scores(own, ["1"], "weight", "wanda")["1.weight"]
    with torch.no_grad():
        norms = scale(own.images).transpose(0, 1).flatten(1).norm(dim=1)
    for row, column in itertools.product(range(6), range(2)):
        wanted = plain.weight[row, column].abs() * norms[order[2 * (row // 3) + column]]
        torch.testing.assert_close(found[row, column], wanted.detach())


def test_wanda_of_a_group_counts_layers_and_fisher_needs_labels():
    model = Residual(2, (3,))
    found, _ = scores(model, "wanda")
    subject = context(model)
    with torch.no_grad():
        x = torch.relu(model.norm(model.stem(subject.images)))
        y = torch.relu(model.norms[0](model.first[0](x)))
    into, out = (t.transpose(0, 1).flatten(1).norm(dim=1) for t in (x, y))
    first = (model.first[0].weight.detach().flatten(1).abs() * into).sum(1)
    second = (model.second[0].weight.detach().flatten(1).abs() * out).sum(0)
    assert found["first.0"] == pytest.approx(((first + second) / 2).tolist(), rel=1e-5)
    with pytest.raises(PruningError, match="labels: criterion fisher needs one for each image"):
        score_groups(PruningContext(model, subject.images), "fisher")


class Given(nn.Module):
    """Weights that are passed to functions: to attention, and to functional conv2d and linear."""

    def __init__(self, weights=False):
        super().__init__()
        self.weights = weights
        self.patches, self.b = nn.Conv2d(1, 4, 2, 2), nn.Conv2d(4, 8, 1)
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.out = nn.Linear(8, 4, bias=False), nn.Linear(4, 3)

    def inputs(self, x, heads):
        """The input of each weight, with attention written out in full; the output comes last."""
        y = self.patches(x)
        t = nn.functional.conv2d(y, self.b.weight, self.b.bias).flatten(2).transpose(1, 2)
        q, k, v = (t @ self.m.in_proj_weight.T + self.m.in_proj_bias).chunk(3, 2)
        mixed = []
        for head in range(heads):
            own = slice(head * 4, head * 4 + 4)
            share = (q[..., own] @ k[..., own].mT / 2).softmax(-1)
            mixed.append(share @ v[..., own])
        z = torch.cat(mixed, 2)
        s = t + self.m.out_proj(z)
        h = torch.relu(nn.functional.linear(s, self.fc.weight))
        known = {"patches": x, "b": y, "m.in_proj": t, "m.out_proj": z, "fc": s, "out": h}
        return known, self.out(h).mean(1)

    def forward(self, x):
        t = (
            nn.functional.conv2d(self.patches(x), self.b.weight, self.b.bias)
            .flatten(2)
            .transpose(1, 2)
        )
        s = t + self.m(t, t, t, need_weights=self.weights)[0]
        return self.out(torch.relu(nn.functional.linear(s, weight=self.fc.weight))).mean(1)


def given_inputs(subject):
    with torch.no_grad():
        known, result = subject.model.inputs(subject.images, 2)
        torch.testing.assert_close(subject.model(subject.images), result)
    return known


@pytest.mark.parametrize("weights", [False, True])
def test_wanda_of_weights_that_functions_are_given(weights):
    torch.manual_seed(0)
    subject = context(Given(weights))
    inputs = given_inputs(subject)
    layers = ["b", "m.out_proj", "fc", "out"]
    found = criteria.scores(subject, layers, "weight", "wanda")
    for name in layers:
        x, weight = inputs[name], subject.model.get_parameter(f"{name}.weight").detach()
        norms = (x.mT if x.dim() == 3 else x).transpose(0, 1).flatten(1).norm(dim=1)
        wanted = weight.flatten(1).abs() * norms
        torch.testing.assert_close(found[f"{name}.weight"], wanted.view(weight.shape))


def test_wanda_of_heads_counts_the_projections_that_attention_holds_itself():
    torch.manual_seed(0)
    subject = context(Given())
    inputs = given_inputs(subject)
    found, _ = score_groups(subject, "wanda", "mean", "none")
    heads = next(group for group in found if len(group.units) == 2).scores
    t, z = (inputs[f"m.{name}_proj"].flatten(0, 1).norm(dim=0) for name in ("in", "out"))
    into = (subject.model.m.in_proj_weight.detach().abs() * t).sum(1).view(3, 2, 4).sum((0, 2))
    out = (subject.model.m.out_proj.weight.detach().abs() * z).sum(0).view(2, 4).sum(1)
    torch.testing.assert_close(heads.float(), (into + out) / 2)


class Multiplied(nn.Module):
    """A layer's weight used in a matrix product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(SIDE, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(x.mean((1, 2)) @ self.a.weight.T)


def test_wanda_refuses_a_weight_whose_inputs_are_not_seen():
    with pytest.raises(
        PruningError, match=r"the input of a\.weight is unknown: the network passes"
    ):
        criteria.scores(context(Multiplied()), ["a", "b"], "weight", "wanda")
    assert criteria.scores(context(Multiplied()), ["b"], "weight", "wanda")["b.weight"].all()


def test_a_group_without_what_the_criterion_needs_is_refused_with_the_reason():
    found, refused = scores(Grouped(), "bn_scale")
    assert not found
    assert refused["c"] == "nothing in it has a bn_scale"
    with pytest.raises(SettingsError, match=r"criterion: lamp of a group is criterion: l2"):
        prune(by_hand(), criterion="lamp")


# ---- selections ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranking", "chosen", "wanted"),
    [  # normalised: stem .689 1.311, block .45 1.35 1.2; plain: 2.1 4, 1 3 2.667
        ("layer", {"ratios": 0.5}, {"stem": [0], "first.0": [0, 2]}),
        ("global", {"ratios": 0.4, "keep_at_least": 0}, {"stem": [0], "first.0": [0]}),
        ("global", {"ratios": 0.6, "keep_at_least": 0}, {"stem": [0], "first.0": [0, 2]}),
        ("global", {"ratios": 0.7, "keep_at_least": 0}, {"stem": [0], "first.0": [0, 2]}),
        ("global", {"ratios": 0.7, "keep_at_least": 0.5}, {"stem": [0], "first.0": [0]}),
        ("isomorphic", {"ratios": 0.4}, {"stem": [0], "first.0": [0, 2]}),
        ("global", {"ratios": 0.4, "pick": "max"}, {"stem": [1], "first.0": [1]}),
        ("layer", {"ratios": {"stem": 0.5}}, {"stem": [0]}),
        ("layer", {"ratios": {"second.0": 0.5}}, {"stem": [0]}),
        ("layer", {"ratios": 0.5, "skip": ["second.*"]}, {"first.0": [0, 2]}),
        ("layer", {"ratios": 0.9, "round_to": 2}, {"first.0": [0]}),
    ],
)
def test_selections_by_hand(ranking, chosen, wanted):
    found = prune(by_hand(), ranking=ranking, **chosen)
    assert gone(found) == wanted
    alone = isinstance(chosen.get("ratios"), dict) or "skip" in chosen
    among = sum({"stem": 2, "first.0": 3}[name] for name in wanted) if alone else 5
    assert found.notes["ratio_reached"] == sum(map(len, wanted.values())) / among


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_random_picks_are_as_many_and_follow_the_seed(ranking):
    found = [
        gone(prune(Residual(8, (9,)), ranking=ranking, ratios=0.5, pick="random", seed=seed))
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]
    assert {sum(map(len, own.values())) for own in found} == {9}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ranking", ["layer", "global", "isomorphic"])
def test_rankings_against_brute_force(ranking, seed):
    """Among all selections of this many units, the chosen one has the lowest total score."""
    chance = torch.Generator().manual_seed(seed)
    sizes, kinds = [4, 3, 5], [("a",), ("b",), ("a",)]
    groups, start = [], 0
    for size, kind in zip(sizes, kinds, strict=True):
        units = torch.arange(start, start + size).unsqueeze(1)
        score = torch.rand(size, generator=chance, dtype=torch.float64)
        groups.append(group_scores.ScoredGroup((str(start),), units, score, kind))
        start += size
    ratio = 0.1 + 0.8 * float(torch.rand((), generator=chance))
    together = {"layer": [[0], [1], [2]], "global": [[0, 1, 2]], "isomorphic": [[0, 2], [1]]}
    wanted = set()
    for numbers in together[ranking]:
        pool = {}
        for group in (groups[number] for number in numbers):
            pool |= dict(zip(group.units[:, 0].tolist(), group.scores.tolist(), strict=True))
        count = min(ceil(Decimal(repr(ratio)) * len(pool)), len(pool) - 1)
        best = min(itertools.combinations(pool, count), key=lambda c: sum(map(pool.get, c)))
        wanted |= set(best)
    for group in groups:  # the best unit of each group is kept
        own = group.units[:, 0].tolist()
        if wanted.issuperset(own):
            wanted.discard(own[int(group.scores.argmax())])
    ranked = GroupRanking(tuple(groups), (ratio,) * 3, ranking)
    chosen = zip(groups, ranked.chosen(), strict=True)
    assert {i for group, own in chosen for i in group.units[own, 0].tolist()} == wanted


def test_isomorphic_groups_are_those_of_equal_structure():
    model = Residual(4, (3, 5))
    found, _ = score_groups(context(model), "l1")
    structures = {group.groups[0]: group.structure for group in found}
    assert structures["first.0"] == structures["first.1"] != structures["stem"]
    assert structures["first.0"] == ("out Conv2d", "norm BatchNorm2d", "in Conv2d")


def test_parts_of_a_balance_lose_their_least_important_channels_in_pairs():
    torch.manual_seed(3)
    model = Grouped()
    found, _ = scores(model, "l1", "sum")
    assert len(found["a"]) == 3 and len(found["b"]) == 2, "of 6 and 4 channels, in two parts"
    decided = prune(model, reduce="sum", ratios=0.5)
    a, b, c = (model.get_parameter(f"{n}.weight").detach().abs() for n in "abc")
    of_a = a.flatten(1).sum(1) + b.view(2, 2, 3, 9).sum((1, 3)).flatten()
    of_b = b.flatten(1).sum(1) + c.flatten(1).sum(0)
    lowest = lambda s, n: [int(i) for i in s.sort().indices[:n]]  # noqa: E731
    wanted_a = [*lowest(of_a[:3], 2), *(3 + i for i in lowest(of_a[3:], 2))]
    wanted_b = [*lowest(of_b[:2], 1), *(2 + i for i in lowest(of_b[2:], 1))]
    assert {n: i for n, i in gone(decided).items() if n != "c"} == {
        "a": sorted(wanted_a), "b": sorted(wanted_b),
    }  # fmt: skip
    batch = torch.randn(3, 1, SIDE, SIDE, dtype=torch.float64)
    model = model.double()
    small = removal.remove(model, decided.channels, batch).model
    assert small.b.weight.shape == (2, 1, 3, 3) and small.b.groups == 2
    masked = removal.mask(model, decided.channels, batch)
    with torch.no_grad():
        assert float((small(batch) - masked(batch)).abs().max()) <= 1e-9


class Excited(nn.Module):
    """An inverted residual block: a depthwise convolution, squeeze-excite, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.expand, self.bn1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.fc = nn.Conv2d(16, 8, 1, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.depthwise(torch.relu(self.bn1(self.expand(x))))
        y = y * torch.sigmoid(self.fc2(torch.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        return self.fc((x + self.project(y)).mean((2, 3)))


@pytest.mark.parametrize("ranking", ["layer", "global", "isomorphic"])
@pytest.mark.parametrize("wanted", [{"macs": 0.5}, {"params": 0.4}, {"bytes": 0.5}])
def test_a_target_is_reached_through_sums_products_and_depthwise_convolutions(ranking, wanted):
    torch.manual_seed(2)
    model = Excited()
    found = prune(model, ranking=ranking, criterion="l2", target=wanted, keep_at_least=0.25)
    small = removal.remove(model, found.channels, torch.zeros(1, 1, SIDE, SIDE)).model
    image = torch.zeros(1, 1, SIDE, SIDE)
    left = {
        "macs": cost.macs(small, image) / cost.macs(model, image),
        "params": cost.parameters(small) / cost.parameters(model),
        "bytes": cost.weight_bytes(small)[0] / cost.weight_bytes(model)[0],
    }
    (kind, share), = wanted.items()  # fmt: skip
    assert found.notes[f"{kind}_left_reached"] == pytest.approx(left[kind], rel=1e-9)
    assert left[kind] == pytest.approx(share, abs=0.06), "each step removes a channel of the block"
    for name, layer in masks.layers(model).items():
        assert small.get_submodule(name).weight.shape[0] >= layer.weight.shape[0] / 4, name


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ({"ratios": {"fc": 0.5}}, r"fc = 0\.5 is for the channels of fc, .*an output of"),
        ({"ratios": {"stem": 0.5, "second.0": 0.2}}, "can only be removed together .stem, second"),
        ({"ratios": {"con*": 0.5}}, r"con\* matches no layer"),
        ({"ratios": 0}, r"nothing would be pruned; at least one group .*: stem, first\.0"),
        ({"ranking": "isomorphic", "ratios": {"stem": 0.5}}, "ranking isomorphic compares all"),
        ({"granularity": "filter", "reduce": "max"}, "reduce: needs granularity: group"),
        ({"granularity": "filter", "ranking": "isomorphic"}, "isomorphic needs granularity: group"),
        ({"keep_at_least": 1}, "keep_at_least = 1"),
    ],
)
def test_mistakes_are_one_line(chosen, line):
    with pytest.raises(SettingsError, match=line) as caught:
        prune(by_hand(), **chosen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("granularity", "line"),
    [
        (
            "group",
            r"no group of the network can be pruned \(0: an output of the network; input: an",
        ),
        ("filter", r"no layer of the network can be pruned \(0: its outputs are locked: an output"),
    ],
)
def test_a_network_of_which_nothing_can_go_is_told_with_the_reasons(granularity, line):
    with pytest.raises(SettingsError, match=line):
        prune(nn.Sequential(nn.Conv2d(1, 4, 3)), granularity=granularity)


def test_which_layers_may_not_choose_alone_is_told_with_the_true_reason():
    subject = context(Excited())
    reasons = unprunable_layers(subject.graph, "filter")
    assert {name: reason.partition(";")[0] for name, reason in reasons.items()} == {
        "stem": "its outputs are part of a residual sum",
        "expand": "its outputs are part of a squeeze-excite product",
        "depthwise": "a depthwise convolution, whose outputs go with its inputs",
        "fc2": "its outputs are part of a squeeze-excite product",
        "project": "its outputs are part of a residual sum",
        "fc": "its outputs are locked: an output of the network",
    }
    assert reasons["stem"].endswith(
        "granularity group removes such channels from all layers at once"
    )
    assert "\n  coupled by: a squeeze-excite product, a depthwise convolution\n" in str(
        subject.graph
    )
