"""Weights to start from: every format, files of the original projects, mismatches, and DVC."""

import importlib.util
import json
import os
import re
import shutil
import sys
import types
from collections import Counter, defaultdict, deque
from datetime import date

import foreign_networks as foreign
import pytest
import safetensors.torch
import torch
from torch import nn
from workspace import ROOT, fresh_project

import secateur
from secateur.base import plugin, settings
from secateur.base.errors import CheckpointError, DataError, SecateurError, SettingsError
from secateur.base.torchvision_import import import_torchvision
from secateur.data import dataset
from secateur.data.dataset import Images, InMemoryImages
from secateur.nn import checkpoint, matching, weights
from secateur.nn.checkpoint import Header
from stages import baseline

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


def build(arch, classes=10, shape=CIFAR, **chosen):
    module = plugin.load("archs", arch)
    valid = settings.validate(module.Settings, chosen, f"archs.{arch}")
    with settings.section(f"archs.{arch}"):
        return module.build(valid, classes, shape)


def trained(model, seed=0):
    """The network with norm statistics, scales and biases that differ from their initial values."""
    chance = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_mean, module.running_var):
                tensor += 0.5 * torch.rand(tensor.shape, generator=chance)
            module.bias.data.normal_(generator=chance)
    return model.eval()


def load_into(model, path, arch=None, **options):
    """Read and match weights as baseline does; returns the network."""
    if arch:
        module = plugin.load("archs", arch[0])
        for names in ("aliases", "auxiliary"):
            if hasattr(module, names):
                options[names] = getattr(module, names)(module.Settings(**arch[1]))
    matching.fill(model, weights.read(path), **options)
    return model.eval()


def same(model, other, shape=CIFAR):
    """Whether both networks compute the same in float64."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.inference_mode():
        expected = other.double().eval()(images)
        found = model.double().eval()(images)
    return bool((found - expected).abs().max() <= 1e-9 * expected.abs().max())


# ----- the original projects ----------------------------------------------------------------------


def of_bearpaw(model, path):
    """bearpaw, DeepHoyer, gconv-prune: a training checkpoint, with the network in DataParallel."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = nn.DataParallel(model).state_dict()
    file = {"epoch": 3, "state_dict": state, "acc": 0.9, "best_acc": 0.91}
    torch.save({**file, "optimizer": optimizer.state_dict()}, path)


def of_bearpaw_before_torch_1_6(model, path):
    state = nn.DataParallel(model).state_dict()
    file = {"epoch": 3, "state_dict": state, "acc": torch.tensor(0.9), "best_acc": 0.91}
    torch.save(file, path, _use_new_zipfile_serialization=False)


def of_deephoyer(model, path):
    """MNIST: only the state dict."""
    torch.save(model.state_dict(), path)


def of_greg(model, path):
    """The pickled network next to its state dict."""
    if hasattr(model, "features"):
        model.features = nn.DataParallel(model.features)
    file = {"epoch": 2, "arch": "net", "model": model, "state_dict": model.state_dict()}
    torch.save({**file, "acc1": 93.0, "ExpID": "123", "prune_state": "finetune"}, path)


def of_classifier_pruner(model, path):
    torch.save({"model": model.state_dict(), "acc": 95.0, "epoch": 99}, path)


