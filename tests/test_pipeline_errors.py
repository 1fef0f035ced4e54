"""Help, and one clear line for each mistake; most tests run in this process, some run commands."""

import hashlib
import json
import sys

import numpy as np
import pytest
import safetensors.numpy
from workspace import STAGES

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_says_what_it_reads_and_writes(finished, name):
    text = finished.stage_here(name, "--help")
    assert "Reads" in text and "Writes" in text


BAD = {
    "unknown key": ({"baseline__epohcs": 3}, "baseline.epohcs: unknown key", "epochs"),
    "unknown plug-in": ({"penalty": "hoyer_sqare"}, "penalty = 'hoyer_sqare'", "hoyer_square"),
    "negative decay": ({"decay": -1e-4}, "decay = -0.0001", "greater than or equal to 0"),
    "text for a number": ({"decay": "much"}, "decay = 'much'", "number"),
    "ratio out of range": ({"data__validation": 1.5}, "data.validation = 1.5", "0.5"),
    "later stage": ({"finetune__lr": 0}, "finetune.lr = 0", "greater than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_get_one_clear_line_before_any_work(finished, tmp_path, case):
    changes, *words = BAD[case]
    project = finished.copy(tmp_path / "project")
    project.params(**changes)
    log = project.stage_here("baseline", ok=False)
    assert len(log.strip().splitlines()) == 1 and log.startswith("error: ")
    assert all(word in log for word in words), log
    assert project.model_bytes() == finished.model_bytes()


def test_a_model_file_with_one_changed_bit_is_not_used(project):
    checkpoint = project.path / "models/baseline/model.safetensors"
    content = bytearray(checkpoint.read_bytes())
    content[-2] ^= 0x40
    checkpoint.unlink()
    checkpoint.write_bytes(content)
    log = project.stage_here("sparse_train", ok=False)
    assert len(log.strip().splitlines()) == 1, log
    record = json.loads((project.path / "models/baseline.run.json").read_text())
    hashes = [hashlib.sha256(content).hexdigest()[:12], record["sha256"][:12]]
    words = ["models/baseline/model.safetensors", "models/baseline.run.json", "`dvc checkout`"]
    assert all(word in log for word in [*hashes, *words]), log
    (project.path / "models/baseline.run.json").unlink()
    assert "sparse-train: epoch" in project.stage("sparse_train")  # it is not a dependency


def test_bad_files_get_one_clear_line(project):
    checkpoint = project.path / "models/baseline/model.safetensors"
    whole = checkpoint.read_bytes()
    cases = {
        "truncated": whole[: len(whole) // 2],
        "foreign": safetensors.numpy.save({"x": np.zeros(3)}),
        "pickle": b"\x80\x02}q\x00.",
        "": None,
    }
    for word, content in cases.items():
        checkpoint.unlink(missing_ok=True)
        if content is not None:
            checkpoint.write_bytes(content)
        log = project.stage_here("sparse_train", ok=False)
        assert len(log.strip().splitlines()) == 1, log
        assert "models/baseline/model.safetensors" in log and word in log.replace(
            "not written by Secateur", "foreign"
        ), log
    checkpoint.write_bytes(whole)
    project.params(arch="lenet5")
    log = project.stage_here("sparse_train", ok=False)
    assert "holds architecture 'lenet300'" in log


def test_a_limit_on_the_size_of_files_that_stops_dvc_gives_one_clear_line(project):
    command = f"ulimit -f 3; exec {sys.executable} -m stages.prepare"
    log = project.run("bash", "-c", command, ok=False)
    assert len(log.strip().splitlines()) == 1, log
    assert log.startswith("error: DVC cannot use the database") and "disk full" in log


def test_missing_data_says_where_it_looked(project, tmp_path):
    project.params(dataset="mnist")
    log = project.stage_here("prepare", ok=False, SECATEUR_DATA=str(tmp_path / "nothing"))
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "nothing") in line and "SECATEUR_DATA" in line


def test_a_diverging_loss_stops_and_keeps_the_last_good_state(project):
    project.params(baseline__optimizer="sgd", baseline__lr=1e8, seed=11)
    log = project.stage_here("baseline", ok=False)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "epoch 1, step" in line and "lr" in line
    project.params(baseline__lr=0.05, baseline__epochs=2)
    project.stage("baseline")


def test_the_commands_themselves_help_and_refuse(project):
    text = project.run("python", "-m", "stages.baseline", "--help")
    assert "Reads" in text and "Writes" in text
    project.params(decay=-1e-4)
    log = project.stage("baseline", ok=False)
    assert len(log.strip().splitlines()) == 1 and log.startswith("error: ")
