"""A study whose values are chosen by a sampler of Optuna: random, TPE or NSGA-II.

J. Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011 (TPE); K. Deb et al.,
A fast and elitist multiobjective genetic algorithm: NSGA-II, 2002.

A trial is run up to `finetune` and judged on the validation images. The trials that no other trial
beats are then evaluated on the test images, like the cells of an ordinary study. Trials are stored
in Optuna's journal, studies/<name>.journal: an interrupted search resumes with the same trials that
it would have run without the interruption.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.base import optional
from secateur.base.errors import SecateurError, SettingsError
from secateur.pipeline import console, tracked
from secateur.pipeline.record import model_spec, parse
from secateur.studies import definition, marks, plan, rounds
from secateur.studies.definition import PlannedCell, Space, Study
from secateur.studies.execution import check
from secateur.studies.execution.keys import Entry, Graph
from secateur.studies.execution.local import Executor
from secateur.studies.execution.snapshot import PLACE, Snapshot
from secateur.studies.plan import Plan
from secateur.studies.progress import Progress, executor_of
from secateur.studies.report import trials as table
from secateur.studies.report.trials import Trial
from secateur.studies.space import MAXIMISED, Range, Search

LAST = "finetune"
"""The stage that ends a trial; with several rounds, that of the last round."""
PREPARE = "prepare"
NO_IMAGES = (
    "search: accuracy is judged on the validation images, but there are none; set data.validation "
    "above 0"
)


def show(study: Study, space: Space) -> None:
    """Print the search space, and the progress of the search."""
    console.say(f"{study.name}: {study.about}")
    for axis, values in space.axes.items():
        console.say(f"axis       {axis}: {_words(values)}")
    search = space.search
    console.say(
        f"search     {search.trials} trials by {search.sampler}, seeds "
        f"{', '.join(map(str, space.seeds))} each, "
        f"for {' and '.join(search.objectives)}"
    )
    path = journal(study.name)
    done = Trials(study.name, space).count() if path.is_file() else 0
    console.say(f"trials     {done} in {path}, {max(search.trials - done, 0)} to be run")


def run(state: Snapshot, study: Study, space: Space, options: argparse.Namespace) -> Study:
    """Run the missing trials; returns the study with the cells of the best trials."""
    search, began = space.search, time.monotonic()
    graph = Graph(state.copy("plan"), state.root)
    with _alone(state, study.name):
        trials = Trials(study.name, space)
        if trials.missing():
            _check_settings(graph, space)
        _check_validation(state, graph, space, options)
        trials.claim(_digest(graph, space))
        if trials.missing():
            with executor_of(options, state, graph, search.batch * len(space.seeds)) as executor:
                while trials.missing() and not _late(search, began):
                    _batch(state, graph, space, trials, executor)
        best = trials.best()
        folder = marks.REPORTS / study.name
        folder.mkdir(parents=True, exist_ok=True)
        table.write(folder, trials.rows())
    cells = [cell for trial in best for cell in space.cells(_name(trial), trial.params)]
    return replace(study, cells=tuple(cells), remarks=(_remark(space, trials.count()),))


def _check_settings(graph: Graph, space: Space) -> None:
    """Raise SettingsError for a label, or an end of a range, whose settings are not allowed."""
    made = plan.make(graph, _choices(space, both_ends=True), LAST)
    made.look_up()
    check.settings(made)


def _check_validation(
    state: Snapshot, graph: Graph, space: Space, options: argparse.Namespace
) -> None:
    """Raise SettingsError if accuracy is an objective but there are no validation images.

    If none are split off the training images, the data set may have its own; this is known once it
    is prepared.
    """
    if "accuracy" not in space.search.objectives:
        return
    cells = [
        cell
        for cell in _choices(space)
        if not rounds.whole(graph.params, cell.settings)["data"]["validation"]
    ]
    made = plan.make(graph, cells, PREPARE)
    made.look_up()
    if made.missing():
        with executor_of(options, state, graph, len(made.works)) as executor:
            Progress(state, made).finish(executor)
    for number in filter(made.finished, range(len(cells))):
        path = f"data/{made.params(number)['dataset']}/about.json"
        info = json.loads(graph.read(made.entries_of(number)[PREPARE], path))
        if not info["counts"]["val"]:
            raise SettingsError(f"{cells[number].name}: {NO_IMAGES}")


def _batch(
    state: Snapshot,
    graph: Graph,
    space: Space,
    trials: "Trials",
    executor: Executor,
) -> None:
    """Run the next trials up to the end of their batch, and tell the sampler their results."""
    open_trials = trials.propose()
    cells = {t.number: space.cells(_name(t), t.params) for t in open_trials}
    made = plan.make(graph, [cell for own in cells.values() for cell in own], LAST)
    made.look_up()
    progress = Progress(state, made)
    progress.finish(executor)
    numbers = iter(range(len(made.cells)))
    for trial in open_trials:
        own = [next(numbers) for _ in cells[trial.number]]
        if not all(map(made.finished, own)):
            trials.fail(trial)
            console.say(
                f"trial {trial.number}: failed; the next call of the command tries it again"
            )
            continue
        reached = judged(made, own, space.search.objectives)
        trials.tell(trial, reached)
        words = ", ".join(f"{name} {value:.4g}" for name, value in reached.items())
        console.say(
            f"trial {trial.number}: {words}; {trials.count()} of {space.search.trials} done"
        )


def judged(made: Plan, cells: Sequence[int], objectives: Sequence[str]) -> dict[str, float]:
    """Results of the finished cells of one trial: means over seeds."""
    found = [
        _reached(made, made.entries_of(cell), rounds.last(made.params(cell), LAST), objectives)
        for cell in cells
    ]
    return {name: statistics.fmean(values[name] for values in found) for name in objectives}


def _reached(
    made: Plan, entries: Mapping[str, Entry], last: str, objectives: Sequence[str]
) -> dict[str, float]:
    """Accuracy on the validation images, and remaining shares of parameters and MACs."""
    values: dict[str, float] = {}
    if "accuracy" in objectives:
        path = str(model_spec(last).record)
        metrics = parse(made.graph.read(entries[last], path), path).metrics
        known = metrics.get("val_accuracy")  # missing if its training had no epochs
        values["accuracy"] = _accuracy(made, entries, last) if known is None else known
    if {"params", "macs"} & {*objectives}:
        values |= _costs(made, entries, last)
    return values


def _accuracy(made: Plan, entries: Mapping[str, Entry], last: str) -> float:
    """Accuracy of the final network on the validation images, from the files in DVC's cache."""
    from secateur.data import dataset
    from secateur.nn import checkpoint
    from secateur.training.evaluation import accuracy

    (out,) = entries[PREPARE]["outs"]
    with tempfile.TemporaryDirectory() as folder:
        for path, md5 in tracked.contents(made.graph.object(out["md5"])).items():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(made.graph.object(md5).resolve())
        prepared = dataset.load(Path(folder))
        if not prepared.info.counts["val"]:
            raise SettingsError(NO_IMAGES)
        final = checkpoint.load(_checkpoint(made, entries, last))
        info = replace(prepared.info, mean=list(final.header.mean), std=list(final.header.std))
        return accuracy(final.model(), prepared.val, info)[0]