MASK, INDEXED = foreign.MaskConv2d, foreign.GroupConv2d
ORIGINALS = {
    "bearpaw-resnet": (
        lambda: foreign.ResNet((16, 32, 64), 1, "downsample", "fc"),
        of_bearpaw, "model_best.pth.tar", "resnet_cifar", {"depth": 8, "shortcut": "B"},
    ),
    "bearpaw-resnet-of-2018": (
        lambda: foreign.ResNet((16, 32, 64), 1, "downsample", "fc"),
        of_bearpaw_before_torch_1_6, "model_best.pth.tar", "resnet_cifar",
        {"depth": 8, "shortcut": "B"},
    ),
    "bearpaw-preresnet": (
        foreign.PreResNet, of_bearpaw, "checkpoint.pth.tar", "preresnet", {"depth": 11},
    ),
    "bearpaw-wrn": (
        foreign.WideResNet, of_bearpaw, "model_best.pth.tar", "wide_resnet",
        {"depth": 16, "widen": 2},
    ),
    "bearpaw-resnext": (
        foreign.ResNeXt, of_bearpaw, "model_best.pth.tar", "resnext",
        {"depth": 20, "cardinality": 2, "base_width": 4, "widen": 2},
    ),
    "bearpaw-densenet": (
        lambda: foreign.DenseNet(foreign.DenseBottleneck, 2, 6, 12, 0.5),
        of_bearpaw, "model_best.pth.tar", "densenet",
        {"depth": 16, "growth": 6, "bottleneck": True, "compression": 0.5},
    ),
    "bearpaw-vgg-bn": (
        lambda: foreign.VGG((1, 1, 2, 2, 2), True, 5),
        of_bearpaw, "model_best.pth.tar", "vgg", {"depth": 11},
    ),
    "bearpaw-vgg": (
        lambda: foreign.VGG((1, 1, 2, 2, 2), True, 5, norm=False),
        of_bearpaw, "model_best.pth.tar", "vgg", {"depth": 11, "batch_norm": False},
    ),
    "bearpaw-alexnet": (foreign.AlexNet, of_bearpaw, "model_best.pth.tar", "alexnet_cifar", {}),
    "deephoyer-lenet300": (foreign.LeNet300, of_deephoyer, "elt_0.0_0.pth", "lenet300", {}),
    "deephoyer-lenet5": (foreign.LeNet5, of_deephoyer, "elt_0.0_0.pth", "lenet5", {}),
    "greg-resnet": (
        lambda: foreign.ResNet((16, 32, 64), 1, "downsample", "linear", pad=True),
        of_greg, "checkpoint_best.pth", "resnet_cifar", {"depth": 8},
    ),
    "greg-vgg": (
        lambda: foreign.VGG((1, 1, 2, 2, 2), False, 4),
        of_greg, "checkpoint_best.pth", "vgg", {"depth": 11, "bias": False, "pools": [1, 2, 3, 4]},
    ),
    "classifier-pruner-resnet": (
        lambda: foreign.ResNet((64, 128, 256, 512), 2, "shortcut", "linear"),
        of_classifier_pruner, "last.pth", "resnet_slim", {"depth": 18},
    ),
    "classifier-pruner-vgg": (
        lambda: foreign.VGG((1, 1, 2, 2, 2), True, 5),
        of_classifier_pruner, "best.pth", "vgg", {"depth": 11},
    ),
    "gconv-preresnet": (
        lambda: foreign.PreResNet(MASK), of_bearpaw, "model_best.pth.tar", "preresnet",
        {"depth": 11},
    ),
    "gconv-densenet": (
        lambda: foreign.DenseNet(foreign.DenseBasic, 2, 4, 16, 1.0, MASK),
        of_bearpaw, "model_best.pth.tar", "densenet", {"depth": 10, "growth": 4},
    ),
    "gconv-condensenet": (
        lambda: foreign.CondenseNet((2, 2), (4, 8), MASK),
        of_bearpaw, "model_best.pth.tar", "condensenet", {"stages": [2, 2], "growth": [4, 8]},
    ),
    "gconv-condensenet-indexed": (
        lambda: foreign.CondenseNet((2, 2), (4, 8), INDEXED),
        of_bearpaw, "model_best.pth.tar", "condensenet", {"stages": [2, 2], "growth": [4, 8]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINALS)
def test_files_of_the_original_projects_load_and_compute_the_same(name, tmp_path):
    make, save, file, arch, chosen = ORIGINALS[name]
    torch.manual_seed(0)
    original = trained(make())
    for module in original.modules():
        if isinstance(module, MASK):  # a network pruned by gconv-prune
            module.mask.data[torch.rand(module.mask.shape) < 0.3] = 0
    save(original, tmp_path / file)
    shape = MNIST if arch.startswith("lenet") else CIFAR
    model = load_into(build(arch, shape=shape, **chosen), tmp_path / file, (arch, chosen))
    assert same(model, original, shape)


def test_indices_that_change_the_order_of_channels_are_refused(tmp_path):
    original = foreign.CondenseNet((2, 2), (4, 8), INDEXED)
    original.features.denseblock_1[0].conv1.ind_in.data = torch.arange(7, -1, -1)
    of_bearpaw(original, tmp_path / "a.pth.tar")
    chosen = {"stages": [2, 2], "growth": [4, 8]}
    with pytest.raises(CheckpointError, match=r"ind_in changes the order of channels"):
        load_into(build("condensenet", **chosen), tmp_path / "a.pth.tar", ("condensenet", chosen))


# ----- formats ------------------------------------------------------------------------------------


class Small(nn.Module):
    """Has a layer named `module`, which is also the name that wrappers use."""

    def __init__(self, classes=3):
        super().__init__()
        self.module = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.fc(self.norm(self.module(x)).relu().mean((2, 3)))


def safe(model, path):
    safetensors.torch.save_file(model.state_dict(), path)


def sharded(model, folder):
    folder.mkdir()
    parts, table = {"a.safetensors": {}, "b.safetensors": {}}, {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        file = list(parts)[number % 2]
        parts[file][name], table[name] = tensor, file
    for file, tensors in parts.items():
        safetensors.torch.save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def with_prefix(prefix, **around):
    def save(model, path):
        state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({key: state if value is None else value for key, value in around.items()}, path)

    return save


class Loss(nn.Module):
    """A class that is missing when the file is read."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def lightning(model, path):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    file = {"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 1, "callbacks": {}}
    torch.save({**file, "pytorch-lightning_version": "2.5", "loops": {"fit": Loss()}}, path)


FORMATS = {
    "state dict": lambda model, path: torch.save(model.state_dict(), path),
    "before torch 1.6": lambda model, path: torch.save(
        model.state_dict(), path, _use_new_zipfile_serialization=False
    ),
    "safetensors": safe,
    "parts": sharded,
    "whole network": lambda model, path: torch.save(model, path),
    "whole network in DataParallel": lambda model, path: torch.save(nn.DataParallel(model), path),
    "DataParallel": lambda model, path: torch.save(nn.DataParallel(model).state_dict(), path),
    "torch.compile": with_prefix("_orig_mod.", model=None, step=1),
    "both": with_prefix("module._orig_mod.", net=None),
    "Lightning": lightning,
    "a name of one's own": with_prefix("encoder.backbone.", network=None),
    "half": lambda model, path: torch.save(
        {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}, path
    ),
    "without counters": lambda model, path: torch.save(
        {n: t for n, t in model.state_dict().items() if not n.endswith("tracked")}, path
    ),
    "with counters of thop": lambda model, path: torch.save(
        {**model.state_dict(), "fc.total_ops": torch.zeros(1), "total_params": torch.ones(1)}, path
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_network_in_python_too(name, tmp_path):
    torch.manual_seed(0)
    original = trained(Small())
    FORMATS[name](original, tmp_path / "w")
    if name == "half":
        original = original.half().float()
    model = secateur.load(tmp_path / "w", into=Small())
    assert not model.training
    assert same(model, original, (3, 8, 8))


@pytest.mark.parametrize("keep", ["first", "second", "both"])
def test_a_shared_tensor_may_have_one_of_its_names_in_the_file(keep, tmp_path):
    """As in files of safetensors' save_model, which keeps the first."""

    def tied():
        model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        model.second.weight = model.first.weight
        return model

    original, model = tied(), tied()
    drop = {"first": "second.weight", "second": "first.weight"}.get(keep)
    tensors = {name: t.clone() for name, t in original.state_dict().items() if name != drop}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    matching.fill(model, weights.read(tmp_path / "w.safetensors"))
    assert model.first.weight is model.second.weight
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_what_was_loaded_in_python_can_be_pruned_saved_and_loaded(tmp_path):
    torch.save(trained(Small()).state_dict(), tmp_path / "a.pth")
    model = secateur.load(tmp_path / "a.pth", into=Small())
    images = torch.randn(2, 3, 8, 8)
    result = secateur.prune(model, images, secateur.pruners.magnitude(ratios=0.5))
    secateur.save(result, tmp_path / "small.safetensors")
    small = secateur.load(tmp_path / "small.safetensors", into=Small())
    assert small.module.out_channels == 2
    assert same(small, result.model, (3, 8, 8))


class Table(dict):
    """A dictionary whose keys are also attributes, as in yacs and EasyDict."""

    def __init__(self, **keys):
        super().__init__(**keys)
        self.__dict__.update(keys)


class Lines(list):
    """A list type with its own class."""


@pytest.mark.parametrize(
    "beside",
    [
        Table(lr=0.1, layers=Table(width=4, names=Lines(["a"]))),
        defaultdict(list, loss=[1.0, 2.0]),
        deque([1, 2, 3], maxlen=3),
        Lines([1, 2]),
        [defaultdict(deque, a=deque([1]), b=deque([2, 3])), Lines([Table(a=1)]), Counter("ab")],
    ],
    ids=lambda beside: type(beside).__name__,
)
def test_dictionaries_and_lists_of_any_class_may_stand_beside_the_weights(beside, tmp_path):
    state = Small().state_dict()
    torch.save({"history": beside, "state_dict": state, "more": beside}, tmp_path / "a.pth")
    found = weights.read(tmp_path / "a.pth").tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_weights_may_be_in_a_dictionary_of_any_class(tmp_path):
    state = Small().state_dict()
    torch.save(Table(get=2, model=Table(**state)), tmp_path / "a.pth")
    assert weights.read(tmp_path / "a.pth").tensors.keys() == state.keys()


def test_a_class_that_is_filled_as_dictionary_and_as_list_is_refused_in_one_line(tmp_path):
    class Both:
        def __reduce__(self):
            return Lines, (), None, iter([1]), iter([("a", 2)])

    torch.save({"state_dict": Small().state_dict(), "odd": Both()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="Can only SETITEM for dict"):
        weights.read(tmp_path / "a.pth")


def test_nothing_that_a_file_names_is_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    class Writes:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for number, hostile in enumerate((Runs(), Writes())):
        path = tmp_path / f"{number}.pth"
        torch.save({"state_dict": Small().state_dict(), "hook": hostile}, path)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        weights.read(tmp_path / "0.pth")
    assert weights.read(tmp_path / "1.pth").tensors
    assert not (tmp_path / "ran").exists()


# ----- mismatches ---------------------------------------------------------------------------------


def small_file(tmp_path, change):
    state = Small().state_dict()
    change(state)
    torch.save(state, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_all_that_does_not_fit_is_told_at_once_ten_names_of_each_at_most(tmp_path):
    def change(state):
        del state["fc.bias"]
        state["fc.weight"] = torch.zeros(7, 4)
        state.update({f"extra{number}": torch.zeros(1) for number in range(12)})

    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as told:
        load_into(model, small_file(tmp_path, change))
    line = str(told.value)
    assert "\n" not in line and line.startswith(f"{tmp_path}/a.pth: ")
    assert "1 missing: fc.bias;" in line
    assert "12 unexpected: extra0, extra1, " in line and "extra9, and 2 more;" in line
    assert line.endswith("1 of another shape: fc.weight 7x4, needs 3x4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"fc.bias": torch.tensor([1, 2, 3])}), r"fc\.bias holds torch\.int64"),
        (lambda s: s["fc.bias"].fill_(float("nan")), r"fc\.bias holds values that are not finite"),
        (lambda s: s.update({"fc.bias": torch.ones(3).to_sparse()}), "not an ordinary tensor"),
        (lambda s: s.update({"fc.bias": torch.ones(3, device="meta")}), "not an ordinary tensor"),
        (lambda s: s.pop("norm.running_mean"), r"1 missing: norm\.running_mean"),
    ],
)
def test_tensors_that_would_do_harm_are_refused(change, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        load_into(Small(), small_file(tmp_path, change))


def test_renamed_keys_may_be_of_tensors_or_modules_with_any_text(tmp_path):
    original = foreign.ResNet((16, 32), 1, "downsample", "head")
    state = {n.replace("layer", "stage"): t for n, t in original.state_dict().items()}
    torch.save({f"module.{n}": t for n, t in state.items()}, tmp_path / "a.pth")
    rename = {"stage*.downsample": "layer*.short", "stage*": "layer*", "head.bias": "fc.bias",
              "head.weight": "fc.weight"}  # fmt: skip
    model = foreign.ResNet((16, 32), 1, "short", "fc")
    assert same(load_into(model, tmp_path / "a.pth", rename=rename), original)
    with pytest.raises(CheckpointError, match="rename: 'haed' is the name of no tensor"):
        load_into(model, tmp_path / "a.pth", rename={**rename, "haed": "fc"})
    with pytest.raises(CheckpointError, match=r"module.bn1.bias .*: both become bn1.weight"):
        load_into(model, tmp_path / "a.pth", rename={**rename, "bn1.bias": "bn1.weight"})
    with pytest.raises(CheckpointError, match=r"rename: 'stage\*': 'layer' must have as many \*"):
        load_into(model, tmp_path / "a.pth", rename={"stage*": "layer"})


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "ema.0."])
def test_names_to_be_renamed_may_be_those_in_the_file(prefix, tmp_path):
    original = trained(Small())
    state = {n.replace("fc", "head"): t for n, t in original.state_dict().items()}
    torch.save({prefix + n: t for n, t in state.items()}, tmp_path / "a.pth")
    for rename in ({"head": "fc"}, {prefix + "head": "fc"}, {prefix + "head": prefix + "fc"}):
        model = load_into(Small(), tmp_path / "a.pth", rename=rename)
        assert same(model, original, (3, 8, 8))
    with pytest.raises(CheckpointError, match=r"2 missing: fc.weight, fc.bias"):
        load_into(Small(), tmp_path / "a.pth", rename={prefix + "head": "fd"})
    with pytest.raises(CheckpointError, match="is the name of no tensor"):
        load_into(Small(), tmp_path / "a.pth", rename={prefix + "haed": "fc"})


def test_a_reading_of_prefixes_in_which_names_meet_is_not_taken(tmp_path):
    """Without the prefix `a.` of most names, an alias would give two tensors the same name."""
    state = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2), "b.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "a.pth")
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    aliases = {"weight": "b.weight"}
    matching.fill(model, weights.read(tmp_path / "a.pth"), aliases=aliases)
    assert all(bool((tensor == 1).all()) for tensor in model.state_dict().values())


def damaged(content):
    """Contents that have none of the formats or are incomplete."""
    yield "text", b"weights"
    yield "empty", b""
    yield "no archive", b"PK\x03\x04" + bytes(50)
    yield "no pickle", b"\x80\x02nonsense."
    for share in (0.2, 0.9, 0.999):
        yield f"{share}", content[: int(share * len(content))]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_damaged_file_is_told_in_one_line(legacy, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(Small().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    for name, content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"^\S+/a\.pth: [^\n]+$") as told:
            weights.read(path)
        assert len(str(told.value)) < 400, name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "no weights in it"),
        ({"epoch": 1, "state_dict": {}}, "no weights in it"),
        (Loss().weight, "no weights in it"),
    ],
)
def test_a_file_without_weights_is_told(content, words, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words):
        weights.read(tmp_path / "a.pth")


