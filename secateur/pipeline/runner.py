"""What the stages that make a model have in common: made once, watched, saved, recorded."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from secateur.base import files, machine, stage
from secateur.base.errors import SecateurError
from secateur.base.settings import Params, Train
from secateur.data import dataset as data
from secateur.nn import checkpoint, norms
from secateur.nn.checkpoint import Checkpoint, Header
from secateur.pipeline import console, record
from secateur.pipeline import tracking as track
from secateur.pipeline.record import FOLDERS
from secateur.sparsity.choices import Choices
from secateur.sparsity.masks import Masks
from secateur.training import loop as train
from secateur.training import resume
from secateur.training.engine import Engine, relaunch
from secateur.training.penalty import Penalty, Row


@dataclass(frozen=True)
class StageResult:
    """A model as a stage leaves it."""

    model: nn.Module
    header: Header
    masks: Masks = field(default_factory=dict)
    choices: Choices = field(default_factory=dict)
    """What the penalty has chosen to go."""
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[Row] | None = None
    """A row for every epoch of a training, which may have none."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Name -> a further <name>.csv beside the model."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Name -> content of a further file beside the model."""


class StageContext:
    """One stage at work on one model: what it may read, and the loop it may run."""

    def __init__(self, name: str, pipeline: str = "dvc.yaml") -> None:
        """Check settings and inputs; nothing is computed yet. `pipeline` declares the stage."""
        self.stage = stage.open_stage(name, pipeline)
        self.params: Params = self.stage.params
        self.data = data.load(self.stage.input(f"data/{self.params.dataset}"))
        self.upstream: dict[str, Checkpoint] = {}
        self.watchers: list[train.Callback] = []
        self.work: train.StateStore | None = None
        self.engine: Engine | None = None
        machine.device()

    def checkpoint(self, maker: str) -> Checkpoint:
        """The model that stage `maker` has made, checked against architecture and data."""
        path = self.stage.input(FOLDERS[maker]) / "model.safetensors"
        arch = self.params.arch
        found = checkpoint.load(path, arch, self.params.archs.get(arch) or {}, self.data.info.hash)
        self.upstream[maker] = found
        return found

    def fit(
        self,
        model: nn.Module,
        settings: Train,
        *,
        penalty: Penalty | None = None,
        masks: Masks | None = None,
    ) -> train.FitResult:
        """Train `model` in place; goes on where a killed process was."""
        assert self.work is not None, "fit() is for the function that make() was given"
        bar = console.Training(self.stage.name)
        first = self.engine is None or self.engine.is_main
        try:
            result = train.fit(
                model,
                self.data,
                settings,
                self.params.seed,
                self.work,
                [bar, *self.watchers] if first else [],
                engine=self.engine,
                penalty=penalty,
                masks=masks,
            )
        finally:
            bar.close()
        if first:
            bar.finish(result.history, result.best_epoch)
        return result

    def header(self, parent: Checkpoint | None = None, **notes: Any) -> Header:
        """Header of the model in the making."""
        if parent is not None:
            return replace(
                parent.header,
                stage=self.stage.name,
                parent=parent.sha256,
                notes=notes,
                versions=machine.versions(),
            )
        info = self.data.info
        return Header(
            arch=self.params.arch,
            arch_settings=self.params.archs.get(self.params.arch) or {},
            classes=info.classes,
            shape=info.shape,
            mean=info.mean,
            std=info.std,
            split=info.hash,
            stage=self.stage.name,
            notes=notes,
        )


def trained(
    model: nn.Module, header: Header, fit: train.FitResult, masks: Masks | None = None
) -> StageResult:
    """What a training stage leaves: the model with the figures of the epoch that was kept."""
    picked = fit.history[fit.best_epoch - 1] if fit.history else {}
    kept = {k: v for k, v in picked.items() if k not in ("epoch", "lr")}
    metrics = kept | {"best_epoch": float(fit.best_epoch), "epochs": float(len(fit.history))}
    return StageResult(model, header, masks or {}, metrics=metrics, history=fit.history)


def train_model(
    job: StageContext, settings: Train, produce: Callable[[StageContext], StageResult]
) -> None:
    """`make` for a stage that trains by `settings`: in several processes if those were started.

    The first process holds the lock, writes and reports; the others only train with it.
    """
    if relaunch(job.stage.name.replace("-", "_")):
        return
    job.engine = Engine(settings.precision)
    if job.engine.is_main:
        make(job, produce)
    elif not job.engine.broadcast(None):
        job.work = _Elsewhere()
        produce(job)


def make(job: StageContext, produce: Callable[[StageContext], StageResult]) -> None:
    """Run `produce` once for each fingerprint, and write model, history and record.

    A twin that waits for the same work, here or in another experiment, takes the result over.
    """
    folder = Path(FOLDERS[job.stage.name])
    recorded = folder.with_name(f"{folder.name}.run.json")
    outs = [str(folder), str(recorded)]
    name = job.stage.name
    with resume.single_flight(job.stage, outs, lambda: console.waiting(name)) as work:
        if job.engine is not None:
            job.engine.broadcast(work.done)
        if work.done:
            work.take()
            console.taken(name)
            return
        run = _open_run(job, work)
        clock = _Clock(work)
        job.work, job.watchers = work, [run, clock]
        gc.freeze()  # what the imports made lives as long as the process: nothing to collect there
        try:
            product = produce(job)
        except SecateurError:
            run.fail()
            raise
        _write(job, folder, recorded, product, run, clock.total())
        work.finish()


def _write(
    job: StageContext,
    folder: Path,
    recorded: Path,
    product: StageResult,
    run: track.Run,
    seconds: float,
) -> None:
    """Model, history and record of a stage that is through."""
    path, model = folder / "model.safetensors", str(folder / "model.safetensors")
    sha256 = checkpoint.save(path, product.header, product.model, product.masks, product.choices)
    if product.history is not None:
        columns = None if product.history else ["epoch", "lr", *train.FIGURES]
        table = pd.DataFrame(product.history, columns=columns).astype({"epoch": int})
        files.write_text(folder / "history.csv", table.to_csv(index=False))
    tables = {"scales": norms.distribution(product.model)} | product.tables
    for name, table in tables.items():
        files.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    for name, text in product.texts.items():
        files.write_text(folder / name, text)
    model_id = run.close(product.metrics | {"seconds": seconds}, model, sha256)
    info = job.data.info
    record.save(
        recorded,
        record.RunRecord(
            stage=job.stage.name,
            fingerprint=job.stage.fingerprint,
            params=job.stage.declared,
            metrics=product.metrics,
            model=model,
            sha256=sha256,
            dataset={"name": info.name, "hash": info.hash, **info.counts},
            seconds=round(seconds, 3),
            hardware=machine.hardware(),
            run_id=run.id,
            model_id=model_id,
            tracking_uri=run.store.uri if run.id else None,
            upstream={maker: c.sha256 for maker, c in job.upstream.items()},
        ),
    )


def _open_run(job: StageContext, work: resume.Work) -> track.Run:
    """The stage's MLflow run, linked to those of the models it reads."""
    upstream = {}
    for maker in job.upstream:
        path = Path(f"{FOLDERS[maker]}.run.json")  # for the link alone; may be missing
        upstream[maker] = record.load(path) if path.exists() else None
    run = track.Run(track.Store(), job.stage, upstream)
    info = job.data.info
    run.open(work.note("run_id"), {"name": info.name, "hash": info.hash})
    work.note("run_id", run.id)
    return run


class _Elsewhere:
    """The memory of a process that trains with another one, which keeps the state of both."""

    def state(self) -> None:
        """The first process hands it over."""

    def keep(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """The first process keeps it."""
        return False


class _Clock:
    """Wall time of the work over all tries, noted whenever the state is safe."""

    def __init__(self, work: resume.Work) -> None:
        self.work, self.began = work, time.monotonic()
        self.before = float(work.note("seconds") or 0.0)

    def total(self) -> float:
        return self.before + time.monotonic() - self.began

    def start(self, epochs: int, steps: int, rows: list[Row]) -> None:
        """Nothing to do."""

    def step(self, epoch: int, step: int) -> None:
        """Nothing to do."""

    def epoch(self, row: Row) -> None:
        """Nothing to do."""

    def saved(self) -> None:
        """Note the time so far."""
        self.work.note("seconds", self.total())