def _checkpoint(made: Plan, entries: Mapping[str, Entry], stage: str) -> Path:
    """The model of a finished stage, in DVC's cache."""
    path = str(model_spec(stage).checkpoint)
    place = made.graph.locate(entries[stage], path)
    if place is None:
        raise SecateurError(f"{path}: the stage has not written it")
    return place


def _costs(made: Plan, entries: Mapping[str, Entry], last: str) -> dict[str, float]:
    """Remaining shares of the dense network's parameters and MACs, counting only non-zeros."""
    import torch

    from secateur.nn import checkpoint, cost

    dense, final = (
        checkpoint.load(_checkpoint(made, entries, stage)) for stage in ("baseline", last)
    )
    image = torch.zeros(1, *dense.header.shape)
    network, small = dense.model(), final.model()
    left = sum(layer.macs for layer in cost.layer_costs(small, image, final.masks))
    return {
        "params": 1 / cost.compression(network, small, final.masks),
        "macs": left / cost.macs(network, image),
    }


class Trials:
    """The journal of a search."""

    def __init__(self, name: str, space: Space) -> None:
        self.space, self.search = space, space.search
        self._optuna = optional.load("optuna", "for a search")
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self.path = journal(name)
        backend = self._optuna.storages.journal.JournalFileBackend(str(self.path))
        directions = [
            "maximize" if objective in MAXIMISED else "minimize"
            for objective in self.search.objectives
        ]
        with self._damaged():
            storage = self._optuna.storages.JournalStorage(backend)
            known = {each.study_name for each in storage.get_all_studies()}
            if name in known:  # create_study would write a line for it again
                self._study = self._optuna.load_study(study_name=name, storage=storage)
            else:
                self._study = self._optuna.create_study(
                    study_name=name, storage=storage, directions=directions
                )
            if [each.name.lower() for each in self._study.directions] != directions:
                raise ValueError("other objectives")
        self._failed: set[int] = set()
        self._distributions = {axis: self._distribution(v) for axis, v in space.axes.items()}

    @contextlib.contextmanager
    def _damaged(self) -> Iterator[None]:
        """SettingsError for a file that is not a journal, or has other objectives."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise SettingsError(
                f"{self.path}: no journal of this search ({type(error).__name__}: {error}); "
                "delete it, or give the study another name"
            ) from None

    def claim(self, digest: str) -> None:
        """Raise SettingsError if the journal's trials had other code, settings or data."""
        known = self._study.user_attrs.get("digest")
        if known is None:
            self._study.set_user_attr("digest", digest)
        elif known != digest:
            raise SettingsError(
                f"{self.path}: its trials were of other axes, objectives, seeds, settings, code or "
                "data; delete it, or give the study another name (what is trained stays in DVC's "
                "cache)"
            )

    def finished(self) -> list[Any]:
        """The trials with recorded results, by number."""
        return [trial for trial in self._study.get_trials() if trial.state.is_finished()]

    def count(self) -> int:
        """Number of trials with recorded results."""
        return len(self.finished())

    def missing(self) -> bool:
        """Whether more trials are to be run, apart from failed ones."""
        return self.count() + len(self._failed) < self.search.trials

    def propose(self) -> list[Any]:
        """The trials to run next: those started but not finished, and the rest of a batch.

        A failed trial is proposed again, but not within the same call of the command.

        Every proposal has its own sampler, seeded by the search's seed and the number of the trial,
        so that it depends only on the trials before it.
        """
        open_trials = self._open()
        count, batch = len(self._study.get_trials()), self.search.batch
        end = min(-(-count // batch) * batch if open_trials else count + batch, self.search.trials)
        for number in range(count, end):
            self._study.sampler = self._sampler(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                self._study.ask(self._distributions)
        return self._open()

    def _open(self) -> list[Any]:
        """The trials that were started and have neither a result nor failed."""
        return [
            trial
            for trial in self._study.get_trials()
            if not trial.state.is_finished() and trial.number not in self._failed
        ]

    def tell(self, trial: Any, reached: Mapping[str, float]) -> None:
        """Record the results of a trial, by objective."""
        self._study.tell(trial.number, [reached[name] for name in self.search.objectives])

    def fail(self, trial: Any) -> None:
        """Leave out a failed trial until the next call.

        Nothing is written to the journal, whose entries are final; the cause may be a full disk.
        """
        self._failed.add(trial.number)

    def best(self) -> list[Any]:
        """The trials that no other beats in every objective; SecateurError if all have failed."""
        complete = [trial for trial in self.finished() if trial.values is not None]
        if not complete:
            raise SecateurError("search: no trial has succeeded; the same command tries again")
        if len(self.search.objectives) == 1:
            return [self._study.best_trial]
        return sorted(self._study.best_trials, key=lambda trial: trial.number)

    def rows(self) -> list[Trial]:
        """All trials for the table, including failed ones."""
        best = {trial.number for trial in self.best()}
        return [
            Trial(
                trial.number,
                trial.params,
                dict(zip(self.search.objectives, trial.values or [], strict=False)),
                trial.number in best,
            )
            for trial in self._study.get_trials()
            if trial.state.is_finished() or trial.number in self._failed
        ]

    def _sampler(self, number: int) -> Any:
        """The sampler for one proposal."""
        seed = (self.search.seed * 1_000_003 + number) % 2**32
        samplers = self._optuna.samplers
        if self.search.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if self.search.sampler == "nsga2":
            size = max(self.search.batch, self.search.trials // 5, 2)
            return samplers.NSGAIISampler(seed=seed, population_size=size)
        return samplers.TPESampler(seed=seed)

    def _distribution(self, axis: Range | tuple[str, ...]) -> Any:
        kinds = self._optuna.distributions
        if not isinstance(axis, Range):
            return kinds.CategoricalDistribution(axis)
        if axis.whole:
            return kinds.IntDistribution(axis.low, axis.highest, log=axis.log, step=axis.step or 1)
        return kinds.FloatDistribution(axis.low, axis.highest, log=axis.log, step=axis.step)


def journal(name: str) -> Path:
    """File with the trials of a study."""
    return definition.FOLDER / f"{name}.journal"


def _name(trial: Any) -> str:
    """Name of a trial, as part of the names of its experiments."""
    return f"t{trial.number:03d}"


def _late(search: Search, began: float) -> bool:
    return search.hours is not None and time.monotonic() - began > 3600 * search.hours


def _choices(space: Space, both_ends: bool = False) -> list[PlannedCell]:
    """The cells of one choice for every label; ranges have their lowest number.

    With `both_ends`, also one for the highest number of every range.
    """
    start = {axis: definition.first(values) for axis, values in space.axes.items()}
    choices = {"start": start}
    for axis, values in space.axes.items():
        if not isinstance(values, Range):
            choices |= {f"{axis} {label}": start | {axis: label} for label in values}
        elif both_ends:
            choices[f"{axis} {values.highest}"] = start | {axis: values.highest}
    return [cell for name, chosen in choices.items() for cell in space.cells(name, chosen)]


def _digest(graph: Graph, space: Space) -> str:
    """Hash of everything that results of trials depend on, except the choice itself.

    The pieces of work of one choice for every label represent code, settings and data.
    """
    ids = list(plan.make(graph, _choices(space), LAST).works)
    axes = {axis: repr(values) for axis, values in space.axes.items()}
    text = json.dumps([ids, axes, list(space.seeds), list(space.search.objectives)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def _alone(state: Snapshot, name: str) -> Iterator[None]:
    """Hold the lock of this search; SecateurError if the search is already running."""
    path = state.root / PLACE / f"{name}.search.lock"
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SecateurError(f"search {name}: is running already") from None
        yield


def _words(axis: Range | tuple[str, ...]) -> str:
    """An axis in words."""
    if not isinstance(axis, Range):
        return " | ".join(axis)
    kind = ", by its logarithm" if axis.log else f", step {axis.step}" if axis.step else ""
    return f"{axis.low} to {axis.high}{kind}"


def _remark(space: Space, done: int) -> str:
    """A remark on the page about the origin of its rows."""
    axes = "; ".join(f"{axis}: {_words(values)}" for axis, values in space.axes.items())
    return (
        f"search: {done} trials by {space.search.sampler} over {axes}, judged by "
        f"{' and '.join(space.search.objectives)} on the validation images; the rows are the "
        "trials that no other trial beats in all of these; only they were evaluated on test images"
    )
