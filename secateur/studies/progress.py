"""Runs the pieces of work of a plan with an executor until none is missing."""

import argparse
import contextlib
import heapq
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from secateur.base.errors import SettingsError, cut
from secateur.pipeline import console
from secateur.studies import estimate
from secateur.studies.execution import local
from secateur.studies.execution.experiments import Experiments
from secateur.studies.execution.keys import Entry, Graph, run_key
from secateur.studies.execution.local import Executor, Outcome
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.execution.work import Task
from secateur.studies.plan import Plan

KILLS = 5
"""How often a piece of work is restarted after its process was killed."""


OFTEN, SELDOM = 10.0, 60.0
"""Seconds between two lines of progress: if a piece has ended in between, and otherwise."""


def check_options(options: argparse.Namespace) -> None:
    """Raise SettingsError for an option that the chosen executor does not have."""
    for option, executor in (("cpus", "ray"), ("gpus", "ray"), ("slurm", "slurm")):
        if getattr(options, option) not in (None, []) and options.executor != executor:
            raise SettingsError(
                f"--{option}: of no effect with --executor {options.executor}, "
                f"only with --executor {executor}"
            )


@contextlib.contextmanager
def executor_of(
    options: argparse.Namespace, state: Snapshot, graph: Graph, pieces: int
) -> Iterator[Executor]:
    """The executor of these options, for at most `pieces` pieces of work at a time.

    It is closed at the end, and when the process is asked to terminate.
    """
    made = _executor(options, state, graph.ignored, pieces)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield made
    finally:
        made.close()
        signal.signal(signal.SIGTERM, before)


def _executor(
    options: argparse.Namespace, state: Snapshot, ignored: list[str], pieces: int
) -> Executor:
    slots = options.workers or local.processors()
    if options.executor == "local":
        return local.LocalExecutor(state, min(slots, pieces), ignored)
    if options.executor == "ray":
        from secateur.studies.execution import on_ray

        cpus = 1 if options.cpus is None else options.cpus
        return on_ray.RayExecutor(state, ignored, options.workers, cpus, options.gpus or 0)
    from secateur.studies.execution import on_slurm

    parameters = {k: int(v) if v.isdecimal() else v for k, v in options.slurm}
    return on_slurm.SlurmExecutor(state, options.workers or 64, parameters)


