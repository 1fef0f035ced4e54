"""The pipeline as people use it: real DVC, real MLflow store, real digits."""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import safetensors.torch
import yaml
from mlflow import MlflowClient

from secateur.data.dataset import load

pytestmark = pytest.mark.pipeline

STAGES = ["prepare", "baseline", "sparse_train", "prune", "finetune", "evaluate"]
MODELS = ["baseline", "sparse", "pruned", "finetuned"]


def ran(log):
    return [line.split("'")[1] for line in log.splitlines() if line.startswith("Running stage")]


def runs(project, condition=""):
    client = MlflowClient(f"sqlite:///{project.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("secateur")
    return list(client.search_runs([experiment.experiment_id], condition))


def model_bytes(project):
    return {m: (project.path / f"models/{m}/model.safetensors").read_bytes() for m in MODELS}


# -- what runs, and what does not ------------------------------------------------------------------


def test_the_first_run_runs_everything_and_the_second_nothing(finished):
    assert ran(finished.log) == [s.replace("_", "-") for s in STAGES]
    assert "up to date" in finished.dvc("repro")


def test_new_plugins_and_changed_observers_leave_everything_valid(project):
    penalty = project.path / "secateur/penalties/mine.py"
    penalty.write_text((project.path / "secateur/penalties/l1.py").read_text())
    for observer in ("track", "console"):
        file = project.path / f"secateur/{observer}.py"
        file.write_text(file.read_text() + "\n# changed\n")
    assert "up to date" in project.dvc("status", "dvc.yaml")
    file = project.path / "secateur/nn/cost.py"
    file.write_text(file.read_text() + "\n# changed\n")
    status = project.dvc("status", "dvc.yaml")
    assert "prune" in status and "baseline" not in status.split("\n")[0]


def test_experiments_run_only_what_they_change(project):
    log = project.dvc("exp", "run", "-S", "decay=1e-5")
    assert ran(log) == ["sparse-train", "prune", "finetune", "evaluate"]
    assert ran(project.dvc("exp", "run", "-S", "decay=0.0003")) == []
    log = project.dvc("exp", "run", "-S", "pruners.std.sensitivity=0.5")
    assert ran(log) == ["prune", "finetune", "evaluate"]
    project.dvc("checkout")  # as `exp apply` does; the other pipeline has never run


def test_a_second_clone_reuses_models_and_shows_the_whole_chain(finished, tmp_path):
    first = finished.copy(tmp_path / "first")
    first.dvc("remote", "add", "-d", "shelf", str(tmp_path / "shelf"))
    first.commit()
    first.dvc("push", "--run-cache")
    second = type(first)(tmp_path / "second")
    first.run("git", "clone", "-q", str(first.path), str(second.path))
    second.dvc("pull", "--run-cache", ok=None)  # evaluate's report is Git's, not the remote's
    log = second.dvc("repro", SECATEUR_TRACKING="on")
    assert set(ran(log)) <= {"evaluate"}
    assert model_bytes(second) == model_bytes(first)
    second.run(sys.executable, "-m", "secateur.pipeline.sync", SECATEUR_TRACKING="on")
    kinds = Counter(r.data.tags["stage"] for r in runs(second))
    assert kinds == {"baseline": 1, "sparse-train": 1, "prune": 1, "finetune": 1, "evaluate": 1}
    again = second.run(sys.executable, "-m", "secateur.pipeline.sync", SECATEUR_TRACKING="on")
    assert "0 runs written" in again


def test_queued_experiments_share_models_and_none_is_lost(unborn):
    sweep = ["-S", "pruners.std.sensitivity=0.1,0.3", "-S", "decay=1e-4"]
    for attempt in range(2):
        unborn.dvc("exp", "run", "--queue", *sweep)
        unborn.dvc("queue", "start", "-j", "2", SECATEUR_TRACKING="on")
        for _ in range(120):
            status = unborn.dvc("queue", "status")
            if "Queued" not in status and "Running" not in status:
                break
            if "0 active" in status:  # a worker may leave before the queue is empty
                unborn.dvc("queue", "start", "-j", "2", SECATEUR_TRACKING="on")
            time.sleep(2)
        lost = [line.split()[1] for line in status.splitlines() if "Failed" in line]
        if not lost:
            break
        # DVC's workers can trip over each other's temporary files (treeverse/dvc#10673)
        log = unborn.dvc("queue", "logs", lost[0], ok=None)
        assert attempt == 0 and ".tmp" in log, log
        unborn.dvc("queue", "remove", "--all")
    made = Counter(r.data.tags["stage"] for r in runs(unborn))
    assert made == {"baseline": 1, "sparse-train": 1, "prune": 2, "finetune": 2, "evaluate": 2}


# -- what comes out --------------------------------------------------------------------------------


def test_the_report_agrees_with_a_forward_pass_in_numpy(finished):
    report = json.loads((finished.path / "metrics/evaluate.json").read_text())
    test = load(finished.path / "data/digits").test
    pixels = test.images.numpy().reshape(len(test), -1) / 255.0
    for name in MODELS:
        path = finished.path / f"models/{name}/model.safetensors"
        w = safetensors.numpy.load_file(path)
        x = pixels
        for number in (1, 2, 3):
            x = x @ w[f"fc{number}.weight"].T.astype(float) + w[f"fc{number}.bias"]
            x = np.maximum(x, 0) if number < 3 else x
        weights = [t for key, t in w.items() if not key.startswith("mask:")]
        row = report[name]
        assert row["accuracy"] == pytest.approx(np.mean(x.argmax(1) == test.labels.numpy()))
        assert row["params"] == sum(t.size for t in weights)
        assert row["nonzero"] == sum(np.count_nonzero(t) for t in weights)
        matrices = [t for t in weights if t.ndim == 2]
        assert row["macs"] == sum(np.count_nonzero(t) for t in matrices)
        assert row["macs_dense"] == sum(t.size for t in matrices)
        assert row["latency_ms"] > 0 and row["latency_iqr_ms"] >= 0
    dense, final = report["baseline"], report["finetuned"]
    assert report["compression"] == pytest.approx(dense["params"] / final["nonzero"])
    assert report["theoretical_speedup"] == pytest.approx(dense["macs"] / final["macs"])
    layers = pd.read_csv(finished.path / "metrics/layers.csv")
    assert list(layers.groupby("model").nonzero.sum()[MODELS]) == [
        report[m]["nonzero"] for m in MODELS
    ]


def test_what_is_pruned_stays_pruned(finished):
    load_file = safetensors.torch.load_file
    pruned = load_file(finished.path / "models/pruned/model.safetensors")
    final = load_file(finished.path / "models/finetuned/model.safetensors")
    masks = [key for key in pruned if key.startswith("mask:")]
    assert masks
    for key in masks:
        gone = ~pruned[key]
        assert gone.any() and not final[key.removeprefix("mask:")][gone].any()


def test_the_models_name_their_parents(finished):
    records = [json.loads((finished.path / f"models/{m}.run.json").read_text()) for m in MODELS]
    for parent, child in itertools.pairwise(records):
        assert child["upstream"] == {parent["stage"]: parent["sha256"]}


def test_scratch_keeps_the_shape_and_not_the_weights(project):
    project.params(finetune__init="scratch")
    project.dvc("repro")
    load_file = safetensors.torch.load_file
    pruned = load_file(project.path / "models/pruned/model.safetensors")
    final = load_file(project.path / "models/finetuned/model.safetensors")
    assert {k: t.shape for k, t in pruned.items()} == {k: t.shape for k, t in final.items()}
    same = (pruned["fc1.weight"] == final["fc1.weight"]) & (pruned["fc1.weight"] != 0)
    assert not same.any()


def test_a_structural_penalty_shrinks_the_network(project):
    project.params(penalty="group_hoyer_square", decay=0.01, arch="lenet5", pruner="threshold")
    project.params(pruners__threshold__sensitivity=0.01, sparse_train__epochs=25)
    log = project.dvc("repro")
    shapes = {
        key: t.shape
        for key, t in safetensors.torch.load_file(
            project.path / "models/pruned/model.safetensors"
        ).items()
    }
    assert shapes["fc1.weight"][0] < 500, log
    report = json.loads((project.path / "metrics/evaluate.json").read_text())
    assert report["pruning"]["reached"]["difference_float64"] < 1e-9
    assert report["finetuned"]["accuracy"] > 0.8


def test_sensitivity_is_a_pipeline_of_its_own_whose_suggestion_the_main_one_takes(project):
    log = project.dvc("repro", "stages/sensitivity/dvc.yaml")
    assert "bn_scale is left out" in log
    penalty = project.path / "secateur/penalties/mine.py"
    penalty.write_text((project.path / "secateur/penalties/l1.py").read_text())
    assert "up to date" in project.dvc("status"), "both pipelines are"
    table = pd.read_csv(project.path / "metrics/sensitivity.csv")
    dense = json.loads((project.path / "models/baseline.run.json").read_text())
    now = dense["metrics"]["val_accuracy"]
    assert set(table.criterion) == {"l1", "random"} and set(table.layer) == {"fc1", "fc2"}
    assert (table[table.ratio == 0].accuracy - now).abs().max() < 1e-5
    mean = table.groupby("ratio").accuracy.mean()
    assert mean[0.9] < mean[0.1] <= mean[0] + 0.01
    found = yaml.safe_load((project.path / "metrics/sensitivity.yaml").read_text())["l1"]
    project.params(pruner=found["pruner"])
    for key, value in found["pruners"]["magnitude"].items():
        project.params(**{f"pruners__magnitude__{key}": value})
    assert "l1" in project.dvc("repro", "prune")
    plots = project.dvc("plots", "show", "-o", "shown")
    page = (project.path / "shown/index.html").read_text()
    assert "accuracy after pruning outputs of one layer" in page, plots


# -- MLflow ----------------------------------------------------------------------------------------


def test_the_pipeline_run_links_the_stage_runs_and_carries_the_chain(finished):
    (pipeline,) = runs(finished, "tags.kind = 'pipeline'")
    stages = {r.data.tags["stage"]: r for r in runs(finished, "tags.kind = 'stage'")}
    assert set(stages) == {"baseline", "sparse-train", "prune", "finetune"}
    for name, run in stages.items():
        assert pipeline.data.tags[f"run.{name}"] == run.info.run_id
        assert run.info.run_id in pipeline.data.tags["mlflow.note.content"]
        assert run.info.status == "FINISHED"
        assert run.data.params.items() <= pipeline.data.params.items()
    assert "decay" not in stages["baseline"].data.params, "only declared params are logged"
    report = json.loads((finished.path / "metrics/evaluate.json").read_text())
    assert pipeline.data.metrics["finetuned/accuracy"] == report["finetuned"]["accuracy"]
    assert pipeline.data.metrics["compression"] == report["compression"]
    (data,) = stages["baseline"].inputs.dataset_inputs
    assert data.dataset.name == "digits"
    about = json.loads((finished.path / "data/digits/about.json").read_text())
    assert about["hash"].startswith(data.dataset.digest)


def test_the_curves_in_mlflow_are_those_of_the_history(finished):
    client = MlflowClient(f"sqlite:///{finished.path / 'mlflow.db'}")
    (run,) = runs(finished, "tags.stage = 'sparse-train'")
    logged = client.get_metric_history(run.info.run_id, "epoch/val_accuracy")
    history = pd.read_csv(finished.path / "models/sparse/history.csv")
    assert [m.value for m in logged] == pytest.approx(list(history.val_accuracy))
    assert [m.step for m in logged] == list(history.epoch)


def test_a_lost_store_is_written_again(project):
    (project.path / "mlflow.db").unlink()
    project.run(sys.executable, "-m", "secateur.pipeline.sync", SECATEUR_TRACKING="on")
    assert len(runs(project)) == 5
    (pipeline,) = runs(project, "tags.kind = 'pipeline'")
    restored = {r.info.run_id for r in runs(project, "tags.restored = 'true'")}
    assert {v for k, v in pipeline.data.tags.items() if k.startswith("run.")} == restored


def test_four_processes_may_start_on_a_fresh_store(unborn):
    code = "from secateur.pipeline.tracking import Store; assert Store().client is not None"
    env = unborn.env(SECATEUR_TRACKING="on")
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=unborn.path, env=env) for _ in range(4)
    ]
    assert [p.wait(timeout=600) for p in started] == [0, 0, 0, 0]
    assert runs(unborn) == []


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_dead_tracking_server_costs_seconds_and_a_warning(project, silent):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        project.params(seed=2)
        before = time.monotonic()
        project.stage("baseline", SECATEUR_TRACKING="off")
        plain = time.monotonic() - before
        project.params(seed=3)
        before = time.monotonic()
        log = project.stage("baseline", SECATEUR_TRACKING="on", MLFLOW_TRACKING_URI=uri)
        assert time.monotonic() - before < plain + 45
    assert log.count("warning: MLflow") == 1 and uri in log
    record = json.loads((project.path / "models/baseline.run.json").read_text())
    assert record["run_id"] is None


