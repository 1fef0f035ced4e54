"""Training in two processes equals training in one: real torchrun and real gloo, on the CPU.

The processes start warm (tests/warm).
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import one_step
import pandas as pd
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from workspace import ROOT, Project

from secateur.base import plugin
from secateur.data.batches import first_images
from secateur.training.evaluation import accuracy

pytestmark = pytest.mark.pipeline

TWO = "python -m torch.distributed.run --standalone --nproc-per-node 2"
WARM = {"SECATEUR_LAUNCH": TWO, "PYTHON_EXEC": "python"}
EPS = 2.0**-23
"""Spacing of float32 numbers near 1."""


# -- the arithmetic: one step in float64 -----------------------------------------------------------


@pytest.fixture(scope="module")
def steps_of_two(tmp_path_factory, programs):
    """(case, rank) -> weights, history row and passes in training of each of two processes.

    The cases are those of one step, and ("norm", kind of the average).
    """
    folder = tmp_path_factory.mktemp("steps")
    command = [*TWO.split(), "-m", "tests.one_step", str(folder)]
    Project(ROOT).run(*command, timeout=600, PYTHON_EXEC="python", SECATEUR_DEVICE="cpu")
    found = {}
    for case in (*one_step.CASES, ("norm", "none"), ("norm", "ema")):
        for rank in (0, 1):
            path = folder / f"{'-'.join(map(str, (*case, rank)))}.safetensors"
            with safetensors.safe_open(path, framework="pt") as file:
                row, passes = map(json.loads, map(file.metadata().get, ("row", "passes")))
            found[case, rank] = safetensors.torch.load_file(path), row, passes
    return found


def rounding(logits):
    """Bound on the float32 error in the gradient of an image's cross-entropy w.r.t. one logit.

    The logits are rounded and their maximum is subtracted, followed by exponential, sum, logarithm
    and exponential again: eight operations, each with an error of at most EPS times the largest
    number that occurs, which is a logit or 1.
    """
    return 8 * EPS * (1 + float(logits.abs().max()))


def right_and_unsure(logits, labels):
    """Number of correct predictions, and of predictions that rounding may change."""
    top = logits.topk(2).values
    return int((logits.argmax(1) == labels).sum()), int((top[:, 0] - top[:, 1] < 1e-5).sum())


@pytest.mark.parametrize("case", one_step.CASES, ids="{0[0]} images, {0[1]} passes".format)
def test_a_step_of_two_processes_is_that_of_one_within_rounding(case, steps_of_two, monkeypatch):
    """Only the cross-entropy is computed in float32, so the bound is that of its rounding.

    The bound holds on any processor, and is a thousandth of the contribution of one image in 68.
    """
    monkeypatch.setenv("SECATEUR_DEVICE", "cpu")
    count, _ = case
    before, data = one_step.network(), one_step.digits(count)
    images = first_images(data.train, data.info, count)
    model, row = one_step.step(*case)
    alone = model.state_dict()
    together, row_of_two, passes = steps_of_two[case, 0]
    others, row_of_second, passes_of_second = steps_of_two[case, 1]
    assert passes_of_second == passes, "a process with one more would wait on several GPUs"
    start = {name: value.detach() for name, value in before.named_parameters()}

    def logits_of(weights):
        return torch.func.functional_call(before, weights, (images,))

    logits = logits_of(start)
    reach = torch.func.jacrev(logits_of)(start)  # (images, classes, *shape) by parameter
    assert set(together) == set(alone) == set(reach)
    for name, found in together.items():
        assert torch.equal(found, others[name]), "all processes end with the same weights"
        step = one_step.LR * reach[name].abs().sum(1).mean(0)  # if all gradients of logits were 1
        bound = 2 * rounding(logits) * step + 1e-14 * start[name].abs()
        assert ((found - alone[name]).abs() <= bound).all(), name
        moved = (alone[name] - start[name]).norm()
        assert bound.norm() < 1e-3 * moved, "the bound would reveal one image of 68"

    assert row_of_second == row_of_two
    assert set(row_of_two) == set(row)
    right, unsure = right_and_unsure(logits, data.train.labels)
    loss = float(F.cross_entropy(logits, data.train.labels))
    for weights, shown in ((alone, row), (together, row_of_two)):
        assert shown["epoch"] == 1 and shown["lr"] == one_step.LR
        assert abs(shown["train_accuracy"] * count - right) <= unsure
        # the mean of n numbers takes n additions
        assert abs(shown["train_loss"] - loss) <= (count + 8) * EPS * loss + rounding(logits)
        val = first_images(data.val, data.info, len(data.val))
        of_val = torch.func.functional_call(before, weights, (val,))
        right_of_val, unsure_of_val = right_and_unsure(of_val, data.val.labels)
        assert abs(shown["val_accuracy"] * len(val) - right_of_val) <= unsure_of_val
        loss_of_val = float(F.cross_entropy(of_val, data.val.labels))
        off = abs(shown["val_loss"] - loss_of_val)
        assert off <= (len(val) + 8) * EPS * loss_of_val + rounding(of_val)


@pytest.mark.parametrize("kind", ["none", "ema"])
def test_accuracy_is_that_of_the_network_that_is_kept(kind, steps_of_two):
    """Each process has batch-norm statistics of its own while it trains; the first one's count."""
    (first, row, _), (second, *_) = (steps_of_two[("norm", kind), rank] for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    model, _ = one_step.epochs_with_norm(kind, None)
    model.load_state_dict(first)
    data = one_step.digits(300)
    right, loss = accuracy(model, data.val, data.info)
    assert row["val_accuracy"] == pytest.approx(right, abs=1e-6)
    assert row["val_loss"] == pytest.approx(loss, rel=1e-6)


# -- the stage -------------------------------------------------------------------------------------
def weights(project):
    return safetensors.numpy.load_file(project.path / "models/baseline/model.safetensors")


def test_a_stage_in_two_processes_does_what_it_does_in_one(project):
    """Two steps; the second has a single image, too few for two processes."""
    project.params(
        baseline__optimizer="sgd",
        baseline__lr=0.1,
        baseline__epochs=1,
        baseline__batch_size=1292,  # of 1,293 images
        baseline__accumulate_grad_batches=2,
        baseline__keep="last",
    )
    found = []
    for launch in ({}, WARM):
        for made in (project.path / "models/baseline").iterdir():
            made.unlink()
        log = project.stage("baseline", **launch)
        assert log.count("epoch 1 of 1 kept") == 1  # the second process prints nothing
        history = pd.read_csv(project.path / "models/baseline/history.csv")
        record = json.loads((project.path / "models/baseline.run.json").read_text())
        assert record["stage"] == "baseline"
        found.append((weights(project), history.iloc[0], record))
    (alone, row, record), (together, row_of_two, record_of_two) = found
    params = yaml.safe_load((project.path / "params.yaml").read_text())
    torch.manual_seed(params["seed"])
    arch = plugin.load("archs", params["arch"])
    start = arch.build(arch.Settings(**params["archs"][params["arch"]]), 10, (1, 8, 8))
    assert set(together) == set(alone) == set(start.state_dict())
    for name, before in start.state_dict().items():
        apart = np.linalg.norm(together[name] - alone[name])
        # rounding changes a step by a few millionths; half of the images would change it by more
        # than half
        assert apart < 0.01 * np.linalg.norm(alone[name] - before.numpy()), name
    assert set(row_of_two.index) == set(row.index) and set(record_of_two) == set(record)
    assert row_of_two["epoch"] == row["epoch"] == 1 and row_of_two["lr"] == row["lr"]
    for key in ("train_loss", "val_loss"):
        assert row_of_two[key] == pytest.approx(row[key], rel=1e-3)
    for key in ("train_accuracy", "val_accuracy"):
        assert row_of_two[key] == pytest.approx(row[key], abs=0.01)  # an image may be undecided


def workers(project):
    """Ids of the stage's processes that torchrun has started for this project."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            command = (process / "cmdline").read_bytes()
            place = (process / "cwd").readlink()
            if command.endswith(b"\0-u\0-m\0stages.baseline\0") and place == project.path:
                found.append(int(process.name))
    return found


def started(project, epochs):
    """Start the stage in two processes, and wait for the first saved state.

    Returns torchrun's process and the ids of both, or None if the stage has already finished.
    """
    project.params(baseline__epochs=epochs)
    states = project.saved_states("baseline")
    process = subprocess.Popen(
        ["python", "-m", "stages.baseline"],
        cwd=project.path, env=project.env(**WARM, SECATEUR_SAVE_SECONDS="0"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while project.saved_states("baseline") == states and process.poll() is None:
        assert time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    found = workers(project)
    if len(found) == 2:
        return process, found
    assert process.wait(600) == 0, process.communicate()[0]
    return None


def test_a_killed_worker_ends_the_stage_and_the_next_run_goes_on(project, tmp_path):
    project.params(baseline__keep="last")
    (project.path / "models/baseline/model.safetensors").unlink()
    undisturbed = project.copy(tmp_path / "undisturbed")
    for epochs in (12, 100, 1000):  # a fast machine may finish earlier
        if begun := started(project, epochs):
            break
        (project.path / "models/baseline/model.safetensors").unlink()
    process, (_, second) = begun
    os.kill(second, signal.SIGKILL)
    log, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "error: baseline: a process of" in log.splitlines()[-1]
    assert not (project.path / "models/baseline/model.safetensors").exists()
    log = project.stage("baseline", **WARM)
    assert "resuming after epoch" in log
    undisturbed.params(baseline__epochs=epochs)
    undisturbed.stage("baseline", **WARM)
    files = [p.path / "models/baseline/model.safetensors" for p in (project, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_launcher_that_is_not_there_is_told_in_one_line(project):
    log = project.stage_here("baseline", ok=False, SECATEUR_LAUNCH="no-such-launcher -n 2")
    assert log.splitlines()[-1].startswith("error: SECATEUR_LAUNCH = 'no-such-launcher -n 2'")
