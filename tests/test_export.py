"""Exported files: correct for every architecture, reproducible to the byte, free of pickles."""

import copy
import importlib.util
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cutting import at_random, randomise
from test_channels_zoo import SMALL, graph
from torch import nn

from secateur.archs import resnet_slim, vgg
from secateur.base import files, machine, optional, plugin
from secateur.base.errors import CheckpointError, SecateurError
from secateur.base.sections import ExportedFiles
from secateur.channels.graph import build_channel_graph
from secateur.data.dataset import DatasetInfo, InMemoryImages
from secateur.deploy import export, latency, metadata, parity, pt2_archive, quantisation, runtimes
from secateur.deploy.export import PixelNetwork
from secateur.deploy.metadata import Metadata
from secateur.deploy.runtimes import open_model
from secateur.nn import cost
from secateur.nn.layers import ChannelSelect, IndexedConv2d
from secateur.pruning import removal
from stages.export import __main__ as stage

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_registry")
ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["a", "b", "c", "d"]
SMALLEST = [
    ("lenet300", {"hidden": [9, 7]}, (1, 8, 8)),
    ("lenet5", {"filters": [5, 6], "hidden": 8}, (1, 8, 8)),
    ("resnet_cifar", {"depth": 8}, (3, 7, 9)),  # a shortcut that pads with zeros
    ("preresnet", {"depth": 8, "block": "basic"}, (3, 8, 8)),
    ("resnet_slim", {"depth": 18}, (3, 8, 8)),
    ("resnext", {"depth": 11, "cardinality": 4, "base_width": 4, "widen": 1}, (3, 8, 8)),
    ("wide_resnet", {"depth": 10, "widen": 1}, (3, 8, 8)),
    ("densenet", {"depth": 7, "growth": 4}, (3, 8, 8)),
    ("condensenet", {"stages": [1, 1, 1], "growth": [2, 4, 8], "groups": 2}, (3, 8, 8)),
    ("vgg", {"depth": 11, "pools": [1, 2, 4]}, (3, 8, 8)),
    ("airbench", {"entrance": 5, "widths": [8, 6, 7]}, (3, 9, 10)),
    ("alexnet_cifar", {}, (3, 32, 32)),
    ("torchvision", {"name": "squeezenet1_1"}, (3, 32, 32)),
]
"""Every architecture with few layers: each export takes a tenth of a second."""


def about(shape, **changes):
    fields = {
        "classes": CLASSES, "shape": list(shape), "mean": [0.4], "std": [0.2], "resize": None,
        "preprocessing": "outside", "sha256": "0" * 64, "arch": "any", "split": "s",
    }  # fmt: skip
    return Metadata(**(fields | changes))


def pictures(shape, count=9, seed=0):
    """A split of random pixels, and its description."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, *shape[1:], shape[0]), generator=chance, dtype=torch.uint8)
    labels = torch.randint(4, (count,), generator=chance)
    split = InMemoryImages.from_pixels(pixels, labels)
    info = DatasetInfo("x", CLASSES, list(shape), [0.4], [0.2], "s", {"test": count})
    return split, info


def proved(model, shape, folder, **options):
    """Write both files, open them, and compare them with the network."""
    return compared(model, shape, export.write(model, shape, about(shape), folder), **options)


def compared(model, shape, paths, **options):
    """Open both files and compare them with the network."""
    opened = {path.name: open_model(path) for path in paths.values()}
    third = {"openvino": open_model(paths[".onnx"], "openvino")}
    found = parity.verify(model, opened | third, *pictures(shape), **options)
    assert set(found) == {"model.onnx", "model.pt2", "openvino"}
    for result in found.values():
        assert 0 <= result.difference <= 1e-5 and result.ties == 0
    return opened


def test_every_architecture_is_here():
    own = {arch for arch, *_ in SMALLEST}
    assert own == set(plugin.names("archs")) - {"module", "timm"}, "module is the user's own code"


def settled(model, shape):
    """The network with batch-norm statistics of random images, so that its outputs differ between
    images, like those of a trained network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the only batch
    with torch.no_grad():
        model.train()(torch.from_numpy(noise(shape, 64)))
    return model.eval()


