"""The start of a stage: settings are checked once, library versions every time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.base import machine, plugin, settings
from secateur.pipeline import console, params_file

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = """
import sys
from secateur.base import errors, plugin, stage
try:
    stage.open_stage("baseline")
except errors.SettingsError as error:
    sys.exit(str(error))
kinds = tuple(f"secateur.{kind}." for kind in plugin.KEYS)
print(sum(name.startswith(kinds) and "._" not in name for name in sys.modules))
"""
PLUGINS = sum(len(plugin.names(kind)) for kind in plugin.KEYS)


def imported(project, **options):
    """Number of plug-ins that opening the stage imports, or the error if it fails."""
    return project.run("python", "-c", IMPORTED, **options).strip()


@pytest.mark.pipeline
def test_settings_are_checked_once_for_a_content_and_a_code(unborn):
    assert imported(unborn) == str(PLUGINS)
    assert imported(unborn) == "0"
    unborn.params(decay=0.5)
    assert imported(unborn) == str(PLUGINS)
    file = unborn.path / "secateur/archs/vgg.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert imported(unborn) == str(PLUGINS)
    unborn.params(pruners__magnitude__ratios=1.5)  # a pruner not in use
    for _ in range(2):
        assert "pruners.magnitude.ratios = 1.5" in imported(unborn, ok=False)
    unborn.params(pruners__magnitude__ratios=0.5)
    assert imported(unborn) == "0"


@pytest.mark.pipeline
def test_stages_that_start_at_the_same_time_check_the_same_settings(unborn):
    started = [
        subprocess.Popen(
            ["python", "-c", IMPORTED], cwd=unborn.path, env=unborn.env(),
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    assert [p.communicate(timeout=300)[0].strip().isdecimal() for p in started] == [True] * 3
    assert len(list((unborn.path / ".resume/settings").iterdir())) == 1


@pytest.mark.pipeline
def test_a_stage_refuses_other_installed_versions_until_they_are_written(unborn):
    unborn.params(libraries__torch="1.0.0")
    unborn.stage("prepare")  # prepare does not depend on the version
    log = unborn.stage("baseline", ok=False)
    (line,) = log.strip().splitlines()
    here = machine.installed_versions()["torch"]
    assert line.startswith(f"error: params.yaml: libraries.torch = '1.0.0': {here} is installed")
    assert "install torch==1.0.0" in line and "secateur libraries --update" in line
    secateur = ("python", "-m", "secateur", "libraries")
    assert "--update" in unborn.run(*secateur)
    assert f"libraries.torch: 1.0.0 -> {here}" in unborn.run(*secateur, "--update")
    assert "--update" not in unborn.run(*secateur)
    unborn.stage("baseline")


def test_versions_are_named_without_the_suffix_of_the_build():
    assert set(machine.installed_versions()) == {"torch", "torchvision"}
    assert not any("+" in version for version in machine.installed_versions().values())


def test_changed_values_leave_the_rest_of_params_yaml_as_it_is(tmp_path):
    path, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text()
    path.write_text(text)
    params_file.update({"libraries.torch": "9.8.7", "pruners.std.sensitivity": 0.75}, path)
    changed = [
        (before, after)
        for before, after in zip(text.splitlines(), path.read_text().splitlines(), strict=True)
        if before != after
    ]
    (std, new_std), (torch, new_torch) = changed
    assert new_std == std.replace("0.25 ", "0.75 ") and "#" in new_std
    assert torch.startswith("  torch: ") and new_torch == "  torch: 9.8.7"


def test_values_are_found_under_the_dotted_keys_of_the_flat_table():
    params = settings.raw(ROOT / "params.yaml")
    flat = params_file.flat(params)
    assert flat["prune.remove_dead"] is True and "prune" not in flat
    assert all(params_file.value_at(params, key) == value for key, value in flat.items())
    assert params_file.flat(params_file.nested(flat)) == flat
    null = next(key for key, value in flat.items() if value is None)
    for key, there in {null: True, "prune": True, "prune.x": False, f"{null}.x": False}.items():
        assert params_file.has(params, key) is there
    assert params_file.value_at(params, f"{null}.x") is None


STARTED = """
import gc, json, sys
import stages
def passes():
    return [generation["collections"] for generation in gc.get_stats()]
before = passes()
import stages.finetune
quiet = passes() == before and not gc.isenabled()
from stages import baseline, evaluate, prune, sparse_train
import torch
from secateur.base.sections import Train
from secateur.data import dataset
from secateur.data.dataset import InMemoryImages
from secateur.pipeline.runner import _NoStore
from secateur.training import loop
images = InMemoryImages(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.arange(8) % 2)
info = dataset.DatasetInfo("toy", ["0", "1"], (1, 2, 2), [0.0], [1.0], "", {})
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
data = dataset.Dataset(info, images, images, images)
for optimizer in ("sgd", "adam"):
    loop.fit(model, data, Train(epochs=1, batch_size=4, optimizer=optimizer), 1, _NoStore(), [])
heavy = {"lightning_fabric", "mlflow", "pandas", "scipy", "sklearn", "sympy", "torch._dynamo"}
print(json.dumps([quiet, sorted(heavy & set(sys.modules))]))
from secateur.pipeline import console
def work():
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
    made = [[] for _ in range(10 * gc.get_threshold()[0])]
    assert passes()[0] > before[0]
    print("worked")
console.main(work, "finetune", "")
"""


@pytest.fixture(scope="module")
def started():
    """Output of a separate, cold process that imports the stages, trains, and works as a stage."""
    done = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "models/a"), "models/a: Permission denied"),
        (OSError("first\nsecond"), "prune: first second"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(error, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune"])
    monkeypatch.setattr(console.signal, "signal", lambda *_: None)
    monkeypatch.setattr(console.allocator, "resume_collection", lambda: None)

    def work():
        raise error

    with pytest.raises(SystemExit) as end:
        console.main(work, "prune", None)
    assert end.value.code == 1 and capsys.readouterr().err == f"error: {line}\n"


def test_what_takes_seconds_to_import_is_not_imported_by_a_stage_that_trains(started):
    assert json.loads(started[0])[1] == []


def test_garbage_is_collected_from_when_a_stage_works_not_while_it_imports(started):
    assert json.loads(started[0])[0] and started[1:] == ["worked"]


LEAVING = """
import atexit, sys
from secateur.base import allocator
atexit.register(allocator._exit_fast)
atexit.register(print, "at exit")
class Slow:
    def __del__(self): print("taken apart")
kept = sys.modules["kept"] = Slow()
print("work")
{}
"""


@pytest.mark.parametrize(
    ("end", "left"),
    [("allocator.succeeded(); sys.exit(0)", False), ("sys.exit(3)", True), ("1 / 0", True)],
)
def test_a_process_that_succeeds_is_not_taken_apart_and_loses_no_output(end, left):
    done = subprocess.run(
        [sys.executable, "-c", LEAVING.format(end)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == {"s": 3, "1": 1}.get(end[0], 0)
    assert done.stdout.splitlines() == ["work", "at exit", *(["taken apart"] if left else [])]
