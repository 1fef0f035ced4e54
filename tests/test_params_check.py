"""`secateur check`, and the same check in recipes and studies: names and settings, before DVC."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from secateur.base import settings
from secateur.base.errors import SettingsError
from secateur.pipeline import params_check
from secateur.pipeline.params_file import value_at

ROOT = Path(__file__).resolve().parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
TEACHER = "finetune.distillation.teacher"
CHECK = ("python", "-m", "secateur", "check")


def changed(**values):
    """params.yaml with other values; `section__key` stands for a nested key."""
    params = PARAMS
    for key, value in values.items():
        for part in reversed(key.split("__")):
            value = {part: value}
        params = settings.merged(params, value)
    return params


def names_refused(root=ROOT, **values):
    with pytest.raises(SettingsError) as error:
        params_check.check_names(changed(**values), root)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"pruner": "magnitud"},
            r"^params\.yaml: pruner = 'magnitud': .*did you mean magnitude\?$",
        ),
        ({"arch": "resnet_cifr"}, r"^params\.yaml: arch = 'resnet_cifr': .*mean resnet_cifar\?$"),
        ({"dataset": 7}, r"^params\.yaml: dataset = '7': there is no secateur/datasets/7\.py; "),
        (
            {"baseline__weights": "publishd"},
            r"^params\.yaml: baseline\.weights = 'publishd': there is no weights/publishd; there "
            r"are: none, published; did you mean published\?$",
        ),
        (
            {"archs__module__source": "stages/prepar.py"},
            r"^params\.yaml: archs\.module\.source = 'stages/prepar\.py': there is no stages/"
            r"prepar\.py.*; did you mean stages/prepare\.py\?$",
        ),
        (
            {"sparse_train__distillation__code": "secateur/archs/lenet30.py"},
            r"^params\.yaml: sparse_train\.distillation\.code = .*mean secateur/archs/lenet300\.py",
        ),
    ],
)
def test_a_name_that_stands_for_nothing_is_told_with_the_nearest(values, line):
    assert re.search(line, names_refused(**values))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pruner": "obs", "arch": "vgg", "baseline__weights": "published"},
        {TEACHER.replace(".", "__"): "models/baseline"},  # a stage will make this file
        {"finetune__rewind_to": "models/baseline", "prune__latency": "torch"},
        {"archs__module__source": str(ROOT / "stages")},
    ],
)
def test_what_is_there_or_a_stage_makes_passes(values):
    params_check.check_names(changed(**values), ROOT)


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("baseline.distillation.teacher", "weights/none"),
        ("baseline.weights", "none"),
        ("prune.latency", "none"),
        ("finetune.rewind_to", "weights/none"),
        ("archs.module.source", None),
    ],
)
def test_a_key_that_dvc_needs_is_missed_though_a_stage_has_a_default(key, default):
    params = copy.deepcopy(PARAMS)
    section, _, last = key.rpartition(".")
    del value_at(params, section)[last]
    with pytest.raises(SettingsError) as error:
        params_check.check_names(params, ROOT)
    line = str(error.value)
    assert line.startswith(f"params.yaml: {key}: missing; DVC needs it")
    assert default is None or line.endswith(f", and {default} is the default")


def test_a_file_that_dvc_can_bring_is_told_so(tmp_path):
    for name in ("dvc.yaml", "weights/none", "latency/none.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "weights/a.pth.dvc").write_text("outs: []\n")
    line = names_refused(tmp_path, baseline__weights="a.pth")
    assert line.endswith("there is no weights/a.pth; `dvc pull weights/a.pth` brings it")


@pytest.mark.pipeline
def test_the_command_says_what_dvc_does_not(project):
    assert "no mistake found" in project.run(*CHECK)
    project.params(pruner="magnitud")
    assert re.search(r"\[Errno 2\] No such file.*magnitud\.py", project.dvc("repro", ok=False))
    (line,) = project.run(*CHECK, ok=False).splitlines()
    assert line.startswith("error: params.yaml: pruner = 'magnitud': ")
    for values, words in (
        ({"pruner": "magnitude", "pruners__obs__dampin": 1}, "did you mean damping?"),
        ({"pruners": PARAMS["pruners"], "penalty": "network_slimming"}, "no batch normalisation"),
        ({"penalty": "l1", "libraries__torch": "1.0.0"}, "libraries.torch = '1.0.0'"),
    ):
        project.params(**values)
        (line,) = project.run(*CHECK, ok=False).splitlines()
        assert line.startswith("error: params.yaml: ") and words in line


@pytest.mark.pipeline
def test_before_the_data_are_prepared_the_network_is_not_tried(unborn):
    unborn.params(penalty="network_slimming")
    assert "network is checked when the data are prepared" in unborn.run(*CHECK)
    (line,) = unborn.run(*CHECK, ok=False, SECATEUR_DEVICE="gpu9").splitlines()
    assert "SECATEUR_DEVICE" in line


@pytest.mark.pipeline
def test_recipes_and_studies_say_it_before_dvc_does_anything(unborn):
    for folder in ("recipes", "studies"):
        file = unborn.path / folder / "wrong.yaml"
        file.write_text("about: a name that is misspelt\nsettings: {pruner: magnitud}\n")
    unborn.commit()
    before = (unborn.path / "params.yaml").read_text()
    for command in (("recipe", "wrong"), ("recipe", "wrong", "--apply"), ("study", "wrong")):
        (line,) = unborn.run(sys.executable, "-m", "secateur", *command, ok=False).splitlines()
        assert re.match(r"error: (cell wrong-s1: )?params\.yaml: pruner = 'magnitud'", line), line
        assert line.endswith("did you mean magnitude?")
    assert (unborn.path / "params.yaml").read_text() == before


def test_make_repro_checks_first():
    make = ("make", "--dry-run", "repro")
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [
        line for line in done.stdout.splitlines() if "secateur check" in line or "dvc" in line
    ]
    assert "secateur check" in commands[-2] and "dvc repro" in commands[-1]