def noise(shape, count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def forms(rows):
    """Parametrize the fixture `form` with these networks."""
    return pytest.mark.parametrize("form", rows, ids=str, indirect=True)


QUICK = {"lenet5", "resnet_cifar", "resnext", "densenet", "condensenet"}
"""Only these are quantised to int8 in every run, since it takes a second each: they cover shortcuts
padded with zeros, groups and concatenations."""


@pytest.fixture(scope="module")
def forms_made():
    """Cache of `form` by its parameter: several tests use a form, not in succession."""
    return {}


@pytest.fixture
def form(request, forms_made, tmp_path_factory):
    """A network of the zoo, the shape of its images, and its files, which must not be changed."""
    key = str(request.param)
    if key not in forms_made:
        forms_made[key] = make_form(request.param, tmp_path_factory.mktemp(request.param[0]))
    return forms_made[key]


def make_form(row, folder):
    """Build the network and its files; small versions of the two largest families."""
    arch, chosen, shape = row
    with pytest.MonkeyPatch.context() as patch:
        if row in SMALLEST:
            patch.setattr(vgg, "WIDTHS", tuple(width // 8 for width in vgg.WIDTHS))
            patch.setattr(resnet_slim, "WIDTH", resnet_slim.WIDTH // 8)
            patch.setitem(resnet_slim.COUNTS, 18, (2, 1, 1, 1))
        model = settled(graph(arch, chosen, shape, seed=2).float(), shape)
    return model, shape, export.write(model, shape, about(shape), folder)


@forms(SMALLEST)
def test_both_files_of_every_network_compute_what_it_computes(form):
    compared(*form)


@forms([row for row in SMALLEST if row[0] in QUICK])
def test_int8_of_every_network_computes_nearly_the_same_in_both_runtimes(form):
    check_int8(*form)


@pytest.mark.slow
@forms([*SMALL, *(row for row in SMALLEST if row[0] not in QUICK)])
def test_all_files_of_the_larger_forms(form):
    compared(*form)
    check_int8(*form)


def check_int8(model, shape, paths):
    """Rounding activations to 255 steps and weights to 127 causes errors of a tenth to a quarter of
    the differences between images; wrong zero points or saturated sums cause more than 100 %."""
    source = paths[".onnx"]
    target = source.with_name("int8.onnx")
    quantisation.quantise(source, target, noise(shape, 64))
    images = noise(shape, 50, seed=1)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(images)).numpy()
    for runtime in runtimes.for_file(target):
        error = open_model(target, runtime)(images) - wanted
        error, spread = error - error.mean(axis=0), wanted - wanted.mean(axis=0)
        assert 0 < np.linalg.norm(error) < 0.35 * np.linalg.norm(spread), runtime


TIMM = [("test_efficientnet", 64)]
LARGER_TIMM = [
    *(
        (f"test_{name}", 64)
        for name in ("resnet", "convnext", "byobnet", "mambaout", "efficientnet_gn")
    ),
    *((name, 64) for name in ("resnet18", "mobilenetv3_small_050", "regnetx_002", "densenet121")),
    *((name, 64) for name in ("convnext_atto", "resnext26ts", "efficientnet_lite0")),
    ("deit_tiny_patch16_224", 32),
]


def check_pruned_timm(name, side, folder):
    """Both files of a timm network from which random channels were removed."""
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    shape = (3, side, side)
    model, batch = graph("timm", {"name": name}, shape), torch.randn(2, *shape).double()
    found = build_channel_graph(model, batch)
    small = removal.remove(model, at_random(found, 3), batch).model
    assert cost.parameters(small) < cost.parameters(model)
    proved(small.float(), shape, folder)


@pytest.mark.parametrize(("name", "side"), TIMM)
def test_both_files_of_pruned_networks_of_timm(name, side, tmp_path):
    check_pruned_timm(name, side, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), LARGER_TIMM)
def test_both_files_of_larger_pruned_networks_of_timm(name, side, tmp_path):
    check_pruned_timm(name, side, tmp_path)


def after_surgery():
    """A network without some channels: its shortcut selects channels and puts zeros between."""
    shape = (3, 8, 8)
    model = graph("resnet_cifar", {"depth": 8}, shape)
    batch = torch.randn(2, *shape, dtype=torch.float64)
    found = build_channel_graph(model, batch)
    model = removal.remove(model, at_random(found, 3), batch).model
    selects = [m for m in model.modules() if isinstance(m, ChannelSelect)]
    assert any(m._zeros and m._padding is None for m in selects), "not only padding"
    return model


def with_groups():
    """Group convolutions with an index before them, after them, and on both sides."""
    chance = torch.Generator().manual_seed(4)
    layers = [ChannelSelect([0, 1, 2, 0, 1, 2])]
    for ends in ((True, False), (False, True), (True, True)):
        order = [torch.randperm(6, generator=chance) if end else None for end in ends]
        weight = torch.randn(6, 3, 3, 3, generator=chance)
        layers += [IndexedConv2d.from_conv(nn.Conv2d(6, 6, 3), weight, None, 2, *order), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(6, 4))


@pytest.mark.parametrize("make", [after_surgery, with_groups])
def test_both_files_of_a_network_after_surgery_and_with_group_convolutions(make, tmp_path):
    proved(make().float(), (3, 8, 8), tmp_path)


def small():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(1), nn.Linear(4 * 16, 4))
    return randomise(model, 3).eval()


SHAPE = (3, 6, 6)


def test_pixels_are_normalised_inside(tmp_path):
    """From pixels, the file computes what the network computes from normalised images."""
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    opened = proved(PixelNetwork(small(), mean, std), SHAPE, tmp_path, pixels=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *SHAPE)).astype(np.float32)
    images = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    with torch.no_grad():
        wanted = small().double()(torch.from_numpy(images)).numpy()
    for run in opened.values():
        np.testing.assert_allclose(run(pixels), wanted, rtol=0, atol=1e-5 * abs(wanted).max())


