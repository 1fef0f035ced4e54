"""Latency targets: tables of measured layers, predictions, and what is pruned."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import secateur
from secateur.base import optional, plugin, settings
from secateur.base.errors import PruningError, SecateurError, SettingsError
from secateur.base.sections import Prune
from secateur.base.torchvision_import import import_torchvision
from secateur.channels.graph import build_channel_graph
from secateur.data import dataset
from secateur.data.dataset import DatasetInfo
from secateur.deploy import layer_times
from secateur.nn import checkpoint, cost
from secateur.pipeline import latency_check, preflight
from secateur.pruning import latency
from secateur.pruning.decision import PruningContext
from secateur.pruning.latency import LatencyTable, MeasuredLayer, MeasuredNetwork
from stages import prune as prune_stage

import_torchvision()

from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402

SIDE = 8
pytestmark = pytest.mark.usefixtures("one_registry")


class Net(nn.Module):
    """A residual sum, a depthwise convolution, and an MLP."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.inner = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.outer = nn.Conv2d(32, 16, 1)
        self.mlp = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.outer(self.depthwise(self.inner(x).relu()).relu())
        return self.head(self.mlp(x.mean((2, 3))).relu())


def net():
    torch.manual_seed(0)
    return Net().eval()


def image(count=1):
    return torch.randn(count, 3, SIDE, SIDE)


