"""Depth pruning: residual branches are found, scored by the loss, and removed exactly."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cutting import randomise
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from workspace import yaml_text

import secateur
from secateur.base import plugin
from secateur.base.errors import CheckpointError, PruningError, SettingsError
from secateur.base.sections import Prune
from secateur.channels.graph import build_channel_graph
from secateur.data import dataset
from secateur.deploy import export
from secateur.nn import checkpoint, cost
from secateur.nn.layers import Removed
from secateur.pipeline import preflight
from secateur.pruning.branches import residual_branches
from secateur.pruning.decision import PruningContext
from stages import prune as prune_stage


class Block(nn.Module):
    """x + f(x), where f is a convolution, a normalisation and a convolution."""

    def __init__(self, channels, inner):
        super().__init__()
        self.first = nn.Conv2d(channels, inner, 3, padding=1)
        self.norm = nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, channels, 1)

    def branch(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))

    def forward(self, x):
        return torch.relu(x + self.branch(x))


class Net(nn.Module):
    """Three blocks; one activation serves all of the network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(Block(4, inner) for inner in (2, 3, 5))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.run(x, {0, 1, 2}))

    def run(self, x, left):
        """Pooled features, where only the blocks in `left` run."""
        x = self.act(self.stem(x))
        for number, block in enumerate(self.blocks):
            x = block(x) if number in left else torch.relu(x)
        return x.mean((2, 3))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    randomise(model, 0)
    return model


def find(model, images=IMAGES):
    return residual_branches(build_channel_graph(model.eval(), images[:1]), images[:1])


def without(model, *names, images=IMAGES):
    pruner = secateur.pruners.branches(number=None, remove=names)
    return secateur.prune(model, images, pruner)


def test_branches_are_found_with_their_layers(net):
    found = find(net)
    assert list(found) == BLOCKS
    assert found["blocks.1"].modules == ("blocks.1.first", "blocks.1.norm", "blocks.1.second")
    assert found["blocks.1"].last == "blocks.1.second"


@pytest.mark.parametrize("left", [s for k in range(3) for s in itertools.combinations(range(3), k)])
def test_the_network_without_branches_computes_what_its_shortcuts_compute(net, left):
    removed = [f"blocks.{number}" for number in range(3) if number not in left]
    result = without(net, *removed)
    with torch.no_grad():
        expected = net.head(net.run(IMAGES, set(left)))
        assert torch.equal(result.model(IMAGES), expected)
    for number, block in enumerate(result.model.blocks):
        parameters = sum(p.numel() for p in block.parameters())
        inner = (2, 3, 5)[number]
        whole = inner * 4 * 9 + inner + 2 * inner + 4 * inner + 4
        assert parameters == (whole if number in left else 0)


class Writing(Block):
    """Its branch begins with an activation in place, so that the shortcut is active as well."""

    def branch(self, x):
        return self.second(torch.relu(self.norm(self.first(torch.relu_(x)))))

    def forward(self, x):
        return x + self.branch(x)


class Doubled(Block):
    """The first layer of its branch also runs beside it."""

    def forward(self, x):
        return torch.cat([x + self.branch(x), self.first(x)], 1)


class Wide(Block):
    """The shortcut is one column wide, so that the branch gives the sum its shape."""

    def forward(self, x):
        return x[:, :, :, :1] + self.branch(x)


class Method(Block):
    """A number has no method `add`."""

    def forward(self, x):
        return self.branch(x).add(x)


class Dropped(Block):
    """The sum gets the result of a module that also runs elsewhere."""

    def __init__(self, channels, inner):
        super().__init__(channels, inner)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(x) + self.drop(self.branch(x))


@pytest.mark.parametrize("block", [Writing, Doubled, Wide, Method, Dropped])
def test_a_branch_that_does_more_than_add_is_none(block):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block(4, 3), nn.Conv2d(4, 2, 1)).eval()
    if block is Doubled:
        model[2] = nn.Conv2d(7, 2, 1)
    assert find(model) == {}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4, 3), nn.Conv2d(4, 2, 1))
    assert list(find(plain)) == ["1"]