def test_other_things_are_told(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "parts").mkdir()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "parts/model.safetensors.index.json").write_text(json.dumps(index))
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "script.pt")
    torch.save(Small(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name, words in [
        ("nothing.pth", "missing"),
        ("folder", r"neither model\.safetensors nor pytorch_model\.bin"),
        ("parts", "a table of file names"),
        ("script.pt", "torchscript"),
        ("old.pth", r"test_weights\.Small is pickled in it, in the format of torch before 1\.6"),
    ]:
        with pytest.raises(CheckpointError, match=words) as told:
            weights.read(tmp_path / name)
        assert "\n" not in str(told.value)


# ----- normalisation and image size --------------------------------------------------------------

TIMM = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 96, 64]}


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"config.json": {"architecture": "resnet18", "pretrained_cfg": TIMM}}, (96, 64)),
        ({"config.json": {"architecture": "resnet18", "num_classes": 5, **TIMM}}, (96, 64)),
        (
            {
                "config.json": {"model_type": "resnet"},
                "preprocessor_config.json": {
                    "image_mean": TIMM["mean"], "image_std": TIMM["std"],
                    "size": {"height": 96, "width": 64},
                },
            },
            (96, 64),
        ),
        ({"preprocessor_config.json": {"image_mean": TIMM["mean"], "image_std": TIMM["std"],
                                       "size": 96}}, (96, 96)),
        ({"preprocessor_config.json": {"image_mean": TIMM["mean"], "image_std": TIMM["std"],
                                       "size": {"shortest_edge": 96}}}, None),
    ],
)  # fmt: skip
def test_folders_of_the_hub_say_what_they_expect(files, size, tmp_path):
    safe(Small(), tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = weights.read(tmp_path)
    assert (found.mean, found.std, found.size) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), size)
    model = secateur.load(tmp_path, into=Small())
    assert model.preprocess == secateur.Preprocess((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


@pytest.mark.parametrize(
    "config",
    [{"mean": [0.5], "std": [0.1, 0.2]}, {"mean": "x", "std": [0]}, {"mean": [1e400], "std": [1]}],
)
def test_a_configuration_that_makes_no_sense_is_not_believed(config, tmp_path):
    safe(Small(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    assert (weights.read(tmp_path).mean, weights.read(tmp_path).std) == ((), ())


# ----- published weights --------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Empty caches of torch.hub and Hugging Face, and no network access."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(name, state, folder, monkeypatch):
    """Save a state dict where torchvision expects the published weights of `name`."""
    models = import_torchvision().models
    best = models.get_model_weights(name).DEFAULT
    torch.save(state, folder / "new")
    digest = weights.read(folder / "new").sha256[:8]
    (folder / "new").rename(folder / f"{name}-{digest}.pth")
    entry = types.SimpleNamespace(
        url=f"https://download.pytorch.org/models/{name}-{digest}.pth",
        transforms=best.transforms,
        meta=best.meta,
    )
    monkeypatch.setattr(
        models, "get_model_weights", lambda _name: types.SimpleNamespace(DEFAULT=entry)
    )
    return folder / f"{name}-{digest}.pth"


def published(arch, **chosen):
    module = plugin.load("archs", arch)
    with settings.section(f"archs.{arch}"):
        return module.published(module.Settings(**chosen))


def test_without_network_published_weights_are_one_clear_error(offline):
    with pytest.raises(DataError) as told:
        published("torchvision", name="squeezenet1_1")
    line = str(told.value)
    assert "\n" not in line
    assert str(offline) in line
    assert "https://download.pytorch.org/models/squeezenet1_1-" in line


def test_published_weights_bring_their_normalisation_and_size(offline, monkeypatch):
    model = build("torchvision", 1000, name="squeezenet1_1")
    publish("squeezenet1_1", model.state_dict(), offline, monkeypatch)
    found = published("torchvision", name="squeezenet1_1")
    assert found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)
    assert found.size == (224, 224)
    other = build("torchvision", 1000, name="squeezenet1_1")
    matching.fill(other, found)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_published_weights_with_more_or_other_names_are_understood(name, offline, monkeypatch):
    """Published densenets have the names of an earlier version, and googlenet has auxiliary heads.

    The architecture knows these names, so a user's file may have them too.
    """
    chosen = {"name": name, "transform_input": name == "googlenet"}
    with torch.device("meta"):
        model = build("torchvision", 1000, (3, 64, 64), **chosen)
    own = {n for n in model.state_dict() if not n.endswith("num_batches_tracked")}
    names = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", n) for n in own}
    if name == "googlenet":
        names.add("aux1.conv.conv.weight")
    assert names != own
    publish(name, {n: torch.zeros(1) for n in names}, offline, monkeypatch)
    found = published("torchvision", **chosen)
    module = plugin.load("archs", "torchvision")
    valid = module.Settings(**chosen)
    matched = matching.match(found.tensors, model.state_dict(), {}, module.aliases(valid))
    assert matched.sources.keys() == own
    assert all(n.startswith(module.auxiliary(valid)) for n in matched.unexpected)


def test_names_that_the_architecture_knows_are_understood_in_any_file(monkeypatch, tmp_path):
    state = {n.replace("fc", "head"): t for n, t in trained(Small()).state_dict().items()}
    torch.save({**state, "aux1.weight": torch.ones(1)}, tmp_path / "a.pth")
    arch = types.SimpleNamespace(aliases=lambda _: {"head": "fc"}, auxiliary=lambda _: ("aux",))
    monkeypatch.setattr(baseline.plugin, "load", lambda *_: arch)
    monkeypatch.setattr(baseline.checkpoint, "classifier", lambda _: frozenset())
    wanted = types.SimpleNamespace(head="keep", rename={})
    context = types.SimpleNamespace(
        params=types.SimpleNamespace(baseline=wanted, chosen=lambda _: None)
    )
    header = Header("", {}, ["a", "b", "c"], [3, 8, 8], [0.0], [1.0], "", "baseline")
    model = Small()
    baseline._fill(model, header, weights.read(tmp_path / "a.pth"), context)
    assert torch.equal(model.fc.weight, state["head.weight"])


def test_ported_weights_need_their_normalisation_in_the_network():
    line = r"archs\.torchvision\.transform_input = False: .* googlenet need true"
    with pytest.raises(SettingsError, match=line):
        published("torchvision", name="googlenet")


def test_an_overwritten_file_of_published_weights_is_noticed(offline, monkeypatch):
    """The name of the file contains the beginning of its hash."""
    state = build("torchvision", 1000, name="squeezenet1_1").state_dict()
    path = publish("squeezenet1_1", state, offline, monkeypatch)
    torch.save({**state, "classifier.1.bias": torch.ones(1000)}, path)
    with pytest.raises(CheckpointError, match="not the file that was published"):
        published("torchvision", name="squeezenet1_1")


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
class TestTimm:
    """With files in the layout of Hugging Face's cache."""

    NAME, COMMIT = "resnet10t.c3_in1k", "0" * 40

    @pytest.fixture
    def cache(self, offline, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(offline))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return offline

    def put(self, cache, state):
        """Store the file of a repository as `hf_hub_download` does."""
        repository = cache / f"models--timm--{self.NAME}"
        snapshot = repository / "snapshots" / self.COMMIT
        for folder in (repository / "refs", repository / "blobs", snapshot):
            folder.mkdir(parents=True)
        (repository / "refs/main").write_text(self.COMMIT)
        safetensors.torch.save_file(state, repository / "blobs/new")
        blob = repository / "blobs" / weights.read(repository / "blobs/new").sha256
        (repository / "blobs/new").rename(blob)
        (snapshot / "model.safetensors").symlink_to(blob)
        return blob

    def test_published_weights_come_from_the_cache_with_their_normalisation(self, cache):
        model = build("timm", 1000, name=self.NAME)
        blob = self.put(cache, model.state_dict())
        found = published("timm", name=self.NAME)
        assert found.mean == (0.485, 0.456, 0.406)
        assert found.size is not None and found.source == f"{self.NAME} of timm"
        other = build("timm", 1000, name=self.NAME)
        matching.fill(other, found)
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())
        blob.write_bytes(blob.read_bytes()[:-4] + b"abcd")
        with pytest.raises(CheckpointError, match="not the file that was published"):
            published("timm", name=self.NAME)

    def test_without_network_it_is_one_clear_error(self, cache):
        with pytest.raises(DataError, match=r"resnet10t\.c3_in1k \(timm/[^\n]*hf download[^\n]*$"):
            published("timm", name=self.NAME)

    @pytest.mark.parametrize(
        ("name", "shape", "words"),
        [
            ("resnet19", CIFAR, r"archs\.timm\.name = 'resnet19': timm has no such network; did"),
            ("resnet18.x", CIFAR, r"archs\.timm\.name = 'resnet18\.x': timm has no such network"),
            ("hf-hub:a/b", CIFAR, r"archs\.timm\.name = 'hf-hub:a/b': "),
            ("test_vit", (3, 30, 30), r"arch = 'timm': test_vit cannot take images of 3x30x30"),
        ],
    )
    def test_what_cannot_be_is_told(self, name, shape, words):
        with pytest.raises(SettingsError, match=words):
            build("timm", 10, shape, name=name)

    def test_a_transformer_for_other_sizes_is_built_for_them(self):
        model = build("timm", 7, (3, 64, 64), name="test_vit")
        assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    timm = plugin.load("archs", "timm")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(SecateurError, match=r"for arch: timm and is not .*`pip install timm`"):
        timm.import_timm()


# ----- a network of one's own ---------------------------------------------------------------------

OWN = """
from torch import nn
{before}

def make(num_classes, width=4):
    {body}
"""
LAYERS = "nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), {out})"
GOOD = "return " + LAYERS.format(out="nn.Linear(width, num_classes)")
LATE = """
    class Late(nn.Linear):
        def forward(self, images):
            import more
            return super().forward(images.mean((2, 3)))
    return Late(3, num_classes)
"""
KEEPS = """
    class Keeps(nn.Linear):
        window = None
        def forward(self, images):
            if self.window is None:
                self.window = torch.hann_window(num_classes)
            return super().forward(images.mean((2, 3))) * self.window
    return Keeps(3, num_classes)
"""

EXTRA = """
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}
    return nn.Sequential(nn.Flatten(), Extra(3 * 32 * 32, num_classes))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module of the user into a project, and build its network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    names = iter(f"net{id(tmp_path)}_{number}" for number in range(9))

    def make(body=GOOD, before="", **chosen):
        name = next(names)
        (tmp_path / f"mine/{name}.py").write_text(OWN.format(body=body, before=before))
        given = {"target": f"mine.{name}:make", "source": "mine", **chosen}
        module = plugin.load("archs", "module")
        valid = settings.validate(module.Settings, given, "archs.module")
        with settings.section("archs.module"):
            return module.build(valid, 5, CIFAR)

    yield make
    for name in [n for n in sys.modules if n.partition(".")[0] in ("mine", "more")]:
        del sys.modules[name]


def test_a_network_of_ones_own_gets_its_arguments_and_the_number_of_classes(own):
    model = own(arguments={"width": 6})
    assert model[0].out_channels == 6 and model[3].out_features == 5
    fixed = own(GOOD.replace("num_classes)", "5)"), arguments={"num_classes": 1}, classes=None)
    assert fixed[3].out_features == 5


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"target": None}, r"target = None: name the function: package\.module:function"),
        ({"target": "no.such:make"}, r"cannot be imported: ModuleNotFoundError: No module named"),
        ({"target": "os:nothing"}, r"target = 'os:nothing': os has no function nothing"),
        ({"arguments": {"wide": 1}}, r"fails: TypeError: make\(\) got an unexpected .*\(module"),
        ({"body": "return 3"}, "returned a int, not a torch.nn.Module"),
        ({"body": "return 1 / 0"}, r"fails: ZeroDivisionError: .* \(net\w+\.py, line 6\)"),
        ({"before": "import nonsense_of_mine"}, r"cannot be imported: .*\(net\w+\.py, line 3\)"),
        ({"body": GOOD.replace("num_classes)", "9)")}, r"gives \(1, 9\) for one image, needs"),
        ({"body": GOOD.replace("Conv2d(3", "Conv2d(4")}, "its network fails on an image of 3x32"),
        ({"body": EXTRA}, r"has 1\._extra_state = {'step': 3}; files hold only tensors"),
        ({"source": "weights/none"}, r"source = 'weights/none': does not cover mine/net\w+\.py"),
        ({"before": "import more"}, r"source = 'mine': does not cover more\.py"),
        ({"body": "import more; " + GOOD}, r"source = 'mine': does not cover more\.py"),
        ({"body": LATE, "before": "import torch"}, r"source = 'mine': does not cover more\.py"),
        ({"arguments": {"width": {"a": [{1: 2}]}}}, r"width\.a\[0\]: its key 1 is not text"),
        ({"arguments": {"width": date(2024, 1, 2)}}, "width = 2024-01-02: a date is neither text"),
        ({"arguments": {"width": [float("nan")]}}, r"width\[0\] = nan: a finite number"),
    ],
)
def test_mistakes_with_ones_own_network_are_one_line(own, tmp_path, chosen, words):
    (tmp_path / "more.py").write_text("")
    with pytest.raises(SettingsError, match=words) as told:
        own(**chosen)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith("params.yaml: archs.module.")


def test_tensors_that_a_network_keeps_from_its_first_pass_serve_in_training(own):
    model = own(KEEPS, before="import torch")
    model(torch.randn(2, *CIFAR)).sum().backward()
    assert model.weight.grad is not None


def test_arguments_may_be_whatever_a_checkpoint_keeps(own):
    chosen = {"width": 4, "more": {"a": [1, 2.5, None, True, "text", {"b": []}]}}
    with pytest.raises(SettingsError, match="unexpected keyword argument 'more'"):
        own(arguments=chosen)


def test_the_classifier_of_a_network_that_reads_values_of_tensors_is_found(own):
    body = "rates = [x.item() for x in torch.linspace(0, 0.1, 3)]; " + GOOD
    own(body, before="import torch")
    name = next(n for n in sys.modules if n.startswith("mine.net"))
    chosen = {"target": f"{name}:make", "source": "mine"}
    header = Header("module", chosen, [*"abcde"], list(CIFAR), [0.0], [1.0], "", "baseline")
    before = torch.get_rng_state()
    assert checkpoint.classifier(header) == {"3.weight", "3.bias"}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_function_that_a_file_names_is_not_called(tmp_path):
    chosen = {"target": "os:mkdir", "arguments": {"path": str(tmp_path / "ran")}, "classes": None}
    header = Header("module", chosen, ["a"], [1, 1, 1], [0.0], [1.0], "", "finetune")
    checkpoint.save(tmp_path / "a.safetensors", header, nn.Linear(1, 1), {})
    with pytest.raises(CheckpointError, match=r"not called; give an instance: load\(path, into="):
        secateur.load(tmp_path / "a.safetensors")
    assert not (tmp_path / "ran").exists()


# ----- in the pipeline ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coloured(tmp_path_factory, programs):
    """A project with random images of ten classes as cifar10, whose baseline does not train."""
    project = fresh_project(tmp_path_factory.mktemp("coloured"))
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8, generator=chance)
    labels = torch.arange(60) % 10
    split = InMemoryImages.from_pixels(pixels, labels)
    images = Images(split, split, [str(k) for k in range(10)], (0.5,) * 3, (0.25,) * 3)
    dataset.save(project.path / "data/cifar10", dataset.prepare("cifar10", images, 0.2, 0))
    project.params(dataset="cifar10", baseline__epochs=0, arch="resnet_cifar")
    project.params(archs__resnet_cifar__depth=8, pruner="threshold")
    return project


@pytest.fixture
def start(coloured):
    """Run baseline in that project with these params; returns its output and the network."""
    original = (coloured.path / "params.yaml").read_text()

    def run(ok=True, **params):
        coloured.params(**params)
        if not ok:
            output = coloured.stage_here("baseline", ok=False)
            assert output.count("\n") == 1 and output.startswith("error: "), output
            return output
        output = coloured.stage("baseline")
        return output, checkpoint.load(coloured.path / "models/baseline/model.safetensors").model()

    yield run
    (coloured.path / "params.yaml").write_text(original)


DRAWN = """
import random
import numpy as np
import torch
from torch import nn

def net(num_classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))
    model[1].weight.data[0, 0] = random.random()
    model[1].bias.data = torch.from_numpy(np.random.rand(num_classes)).float()
    return model
"""


@pytest.mark.pipeline
@pytest.mark.usefixtures("start")
def test_weights_that_own_code_draws_by_numpy_or_python_follow_the_seed_too(coloured):
    (coloured.path / "drawn.py").write_text(DRAWN)
    own = {"archs__module__target": "drawn:net", "archs__module__source": "drawn.py"}
    found = []
    for seed in (1, 1, 2):
        shutil.rmtree(coloured.path / ".resume", ignore_errors=True)
        coloured.params(arch="module", seed=seed, **own)
        coloured.stage("baseline")
        found.append(checkpoint.load(coloured.path / "models/baseline/model.safetensors").tensors)
    for name in ("1.weight", "1.bias"):
        first, again, other = (tensors[name] for tensors in found)
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.pipeline
def test_a_resnet_18_of_torchvision_is_taken_from_every_format(coloured, start):
    original = trained(build("torchvision", 10, CIFAR, name="resnet18"))
    folder = coloured.path / "weights"
    torch.save(original.state_dict(), folder / "a.pth")
    of_bearpaw(original, folder / "a.pth.tar")
    safe(original, folder / "a.safetensors")
    for name in ("a.pth", "a.pth.tar", "a.safetensors"):
        output, model = start(arch="torchvision", baseline__weights=name)
        assert f"baseline: weights/{name}" in output
        assert same(model, original)
    record = json.loads((coloured.path / "models/baseline.run.json").read_text())
    assert set(record["metrics"]) == {"val_accuracy", "val_loss", "kept_epoch", "epochs"}
    assert record["metrics"]["epochs"] == 0


@pytest.mark.pipeline
def test_the_normalisation_of_the_weights_is_used_recorded_and_shown(coloured, start):
    original = trained(build("resnet_cifar", 10, CIFAR, depth=8))
    folder = coloured.path / "weights/hub"
    folder.mkdir()
    safe(original, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    output, model = start(baseline__weights="hub")
    assert "normalised by its mean (0.5, 0.4, 0.3), std (0.2, 0.2, 0.1), not by" in output
    assert "made for images of 96x64 pixels, these have 32x32" in output
    made = checkpoint.load(coloured.path / "models/baseline/model.safetensors")
    assert (made.header.mean, made.header.std) == (TIMM["mean"], TIMM["std"])
    data = dataset.load(coloured.path / "data/cifar10")
    preprocess = secateur.Preprocess(tuple(TIMM["mean"]), tuple(TIMM["std"]))
    with torch.inference_mode():
        logits = model(preprocess(data.val.images))
    expected = (logits.argmax(1) == data.val.labels).double().mean()
    record = json.loads((coloured.path / "models/baseline.run.json").read_text())
    assert record["metrics"]["val_accuracy"] == pytest.approx(float(expected))
    # later stages normalise as the network's header says, whatever the data set says
    (coloured.path / "models/sparse").mkdir(exist_ok=True)
    coloured.params(sparse_train__epochs=0, penalty="none")
    coloured.stage("sparse_train")
    sparse = checkpoint.load(coloured.path / "models/sparse/model.safetensors")
    assert sparse.header.mean == TIMM["mean"]


@pytest.mark.pipeline
def test_another_number_of_classes_needs_a_new_classifier(coloured, start):
    original = trained(build("resnet_cifar", 7, CIFAR, depth=8))
    of_deephoyer(original, coloured.path / "weights/seven.pth")
    line = start(ok=False, baseline__weights="seven.pth")
    assert "2 of another shape: fc.weight 7x64, needs 10x64, fc.bias 7, needs 10 (the data has" in (
        line
    )
    assert "baseline.head = reset" in line
    assert "baseline.epochs: 0; with head: reset at least one" in (
        start(ok=False, baseline__head="reset")
    )
    _, model = start(baseline__epochs=1, baseline__lr=1e-20)
    for name, tensor in model.named_parameters():
        if not name.startswith("fc."):
            assert torch.equal(tensor, original.get_parameter(name)), name
    assert model.fc.out_features == 10


@pytest.mark.pipeline
def test_every_wrong_setting_or_file_is_one_line(coloured, start):
    (coloured.path / "weights/wrong.pth").write_bytes(b"x")
    of_deephoyer(build("resnet_cifar", 10, CIFAR, depth=8), coloured.path / "weights/right.pth")
    for params, words in [
        ({"baseline__weights": "wrong.pth"}, "weights/wrong.pth: neither safetensors nor"),
        ({"baseline__weights": "gone.pth"}, "weights/gone.pth: missing"),
        ({"baseline__weights": "../params.yaml"}, "baseline.weights = '../params.yaml': none, pub"),
        ({"baseline__weights": "/etc/passwd"}, "baseline.weights = '/etc/passwd': none, published"),
        ({"baseline__weights": None}, "baseline.weights = None: text is needed"),
        ({"baseline__weights": "published"}, "there are none for arch 'resnet_cifar'"),
        (
            {"baseline__weights": "right.pth", "baseline__rename": {"x": "fc"}},
            "weights/right.pth: rename: 'x' is the name of no tensor in the file",
        ),
        ({"baseline__rename": {"x": 1}}, "baseline.rename.x = 1: text is needed"),
        ({"baseline__rename": {}, "baseline__head": "new"}, "baseline.head = 'new': must be"),
    ]:
        assert words in start(ok=False, **params)


@pytest.mark.pipeline
def test_a_model_of_the_pipeline_is_a_start_too(coloured, start):
    made = trained(build("resnet_cifar", 10, CIFAR, depth=8))
    header = Header(
        "resnet_cifar", {"depth": 8}, [f"class {k}" for k in range(10)], [3, 32, 32],
        [0.1] * 3, [0.9] * 3, "", "finetune",
    )  # fmt: skip
    checkpoint.save(coloured.path / "weights/ours.safetensors", header, made, {})
    line = start(ok=False, baseline__weights="ours.safetensors")
    assert "its classes are ['class 0', " in line and "baseline.head = reset" in line
    _, model = start(baseline__head="reset", baseline__epochs=1, baseline__lr=1e-20)
    assert torch.equal(model.conv1.weight, made.conv1.weight)


@pytest.mark.pipeline
def test_changed_weights_and_changed_code_make_the_baseline_stale_for_dvc(tmp_path):
    """With real DVC: up to date, stale after a change, one clear line for a missing file."""
    project = fresh_project(tmp_path)
    (project.path / "mine.py").write_text(OWN.format(body="return Net(num_classes, width)", before=(
        "class Net(nn.Sequential):\n    def __init__(self, classes, width):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))\n"
    )))  # fmt: skip
    project.params(arch="module", baseline__epochs=0, baseline__weights="a.pth")
    project.params(archs__module__target="mine:make", archs__module__source="mine.py")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 10))
    torch.save(net.state_dict(), project.path / "weights/a.pth")
    project.dvc("repro", "baseline")
    first = (project.path / "models/baseline/model.safetensors").read_bytes()
    assert "up to date" in project.dvc("status", "baseline")
    net[2].bias.data += 1
    torch.save(net.state_dict(), project.path / "weights/a.pth")
    with (project.path / "mine.py").open("a") as file:
        file.write("# changed\n")
    assert re.findall(r"modified: +(\S+)", project.dvc("status", "baseline")) == [
        "weights/a.pth", "mine.py",
    ]  # fmt: skip
    project.dvc("repro", "baseline")
    assert (project.path / "models/baseline/model.safetensors").read_bytes() != first
    (project.path / "weights/a.pth").unlink()
    log = project.dvc("repro", "baseline", ok=False)
    assert "weights/a.pth" in log.splitlines()[-1]


def test_the_files_that_stand_for_no_weights_are_in_git():
    assert (ROOT / "weights/none").read_text() and (ROOT / "weights/published").read_text()
