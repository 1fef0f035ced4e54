"""Architectures: published parameter counts, exactly; and each one trains, saves and traces."""

import functools
import importlib.util
import inspect
import math
import operator

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import fx, nn

from secateur.archs import resnet_slim, vgg
from secateur.base import plugin, settings
from secateur.base.errors import SettingsError
from secateur.base.torchvision_import import import_torchvision
from secateur.channels.trace import trace
from secateur.nn import blocks, checkpoint, cost, resizing
from secateur.nn.checkpoint import Header
from secateur.sparsity import masks

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


@pytest.fixture(scope="module", autouse=True)
def quick_norms():
    """Skip batch norms on the meta device, where torch computes them as a dozen operations."""
    computed = F.batch_norm

    def batch_norm(x, *arguments, **options):
        return x if x.is_meta else computed(x, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "batch_norm", batch_norm)
        yield


@pytest.fixture
def smaller(monkeypatch):
    """Small versions of the two largest families: an eighth of the widths, and a ResNet in which
    only one stage has a second block."""
    monkeypatch.setattr(vgg, "WIDTHS", tuple(width // 8 for width in vgg.WIDTHS))
    monkeypatch.setattr(resnet_slim, "WIDTH", resnet_slim.WIDTH // 8)
    monkeypatch.setitem(resnet_slim.COUNTS, 18, (2, 1, 1, 1))


def build(arch, classes=10, shape=CIFAR, seed=0, **chosen):
    module = plugin.load("archs", arch)
    torch.manual_seed(seed)
    valid = settings.validate(module.Settings, chosen, f"archs.{arch}")
    with settings.section(f"archs.{arch}"):
        return module.build(valid, classes, shape)


def sketch(arch, classes=10, shape=CIFAR, **chosen):
    """The network on the meta device, without memory for weights: enough to count large ones."""
    with torch.device("meta"):
        return build(arch, classes, shape, **chosen)


def outputs(model, shape):
    """Output shapes of every module for one image, one shape for each call of the module."""
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, _i, out, n=name: found.setdefault(n, []).append(out.shape)
        )
        if isinstance(module, nn.BatchNorm2d):  # on the meta device, torch has no fast batch norm
            module.forward = functools.partial(unchanged, module)
    model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    return found


def unchanged(norm, x):
    """The input itself, which has the shape of the norm's output."""
    assert x.dim() == 4 and x.shape[1] == norm.num_features == len(norm.weight)
    return x


def macs(model, shape):
    """Multiply-accumulates of convolutions and linear layers for one image."""
    found = outputs(model, shape)
    return sum(
        layer.weight[0].numel() * shape.numel()
        for name, layer in masks.layers(model).items()
        for shape in found[name]
    )


def operations(model, shape):
    """Operations as gconv-prune counts them.

    Each output of a convolution counts two per MAC and one for its bias; each element counts two in
    BN and one in every use of a ReLU. A pooling window counts with its side instead of its area;
    max pooling counts one less.
    """
    found, total = outputs(model, shape), 0
    for name, module in model.named_modules():
        size = sum(shape.numel() for shape in found[name])
        if isinstance(module, nn.Conv2d):
            total += size * (2 * module.weight[0].numel() + (module.bias is not None))
        elif isinstance(module, nn.Linear):
            total += size * (2 * module.in_features - 1)
        elif isinstance(module, nn.BatchNorm2d):
            total += size * 2
        elif isinstance(module, nn.AvgPool2d):
            total += size * module.kernel_size
        elif isinstance(module, nn.MaxPool2d):
            total += size * (module.kernel_size - 1)
        elif isinstance(module, nn.ReLU):
            total += size
    return total


BC = {"bottleneck": True, "compression": 0.5}
PLAIN_VGG = {"batch_norm": False}
GREG_VGG = {"bias": False, "pools": [1, 2, 3, 4]}
DEPGRAPH_VGG = {"bias": False, "pools": [1, 2, 3, 5]}

# parameters as published, and MACs of one 32x32x3 image with their unit, or None if not published
PUBLISHED = [
    # bearpaw/pytorch-classification and DeepHoyer
    ("alexnet_cifar", {}, 10, 2_472_266, (15.0, 1e6)),
    ("vgg", {"depth": 11}, 10, 9_231_114, (152.8, 1e6)),
    ("vgg", {"depth": 13}, 10, 9_416_010, (228.3, 1e6)),
    ("vgg", {"depth": 16}, 10, 14_728_266, (313.2, 1e6)),
    ("vgg", {"depth": 19}, 10, 20_040_522, (398.1, 1e6)),
    ("vgg", {"depth": 19, **PLAIN_VGG}, 10, 20_029_514, (398.1, 1e6)),
    ("resnet_cifar", {"depth": 20, "shortcut": "B"}, 10, 272_474, (40.81, 1e6)),
    ("resnet_cifar", {"depth": 32, "shortcut": "B"}, 10, 466_906, (69.12, 1e6)),
    ("resnet_cifar", {"depth": 44, "shortcut": "B"}, 10, 661_338, (97.44, 1e6)),
    ("resnet_cifar", {"depth": 56, "shortcut": "B"}, 10, 855_770, (125.75, 1e6)),
    ("resnet_cifar", {"depth": 110, "shortcut": "B"}, 10, 1_730_714, (253.15, 1e6)),
    (
        "resnet_cifar",
        {"depth": 164, "block": "bottleneck", "shortcut": "B"},
        10,
        1_704_154,
        (247.65, 1e6),
    ),
    ("preresnet", {"depth": 164}, 10, 1_703_258, (247.65, 1e6)),
    ("preresnet", {"depth": 110, "block": "basic"}, 10, 1_730_522, None),
    ("wide_resnet", {}, 10, 36_479_194, (5.243, 1e9)),
    ("resnext", {"cardinality": 8}, 10, 34_426_698, (5.387, 1e9)),
    ("resnext", {"cardinality": 16}, 10, 68_155_210, (10.689, 1e9)),
    ("airbench", {}, 10, 1_972_802, (118.1, 1e6)),
    ("densenet", {"depth": 100, **BC}, 10, 769_162, (287.9, 1e6)),
    ("densenet", {"depth": 190, "growth": 40, **BC}, 10, 25_624_430, None),
    # Network Slimming, as implemented in classifier-pruner
    ("resnet_slim", {"depth": 18}, 10, 11_173_962, None),
    ("resnet_slim", {"depth": 34}, 10, 21_282_122, None),
    ("resnet_slim", {"depth": 50}, 10, 23_520_842, None),
    ("resnet_slim", {"depth": 101}, 10, 42_512_970, None),
    ("resnet_slim", {"depth": 152}, 10, 58_156_618, None),
]


@pytest.mark.parametrize(
    ("arch", "chosen", "classes", "params", "published"),
    PUBLISHED,
    ids=[f"{arch}-{chosen}" for arch, chosen, *_ in PUBLISHED],
)
def test_parameters_and_macs_are_the_published_ones(arch, chosen, classes, params, published):
    model = sketch(arch, classes, **chosen)
    assert cost.parameters(model) == params
    if published:
        value, unit = published
        digits = len(str(value).split(".")[1])
        assert round(macs(model, CIFAR) / unit, digits) == value


# as counted by gconv-prune: millions of parameters and of operations
GCONV = [
    ("preresnet", {}, 10, CIFAR, 1.7033, 504.7),
    ("preresnet", {}, 100, CIFAR, 1.7264, 504.8),
    ("resnet_cifar", {"depth": 110, "shortcut": "B"}, 10, CIFAR, 1.7307, 509.5),
    ("resnet_cifar", {"depth": 110, "shortcut": "B"}, 100, CIFAR, 1.7366, 509.5),
    ("densenet", {}, 10, CIFAR, 1.0197, 536.4),
    ("densenet", {}, 100, CIFAR, 1.0601, 536.5),
    ("condensenet", {}, 10, CIFAR, 1.9596, 506.0),
    ("condensenet", {}, 100, CIFAR, 2.0317, 506.1),
    ("torchvision", {"name": "resnet18"}, 1000, IMAGENET, 11.6895, 3635.8),
    ("torchvision", {"name": "resnet34"}, 1000, IMAGENET, 21.7977, 7339.0),
    ("torchvision", {"name": "resnet50"}, 1000, IMAGENET, 25.5570, 8210.6),
    ("torchvision", {"name": "resnet101"}, 1000, IMAGENET, 44.5492, 15650.4),
]


@pytest.mark.parametrize(("arch", "chosen", "classes", "shape", "params", "millions"), GCONV)
def test_sizes_and_operations_are_those_of_gconv_prune(
    arch, chosen, classes, shape, params, millions
):
    model = sketch(arch, classes, shape, **chosen)
    assert round(cost.parameters(model) / 1e6, 4) == params
    if shape == CIFAR:  # its networks end in a fixed 8x8 window, which it counts;
        model.pool = nn.AvgPool2d(8)
    if arch == "densenet":  # its transitions pool by a function, which it does not see
        model.transition1.pool = model.transition2.pool = Halve()
    assert round(operations(model, shape) / 1e6, 1) == millions


class Halve(nn.Module):
    """Mean of each 2x2 square of pixels."""

    def forward(self, x):
        return F.avg_pool2d(x, 2)


@pytest.mark.parametrize(
    ("name", "params", "multiply_accumulates"),
    [
        ("resnet18", 11_689_512, 1.814),
        ("resnet34", 21_797_672, 3.664),
        ("resnet50", 25_557_032, 4.089),
        ("vgg16", 138_357_544, 15.470),
    ],
)
def test_networks_of_torchvision_have_their_published_sizes(name, params, multiply_accumulates):
    model = sketch("torchvision", 1000, IMAGENET, name=name)
    assert cost.parameters(model) == params
    assert round(macs(model, IMAGENET) / 1e9, 3) == multiply_accumulates


def test_resnet_56_of_greg_and_of_bearpaw_are_two_networks():
    greg, bearpaw = (sketch("resnet_cifar", depth=56, shortcut=s) for s in "AB")
    layers = masks.layers(greg)
    assert sum(p.numel() for layer in layers.values() for p in layer.parameters()) == 848_954
    assert 2 * macs(greg, CIFAR) == 250_971_392
    assert (cost.parameters(greg), cost.parameters(bearpaw)) == (853_018, 855_770)
    assert macs(bearpaw, CIFAR) - macs(greg, CIFAR) == (16 * 32 * 16**2) + (32 * 64 * 8**2)
    assert set(masks.layers(bearpaw)) - set(layers) == {
        "layer2.0.shortcut.conv",
        "layer3.0.shortcut.conv",
    }


def test_the_three_vgg_19_of_the_literature_are_told_apart():
    """Two of them differ only in the last pooling, which has no MACs, but their outputs differ."""
    slimming, greg, depgraph = (sketch("vgg", **k) for k in ({}, GREG_VGG, DEPGRAPH_VGG))
    assert cost.parameters(slimming) - cost.parameters(greg) == 5_504  # biases
    assert round(cost.parameters(sketch("vgg", 100, **GREG_VGG)) / 1e6, 2) == 20.08
    assert round(2 * macs(greg, CIFAR) / 1e9, 2) == 0.80
    assert macs(greg, CIFAR) == macs(slimming, CIFAR)
    assert macs(depgraph, CIFAR) == macs(greg, CIFAR) + 4 * 512 * 512 * 9 * (16 - 4)

    by_maximum = build("vgg", depth=11, bias=False).eval()
    by_mean = build("vgg", depth=11, **GREG_VGG).eval()
    by_mean.load_state_dict(by_maximum.state_dict())
    images = torch.randn(2, *CIFAR)
    assert not torch.allclose(by_maximum(images), by_mean(images))
    by_mean.pool = nn.AdaptiveMaxPool2d(1)
    assert torch.equal(by_maximum(images), by_mean(images))


@pytest.mark.parametrize("arch", ["resnet_cifar", "densenet"])
def test_the_macs_counted_here_are_those_that_evaluate_reports(arch):
    model, shape = build(arch), (3, 20, 24)
    reported = cost.layer_costs(model, torch.rand(1, *shape))
    assert sum(row.macs_dense for row in reported) == macs(model, shape)


# small versions of all architectures, and the smallest image side that they accept
COLOUR = "colour"
FOREIGN = 0
FORMS = [
    ("lenet300", {}, 1),
    ("lenet5", {}, 8),
    ("resnet_cifar", {"depth": 8}, 1),
    ("resnet_cifar", {"depth": 8, "shortcut": "B"}, 1),
    ("resnet_cifar", {"depth": 20, "block": "bottleneck"}, 1),
    ("resnet_cifar", {"depth": 11, "block": "bottleneck", "shortcut": "B"}, 1),
    ("preresnet", {"depth": 14, "block": "basic"}, 1),
    ("preresnet", {"depth": 11}, 1),
    ("resnet_slim", {"depth": 18}, 1),
    ("resnext", {"depth": 11, "cardinality": 4, "base_width": 8, "widen": 1}, 1),
    ("resnext", {"depth": 20, "cardinality": 2, "base_width": 4, "widen": 2}, 1),
    ("wide_resnet", {"depth": 10, "widen": 1}, 1),
    ("wide_resnet", {"depth": 16, "widen": 2, "dropout": 0}, 1),
    ("densenet", {"depth": 10}, 4),
    ("densenet", {"depth": 16, "growth": 5, **BC}, 4),
    ("condensenet", {"stages": [2, 1, 3], "growth": [2, 4, 8]}, 4),
    ("condensenet", {"stages": [2], "growth": [3]}, 1),
    ("vgg", {"depth": 11}, 32),
    ("vgg", {"depth": 11, "batch_norm": False, "bias": False, "pools": [2, 4]}, 4),
    ("vgg", {"depth": 13, **GREG_VGG}, 16),
    ("airbench", {"entrance": 5, "widths": [8, 16, 12]}, 9),
    ("alexnet_cifar", {}, 29),
    ("torchvision", {"name": "mobilenet_v3_small"}, COLOUR),
    ("torchvision", {"name": "squeezenet1_1"}, COLOUR),
    ("torchvision", {"name": "shufflenet_v2_x0_5"}, COLOUR),
    ("torchvision", {"name": "mnasnet0_5"}, COLOUR),
    ("torchvision", {"name": "regnet_x_400mf"}, COLOUR),
    ("module", {"target": "own_network:Net", "arguments": {"width": 6}}, FOREIGN),
]
if importlib.util.find_spec("timm"):
    FORMS.append(("timm", {"name": "test_resnet"}, FOREIGN))
SHAPES = [
    ((1, 8, 8), 10),
    ((1, 28, 28), 7),
    ((3, 32, 32), 100),
    ((3, 32, 40), 10),
    ((3, 64, 32), 7),
]
NAMES = [f"{arch}-{chosen}" for arch, chosen, _ in FORMS]


def header(arch, chosen, classes, shape):
    return Header(
        arch, chosen, [str(k) for k in range(classes)], list(shape), [0.0], [1.0], "s", ""
    )


def test_every_architecture_is_tested():
    assert {arch for arch, *_ in FORMS} | {"timm"} == set(plugin.names("archs"))


@pytest.mark.parametrize(("shape", "classes"), SHAPES, ids=[f"{s}" for s, _ in SHAPES])
@pytest.mark.usefixtures("smaller")
@pytest.mark.parametrize(("arch", "chosen", "least"), FORMS, ids=NAMES)
def test_it_learns_is_saved_and_traced(arch, chosen, least, shape, classes, tmp_path):
    fits = shape[0] == 3 if least == COLOUR else min(shape[1:]) >= least
    if not fits:
        with pytest.raises(SettingsError, match=rf"^params\.yaml: arch = '{arch}': [^\n]+$"):
            build(arch, classes, shape, **chosen)
        return
    model = build(arch, classes, shape, **chosen).train()
    images, labels = torch.randn(3, *shape), torch.arange(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    logits = model(images)
    assert logits.shape == (3, classes)
    F.cross_entropy(logits, labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    last = list(model.parameters())[-1]
    before = last.detach().clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # BN over three single pixels: huge gradients
    optimizer.step()
    assert not torch.equal(last, before)

    info = header(arch, chosen, classes, shape)
    checkpoint.save(tmp_path / "model.safetensors", info, model, {})
    found = checkpoint.load(tmp_path / "model.safetensors", arch, chosen, "s").model()
    with torch.inference_mode():
        expected = model.eval()(images)
        assert torch.equal(found.eval()(images), expected)
        assert torch.isfinite(expected).all()
        assert torch.equal(fx.symbolic_trace(model)(images), expected)


@pytest.mark.parametrize(("arch", "chosen", "least"), FORMS, ids=NAMES)
def test_every_module_is_called_once_and_only_sums_and_concatenations_stand_between(
    arch, chosen, least
):
    if least in (COLOUR, FOREIGN):
        pytest.skip("as others have written it")
    model = build(arch, **chosen)
    nodes = trace(model).nodes
    called = [str(node.target) for node in nodes if node.op == "call_module"]
    leaves = [n for n, m in model.named_modules() if not list(m.children())]
    assert sorted(called) == sorted(leaves)
    functions = {node.target for node in nodes if node.op == "call_function"}
    assert functions <= {operator.add, torch.cat}
    assert {node.op for node in nodes} <= {"placeholder", "call_module", "call_function", "output"}
    known = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    holders = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert all(type(m) in known for m in holders)


def content(model):
    return [t.numpy().tobytes() for t in model.state_dict().values()]


@pytest.mark.usefixtures("smaller")
@pytest.mark.parametrize(("arch", "chosen", "least"), FORMS, ids=NAMES)
def test_the_seed_decides_the_weights(arch, chosen, least):
    one, same, other = (content(build(arch, seed=seed, **chosen)) for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_the_defaults_in_params_yaml_are_those_of_the_code():
    written = yaml.safe_load((plugin._PACKAGE.parent / "params.yaml").read_text())["archs"]
    for arch in plugin.names("archs"):
        schema = plugin.load("archs", arch).Settings
        assert set(written[arch]) == set(schema.model_fields), arch
        assert settings.validate(schema, written[arch], arch) == schema(), arch


@pytest.mark.parametrize("arch", plugin.names("archs"))
def test_it_says_where_it_comes_from(arch):
    module = plugin.load("archs", arch)
    assert "Source: " in module.__doc__ or arch == "module"
    assert list(inspect.signature(module.build).parameters) == ["settings", "classes", "shape"]


# ----- invalid settings -----

MISTAKES = [
    ("resnet_cifar", {"depth": 57}, "depth = 57: basic blocks need 6n+2, such as 56 or 62"),
    ("resnet_cifar", {"depth": 9, "block": "bottleneck"}, "bottlenecks need 9n+2, such as 11"),
    ("resnet_cifar", {"depth": 2}, "depth = 2: must be greater than or equal to 8"),
    ("resnet_cifar", {"shortcut": "C"}, "shortcut = 'C': must be 'A' or 'B'"),
    ("resnet_cifar", {"block": "wide"}, "must be 'basic' or 'bottleneck'"),
    ("resnet_cifar", {"deepth": 20}, "did you mean depth?"),
    ("preresnet", {"depth": 165}, "depth = 165: bottlenecks need 9n+2, such as 164 or 173"),
    ("preresnet", {"depth": 111, "block": "basic"}, "need 6n+2, such as 110 or 116"),
    ("resnet_slim", {"depth": 36}, "depth = 36: must be 18, 34, 50, 101 or 152"),
    ("resnext", {"depth": 30}, "depth = 30: ResNeXts need 9n+2, such as 29 or 38"),
    ("resnext", {"cardinality": 0}, "cardinality = 0: "),
    ("wide_resnet", {"depth": 26}, "depth = 26: wide ResNets need 6n+4, such as 22 or 28"),
    ("wide_resnet", {"dropout": 1}, "dropout = 1: must be less than 1"),
    ("densenet", {"depth": 41}, "depth = 41: plain DenseNets need 3n+4, such as 40 or 43"),
    ("densenet", {"depth": 43, **BC}, "need 6n+4, such as 40 or 46"),
    ("densenet", {"compression": 0}, "compression = 0: must be greater than 0"),
    ("condensenet", {"growth": [8, 16]}, "growth = [8, 16]: needs as many values as stages"),
    ("condensenet", {"stages": []}, "stages = []: "),
    ("vgg", {"depth": 12}, "depth = 12: must be 11, 13, 16 or 19"),
    ("vgg", {"pools": [1, 1, 2]}, "pools = [1, 1, 2]: stages must ascend, each named once"),
    ("vgg", {"pools": [6]}, "pools.0 = 6: must be less than or equal to 5"),
    ("vgg", {"batch_norm": 3}, "batch_norm = 3: "),
    ("torchvision", {"name": "resnet-18"}, "name = 'resnet-18': "),
    ("torchvision", {"weights": "default"}, "weights: renamed; write baseline.weights"),
    ("module", {"target": "networks/mine.py"}, "target = 'networks/mine.py': "),
]


@pytest.mark.parametrize(("arch", "chosen", "message"), MISTAKES)
def test_impossible_settings_are_refused_with_what_is_allowed(arch, chosen, message):
    with pytest.raises(SettingsError) as caught:
        build(arch, **chosen)
    line = str(caught.value)
    assert line.startswith(f"params.yaml: archs.{arch}.")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("arch", "chosen", "shape", "message"),
    [
        ("vgg", {}, (1, 28, 28), "28x28 pixels are too small .*: 32x32 are needed"),
        ("vgg", GREG_VGG, (3, 40, 15), "40x15 pixels are too small .*: 16x16 are needed"),
        ("alexnet_cifar", {}, (1, 28, 28), "28x28 .* 29x29 are needed"),
        ("densenet", {}, (1, 3, 9), "3x9 .* 4x4 are needed"),
        ("condensenet", {}, (1, 3, 9), "3x9 .* 4x4 are needed"),
        ("torchvision", {}, (1, 28, 28), "need images of 3 channels, these have 1"),
        ("torchvision", {"name": "alexnet"}, CIFAR, "alexnet cannot take images of 32x32 pixels"),
        ("torchvision", {"name": "vit_b_32"}, (3, 40, 40), "vit_b_32 cannot take images of 40x40"),
        ("torchvision", {"name": "resnet19"}, CIFAR, "no such .* did you mean resnet1"),
        ("torchvision", {"name": "fcn_resnet50"}, CIFAR, "no such classification network"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(arch, chosen, shape, message):
    with pytest.raises(SettingsError, match=rf"^params\.yaml: arch[^\n]*{message}[^\n]*$"):
        build(arch, 10, shape, **chosen)


@pytest.mark.parametrize(
    ("arch", "chosen", "side"),
    [("vgg", {}, 32), ("vgg", GREG_VGG, 16), ("alexnet_cifar", {}, 29), ("densenet", {}, 4)],
)
def test_the_smallest_image_is_not_refused_for_nothing(arch, chosen, side):
    model = sketch(arch, 10, (1, side, side), **chosen)
    assert outputs(model, (1, side, side))["fc"] == [(1, 10)]
    with pytest.raises((RuntimeError, ValueError)):
        outputs(model, (1, side - 1, side))


# ----- by hand -----


@pytest.mark.parametrize("side", [8, 7])
def test_shortcut_a_takes_every_second_pixel_and_puts_zeros_on_both_sides(side):
    model = build("resnet_cifar", depth=8, shortcut="A")
    x = torch.randn(2, 16, side, side)
    y = model.get_submodule("layer2.0.shortcut")(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    assert y.shape[1] == 32
    assert not list(model.get_submodule("layer2.0.shortcut").parameters())


def test_names_are_those_that_patterns_select():
    names = list(masks.layers(sketch("resnet_cifar", depth=8, shortcut="B")))
    assert names == [
        "conv1",
        *("layer1.0.conv1", "layer1.0.conv2"),
        *("layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.conv"),
        *("layer3.0.conv1", "layer3.0.conv2", "layer3.0.shortcut.conv"),
        "fc",
    ]
    assert list(masks.layers(sketch("vgg", depth=11))) == [*(f"conv{k}" for k in range(1, 9)), "fc"]
    slim = masks.layers(sketch("resnet_slim", depth=50))
    assert {name.split(".")[0] for name in slim} == {
        *("conv1", "layer1", "layer2", "layer3", "layer4", "fc"),
    }


def test_dropout_works_in_training_alone():
    model, images = build("wide_resnet", depth=10, widen=1, dropout=0.5), torch.randn(4, *CIFAR)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


# ----- first weights -----


def standardised(model):
    """Weights of all convolutions divided by the deviation of He et al. for their fan-out."""
    parts = [
        layer.weight.detach().flatten() / math.sqrt(2 / layer.weight[:, 0].numel())
        for layer in masks.layers(model).values()
        if isinstance(layer, nn.Conv2d)
    ]
    return torch.cat(parts)


OTHERWISE = ("lenet300", "lenet5", "alexnet_cifar", "torchvision", "timm", "module")
"""Networks initialised by PyTorch, by their library or by the user's own code."""
HE = [(a, c) for a, c, _ in FORMS if a not in OTHERWISE]


@pytest.mark.parametrize(("arch", "chosen"), [f for f in HE if f[0] != "resnet_slim"])
def test_convolutions_start_he_normal_and_so_again_from_scratch(arch, chosen):
    model = build(arch, **chosen)
    first = standardised(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    resizing.reset_parameters(model)
    for found in (first, standardised(model)):
        assert float(found.std()) == pytest.approx(1, abs=0.05)
        assert float(found.abs().max()) > 2.5  # normal, not uniform
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and not module.bias.any()
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()
    assert float(model.fc.weight.detach().abs().max()) < 3


def test_a_pruned_network_starts_from_scratch_by_its_own_fan_out():
    """conv1 of a block keeps a quarter of its filters, so its standard deviation doubles."""
    model = build("resnet_cifar", depth=8, shortcut="B")
    new = {name: list(t.shape) for name, t in model.state_dict().items()}
    for key in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        new[f"layer3.0.{key}"][0] = 16
    new["layer3.0.conv2.weight"][1] = 16
    resizing.resize(model, new)
    resizing.reset_parameters(model)
    layer = model.get_submodule("layer3.0.conv1")
    assert layer.weight.shape == (16, 32, 3, 3)
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.05)
    assert model.eval()(torch.randn(2, *CIFAR)).isfinite().all()


def test_orthogonal_weights_are_orthonormal_by_group_and_biases_are_zero():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 30, 1), nn.Linear(30, 4)
    ).double()  # the third has more rows than columns
    resizing.orthogonalise(model)
    for layer in model:
        assert not layer.bias.any()
        for part in layer.weight.detach().chunk(getattr(layer, "groups", 1)):
            matrix = part.flatten(1)
            matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
            identity = torch.eye(len(matrix), dtype=torch.float64)
            assert torch.allclose(matrix @ matrix.T, identity, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("arch", "deviation"), [("vgg", 0.01), ("resnext", math.sqrt(2 / 256))])
def test_classifiers_with_a_start_of_their_own(arch, deviation):
    small = {} if arch == "vgg" else {"depth": 11, "cardinality": 2, "base_width": 8, "widen": 1}
    model = build(arch, 100, **small)
    for _ in range(2):
        assert float(model.fc.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
        assert not model.fc.bias.any()
        resizing.reset_parameters(model)


def test_reset_draws_layer_by_layer_what_torch_draws():
    one, other = build("lenet5", 10, (1, 28, 28)), build("lenet5", 10, (1, 28, 28), seed=1)
    torch.manual_seed(5)
    resizing.reset_parameters(one)
    torch.manual_seed(5)
    for layer in masks.layers(other).values():
        layer.reset_parameters()
    assert content(one) == content(other)


def test_reset_refuses_what_it_would_leave_as_it_was():
    model = build("torchvision", 10, (3, 32, 32), name="swin_t")
    before = content(model)
    with pytest.raises(SettingsError, match=r"features\.1\.0\.attn .*ShiftedWindowAttention"):
        resizing.reset_parameters(model)
    assert content(model) == before


def test_depths_between_are_named():
    assert blocks.blocks_per_stage(56, 6, 2, "x") == 9
    with pytest.raises(ValueError, match="such as 56 or 62"):
        blocks.blocks_per_stage(58, 6, 2, "x")
    with pytest.raises(ValueError, match=r"such as 8$"):
        blocks.blocks_per_stage(2, 6, 2, "x")


@pytest.mark.parametrize(("name", "side", "window"), [("alexnet", 224, 1), ("vgg11", 448, 2)])
def test_torchvision_pooling_of_fixed_windows_is_the_adaptive_one(name, side, window):
    module = plugin.load("archs", "torchvision")
    with torch.device("meta"):  # 130 million weights that are never read
        ours = module.build(module.Settings(name=name), 3, (3, side, side)).avgpool
        theirs = getattr(import_torchvision().models, name)(num_classes=3).avgpool
    assert ours.kernel_size == (window, window)
    maps = torch.randn(2, 4, *(window * size for size in theirs.output_size))
    assert torch.allclose(ours(maps), theirs(maps), atol=1e-6)


def test_torchvision_pooling_stays_adaptive_where_windows_differ():
    module = plugin.load("archs", "torchvision")
    with torch.device("meta"):
        model = module.build(module.Settings(name="vgg11"), 3, (3, 64, 64))
    assert isinstance(model.avgpool, nn.AdaptiveAvgPool2d)
    assert model.training
