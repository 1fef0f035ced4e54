"""Settings that do not fit the network are refused before the first training."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from workspace import yaml_text

from secateur.base import machine, plugin, settings
from secateur.base.errors import SecateurError, SettingsError
from secateur.data.dataset import DatasetInfo
from secateur.nn import checkpoint
from secateur.pipeline.preflight import build_network, check_network, check_settings

PARAMS = yaml.safe_load(Path("params.yaml").read_text())
INFO = DatasetInfo("made up", ["a", "b"], (1, 8, 8), [0.0], [1.0], "", {"train": 640})


@pytest.fixture
def network(tmp_path, monkeypatch):
    """LeNet-5, with params.yaml next to it; changes are given as `section__key`."""

    def made(**changes):
        params = copy.deepcopy(PARAMS)
        for key, value in changes.items():
            *sections, last = key.split("__")
            table = params
            for section in sections:
                table = table[section]
            table[last] = value
        (tmp_path / "params.yaml").write_text(yaml_text(params))
        monkeypatch.chdir(tmp_path)
        module = plugin.load("archs", "lenet5")
        return module.build(module.Settings(), 2, (1, 8, 8))

    return made


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pruner": "magnitude", "pruners__magnitude__ratios": "layer9: 0.5"}, "layer9"),
        ({"pruner": "magnitude", "pruners__magnitude__ratios": "fc2: 0.5"}, "fc2"),
        ({"pruner": "gconv", "pruners__gconv__skip": ["conv7"]}, "skip = 'conv7'"),
        ({"penalty": "greg1", "penalties__greg1__ratios": "layer9: 0.5"}, "layer9"),
        ({"penalty": "network_slimming"}, "no batch normalisation"),
        (
            {"pruner": "network_slimming"},
            r"^params\.yaml: pruners\.network_slimming\.coupled = 'skip': no scale of a batch",
        ),
        (
            {
                "pruner": "magnitude",
                "pruners__magnitude__granularity": "filter",
                "pruners__magnitude__criterion": "bn_scale",
            },
            r"^params\.yaml: pruners\.magnitude\.criterion = 'bn_scale': .* conv1 have no batch",
        ),
        (
            {"pruner": "gconv", "pruners__gconv__groups": 7},
            r"^params\.yaml: pruners\.gconv\.groups = 7: no convolution can have these groups",
        ),
        (
            {"pruner": "gconv", "pruners__gconv__skip": ["conv1", "conv2"]},
            r"^params\.yaml: pruners\.gconv\.skip: the network has no convolution, or all are",
        ),
        ({"pruner": "chosen", "penalty": "l1"}, "penalty l1 chooses no weights"),
        ({"penalty": "rigl", "penalties__rigl__skip": ["conv7"]}, "conv7 matches no layer"),
        ({"penalty": "gradual", "penalties__gradual__end": 1501}, r"sparse_train\.epochs = 150: "),
        ({"penalty": "greg1"}, r"sparse_train\.epochs = 150: the penalty may need .* steps"),
        (
            {"penalty": "gradual", "sparse_train__keep": "best"},
            r"sparse_train\.keep = 'best': .* must be 'last'",
        ),
        (
            {"penalty": "rigl", "penalties__rigl__interval": 1200},
            r"^params\.yaml: penalties\.rigl\.interval = 1200\.0: .* step 1,125 of 1,500; allowed",
        ),
        (
            {
                "parametrization": "variational_dropout",
                "parametrizations__variational_dropout__warmup": 1501,
            },
            r"^params\.yaml: parametrizations\.variational_dropout\.warmup = 1501\.0: .* 1,500",
        ),
        (
            {"baseline__average": {"kind": "ema", "start": 99_999}},
            r"^params\.yaml: baseline\.average\.start = 99999\.0: ",
        ),
        (
            {"finetune__average": {"kind": "swa", "start": 600}},
            r"^params\.yaml: finetune\.average\.start = 600\.0: .* a share of all 600$",
        ),
        (
            {
                "pruner": "chosen",
                "parametrization": "str",
                "penalty": "l1",
                "sparse_train__epochs": 0,
            },
            "penalty l1 chooses no weights to prune, nor does str with sparse_train.epochs = 0",
        ),
        ({"penalty": "gsm"}, r"sparse_train\.optimizer = 'adam': penalty gsm"),
        (
            {"finetune__progressive_resizing": [{"scale": 0.5, "until": 0.5}]},
            r"finetune\.progressive_resizing: the network does not take images of 4x4",
        ),
        (
            {"parametrization": "str", "penalty": "rigl"},
            "parametrization = 'str': prunes by itself",
        ),
        (
            {"parametrization": "variational_dropout", "sparse_train__optimizer": "sgd"},
            "sparse_train.optimizer = 'sgd'",
        ),
    ],
)
def test_what_does_not_fit_the_network_is_refused(changes, line, network):
    with pytest.raises(SettingsError, match=line):
        check_network(network(**changes), INFO)


class Branching(nn.Module):
    """Its control flow depends on the images, so it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x if x.sum() > 0 else -x).mean((2, 3)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pruner": "threshold"}, r"^params\.yaml: prune\.remove_dead: cannot follow Branching: "),
        (
            {"pruner": "magnitude", "prune__remove_dead": False},
            r"^params\.yaml: pruner: cannot follow Branching: ",
        ),
        (
            {
                "pruner": "magnitude",
                "prune__remove_dead": False,
                "pruners__magnitude__granularity": "group",
            },
            r"^params\.yaml: pruner: cannot follow Branching: ",
        ),
        ({"pruner": "threshold", "prune__remove_dead": False}, None),  # masks alone need no graph
    ],
)
def test_a_network_that_cannot_be_followed_is_refused_without_a_penalty_too(changes, line, network):
    network(penalty="none", **changes)
    if line is None:
        check_network(Branching(), INFO)
    else:
        with pytest.raises(SettingsError, match=line):
            check_network(Branching(), INFO)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pruner": "chosen", "penalty": "greg2", "sparse_train__epochs": 6000},
        {"finetune__average": {"kind": "swa", "start": 600}, "finetune__budget": "compute"},
        {"baseline__epochs": 0, "baseline__average": {"kind": "ema", "start": 10}},
        {"pruner": "chosen", "penalty": "rigl"},
        {"pruner": "chosen", "parametrization": "variational_dropout", "penalty": "none"},
        {"pruner": "magnitude", "pruners__magnitude__criterion": "taylor"},
        {
            "pruner": "network_slimming",
            "arch": "vgg",
            "archs__vgg__depth": 11,
            "archs__vgg__pools": [1, 2, 4],
        },  # all scales are equal
        {"pruner": "threshold", "pruners__threshold__sensitivity": 1e9},  # depends on the training
    ],
)
def test_what_may_fit_passes_and_nothing_changes(changes, network):
    network(**changes)
    model = build_network(settings.read(), INFO)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    random = torch.get_rng_state()
    check_network(model, INFO)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"arch": "torchvision"},
            r"^params\.yaml: arch = 'torchvision': its networks need images of",
        ),
        ({"penalty": "greg1", "penalties__greg1__skip": "conv9"}, "skip: conv9 matches no layer"),
        ({"pruner": "magnitude", "pruners__magnitude__ratios": "layer9: 0.5"}, "layer9"),
    ],
)
def test_what_does_not_fit_the_images_is_refused_before_they_are_written(changes, line, network):
    network(**{"arch": "lenet5"} | changes)
    random = torch.get_rng_state()
    with pytest.raises(SettingsError, match=line):
        check_settings(INFO)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_fits_the_images_passes(network):
    network(
        arch="lenet5", penalty="greg1", penalties__greg1__skip="conv1", sparse_train__epochs=5000
    )
    check_settings(INFO)