def test_equal_networks_are_equal_bytes_without_paths_of_this_machine(tmp_path):
    written = []
    for _ in range(2):
        program = export.trace(small(), SHAPE)
        said = about(SHAPE)
        written.append((export.onnx_bytes(program, said), export.pt2_bytes(program, said)))
        torch.manual_seed(len(written))
    assert written[0] == written[1]
    for content in written[0]:
        assert b"site-packages" not in content and str(ROOT).encode() not in content
    other = small()
    with torch.no_grad():
        other[4].bias[0] += 1
    program = export.trace(other, SHAPE)
    assert export.onnx_bytes(program, about(SHAPE)) != written[0][0]
    assert export.pt2_bytes(program, about(SHAPE)) != written[0][1]


def test_the_network_is_left_as_it_is():
    model = small().double().train()
    before = copy.deepcopy(model.state_dict())
    export.trace(model, SHAPE)
    assert model.training and model[0].weight.dtype == torch.float64
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    said = about(SHAPE, classes=["ä", "b c", '"', "d"], experiment="one", resize=7)
    return export.write(small(), SHAPE, said, folder), said


def test_both_files_say_what_they_are(exported):
    paths, said = exported
    assert [metadata.read(path) for path in paths.values()] == [said, said]


def test_an_onnx_file_is_described_for_those_who_know_only_onnx(exported):
    import onnx

    model = onnx.load(exported[0][".onnx"])
    onnx.checker.check_model(model, full_check=True)
    (images,), (logits,) = model.graph.input, model.graph.output
    sizes = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, sizes) == ("images", ["batch", *SHAPE])
    sizes = [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim]
    assert (logits.name, sizes) == ("logits", ["batch", 4])
    keys = [entry.key for entry in model.metadata_props]
    assert keys == sorted(keys) and {"classes", "mean", "std", "sha256"} <= set(keys)


# ---- wrong outputs and invalid files -----------------------------------------------------------


