"""Conversion to group convolutions: equal to the masked network, with few index layers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.archs import resnet_slim, torchvision, vgg
from secateur.base import plugin
from secateur.base.errors import PruningError, SettingsError
from secateur.base.sections import Prune
from secateur.base.torchvision_import import import_torchvision
from secateur.channels import graph as channels
from secateur.data.dataset import InMemoryImages
from secateur.gconv import conversion, permutation
from secateur.nn import checkpoint, cost, resizing
from secateur.nn.checkpoint import Header
from secateur.nn.layers import IndexedConv2d
from secateur.pruners import gconv
from secateur.pruning import proof, removal
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks
from stages import prune as stage

ZOO = {
    "preresnet": {"arch": "preresnet", "depth": 20},
    "preresnet-basic": {"arch": "preresnet", "depth": 14, "block": "basic"},
    "resnet-a": {"arch": "resnet_cifar", "depth": 20, "groups": 2},  # the stream has zero padding
    "resnet-b": {"arch": "resnet_cifar", "depth": 14, "shortcut": "B"},
    "resnet-slim": {"arch": "resnet_slim", "depth": 18, "side": 8},
    "resnext": {"arch": "resnext", "depth": 11, "cardinality": 8, "base_width": 16, "groups": 16},
    "wide-resnet": {"arch": "wide_resnet", "depth": 10, "widen": 2},
    "densenet": {"arch": "densenet", "depth": 13},
    "densenet-bc": {"arch": "densenet", "depth": 16, "bottleneck": True, "compression": 0.5},
    "condensenet": {"arch": "condensenet", "stages": [2, 2, 2]},
    "condensenet-grouped": {"arch": "condensenet", "stages": [2, 2, 2], "trained": 2},
    "vgg": {"arch": "vgg", "depth": 11, "side": 32},
    "vgg-plain": {"arch": "vgg", "depth": 11, "side": 32, "batch_norm": False},
    "alexnet": {"arch": "alexnet_cifar", "side": 32, "groups": 2},
    "resnet18": {"arch": "torchvision", "name": "resnet18", "side": 32},
    "mobilenet": {"arch": "torchvision", "name": "mobilenet_v2", "side": 32},
    "shufflenet": {"arch": "torchvision", "name": "shufflenet_v2_x0_5", "side": 32, "groups": 2},
}


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """VGG and MobileNet at a quarter of their widths, and ResNets with fewer second blocks."""
    resnet, options = import_torchvision().models.resnet, torchvision._options

    def narrow(settings, shape):
        width = {"width_mult": 0.25} if settings.name == "mobilenet_v2" else {}
        return options(settings, shape) | width

    with pytest.MonkeyPatch.context() as patch:
        whole = resnet._resnet
        patch.setattr(
            resnet, "_resnet", lambda kind, _, *how, **a: whole(kind, (2, 1, 1, 1), *how, **a)
        )
        patch.setattr(torchvision, "_options", narrow)
        patch.setattr(vgg, "WIDTHS", tuple(width // 4 for width in vgg.WIDTHS))
        patch.setitem(resnet_slim.COUNTS, 18, (2, 1, 1, 1))
        yield


def build(arch, side=16, groups=4, trained=None, **chosen):
    torch.manual_seed(0)
    chosen |= {} if trained is None else {"groups": trained}
    module = plugin.load("archs", arch)
    model = module.build(module.Settings(**chosen), 10, (3, side, side)).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    return model, torch.randn(4, 3, side, side), groups


def pruned(model, images, **chosen):
    """The masked network and its masks."""
    decision = gconv.prune(gconv.Settings(**chosen), PruningContext(model, images))
    masked = copy.deepcopy(model)
    masks.apply(masked, decision.masks)
    return masked, decision.masks


def small(groups=4, **chosen):
    model, images, _ = build(**ZOO["preresnet"])
    masked, found = pruned(model, images, groups=groups, **chosen)
    return model, masked, found, images


def difference(one, other, images):
    with torch.no_grad():
        before, after = one(images), other(images)
    return float((before - after).abs().max() / before.abs().max())


def indexes(model):
    return int(conversion.group_convolution_counts(model)["index_layers"])


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_computes_what_it_computed_with_masks(name):
    model, images, groups = build(**ZOO[name])
    masked, found = pruned(model, images, groups=groups)
    plain = conversion.convert(masked, found, images[:1], fold=False)
    folded = conversion.convert(masked, found, images[:1])
    assert not plain.masks and not folded.masks
    converted = [name.removesuffix(".weight") for name in found]
    for layer in converted:
        conv, dense = folded.model.get_submodule(layer), masked.get_submodule(layer)
        assert conv.groups == plain.model.get_submodule(layer).groups > dense.groups
        assert conv.weight.numel() == int(found[f"{layer}.weight"].sum())
        assert (conv.in_channels, conv.out_channels) == (dense.in_channels, dense.out_channels)
    assert indexes(plain.model) == 2 * len(converted)
    assert indexes(folded.model) < indexes(plain.model)
    for small in (plain.model, folded.model):
        assert difference(masked, small, images) < 1e-5
    wide = copy.deepcopy(masked).double()
    exact = conversion.convert(wide, found, images[:1].double())
    assert difference(wide, exact.model, images.double()) < 1e-12


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_is_exact(mode, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 18, 3, stride=2, padding=2, dilation=2, bias=bias, padding_mode=mode)
    with torch.no_grad():  # with integers, sums are exact in any order
        for parameter in conv.parameters():
            parameter.copy_(torch.randint(-9, 9, parameter.shape))
    images = torch.randint(-9, 9, (2, 12, 11, 13)).float()
    masked, found = pruned(nn.Sequential(conv), images, groups=3)
    for fold in (True, False):
        converted = conversion.convert(masked, found, images, fold).model
        assert converted[0].weight.shape == (18, 4, 3, 3)
        assert torch.equal(converted(images), masked(images))
        assert not torch.equal(masked(images), conv(images))


def test_numbers_of_groups_by_hand():
    # outputs 0 and 2 read inputs 0 and 3; outputs 1 and 3 read 1 and 2
    conv = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1.0, 17).reshape(4, 4, 1, 1))
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    found = {"0.weight": mask[:, :, None, None]}
    masked = nn.Sequential(conv)
    masks.apply(masked, found)
    made = conversion.convert(masked, found, torch.zeros(1, 4, 2, 2)).model[0]
    assert made.before.tolist() == [0, 3, 1, 2]
    assert made.after.tolist() == [0, 2, 1, 3]
    assert made.weight.flatten(1).tolist() == [[1, 4], [9, 12], [6, 7], [14, 15]]


def test_a_chain_needs_one_index_between_two_layers():
    layers = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)]
    torch.manual_seed(0)
    model, images = nn.Sequential(*layers, nn.Conv2d(16, 5, 1)).eval(), torch.randn(2, 3, 12, 12)
    masked, found = pruned(model, images, groups=4)
    converted = conversion.convert(masked, found, images).model
    # layers 0 and 3 are dense and accept any order, so only the path from 1 to 2 needs an index
    assert [layer.groups for layer in converted] == [1, 4, 4, 1]
    assert indexes(converted) == 1
    assert difference(masked, converted, images) < 1e-5


def test_neighbours_need_no_index_in_a_chain():
    model, images, _ = build(**ZOO["vgg"])
    masked, found = pruned(model, images, groups=4, permutation="same")
    converted = conversion.convert(masked, found, images[:1])
    assert indexes(converted.model) == 0
    assert not any(isinstance(m, IndexedConv2d) for m in converted.model.modules())
    assert difference(masked, converted.model, images) < 1e-5


def test_masks_and_norms_move_with_the_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    ).eval()
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[2].weight)
    images = torch.randn(2, 3, 9, 9)
    found = gconv.prune(gconv.Settings(groups=2), PruningContext(model, images)).masks
    found = {"3.weight": found["3.weight"], "0.weight": torch.rand(8, 3, 3, 3) < 0.7}
    found |= {"3.bias": torch.arange(8) % 3 > 0}
    masks.apply(model, found)
    converted = conversion.convert(model, found, images)
    assert [converted.model[k].groups for k in (0, 3)] == [1, 2]
    assert set(converted.masks) == {"0.weight", "3.bias"}
    for name, mask in converted.masks.items():
        parameter = converted.model.get_parameter(name)
        assert torch.equal(parameter != 0, mask) and not bool(mask.all())
    assert difference(model, converted.model, images) < 1e-5
    order = converted.kept["0"]
    assert torch.equal(converted.model[0].weight, model[0].weight[order])
    assert torch.equal(converted.model[1].running_mean, model[1].running_mean[order])


def test_groups_that_were_there_and_were_converted_are_converted_again():
    model, images, _ = build(**ZOO["condensenet"])
    masked, found = pruned(model, images, groups=2)
    first = conversion.convert(masked, found, images[:1]).model
    again, more = pruned(first, images, groups=4)
    second = conversion.convert(again, more, images[:1]).model
    assert difference(again, second, images) < 1e-5
    dense = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3]
    grouped = [m for m in second.modules() if isinstance(m, nn.Conv2d) and m.groups == 4]
    assert sum(m.weight.numel() for m in grouped) * 4 == sum(m.weight.numel() for m in dense)


def test_a_step_of_training_is_the_same_step():
    _, masked, found, images = small()
    masked, images = masked.double(), images.double()
    converted = conversion.convert(masked, found, images[:1]).model
    for model, held in ((masked, found), (converted, {})):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        masks.hold(model, held, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
            optimizer.step()
    assert difference(masked, converted, images) < 1e-9
    assert cost.nonzero(masked, found) == cost.parameters(converted)


def test_new_weights_in_the_found_groups():
    _, masked, found, images = small()
    converted = conversion.convert(masked, found, images[:1]).model
    before = {name: t.clone() for name, t in converted.state_dict().items()}
    torch.manual_seed(5)
    resizing.reset_parameters(converted)
    after = converted.state_dict()
    assert all(
        torch.equal(after[n], t) for n, t in before.items() if n.endswith(("before", "after"))
    )
    conv = converted.get_submodule("layer3.0.conv2")
    assert not torch.equal(conv.weight, before["layer3.0.conv2.weight"])
    # like torch's group convolution: scaled by the fan-out of all outputs
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


# ---- surgery and files -------------------------------------------------------------------------


def test_dead_channels_go_from_a_converted_network():
    model, images, _ = build(**ZOO["resnet-b"])
    dead = "layer1.0.conv1"
    masked, found = pruned(model, images, groups=2)
    grouping = permutation.grouping_from_mask(found["layer1.0.conv2.weight"])
    gone = grouping.inputs[:, 0]  # one input of each group of the layer that reads them
    with torch.no_grad():
        masked.get_parameter(f"{dead}.weight")[gone] = 0
        for part in ("weight", "bias"):
            masked.get_parameter(f"layer1.0.bn1.{part}")[gone] = 0
    whole = masked.double()
    compact = removal.compact(whole, {}, found, images[:1].double(), True, "gconv")
    assert proof.verify(whole, compact, images.double(), proof.FLOAT64_TOLERANCE) < 1e-9
    smaller = compact.model.get_submodule(dead)
    assert smaller.weight.shape[0] in (14, 16)  # possible if each of its own groups loses one
    assert compact.model.get_submodule("layer1.0.conv2").groups == 2


@pytest.mark.parametrize("name", ["preresnet", "condensenet", "resnet-a"])
def test_channels_can_be_followed_and_taken_out_of_a_converted_network(name):
    model, images, _ = build(**ZOO[name])
    masked, found = pruned(model, images, groups=2)
    converted = conversion.convert(masked.double(), found, images[:1].double()).model
    network = channels.build_channel_graph(converted, images)
    wanted = {g.name: torch.arange(0, g.size, 3) for g in network.groups if g.locked is None}
    selection = network.removable(wanted)
    small = removal.remove(converted, selection, images[:1].double(), {}, network)
    expected = removal.mask(converted, selection, images, network)
    assert proof.verify(expected, small, images.double(), proof.FLOAT64_TOLERANCE) < 1e-9


def header(arch, **settings):
    return Header(arch, settings, list("0123456789"), [3, 16, 16], [0.0], [1.0], "s", "prune")


def test_the_file_holds_groups_and_permutation(tmp_path):
    """test_channels_zoo.py tests that this file, like all others, needs no code of the pruners."""
    _, masked, found, images = small()
    converted = conversion.convert(masked, found, images[:1]).model
    made = header("preresnet", depth=20)
    checkpoint.save(tmp_path / "model.safetensors", made, converted, {})
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert loaded.header.layers["layer1.1.conv1"]["groups"] == 4
    again = loaded.model()
    assert torch.equal(again(images), converted(images))
    assert indexes(again) == indexes(converted) > 0
    assert resizing.describe_layers(again) == resizing.describe_layers(converted)
    one, other = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    checkpoint.save(other, made, again, {})
    assert one.read_bytes() == other.read_bytes()


def run_stage(model, images, decide, monkeypatch, **settings):
    class Params:
        pruner = "own"
        prune = Prune(**settings)

        def chosen(self, kind):
            return {"amount": 1}.items()

    about = SimpleNamespace(mean=[0.0] * 3, std=[1.0] * 3, shape=(3, 16, 16))
    pixels = (images.abs() * 50).clamp(max=255).to(torch.uint8).permute(0, 2, 3, 1)
    train = InMemoryImages.from_pixels(
        pixels.contiguous(), torch.zeros(len(images), dtype=torch.int64)
    )
    job = SimpleNamespace(
        params=Params(),
        start=SimpleNamespace(
            model=lambda: copy.deepcopy(model), choices={}, masks={}, header=None
        ),
        data=SimpleNamespace(info=about, train=train),
        header=lambda parent, **notes: notes,
    )
    monkeypatch.setattr(stage.plugin, "load", lambda *_: SimpleNamespace(prune=decide))
    monkeypatch.setattr(stage.checkpoint, "build_architecture", lambda _: model)
    return stage.prune(job)


@pytest.mark.parametrize("dead", [True, False])
def test_the_stage_converts_and_proves(dead, monkeypatch, capsys):
    model, images, _ = build(**ZOO["preresnet"])

    def decide(_, subject):
        return gconv.prune(gconv.Settings(groups=4), subject)

    kept = run_stage(
        model,
        images,
        decide,
        monkeypatch,
        remove_dead=dead,
        recalibrate=0,
        group_convolutions=False,
    )
    made = run_stage(
        model, images, decide, monkeypatch, remove_dead=dead, recalibrate=0, group_convolutions=True
    )
    assert made.metrics["difference_float64"] < 1e-9
    assert made.metrics["difference_float32"] < proof.FLOAT32_TOLERANCE
    assert made.metrics["group_convolutions"] == made.metrics["grouped_layers"] == 21
    assert not made.masks and set(kept.masks)
    assert cost.parameters(made.model) == cost.nonzero(kept.model, kept.masks)
    assert made.metrics["nonzero"] == kept.metrics["nonzero"] == cost.parameters(made.model)
    assert set(made.texts) == {"groups.json", "groups.csv"}
    assert "left dense: conv1" in capsys.readouterr().out


def test_a_wrong_conversion_is_noticed(monkeypatch):
    model, images, _ = build(**ZOO["preresnet"])
    replace = conversion._replace

    def wrong(network, held, name, *rest):
        replace(network, held, name, *rest)
        if name == "layer2.1.conv2":
            made = network.get_submodule(name)
            made.weight.data = made.weight.data.roll(1, 0)

    monkeypatch.setattr(conversion, "_replace", wrong)
    with pytest.raises(PruningError, match=r"layer layer2\.1\.conv2 differs by"):
        run_stage(
            model, images, lambda _, s: gconv.prune(gconv.Settings(groups=4), s), monkeypatch,
            remove_dead=False, recalibrate=0, group_convolutions=True,
        )  # fmt: skip


def test_nothing_to_convert_is_an_error(monkeypatch):
    model, images, _ = build(**ZOO["preresnet"])
    scattered = {"conv1.weight": torch.rand(16, 3, 3, 3) < 0.5}
    with pytest.raises(
        SettingsError,
        match=r"params\.yaml: prune\.group_convolutions = True: no convolution's mask is made",
    ):
        run_stage(
            model, images, lambda *_: PruningDecision(scattered), monkeypatch,
            remove_dead=True, recalibrate=0, group_convolutions=True,
        )  # fmt: skip