def test_an_adaptive_pooling_is_refused_where_it_cannot_be_trained(network, monkeypatch):
    whole = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    whole.append(nn.Linear(4, 2))
    parts = copy.deepcopy(whole)
    parts[1], parts[3] = nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(16, 2)
    network()
    check_network(parts, INFO)
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    check_network(whole, INFO)
    with pytest.raises(SettingsError, match="1 is an adaptive pooling, which cannot be trained"):
        check_network(parts, INFO)
    network(baseline__epochs=0, sparse_train__epochs=0, finetune__epochs=0)
    check_network(parts, INFO)


def save_teacher(folder, mean, std):
    """Save a LeNet-300-100 for the images of INFO; returns its file and that of its code."""
    header = checkpoint.Header(
        arch="lenet300", arch_settings={"hidden": [5]}, classes=["a", "b"], shape=(1, 8, 8),
        mean=[mean], std=[std], split="", stage="baseline",
    )  # fmt: skip
    file = "weights/teacher.safetensors"
    (folder / "weights").mkdir()
    checkpoint.save(folder / file, header, checkpoint.build_architecture(header), {})
    return file, "secateur/archs/lenet300.py"


def test_a_teacher_of_another_architecture_needs_its_code_named(network, tmp_path):
    (file, code), key = save_teacher(tmp_path, mean=0.0, std=1.0), "finetune__distillation"
    model = network(arch="lenet5", **{f"{key}__teacher": file, f"{key}__code": code})
    check_network(model, INFO)
    model = network(arch="lenet5", **{f"{key}__teacher": file})
    with pytest.raises(SecateurError, match=f"{file}: .* distillation.code must be {code}"):
        check_network(model, INFO)
    network(arch="lenet5", **{f"{key}__teacher": "weights/gone.safetensors"})
    with pytest.raises(SettingsError, match=r"finetune\.distillation\.teacher = .*no such file"):
        check_network(model, INFO)
    network(arch="lenet5", **{f"{key}__teacher": file, f"{key}__code": code})
    with pytest.raises(SecateurError, match="cannot teach: its classes = "):
        check_network(model, replace(INFO, classes=["a", "c"]))