@dataclass
class Progress:
    """A running plan."""

    state: Snapshot
    plan: Plan
    experiments: Experiments | None = None
    """Experiments to write for finished cells."""
    ran: list[str] = field(default_factory=list)
    """Stages that really ran, in the order in which they ended."""
    failed: dict[str, str] = field(default_factory=dict)
    """Id of a piece -> the error in its log."""
    kills: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        works = self.plan.works
        self._order = {id: number for number, id in enumerate(works)}
        self._readers: dict[str, list[str]] = {id: [] for id in works}
        for work in works.values():
            for other in work.upstream.values():
                self._readers[other].append(work.id)
        self._ready: list[tuple[int, int, str]] = []
        self._tasks: dict[str, tuple[Task, list[str]]] = {}
        self._begun: dict[str, float] = {}
        self._began = self._said = self._wrote = time.monotonic()
        self._news = True
        """Whether there is news: nothing was printed yet, or a piece has ended since."""

    def finish(self, executor: Executor) -> None:
        """Run all pieces that are missing."""
        for work in self.plan.missing():
            self._consider(work.id)
        while self._ready or self._tasks:
            while self._ready and len(self._tasks) < executor.slots:
                self._begin(heapq.heappop(self._ready)[2], executor)
            if not self._tasks:
                continue
            for outcome in executor.wait(OFTEN):
                self._end(outcome, executor)
                self._news = True
            self._report(executor.slots)
        self.write_experiments()

    def write_experiments(self) -> None:
        """Write the finished experiments, if experiments are requested."""
        if self.experiments is not None:
            self.experiments.write()

    def _consider(self, id: str) -> None:
        """Mark a piece as ready to start if all pieces that it reads are finished."""
        work = self.plan.works[id]
        if all(other in self.plan.entries for other in work.upstream.values()):
            heapq.heappush(self._ready, (work.cell, self._order[id], id))

    def _begin(self, id: str, executor: Executor) -> None:
        """Submit a piece to the executor, unless the cache has it or another has the same key."""
        entry = self.plan.pending(id)
        assert entry is not None, "all that it reads is finished"
        found = self.plan.graph.find(entry)
        if found is not None:
            self._finished(id, found)
            return
        key = run_key(entry)
        if key in self._tasks:
            self._tasks[key][1].append(id)
            return
        work = self.plan.works[id]
        cell, graph = self.plan.cells[work.cell], self.plan.graph
        task = Task(
            key=key,
            stage=work.stage.address,
            params=self.plan.params_text(work.cell),
            upstream=[self.plan.entries[other] for other in work.upstream.values()],
            root=str(self.state.root),
            revision=self.state.revision,
            tree=self.state.tree,
            cache=str(self.state.cache),
            ignored=graph.ignored,
            experiment=cell.name,
            folders={path: graph.own_files(path) for path in work.stage.folders},
        )
        self._tasks[key] = (task, [id])
        self._begun[id] = time.monotonic()
        executor.submit(task)

    def _end(self, outcome: Outcome, executor: Executor) -> None:
        """Take the result of a piece; restart the piece if its process was killed."""
        task, ids = self._tasks.pop(outcome.key)
        if outcome.status < 0:
            kills = self.kills[task.key] = self.kills.get(task.key, 0) + 1
            if kills < KILLS:
                self._tasks[task.key] = (task, ids)
                executor.submit(task)
                return
        found = local.read_result(task) if outcome.status == 0 else None
        if found is None:
            words = _last_line(task.log) or f"ended with status {outcome.status}"
            for id in ids:
                self.failed[id] = words
            console.say(f"failed: {task.stage} of {task.experiment}: {words}; see {task.log}")
            return
        self.ran.append(task.stage)
        for id in ids:
            self._finished(id, found)

    def _finished(self, id: str, entry: Entry) -> None:
        self.plan.entries[id] = entry
        for reader in self._readers[id]:
            self._consider(reader)

    def _report(self, slots: int) -> None:
        """Print the progress from time to time, and write finished experiments."""
        now = time.monotonic()
        if now - self._said < (OFTEN if self._news else SELDOM):
            return
        self._said, self._news = now, False
        if now - self._wrote > 30:
            self.write_experiments()
            self._wrote = now
        total, left = len(self.plan.works), len(self.plan.missing())
        cells = sum(map(self.plan.finished, range(len(self.plan.cells))))
        spent = {id: now - self._begun[id] for _, ids in self._tasks.values() for id in ids[:1]}
        missing = self.plan.still_possible(self.failed)
        seconds, unknown = estimate.seconds(self.plan, missing, spent, alike=True)
        parallel = min(slots, len(self._tasks) + len(self._ready))
        words = time_left(seconds, unknown, parallel)
        console.say(
            f"{total - left} of {total} pieces, {cells} of {len(self.plan.cells)} cells, after "
            f"{duration(now - self._began)}, {words}"
        )

    def failure(self) -> str | None:
        """One line about all that failed."""
        if not self.failed:
            return None
        lost = sum(not self.plan.finished(number) for number in range(len(self.plan.cells)))
        first = next(iter(self.failed.values()))
        return (
            f"{len(self.failed)} pieces of work failed, so {lost} cells are missing: {first}; the "
            "same command tries again"
        )


def _last_line(log: Path) -> str:
    """The last line that a stage has printed, without `error:`."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return cut(lines[-1].removeprefix("error: "), 300) if lines else ""


def time_left(seconds: float, unknown: Sequence[str], parallel: int) -> str:
    """The time left, in words, for work of these seconds with `parallel` pieces at a time.

    `unknown`: stages of which no times are known yet.
    """
    if unknown and not seconds:
        return f"time left is known when the first {unknown[0]} has ended"
    more = "more than" if unknown else "about"
    return f"{more} {duration(seconds / max(parallel, 1))} left" if seconds else "nearly finished"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)
