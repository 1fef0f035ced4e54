"""Twenty kills with SIGKILL at random moments, starting within a fresh clone, with MLflow on."""

import os
import random
import signal
import subprocess
import time

import pytest
from mlflow import MlflowClient
from workspace import fresh_project

from secateur.pipeline import mlflow_file, tracking
from secateur.pipeline.record import MODELS

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
"""Seed of the moments; what the processes are doing then differs between machines."""
PER_CLONE = 10


def test_kills_at_random_moments_change_nothing(tmp_path):
    undisturbed = clone(tmp_path / "undisturbed")
    began = time.monotonic()
    undisturbed.dvc("repro", SECATEUR_TRACKING="on")
    longest = 0.25 * (time.monotonic() - began)
    moments, kills, number = random.Random(SEED), 0, 0
    while kills < KILLS:
        number += 1
        project = clone(tmp_path / f"clone{number}")
        for _ in range(min(PER_CLONE, KILLS - kills)):
            moment = moments.uniform(0, longest)
            log = killed_after(project, moment)
            if log is None:
                print(f"clone {number}: finished before {moment:.1f} s", flush=True)
                break
            kills += 1
            print(f"clone {number}, kill {kills} after {moment:.1f} s: {log}", flush=True)
        log = project.dvc("repro", SECATEUR_TRACKING="on")
        assert "Traceback" not in log and "warning" not in log, log
        assert project.model_bytes() == undisturbed.model_bytes()
        assert "up to date" in project.dvc("status", "dvc.yaml")
        check_store(project)


def clone(folder):
    folder.mkdir()
    project = fresh_project(folder)
    project.params(baseline__epochs=60, sparse_train__epochs=60, finetune__epochs=40)
    return project


def killed_after(project, seconds):
    """Start `dvc repro` and kill its process group; its last line, or None if it had finished."""
    log = project.path.parent / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=project.path,
            env=project.env(SECATEUR_TRACKING="on"),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            return None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text().split("\n")
    assert not any("Traceback" in line or "warning" in line for line in lines), log.read_text()
    state = "no store" if not (project.path / "mlflow.db").exists() else "store"
    if list(project.path.glob(".mlflow.db.new-*")):
        state = "store being made"
    return f"{state}; {next((line for line in reversed(lines) if line.strip()), 'no line yet')}"


def check_store(project):
    """Every stage and the chain have one finished run, stages with all epochs; none is RUNNING."""
    path = project.path / "mlflow.db"
    assert mlflow_file.fault(path, thorough=True) is None
    assert not list(project.path.glob("mlflow.db.broken-*"))
    assert not list(project.path.glob(".mlflow.db.new-*"))
    runs = project.runs()
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    finished = {run.data.tags["stage"]: run for run in runs if run.info.status == "FINISHED"}
    assert len(finished) == sum(run.info.status == "FINISHED" for run in runs) == 5
    assert finished.keys() == {*MODELS, "evaluate"}
    client = MlflowClient(f"sqlite:///{path}")
    for stage, model in MODELS.items():
        assert finished["evaluate"].data.tags[f"run.{stage}"] == finished[stage].info.run_id
        rows = tracking.read_history(project.path / model.history)
        logged = client.get_metric_history(finished[stage].info.run_id, "epoch/train_loss")
        assert {metric.step: metric.value for metric in logged} == {
            row["epoch"]: pytest.approx(row["train_loss"]) for row in rows
        }
        assert len(finished[stage].outputs.model_outputs) == 1
    killed = [run.data.tags["stage"] for run in runs if run.info.status == "KILLED"]
    print(f"whole: {len(finished)} runs FINISHED, KILLED: {killed or 'none'}", flush=True)