def test_a_file_of_another_network_is_noticed(tmp_path, exported):
    opened = {path.name: open_model(path) for path in exported[0].values()}
    other = small()
    with torch.no_grad():
        other[4].weight[2, 5] += 0.001
    with pytest.raises(SecateurError, match=r"model.onnx: outputs differ .* nothing was written"):
        parity.verify(other, opened, *pictures(SHAPE))


def in_a_stage(**settings):
    """The parts of the context that the stage reads, for the network `small`."""
    split, info = pictures(SHAPE)
    return SimpleNamespace(
        params=SimpleNamespace(export=ExportedFiles(latency_repeats=3, **settings)),
        data=SimpleNamespace(test=split, info=info),
        last=lambda _stage: SimpleNamespace(model=small),
    )


def test_a_file_is_proved_in_every_runtime_in_which_it_is_timed(exported, monkeypatch):
    context = in_a_stage(runtimes=("torch", "openvino"))
    row = stage.prove(context, small(), exported[0])
    assert set(row) == {"model.onnx", "model.pt2"}
    found = row["model.onnx"].pop("openvino")
    assert set(found) == {"difference", "accuracy", "ties"} and found["difference"] < 1e-5
    for name, entry in row.items():
        assert set(entry) == {"bytes", *found} and entry["accuracy"] == found["accuracy"]
        assert entry["bytes"] == exported[0][Path(name).suffix].stat().st_size
    exact = runtimes.RUNTIMES["openvino"]
    wrong = replace(exact, open=lambda *given: lambda images: 2 * exact.open(*given)(images))
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", wrong)
    with pytest.raises(SecateurError, match=r"model.onnx in OpenVINO: outputs differ"):
        stage.prove(context, small(), exported[0])
    stage.prove(in_a_stage(runtimes=("torch",)), small(), exported[0])  # no check in OpenVINO then


def test_times_are_of_the_processor_and_of_batches_larger_than_the_test_set(exported, monkeypatch):
    monkeypatch.setattr(machine, "hardware", lambda: "a GPU")
    monkeypatch.setattr(latency, "thread_counts", lambda: [1])
    context = in_a_stage(runtimes=("torch",), latency_batches=(2, 12))
    report = {
        name: stage.prove(context, small(), exported[0]) for name in ("baseline", "finetuned")
    }
    rows = stage.compare(context, dict.fromkeys(("baseline", "finetuned"), exported[0]), report)
    assert report["hardware"] == machine.cpu_name()
    assert {row["batch"] for row in rows} == {2, 12}
    assert set(report["finetuned"]["csr"]["threads_1"]) == {"batch_2", "batch_12"}


class Late(nn.Module):
    """Correct for the images whose outputs are compared, wrong for a later one."""

    def __init__(self, model, bad):
        super().__init__()
        self.model, self.bad = model, bad

    def __call__(self, images):
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(images)).numpy().copy()
        same = (np.abs(images - self.bad) < 1e-6).all((1, 2, 3))
        logits[same] = -logits[same]
        return logits


def test_one_image_of_another_class_is_noticed_wherever_it_is():
    split, info = pictures(SHAPE, count=300)
    images = next(parity.sequential_batches(split, info, device=torch.device("cpu")))[0]
    wrong = Late(small(), images[290].numpy())  # only the first 256 images are compared by outputs
    with pytest.raises(SecateurError, match=r"f: predicts another class .* 1 images"):
        parity.verify(small(), {"f": wrong}, split, info)
    right = Late(small(), np.full(SHAPE, 9.0, np.float32))
    assert parity.verify(small(), {"f": right}, split, info)["f"].difference < 1e-5


def test_equal_outputs_are_ties_and_no_difference():
    """If two classes differ only by rounding, either one may be predicted."""
    model = small()
    with torch.no_grad():
        model[4].weight[1], model[4].bias[1] = model[4].weight[0], model[4].bias[0]
        model[4].bias[:2] += 100

    def swapped(images):
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()[:, [0, 1, 2, 3]] * np.float32(
                [1, 1 + 1e-6, 1, 1]
            )

    split, info = pictures(SHAPE)
    found = parity.verify(model, {"f": swapped}, split, info)["f"]
    assert found.ties == 9 and found.difference < 2e-6