class Function(Block):
    def forward(self, x):
        return torch.add(x, self.branch(x))


class Placed(Block):
    def forward(self, x):
        y = self.branch(x)
        y += x
        return y


class Ended(Block):
    def __init__(self, channels, inner):
        super().__init__(channels, inner)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(self.branch(x)) + x


class Channelwise(Block):
    """A function in its branch takes only tensors that have channels."""

    def forward(self, x):
        inner = torch.relu(self.norm(self.first(x)))
        return x + self.second(F.dropout2d(inner, 0.1, self.training))


@pytest.mark.parametrize("block", [Function, Placed, Ended, Channelwise])
def test_sums_are_written_in_several_ways(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block(4, 3), nn.Conv2d(4, 2, 1)).eval()
    small = without(model, "1").model
    with torch.no_grad():
        assert torch.equal(small(IMAGES), model[2](model[0](IMAGES)))
    assert not [*small[1].parameters(), *small[1].buffers()]
    assert small.train()(IMAGES).requires_grad  # it can be trained, whatever stands between layers


def test_macs_fall_by_those_of_the_branch(net):
    by_hand = 6 * 6 * (3 * 4 * 9 + 3 * 4)  # of 6x6 positions: 3x3 from 4 to 3 channels, 1x1 back
    result = without(net, "blocks.1")
    assert cost.macs(net, IMAGES[:1]) - cost.macs(result.model, IMAGES[:1]) == by_hand


class Shared(Block):
    """Its first layer has a second name, which is the one that is called."""

    def __init__(self, channels, inner):
        super().__init__(channels, inner)
        self.again = self.first

    def branch(self, x):
        return self.second(torch.relu(self.norm(self.again(x))))


def test_a_layer_with_two_names_is_removed_under_both():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Shared(4, 3), nn.Conv2d(4, 2, 1)).eval()
    small = without(model, "1").model
    assert isinstance(small[1].first, Removed) and small[1].again is small[1].first
    with torch.no_grad():
        assert torch.equal(small(IMAGES), model[2](torch.relu(model[0](IMAGES))))


class Rectified(nn.Module):
    """x + f(x), where f rectifies x in place, behind modules that return it unchanged."""

    def __init__(self, *before):
        super().__init__()
        self.before = nn.Sequential(*before, nn.ReLU(inplace=True))
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.layer(self.before(x))


