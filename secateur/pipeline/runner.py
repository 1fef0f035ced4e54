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
from secateur.training import loop, resume
from secateur.training.callbacks import HISTORY_COLUMNS, Callback, Row
from secateur.training.engine import Engine, relaunch
from secateur.training.penalty import Penalty
from secateur.training.state import StateStore


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
        self.callbacks: list[Callback] = []
        self.store: StateStore | None = None
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
    ) -> loop.FitResult:
        """Train `model` in place; goes on where a killed process was."""
        assert self.store is not None, "fit() is for the function that make() was given"
        bar = console.Training(self.stage.name)
        first = self.engine is None or self.engine.is_main
        try:
            result = loop.fit(
                model,
                self.data,
                settings,
                self.params.seed,
                self.store,
                [bar, *self.callbacks] if first else [],
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
    model: nn.Module, header: Header, fit: loop.FitResult, masks: Masks | None = None
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
        job.store = _Elsewhere()
        produce(job)


def make(job: StageContext, produce: Callable[[StageContext], StageResult]) -> None:
    """Run `produce` once for each fingerprint, and write model, history and record.

    A twin that waits for the same work, here or in another experiment, takes the result over.
    """
    folder = Path(FOLDERS[job.stage.name])
    recorded = folder.with_name(f"{folder.name}.run.json")
    outs = [str(folder), str(recorded)]
    name = job.stage.name
    with resume.single_flight(job.stage, outs, lambda: console.waiting(name)) as store:
        if job.engine is not None:
            job.engine.broadcast(store.complete)
        if store.complete:
            store.restore_outs()
            console.taken(name)
            return
        run = _open_run(job, store)
        clock = _Clock(store)
        job.store, job.callbacks = store, [run, clock]
        gc.freeze()  # what the imports made lives as long as the process: nothing to collect there
        try:
            product = produce(job)
        except SecateurError:
            run.fail()
            raise
        _write(job, folder, recorded, product, run, clock.total())
        store.finish()


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
        columns = None if product.history else list(HISTORY_COLUMNS)
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


def _open_run(job: StageContext, store: resume.ResumeStore) -> track.Run:
    """The stage's MLflow run, linked to those of the models it reads."""
    upstream = {}
    for maker in job.upstream:
        path = Path(f"{FOLDERS[maker]}.run.json")  # for the link alone; may be missing
        upstream[maker] = record.load(path) if path.exists() else None
    run = track.Run(track.Store(), job.stage, upstream)
    info = job.data.info
    run.open(store.note("run_id"), {"name": info.name, "hash": info.hash})
    store.note("run_id", run.id)
    return run


class _Elsewhere:
    """State store of a secondary process: the first process keeps the state of all."""

    def load(self) -> None:
        """Nothing: the first process broadcasts its state."""

    def save(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Nothing: the first process saves the state."""
        return False


class _Clock(Callback):
    """Wall time of a stage over all its processes, noted whenever the state has been saved."""

    def __init__(self, store: resume.ResumeStore) -> None:
        self.store, self.began = store, time.monotonic()
        self.before = float(store.note("seconds") or 0.0)

    def total(self) -> float:
        return self.before + time.monotonic() - self.began

    def on_state_saved(self) -> None:
        """Note the time so far."""
        self.store.note("seconds", self.total())