def test_a_network_that_cannot_be_traced_is_one_line(tmp_path):
    class Wilful(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(SecateurError, match="the network cannot be exported: ") as error:
        export.write(Wilful(), SHAPE, about(SHAPE), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_nothing_in_the_archive_is_a_pickle(exported):
    with zipfile.ZipFile(exported[0][".pt2"]) as archive:
        for item in archive.infolist():
            content = archive.read(item)
            assert not content.startswith((b"PK", b"\x80")), item.filename
            assert b'"use_pickle": true' not in content
    pt2_archive.check(exported[0][".pt2"])


def with_example(path, _source):
    program = torch.export.export(small(), (torch.zeros(2, *SHAPE),))
    torch.export.save(program, path)


def with_file(name):
    def change(path, source):
        path.write_bytes(source.read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"\x80\x04.")

    return change


def with_flag(path, source):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item).replace(b'"use_pickle": false', b'"use_pickle": true')
            new.writestr(item.filename, content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_example, "example inputs as a pickle"),
        (with_file("archive/data/constants/custom_obj_0"), "custom_obj_0'?, which may be a pickle"),
        (with_file("elsewhere/model.pt"), "not an archive of torch.export"),
        (with_flag, "is a pickle; pickles are never loaded"),
        (lambda path, _: torch.save({"a": 1}, path), "not an archive of torch.export"),
        (lambda path, _: path.write_bytes(b"PK\x03\x04"), "cannot be opened"),
    ],
)
def test_an_archive_with_a_pickle_is_never_loaded(change, reason, tmp_path, exported):
    path = tmp_path / "model.pt2"
    change(path, exported[0][".pt2"])
    with pytest.raises(CheckpointError, match=reason) as error:
        open_model(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_file_of_others_has_no_metadata(tmp_path, exported):
    import onnx

    model = onnx.load(exported[0][".onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="no metadata of Secateur"):
        metadata.read(tmp_path / "model.onnx")
    model.metadata_props.add(key="secateur", value="0.1.0")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="its metadata cannot be read"):
        metadata.read(tmp_path / "model.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_before_anything_is_done(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SecateurError, match=rf"{missing} is needed .*{optional.INSTALL}"):
        export.check_packages()


# ---- all or nothing ----------------------------------------------------------------------------

KILLED = """
import os, pathlib, signal, sys
sys.path[:0] = [sys.argv[2]]
from secateur.base import files

def fill(folder):
    (folder / "model.onnx").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)

files.write_folder(pathlib.Path(sys.argv[1]), fill)
"""


@pytest.mark.parametrize("old", [True, False])
def test_a_kill_while_the_folder_is_filled_leaves_the_old_one(old, tmp_path):
    folder = tmp_path / "export"
    if old:
        files.write_folder(folder, lambda place: (place / "model.onnx").write_text("old"))
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(ROOT)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder.exists() == old
    if old:
        assert [file.read_text() for file in folder.iterdir()] == ["old"]
    assert len(list(tmp_path.glob(".export.*"))) == 1

    def while_another_writes(place):
        (place / "model.pt2").write_text("newer")
        files.write_folder(folder, lambda other: (other / "model.pt2").write_text("newest"))

    files.write_folder(folder, while_another_writes)
    assert [file.read_text() for file in folder.iterdir()] == ["newer"]
    assert list(tmp_path.iterdir()) == [folder], "the files left by the killed process are gone"


def test_an_error_while_the_folder_is_filled_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = tmp_path / "export"
    files.write_folder(folder, lambda place: (place / "a").write_text("old"))

    def fail(place):
        (place / "a").write_text("new")
        raise SecateurError("differs")

    with pytest.raises(SecateurError, match="differs"):
        files.write_folder(folder, fail)
    assert (folder / "a").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
    with pytest.raises(SecateurError, match=r"cannot be written: .*; nothing was changed"):
        files.write_folder(folder, lambda place: (place / "x/y").write_text(""))
    assert (folder / "a").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