def test_a_teacher_for_images_normalised_otherwise_is_refused_before_the_first_training(
    network, tmp_path
):
    """Unless the network starts from weights, whose normalisation only the baseline knows."""
    file, code = save_teacher(tmp_path, mean=0.5, std=2.0)
    given = PARAMS["finetune"]["distillation"] | {"teacher": file, "code": code}
    changes = {"arch": "lenet5", "finetune__distillation": given}
    model = network(**changes)
    for check in (lambda: check_settings(INFO), lambda: check_network(model, INFO)):
        with pytest.raises(SecateurError, match=r"cannot teach: its mean = \[0\.5\]"):
            check()
    network(**changes, baseline__weights="some.safetensors")
    check_settings(INFO)
    check_network(model, replace(INFO, mean=[0.5], std=[2.0]))
    with pytest.raises(SecateurError, match=r"cannot teach: its std = \[2\.0\]"):
        check_network(model, replace(INFO, mean=[0.5]))


def test_a_teacher_for_one_size_is_refused_before_the_first_training(network, tmp_path):
    """The network takes images of any size, its teacher only those of the data."""
    teacher, code = save_teacher(tmp_path, mean=0.0, std=1.0)
    pooled = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    sizes = {"finetune__progressive_resizing": [{"scale": 0.5, "until": 0.5}]}
    network(**sizes)
    check_network(nn.Sequential(*pooled), INFO)
    given = {"teacher": teacher, "code": code}
    network(**sizes, finetune__distillation=PARAMS["finetune"]["distillation"] | given)
    words = (
        r"^params\.yaml: finetune\.progressive_resizing.*the teacher does not take images of 4x4"
    )
    with pytest.raises(SettingsError, match=words):
        check_network(nn.Sequential(*pooled), INFO)
