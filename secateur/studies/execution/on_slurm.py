"""Executor `slurm`: every piece of work is a job on nodes that share the project's folder.

Pieces that can start at the same time form one job array. A piece is submitted when the pieces that
it reads are finished, because only then its key is known; so no job depends on another.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.base import optional
from secateur.base.errors import SettingsError
from secateur.studies.execution import work
from secateur.studies.execution.local import Outcome
from secateur.studies.execution.snapshot import PLACE, Snapshot
from secateur.studies.execution.work import Task

POLL = 0.5
"""Seconds between two polls of the jobs."""


class SlurmExecutor:
    """Jobs by submitit; `cluster` None: that of this machine, `local`: processes, for trying."""

    def __init__(
        self,
        state: Snapshot,
        slots: int,
        parameters: Mapping[str, Any],
        cluster: str | None = "slurm",
    ) -> None:
        submitit = optional.load("submitit", "for --executor slurm", "slurm")
        self.slots, self.root = slots, state.root
        try:
            self.jobs: Any = submitit.AutoExecutor(state.root / PLACE / "slurm", cluster=cluster)
            defaults = {"timeout_min": 1440, "cpus_per_task": 1}
            self.jobs.update_parameters(**defaults | dict(parameters))
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise SettingsError(f"--slurm: {error}") from None
        self._waiting: list[Task] = []
        self._running: dict[str, Any] = {}

    def submit(self, task: Task) -> None:
        """Queue a piece, which the next `wait` submits."""
        self._waiting.append(task)

    def wait(self, seconds: float | None = None) -> Sequence[Outcome]:
        """Submit queued pieces as one array, and wait until at least one job has ended."""
        if self._waiting:  # submitit warns of an empty array
            with self.jobs.batch():
                made = [self.jobs.submit(run, task.dumps()) for task in self._waiting]
            self._running |= {task.key: job for task, job in zip(self._waiting, made, strict=True)}
            self._waiting = []
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            done = {key: job for key, job in self._running.items() if job.done()}
            if done or (end is not None and time.monotonic() > end):
                break
            time.sleep(POLL)
        found = []
        for key, job in done.items():
            del self._running[key]
            found.append(Outcome(key, -9 if job.exception() is not None else int(job.result())))
        return found

    def close(self) -> None:
        """Cancel jobs that have not ended; stages save their state."""
        for job in self._running.values():
            job.cancel(check=False)


def run(text: str) -> int:
    """Within a job: run the piece in the job's own copy of the project; returns its status."""
    task = work.loads(text)
    state = work.snapshot_of(task)
    name = "slurm-" + os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    folder = state.copy(name, task.ignored)
    task.place.mkdir(parents=True, exist_ok=True)
    with task.log.open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "secateur.studies.execution.work"],
            cwd=folder, input=text, text=True, stdout=log, stderr=log, check=False,
        )  # fmt: skip
    state.remove(name)
    return done.returncode
