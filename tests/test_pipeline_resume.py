"""Stages that are killed or damaged, and several stages at once."""

import fcntl
import os
import random
import signal
import time

import pytest

pytestmark = pytest.mark.pipeline


def kill(process, project, stage="baseline"):
    """Send SIGKILL; a warm process ends slightly later than the client that represents it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for path in project.path.glob(f".resume/{stage}/*/lock"):
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def test_killed_stages_end_with_the_same_bytes(project, tmp_path):
    """kill -9 at random moments of the training; the undisturbed run has its own project."""
    undisturbed = project.copy(tmp_path / "undisturbed")
    for copy in (project, undisturbed):
        copy.params(baseline__epochs=60, seed=5)
    undisturbed.stage("baseline")
    moments, kills = random.Random(0), 0
    for _ in range(3):
        states = project.saved_states("baseline")
        process = project.start("baseline")
        while process.poll() is None and project.saved_states("baseline") == states:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.2))
        if process.poll() is not None:  # a fast machine may have finished by now
            break
        kill(process, project)
        kills += 1
    assert kills, process.communicate()[0]
    log = process.communicate()[0] if process.returncode == 0 else project.stage("baseline")
    assert "resuming after epoch" in log
    for file in ("model.safetensors", "history.csv"):
        ours, theirs = (p.path / "models/baseline" / file for p in (project, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_a_damaged_state_and_notes_start_the_stage_again(project, tmp_path):
    undisturbed = project.copy(tmp_path / "undisturbed")
    for epochs in (15, 100, 1000):  # a fast machine may finish earlier
        project.params(baseline__epochs=epochs, seed=6)
        process = project.start("baseline")
        while process.poll() is None and not project.saved_states("baseline"):
            time.sleep(0.02)
        kill(process, project)
        if project.saved_states("baseline"):
            break
    (state,) = project.saved_states("baseline")
    undisturbed.params(baseline__epochs=epochs, seed=6)
    undisturbed.stage("baseline")
    state.write_bytes(state.read_bytes()[:1000])
    (state.parent / "notes.json").write_text("[]")
    log = project.stage("baseline")
    warnings = [line for line in log.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all("discarded" in line for line in warnings), log
    assert "resuming after" not in log and "Traceback" not in log
    file = "models/baseline/model.safetensors"
    assert (project.path / file).read_bytes() == (undisturbed.path / file).read_bytes()


def test_two_processes_with_equal_work_train_once(project):
    project.params(seed=7, baseline__epochs=30)
    started = [project.start("baseline") for _ in range(2)]
    logs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("kept" in log for log in logs) == 1, logs
    assert sum("result reused" in log for log in logs) == 1, logs