@pytest.mark.parametrize(
    "before", [(), (nn.Identity(),), (nn.Dropout(), nn.Identity()), (nn.AlphaDropout(),)]
)
def test_a_branch_that_changes_the_shortcut_in_place_is_none(before):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Rectified(*before), nn.Conv2d(4, 2, 1)).eval()
    assert not find(model)
    copied = nn.Sequential(nn.Conv2d(3, 4, 3), Rectified(nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
    assert list(find(copied.eval())) == ["1"]


class Shifted(nn.Module):
    """A linear layer whose bias is a parameter of its own: without the layer, a single row."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4, bias=False)
        self.shift = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        features = x.mean((2, 3))
        return self.layer(features) + self.shift, features


def test_a_sum_with_a_learnt_row_has_no_branch():
    assert not find(Shifted().eval())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_branch_without_which_the_loss_is_lowest_goes_first(net, number):
    left = {0, 1, 2}
    for _ in range(number):
        with torch.no_grad():
            losses = {
                block: float(F.cross_entropy(net.head(net.run(IMAGES, left - {block})), LABELS))
                for block in sorted(left)
            }
        left.remove(min(losses, key=losses.get))
    module = plugin.load("pruners", "branches")
    decision = module.prune(module.Settings(number=number), PruningContext(net, IMAGES, LABELS))
    assert {int(name[-1]) for name in decision.branches} == {0, 1, 2} - left
    assert decision.notes["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert len(decision.lines) == number


def test_skipped_branches_stay(net):
    module = plugin.load("pruners", "branches")
    settings = module.Settings(number=1, skip=("blocks.0", "blocks.2"))
    assert module.prune(settings, PruningContext(net, IMAGES, LABELS)).branches == ("blocks.1",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 4}, "number = 4: the network has 3 residual branches"),
        ({"number": None, "remove": ["stem"]}, "remove = 'stem': .*blocks.0, blocks.1, blocks.2"),
        ({"number": 1, "skip": ["blocks.7"]}, "skip = 'blocks.7': no such residual branch"),
    ],
)
def test_a_branch_that_is_not_there_is_told_with_those_that_are(net, settings, message):
    with pytest.raises(SettingsError, match=message):
        secateur.prune(net, IMAGES, secateur.pruners.branches(**settings), labels=LABELS)


@pytest.mark.parametrize("settings", [{"number": None}, {"remove": ["blocks.0"]}])
def test_number_and_names_exclude_each_other(settings):
    with pytest.raises(SettingsError, match="either a number of branches or their names"):
        secateur.pruners.branches(**settings)


def test_the_loss_needs_labels(net):
    with pytest.raises(PruningError, match="labels: pruner branches"):
        secateur.prune(net, IMAGES, secateur.pruners.branches())


@pytest.mark.parametrize(
    ("arch", "settings", "expected"),
    [
        ("resnet_cifar", {"depth": 14}, 6),
        ("resnet_cifar", {"depth": 14, "shortcut": "B"}, 6),
        ("resnet_cifar", {"depth": 11, "block": "bottleneck", "shortcut": "B"}, 3),
        ("preresnet", {"depth": 11}, 3),
        ("wide_resnet", {"depth": 10, "widen": 1}, 3),
        ("resnext", {"depth": 11, "cardinality": 4, "base_width": 4}, 3),
        ("resnext", {"depth": 11, "cardinality": 4, "base_width": 8}, 3),
        ("densenet", {"depth": 10}, 0),
        ("torchvision", {"name": "resnet18"}, 8),  # one inplace ReLU runs twice in every block
        ("torchvision", {"name": "mobilenet_v3_small"}, 6),  # squeeze-excite within the branch
    ],
)
def test_architectures_lose_any_branch_exactly_and_are_rebuilt(arch, settings, expected, tmp_path):
    module = plugin.load("archs", arch)
    torch.manual_seed(0)
    model = module.build(module.Settings(**settings), 3, (3, 32, 32)).eval()
    randomise(model, 0)
    images = torch.randn(2, 3, 32, 32)
    branches = find(model, images)
    assert len(branches) == expected
    names = list(branches)[1::2]
    if not names:
        return
    assert not [name for name in branches if "shortcut" in name or "downsample" in name]
    result = without(model, *names, images=images)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            for parameter in zeroed.get_submodule(branches[name].last).parameters():
                parameter.zero_()
        assert torch.allclose(zeroed(images), result.model(images), rtol=1e-4, atol=1e-5)
    own = module.Settings(**settings).model_dump()
    header = replace(HEADER, arch=arch, arch_settings=own, shape=(3, 32, 32))
    checkpoint.save(tmp_path / "model.safetensors", header, result.model, {})
    again = checkpoint.load(tmp_path / "model.safetensors").model()
    with torch.no_grad():
        assert torch.equal(again(images), result.model(images))
    result.model.train()(images).sum().backward()  # it can be trained


def test_a_removed_branch_is_in_the_header_and_cannot_be_taken_for_another(net, tmp_path):
    file = tmp_path / "small.safetensors"
    secateur.save(without(net, "blocks.0"), file)
    with safe_open(file, "pt") as opened:
        layers = json.loads(opened.metadata()["secateur"])["layers"]
        assert not [key for key in opened.keys() if key.startswith("blocks.0")]  # noqa: SIM118
    numbers = {"first": 1, "norm": 1, "second": 2}
    assert layers == {f"blocks.0.{own}": {"removed": number} for own, number in numbers.items()}
    loaded = secateur.load(file, into=Net())
    assert isinstance(loaded.blocks[0].first, Removed)
    other = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CheckpointError):
        secateur.load(file, into=other)


def test_a_network_without_branches_is_pruned_further(net):
    once = without(net, "blocks.1").model
    half = secateur.pruners.magnitude(granularity="group", ratios=0.5)
    twice = secateur.prune(once, IMAGES, half)
    assert twice.max_difference < 1e-5
    assert twice.model.stem.out_channels == 2
    assert list(find(twice.model)) == ["blocks.0", "blocks.2"]


def test_the_exported_network_has_no_layer_of_the_branch(net):
    small = without(net, "blocks.0", "blocks.2").model
    nodes = export.onnx_model(export.trace(small, (3, 8, 8))).graph.node
    # the stem, and two of the block that stays, whose shortcut is the only sum
    assert [n.op_type for n in nodes].count("Conv") == 3
    assert [n.op_type for n in nodes].count("Add") == 1


def stage_context(params, model, data, kept=None):
    """What the prune stage gets: settings, data, and a network with its masks."""
    start = SimpleNamespace(masks=kept or {}, choices={}, header=HEADER)
    start.model = lambda: copy.deepcopy(model)
    return SimpleNamespace(
        params=SimpleNamespace(
            pruner="magnitude", prune=Prune(**params), chosen=lambda _: HALF, arch="resnet_cifar"
        ),
        data=data,
        header=lambda parent, **notes: notes,
        start=start,
    )


HALF = plugin.load("pruners", "magnitude").Settings(ratios=0.5)
HEADER = checkpoint.Header(
    "resnet_cifar", {"depth": 14}, ["a", "b", "c"], (3, 8, 8), [0.5] * 3, [0.5] * 3, "", "made up"
)


def test_the_stage_removes_named_branches_beside_what_the_pruner_removes():
    data = toy_data(HEADER.shape, HEADER.classes)
    model = randomise(checkpoint.build_architecture(HEADER), 0)
    mask = torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.2
    kept = {"layer1.0.conv1.weight": mask, "layer1.0.conv2.weight": mask}
    context = stage_context({"branches": ["layer1.1"]}, model, data, kept)
    result = prune_stage.prune(context)
    rows = {row["layer"]: row["outputs_left"] for row in result.tables["outputs"].rows}
    assert rows["layer1.0.conv1"] == 8 and rows["layer2.1.conv1"] == 16
    assert rows["layer1.1.conv1"] == rows["layer1.1.conv2"] == 0
    assert isinstance(result.model.layer1[1].conv1, Removed)
    assert set(result.masks) >= {"layer1.0.conv1.weight", "layer1.0.conv2.weight"}
    # in a further round, the branch is gone already
    again = prune_stage.prune(stage_context({"branches": ["layer1.1"]}, result.model, data))
    assert again.model.layer1[0].conv1.out_channels == 4
    for name in ("layer9", "layer1", "layer1.1.conv1"):  # the last two are no whole branch
        with pytest.raises(
            SettingsError, match=rf"prune.branches = '{name}': .*layer1.0, layer2.0"
        ):
            prune_stage.prune(stage_context({"branches": [name]}, result.model, data))


def test_a_narrow_branch_is_still_told_from_its_shortcut():
    """Filters inside a bottleneck do not decide which operand of the sum is the branch."""
    build = plugin.load("archs", "resnet_cifar")
    settings = build.Settings(depth=11, block="bottleneck", shortcut="B")
    model = randomise(build.build(settings, 3, (3, 16, 16)).eval(), 0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    names = list(find(model, images))
    half = secateur.pruners.magnitude(granularity="filter", ratios=0.75)
    narrow = secateur.prune(model, images, half).model
    inner = narrow.layer2[0]
    own = sum(p.numel() for n, p in inner.named_parameters() if not n.startswith("shortcut"))
    assert own < sum(p.numel() for p in inner.shortcut.parameters())
    assert list(find(narrow, images)) == names


def toy_data(shape, classes):
    """Random pictures of three classes."""
    chance = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (30, *shape[1:], 3), generator=chance, dtype=torch.uint8)
    split = dataset.InMemoryImages.from_pixels(pixels, torch.arange(30) % 3)
    images = dataset.Images(split, split, classes, (0.5,) * 3, (0.5,) * 3)
    return dataset.prepare("toy", images, 0, 0)


def test_the_stage_removes_all_that_the_penalty_chose_by_channel_groups():
    """Also channels that a ChannelSelect passes on, whose choice has the name of its index."""
    header = replace(HEADER, arch_settings={"depth": 8})
    model = randomise(checkpoint.build_architecture(header), 0)
    graph = build_channel_graph(model, torch.zeros(1, *header.shape))
    group = graph.group("layer3.0.conv2")
    gone = torch.zeros(len(graph.canonical), dtype=torch.bool)
    gone[group.ids[::2]] = True
    choices = {}
    for name, ids in graph.output_ids().items():
        if name not in graph.layers:
            choices[name] = gone[ids]
        elif gone[ids].any():
            weight = model.get_submodule(name).weight
            choices[f"{name}.weight"] = gone[ids].view(-1, *[1] * (weight.dim() - 1))
    assert any(name.endswith("index") and bool(own.any()) for name, own in choices.items())
    context = stage_context({}, model, toy_data(header.shape, header.classes))
    context.start.choices, context.start.header = choices, header
    context.params.pruner = "chosen"
    context.params.chosen = lambda _: plugin.load("pruners", "chosen").Settings()
    result = prune_stage.prune(context)
    assert result.model.layer3[0].conv2.out_channels == len(group.ids) // 2
    assert not result.masks  # no chosen channel is left with masks


def test_a_branch_that_is_not_there_is_told_before_any_training(tmp_path, monkeypatch):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["prune"]["branches"] = ["layer4.0"]
    (tmp_path / "params.yaml").write_text(yaml_text(params))
    monkeypatch.chdir(tmp_path)
    info = dataset.DatasetInfo("toy", ["a", "b"], (3, 8, 8), [0.0], [1.0], "", {"train": 640})
    model = checkpoint.build_architecture(HEADER)
    with pytest.raises(SettingsError, match=r"prune.branches = 'layer4.0': .*layer1.0, layer1.1"):
        preflight.check_network(model, info)


def test_a_feature_of_a_removed_branch_is_told_before_any_training(tmp_path, monkeypatch):
    """The finetuned network has lost the layer, and so may have a teacher."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["prune"]["branches"] = ["layer2.0"]
    params["arch"] = "resnet_cifar"
    params["finetune"]["distillation"] |= {"teacher": "models/baseline"}
    params["finetune"]["distillation"]["features"] = ["layer2.0.conv2"]
    monkeypatch.chdir(tmp_path)
    scales = HEADER.mean, HEADER.std  # a teacher needs those of the data
    info = dataset.DatasetInfo("toy", HEADER.classes, (3, 8, 8), *scales, "", {"train": 640})
    model = checkpoint.build_architecture(HEADER)
    Path("params.yaml").write_text(yaml_text(params))
    with pytest.raises(
        SettingsError, match=r"finetune.distillation.features.*'layer2.0.conv2' no more"
    ):
        preflight.check_network(model, info)
    params["finetune"]["distillation"]["features"] = ["layer2.1.conv2"]
    Path("params.yaml").write_text(yaml_text(params))
    preflight.check_network(model, info)
    less = without(model, "layer2.1", images=torch.zeros(1, 3, 8, 8)).model
    checkpoint.save(tmp_path / "weights/small.safetensors", HEADER, less, {})
    params["finetune"]["distillation"]["teacher"] = "weights/small.safetensors"
    Path("params.yaml").write_text(yaml_text(params))
    with pytest.raises(SettingsError, match=r"the teacher has 'layer2.1.conv2' no more"):
        preflight.check_network(model, info)