# -- killed, and in company ------------------------------------------------------------------------


def test_killed_stages_end_with_the_same_bytes(project, tmp_path):
    """kill -9 at random moments of the work; the undisturbed twin has a project of its own."""
    twin = project.copy(tmp_path / "twin")
    for copy in (project, twin):
        copy.params(baseline__epochs=400, seed=5)
    twin.stage("baseline")
    moments = random.Random(0)
    state = project.path / ".resume/baseline"
    before = set(state.glob("*/lock"))
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.baseline"],
            cwd=project.path,
            env=project.env(),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        touched = time.time()
        while process.poll() is None and not any(
            lock not in before and lock.stat().st_mtime >= touched - 0.1
            for lock in state.glob("*/lock")
        ):
            time.sleep(0.02)
        time.sleep(moments.uniform(0.1, 1.3))
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log = project.stage("baseline")
    assert "going on after epoch" in log
    for file in ("model.safetensors", "history.csv"):
        ours, theirs = (p.path / "models/baseline" / file for p in (project, twin))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_twins_train_once(project):
    project.params(seed=7, baseline__epochs=60)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "stages.baseline"],
            cwd=project.path,
            env=project.env(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    logs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("kept" in log for log in logs) == 1, logs
    assert sum("taken over" in log for log in logs) == 1, logs


# -- help and bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_says_what_it_reads_and_writes(finished, name):
    text = finished.run(sys.executable, "-m", f"stages.{name}", "--help")
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
    log = project.stage("baseline", ok=False)
    assert len(log.strip().splitlines()) == 1 and log.startswith("error: ")
    assert all(word in log for word in words), log
    assert model_bytes(project) == model_bytes(finished)


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
        log = project.stage("sparse_train", ok=False)
        assert len(log.strip().splitlines()) == 1, log
        assert "models/baseline/model.safetensors" in log and word in log.replace(
            "not written by Secateur", "foreign"
        ), log
    checkpoint.write_bytes(whole)
    project.params(arch="lenet5")
    log = project.stage("sparse_train", ok=False)
    assert "holds architecture 'lenet300'" in log


def test_missing_data_says_where_it_looked(project, tmp_path):
    project.params(dataset="mnist")
    log = project.stage("prepare", ok=False, SECATEUR_DATA=str(tmp_path / "nothing"))
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "nothing") in line and "SECATEUR_DATA" in line


def test_a_diverging_loss_stops_and_keeps_the_last_good_state(project):
    project.params(baseline__optimizer="sgd", baseline__lr=1e8, seed=11)
    log = project.stage("baseline", ok=False)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "epoch 1, step" in line and "lr" in line
    project.params(baseline__lr=0.05, baseline__epochs=2)
    project.stage("baseline")
