"""Several processes train as one does: real torchrun, real gloo, two processes on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.numpy

pytestmark = pytest.mark.pipeline

TWO = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"


def weights(project):
    return safetensors.numpy.load_file(project.path / "models/baseline/model.safetensors")


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_two_processes_make_the_model_that_one_makes_within_rounding(
    unborn, accumulate_grad_batches
):
    unborn.params(
        baseline__optimizer="sgd",
        baseline__lr=0.1,
        baseline__epochs=5,
        baseline__batch_size=68,  # 1,293 images: the last batch has one, too few for two processes
        baseline__accumulate_grad_batches=accumulate_grad_batches,
        baseline__keep="last",
    )
    unborn.stage("prepare")
    unborn.stage("baseline")
    alone, history = weights(unborn), (unborn.path / "models/baseline/history.csv").read_text()
    for made in (unborn.path / "models/baseline").iterdir():
        made.unlink()
    log = unborn.stage("baseline", SECATEUR_LAUNCH=TWO)
    together = weights(unborn)
    assert log.count("epoch 5 of 5 kept") == 1  # the second process keeps quiet
    assert set(together) == set(alone)
    for name, found in together.items():
        assert abs(found - alone[name]).max() < 1e-4 * abs(alone[name]).max(), name
    rows = [text.splitlines()[-1].split(",") for text in (
        history, (unborn.path / "models/baseline/history.csv").read_text())]  # fmt: skip
    for before, after in zip(*rows, strict=True):
        assert float(after) == pytest.approx(float(before), rel=1e-4)
    record = json.loads((unborn.path / "models/baseline.run.json").read_text())
    assert record["stage"] == "baseline"


def workers(pid):
    """Processes of the stage that torchrun has started below this one."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    children = {}
    for line in listed.splitlines()[1:]:
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    return [w for launcher in children.get(pid, []) for w in children.get(launcher, [])]


def test_a_killed_worker_ends_the_stage_and_the_next_run_goes_on(unborn):
    unborn.params(baseline__epochs=100, baseline__keep="last")
    unborn.stage("prepare")
    undisturbed = unborn.copy(unborn.path.parent / "undisturbed")
    undisturbed.stage("baseline", SECATEUR_LAUNCH=TWO)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.baseline"],
        cwd=unborn.path, env=unborn.env(SECATEUR_LAUNCH=TWO), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(unborn.path.glob(".resume/baseline/*/state.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: baseline: a process of" in log.splitlines()[-1]
    assert not (unborn.path / "models/baseline/model.safetensors").exists()
    log = unborn.stage("baseline", SECATEUR_LAUNCH=TWO)
    assert "going on after epoch" in log
    files = [p.path / "models/baseline/model.safetensors" for p in (unborn, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_launcher_that_is_not_there_is_told_in_one_line(unborn):
    unborn.stage("prepare")
    log = unborn.stage("baseline", ok=False, SECATEUR_LAUNCH="no-such-launcher -n 2")
    assert log.splitlines()[-1].startswith("error: SECATEUR_LAUNCH = 'no-such-launcher -n 2'")
