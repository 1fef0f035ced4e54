"""Stages that are killed, and several at once."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.pipeline


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