def by_macs(model, example, multiple=1, per_output=0.0):
    """A table with times proportional to MACs for layers, and `per_output` for each output."""
    graph = build_channel_graph(model, example)
    positions = cost.output_positions(model, example)
    layers = {}
    for name, layer in graph.layers.items():
        outputs, inputs, deep = len(layer.outputs), len(layer.inputs), layer.depthwise()
        each = model.get_parameter(layer.weight)[0, 0].numel() * positions[name]
        widths = (1, outputs), ((inputs,) if deep else (1, inputs))
        ms = [[each * out * (1 if deep else into) for into in widths[1]] for out in widths[0]]
        layers[name] = MeasuredLayer(
            outputs=widths[0], inputs=widths[1], ms=ms, positions=positions[name]
        )
    dense = latency.widths_left(graph, {})
    half = {name: (max(1, out // 2), max(1, into // 2)) for name, (out, into) in dense.items()}

    def ms(widths):
        layer_ms = sum(layers[name].time(*own) for name, own in widths.items())
        return layer_ms + per_output * sum(out * positions[n] for n, (out, _) in widths.items())

    networks = [MeasuredNetwork(widths=own, ms=ms(own)) for own in (dense, half)]
    return LatencyTable(
        runtime="torch", batch=1, threads=1, hardware="by hand", versions={}, multiple=multiple,
        layers=layers, networks=networks,
    )  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------


def test_times_between_measured_widths_are_interpolated():
    layer = MeasuredLayer(outputs=(2, 4), inputs=(1, 3), ms=((1, 2), (3, 8)), positions=1)
    assert [layer.time(*w) for w in [(2, 1), (4, 3), (3, 1), (2, 2)]] == [1, 8, 2, 1.5]
    assert layer.time(3, 2) == (1.5 + 5.5) / 2
    assert layer.time(1, 9) == 2  # beyond the measured widths, the nearest one counts
    alone = MeasuredLayer(outputs=(4,), inputs=(3,), ms=((8,),), positions=1)
    assert alone.time(2, 1) == 8


def test_what_lies_between_the_layers_follows_from_whole_networks():
    """The factors that made up the times of the networks are recovered."""
    table = by_macs(net(), image())
    positions = {name: layer.positions for name, layer in table.layers.items()}

    def ms(widths, fixed):
        layers = sum(table.layers[name].time(*own) for name, own in widths.items())
        outputs = sum(out * positions[name] for name, (out, _) in widths.items())
        return 0.5 * layers + 3.0 * outputs + fixed

    dense = table.networks[0].widths
    narrow = [{n: (max(1, o // k), max(1, i // k)) for n, (o, i) in dense.items()} for k in (2, 4)]
    networks = [MeasuredNetwork(widths=own, ms=ms(own, 1e3)) for own in (dense, *narrow)]
    fitted = table.model_copy(update={"networks": tuple(networks)})
    assert fitted.factors == pytest.approx((0.5, 3.0))
    other = dense | {"inner": (8, 16), "depthwise": (8, 8), "outer": (16, 8)}
    assert fitted.time(other) == pytest.approx(ms(other, 1e3))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_whole_width_of_a_layer_is_measured(groups):
    """Also where it is no multiple: rounding it made the first outputs to go cost nothing."""
    for width in range(groups, 100, groups):
        for multiple in layer_times.MULTIPLES:
            widths = layer_times._widths(width, False, multiple, groups)
            assert widths[-1] == width and widths == sorted(set(widths))
            assert all(own % groups == 0 for own in widths)


def test_a_table_is_read_back_and_a_damaged_one_is_one_line(tmp_path):
    table = by_macs(net(), image())
    path = tmp_path / "torch.json"
    table.save(path)
    assert secateur.load_latency(path) == table
    words = f"torch, 1 thread, batch 1: {len(table.layers)} layers, dense network "
    assert str(table) == repr(table) and words in repr(table) and len(repr(table)) < 100
    raw = json.loads(path.read_text())
    raw["layers"]["stem"]["ms"] = [[1.0]]
    path.write_text(json.dumps(raw))
    with pytest.raises(
        SecateurError, match=r"torch\.json: layers\.stem\.ms: needs a time for each"
    ):
        secateur.load_latency(path)
    with pytest.raises(SecateurError, match=r"none\.json: missing$"):
        secateur.load_latency(tmp_path / "none.json")


def test_widths_left_are_those_of_the_compact_network():
    model, example = net(), image()
    graph = build_channel_graph(model, example)
    chosen = {"stem": torch.arange(5), "inner": torch.arange(7), "mlp": torch.arange(9)}
    left = latency.widths_left(graph, chosen)
    assert left == {
        "stem": (11, 3), "inner": (25, 11), "depthwise": (25, 25), "outer": (11, 25),
        "mlp": (15, 11), "head": (5, 15),
    }  # fmt: skip


# ---- pruners -------------------------------------------------------------------------------------


def pruned(table, model=None, **chosen):
    own = {"granularity": "group", "target": {"latency": 0.5}} | chosen
    return secateur.prune(
        model or net(), image(4), secateur.pruners.magnitude(**own), latency=table
    )


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_latency_that_is_macs_is_what_counting_macs_finds(ranking):
    """With times proportional to MACs, a latency target prunes like the same target of MACs."""
    model = net()
    result = pruned(by_macs(model, image()), model, ranking=ranking)
    macs = cost.macs(result.model, image()) / cost.macs(model, image())
    assert result.notes["latency_left_asked"] == 0.5
    assert result.notes["latency_left_reached"] == pytest.approx(macs, rel=1e-9)
    assert abs(macs - 0.5) < 0.03
    same = secateur.pruners.magnitude(granularity="group", ranking=ranking, target={"macs": 0.5})
    other = secateur.prune(model, image(4), same).model
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (result.model, other)]
    assert shapes[0] == shapes[1]


def test_widths_are_multiples_as_the_table_suggests_unless_the_target_needs_others():
    model = net()
    table = by_macs(model, image(), multiple=8)
    result = pruned(table, model)
    widths = {result.model.stem.out_channels, result.model.inner.out_channels}
    widths |= {result.model.mlp.out_features}
    assert result.notes["round_to"] == 8
    assert all(width % 8 == 0 for width in widths)
    given = pruned(table, model, round_to=3)  # a multiple set by the user is kept
    assert "round_to" not in given.notes
    assert given.model.inner.out_channels % 3 == 0
    narrow = pruned(table, model, target={"latency": 0.08})
    assert narrow.notes["round_to"] < 8
    with pytest.raises(PruningError, match=r"target\.latency = 0\.0001 cannot be reached"):
        pruned(table, model, target={"latency": 1e-4})


def test_a_further_round_may_ask_for_a_share_of_the_dense_network():
    """Its layers are narrower versions of the dense network's, so the table covers them."""
    dense = net()
    table = by_macs(dense, image())
    first = pruned(table, dense, target={"latency": 0.6}).model
    context = PruningContext(first, image(4), latency=table, dense=dense)
    shares = {}
    for of in ("dense", "given"):
        settings = {"granularity": "group", "target": {"latency": 0.3, "of": of}}
        pruner = secateur.pruners.magnitude(**settings)
        found = plugin.load("pruners", "magnitude").prune(pruner.settings, context)
        left = latency.widths_left(context.graph, found.channels)
        shares[of] = table.time(left) / table.networks[0].ms
        assert abs(found.notes["latency_left_reached"] - 0.3) < 0.03
    assert abs(shares["dense"] - 0.3) < 0.03
    assert abs(shares["given"] - 0.3 * 0.6) < 0.03


def test_filters_and_scales_reach_a_latency_too():
    model = secateur_vgg()
    table = by_macs(model, image())
    by_filter = pruned(table, model, granularity="filter")
    slimming = secateur.pruners.network_slimming(target={"latency": 0.5})
    for result in (by_filter, secateur.prune(model, image(4), slimming, latency=table)):
        assert abs(result.notes["latency_left_reached"] - 0.5) < 0.05


def secateur_vgg():
    """Convolutions with norms that have different scales."""
    torch.manual_seed(0)
    layers, width = [], 3
    for out in (16, 24, 16):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    for norm in model[1::3][:3]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


def test_heads_mlp_widths_and_the_embedding_reach_a_latency_together():
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 2, 3, 24, 96, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)  # with zeros, all channels would be dead
    table = by_macs(model, image())
    block = "encoder.layers.encoder_layer_0"
    assert f"{block}.self_attention.in_proj_weight" in table.layers
    result = pruned(table, model, target={"latency": 0.25})
    macs = cost.macs(result.model, image()) / cost.macs(model, image())
    assert result.notes["latency_left_reached"] == pytest.approx(macs, rel=1e-9)
    assert result.model.get_submodule(f"{block}.self_attention").num_heads < 3
    assert result.model.get_submodule(f"{block}.mlp.0").out_features < 96
    assert result.model.conv_proj.out_channels < 24


# ---- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_one_line():
    with pytest.raises(SettingsError, match=r"^latency: target = \{latency: 0\.5\} needs the"):
        pruned(None)
    with pytest.raises(SettingsError, match=r"target: latency needs whole channels"):
        secateur.pruners.magnitude(granularity="weight", target={"latency": 0.5})
    for share in (0, 1, "half"):
        with pytest.raises(SettingsError, match=r"target\.latency"):
            secateur.pruners.magnitude(granularity="group", target={"latency": share})
    table = by_macs(net(), image())
    with pytest.raises(PruningError, match=r"layer 0 is not in the table of measured layers"):
        pruned(table, secateur_vgg())
    narrow = secateur.prune(net(), image(), secateur.pruners.magnitude(ratios={"mlp": 0.5}))
    wide = r"layer mlp has 24 outputs and 16 inputs, and was measured with at most 12 and 16: the"
    with pytest.raises(PruningError, match=wide):
        pruned(by_macs(narrow.model, image()))
    larger = by_macs(net(), torch.randn(1, 3, 2 * SIDE, 2 * SIDE))
    count = (SIDE // 2) ** 2  # the stem has a stride of 2
    size = rf"layer stem was measured with {4 * count} positions and has {count}: .* another size"
    with pytest.raises(PruningError, match=size):
        pruned(larger)
    for argument in (
        {"runtime": "tvm"}, {"batch": 0}, {"batch": "a"}, {"batch": 1.5}, {"batch": True},
        {"threads": 0}, {"repeats": 2}, {"images": image().to("meta")}, {"model": 3},
        {"images": image().double()}, {"images": image().half()},
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=f"^{next(iter(argument))}"):
            secateur.measure_latency(**{"model": net(), "images": image(), **argument})
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(PruningError, match=rf"^model: stem.weight is {dtype}; call"):
            secateur.measure_latency(net().to(dtype), image())


def params_with(monkeypatch, runtime):
    read = settings.read()
    pruners = {"magnitude": {"granularity": "group", "target": {"latency": 0.5}}}
    changed = {
        "arch": "resnet_cifar", "penalty": "none", "pruner": "magnitude", "pruners": pruners,
        "archs": {"resnet_cifar": {"depth": 8}},
        "prune": read.prune.model_copy(update={"latency": runtime}),
    }  # fmt: skip
    monkeypatch.setattr(settings, "read", lambda: read.model_copy(update=changed))
    classes, shape = [str(n) for n in range(10)], [1, 8, 8]
    return DatasetInfo(
        name="digits", classes=classes, shape=shape, mean=[0.0], std=[1.0], hash="", counts={}
    )


def test_before_the_first_training_a_missing_table_or_runtime_is_one_line(monkeypatch):
    """A table not measured yet is no error: the stage `latency` measures it before prune."""
    preflight.check_settings(params_with(monkeypatch, "torch"))
    with pytest.raises(SettingsError, match=r"pruners\.magnitude\.target.*prune\.latency"):
        preflight.check_settings(params_with(monkeypatch, "none"))

    def missing(module, purpose, group=None):
        raise SecateurError(f"{module} is needed {purpose} and is not installed")

    info = params_with(monkeypatch, "openvino")
    monkeypatch.setattr(optional, "load", missing)
    with pytest.raises(SecateurError, match=r"is not installed"):
        preflight.check_settings(info)


# ---- measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_network_is_measured_pruned_and_measured_again(runtime, monkeypatch, capsys):
    """Times vary and are not compared; all layers are there, and the check reports a time."""
    if runtime != "torch":
        pytest.importorskip(runtime)
        pytest.importorskip("onnxscript")
    for name, value in {"PARTS": (0.5, 1.0), "NETWORKS": (0.5,), "LAYER_REPEATS": 1}.items():
        monkeypatch.setattr(layer_times, name, value)
    monkeypatch.setattr(latency_check, "REPEATS", 3)
    model = net()
    table = secateur.measure_latency(model, image(), runtime, repeats=3)
    assert list(table.layers) == [*latency.widths_left(build_channel_graph(model, image()), {})]
    assert table.layers["stem"].inputs == (3,)
    assert table.layers["inner"].outputs == (16, 32)
    assert table.layers["depthwise"].inputs == (32,)
    assert table.layers["head"].outputs == (5,)
    assert table.layers["stem"].positions == 16
    dense, half = table.networks
    assert dense.widths["inner"] == (32, 16)
    assert half.widths["inner"] == (16, 8)
    assert runtime in table.versions
    times = latency_check.check(table, model, model, image())
    assert times["latency_left_measured"] == times["latency_ms"] / times["latency_ms_before"]
    assert f"ms in {runtime}, 1 thread, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("of", ["given", "dense"])
def test_the_stage_measures_the_share_that_the_target_asks_for(of, monkeypatch, tmp_path):
    """Without a branch, and in a further round, the share is of another network than the first."""
    monkeypatch.setattr(
        layer_times,
        "compare",
        lambda networks, example, **_: {k: cost.macs(m, example) for k, m in networks.items()},
    )
    shape, classes = (3, SIDE, SIDE), ["a", "b", "c"]
    header = checkpoint.Header(
        "resnet_cifar", {"depth": 14}, classes, shape, [0.5] * 3, [0.5] * 3, "", "made up"
    )
    torch.manual_seed(0)
    dense = checkpoint.build_architecture(header).eval()
    by_macs(dense, image()).save(tmp_path / "torch.json")
    labels = torch.arange(60) % 3
    split = dataset.InMemoryImages(torch.randint(256, (60, *shape), dtype=torch.uint8), labels)
    data = dataset.prepare(
        "toy", dataset.Images(split, split, classes, (0.5,) * 3, (0.5,) * 3), 0, 0
    )
    magnitude = plugin.load("pruners", "magnitude")
    target = {"latency": 0.4, "of": of}
    own = magnitude.Settings(granularity="group", target=target)
    start = SimpleNamespace(masks={}, choices={}, header=header, model=lambda: copy.deepcopy(dense))
    context = SimpleNamespace(
        params=SimpleNamespace(
            pruner="magnitude", chosen=lambda _: own,
            prune=Prune(branches=["layer1.1"], latency="torch"),
        ),
        data=data, start=start, header=lambda parent, **notes: notes,
        stage=SimpleNamespace(input=lambda path: tmp_path / path.split("/")[1]),
    )  # fmt: skip
    metrics = prune_stage.prune(context).metrics
    assert metrics["latency_left_reached"] == pytest.approx(0.4, abs=0.03)
    assert metrics["latency_left_measured"] == pytest.approx(metrics["latency_left_reached"])


def test_the_layer_that_is_measured_is_the_one_in_the_network():
    """Module and ONNX model of a measured layer have the sizes of the layer in the network."""
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 1), 2, (1, 0), 1, bias=False), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 1, 2, 2, groups=8), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding="same", groups=2), nn.Flatten(), nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip
    graph = build_channel_graph(model, image())
    shapes = layer_times._shapes(model, graph, image())
    x = image()
    for name, layer in model.named_children():
        before, x = x, layer(x)
        if name not in shapes:
            continue
        (shape,) = shapes[name]
        made = layer_times._module(shape)
        assert made.weight.shape == layer.weight.shape
        assert made(before).shape == x.shape
        content = layer_times._onnx_layer(shape, made, tuple(before.shape))
        found = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), strict_mode=True)
        sizes = [d.dim_value for d in found.graph.output[0].type.tensor_type.shape.dim]
        assert sizes == list(x.shape)
        if shape.kernel:
            assert shape.positions == x[0, 0].numel()
