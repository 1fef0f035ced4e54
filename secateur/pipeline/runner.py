"""Run a stage that makes a model: once for each fingerprint, observed, saved and recorded."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from secateur.base import allocator, files, machine
from secateur.base.errors import CheckpointError, SettingsError, cut, shorten
from secateur.base.files import Table
from secateur.base.sections import NOTHING, Train
from secateur.base.settings import Params, chain, section
from secateur.base.stage import Stage, open_stage, revision
from secateur.data import dataset
from secateur.data.dataset import Dataset
from secateur.data.image_files import ImageFileList
from secateur.data.progressive_resizing import ProgressiveResizing
from secateur.nn import checkpoint, norms
from secateur.nn.checkpoint import Checkpoint, Header
from secateur.pipeline import console, record, tracking
from secateur.pipeline.mlflow_store import Store, tracking_live
from secateur.pipeline.record import STAGES, Chain, StageSpec, model_spec, stage_spec
from secateur.sparsity.choices import Choices
from secateur.sparsity.masks import Masks
from secateur.training import loop, resume
from secateur.training.callbacks import HISTORY_COLUMNS, Callback, Row
from secateur.training.distillation import Distiller, check_data, load_teacher
from secateur.training.engine import Engine, relaunch
from secateur.training.penalty import Penalty
from secateur.training.state import StateStore


@dataclass(frozen=True)
class StageResult:
    """The result of a stage: a model, and what belongs to it."""

    model: nn.Module
    header: Header
    masks: Masks = field(default_factory=dict)
    choices: Choices = field(default_factory=dict)
    """The penalty's choices of what to prune."""
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[Row] | None = None
    """One row per epoch, possibly none; None if the stage does not train."""
    tables: dict[str, Table] = field(default_factory=dict)
    """Name -> table that is saved as <name>.csv beside the model."""
    more: Mapping[str, nn.Module] = field(default_factory=dict)
    """Name -> network of the same shape that is saved as <name>.safetensors beside the model."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """File name -> content of another file beside the model."""


@dataclass(frozen=True)
class StageContext:
    """Everything that a stage may read: its params, the data, and the models it starts from."""

    stage: Stage
    data: Dataset
    upstream: Mapping[str, Checkpoint]
    """Stage -> the model that it has made."""

    @property
    def params(self) -> Params:
        """The params that dvc.yaml declares for the stage; in a round, those of the round."""
        return self.stage.params

    @property
    def start(self) -> Checkpoint:
        """The network that a stage of a round works on, the only model that it reads."""
        (found,) = self.upstream.values()
        return found

    @property
    def round_name(self) -> str | None:
        """The further round that the stage belongs to; None for the main chain."""
        return self.stage.name.partition("@")[2] or None

    @property
    def chain(self) -> Chain:
        """All rounds; for stages that declare `rounds` as a whole."""
        return Chain(chain(self.params.rounds))

    def last(self, stage: str) -> Checkpoint:
        """The model that `stage` has made in the last round."""
        return self.upstream[self.chain.last[stage]]

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Self:
        """This context with another mean and deviation of images; the same if they are empty."""
        return replace(self, data=_normalised(self.data, mean, std)) if mean else self

    def header(self, parent: Checkpoint | None = None, **notes: Any) -> Header:
        """Header of the model that this stage makes: derived from `parent`, or new without one."""
        if parent is not None:
            return replace(
                parent.header,
                stage=self.stage.name,
                parent=parent.sha256,
                notes=notes,
                versions=machine.versions(),
            )
        info, test = self.data.info, self.data.test
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
            resize=test.view.resize if isinstance(test, ImageFileList) else None,
        )


@dataclass(frozen=True)
class TrainingContext(StageContext):
    """The context of a stage that trains: also the processes, the saved state, the observers."""

    engine: Engine
    store: StateStore
    callbacks: Sequence[Callback]
    """Empty in all processes but the main one."""

    def fit(
        self,
        model: nn.Module,
        settings: Train,
        *,
        penalty: Penalty | None = None,
        masks: Masks | None = None,
        keep_epoch: int | None = None,
    ) -> loop.FitResult:
        """Train `model` in place with these settings, from the saved state if there is one."""
        bar = console.Training(self.stage.name, ProgressiveResizing(settings).pixels)
        try:
            with section(_module(self.stage.name)):
                distiller = self._distiller(model, settings)
                result = loop.fit(
                    model,
                    self.data,
                    settings,
                    self.params.seed,
                    self.store,
                    [bar, *self.callbacks] if self.engine.is_main else [],
                    engine=self.engine,
                    penalty=penalty,
                    masks=masks,
                    distiller=distiller,
                    keep_epoch=keep_epoch,
                )
        finally:
            bar.close()
        if self.engine.is_main:
            bar.finish(result.history, result.kept_epoch)
        return result

    def _distiller(self, model: nn.Module, settings: Train) -> Distiller | None:
        """The distiller for the teacher that the settings name; None without a teacher.

        Raises CheckpointError if the teacher does not fit these images and classes.
        """
        wanted, info = settings.distillation, self.data.info
        if wanted.teacher == NOTHING:
            return None
        path = self.stage.input(wanted.teacher)
        if wanted.code != NOTHING:
            self.stage.input(wanted.code)
        arch = self.params.arch
        file, found = load_teacher(path, wanted.code, arch, self.params.archs.get(arch))
        check_data(file, found.header, info, "classes", "shape", "mean", "std")
        shape = tuple(info.shape)
        return Distiller(wanted, found.model(), model, shape, self.params.seed)


def open_context(name: str, round_name: str | None = None) -> StageContext:
    """Read and check settings, data and models of the stage `name`; nothing is computed yet.

    With `round_name` it is the stage of that round, with the settings of the round. Raises
    SecateurError for the first thing that is missing or invalid; a checkpoint must have the
    architecture and the data that params.yaml names.
    """
    stage, spec = _declared(name, round_name)
    params = stage.params
    data = dataset.load(stage.input(f"data/{params.dataset}"))
    arch_settings = params.archs.get(params.arch) or {}
    upstream = {}
    for maker in spec.inputs:
        model = model_spec(maker)
        path = stage.input(model.folder) / "model.safetensors"
        upstream[maker] = checkpoint.load(path, params.arch, arch_settings, data.info.hash)
        _check_record(path, upstream[maker], model.record)
        data = _normalised(data, upstream[maker].header.mean, upstream[maker].header.std)
    return StageContext(stage, data, upstream)


def _declared(name: str, round_name: str | None) -> tuple[Stage, StageSpec]:
    """The declaration of a stage in dvc.yaml, with the settings of its round, and its StageSpec."""
    if round_name is None:
        spec = stage_spec(name)
        stage = open_stage(name, spec.pipeline)
        if spec.rounds is None:
            return stage, spec
        rounds = Chain(chain(stage.params.rounds))
        last = tuple(rounds.last[maker] for maker in spec.inputs)
        return stage, replace(spec, inputs=last if spec.rounds == "last" else tuple(rounds.stages))
    whole = f"{name}@{round_name}"
    try:
        stage = open_stage(whole, stage_spec(whole).pipeline)
    except KeyError:
        raise SettingsError(f"--round {shorten(round_name)}: not the name of a round") from None
    after = stage.params.rounds[round_name].after
    return replace(stage, params=stage.params.of_round(round_name)), stage_spec(whole, after)


def _module(stage: str) -> str:
    """The script of a stage, and its section of params.yaml."""
    return STAGES[stage.partition("@")[0]].module


@contextlib.contextmanager
def _naming_the_round(context: StageContext) -> Iterator[None]:
    """Add the round to an error about a setting: the section it names may be that of the round."""
    try:
        yield
    except SettingsError as error:
        if context.round_name is None:
            raise
        raise SettingsError(f"{error} (in {context.round_name})") from None


def _normalised(data: Dataset, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    """The data with the normalisation of a network, which may come from pretrained weights."""
    if (list(mean), list(std)) == (data.info.mean, data.info.std):
        return data
    return replace(data, info=replace(data.info, mean=list(mean), std=list(std)))


def _check_record(path: Path, found: Checkpoint, path_of_record: Path) -> None:
    """Raise CheckpointError if the file is not the one that its run record names.

    A missing record is not an error: stages do not depend on records, so that run ids never make a
    training stale. The hash is known from loading.
    """
    if not path_of_record.exists():
        return
    named = record.load(path_of_record).sha256
    if named != found.sha256:
        raise CheckpointError(
            f"{path}: changed since it was made: its sha256 is {found.sha256[:12]}, in "
            f"{path_of_record} it is {cut(named, 13)[:12]}; restore both by `dvc checkout`, or "
            "make them again by `dvc repro`"
        )


def make(
    name: str, produce: Callable[[StageContext], StageResult], round_name: str | None = None
) -> None:
    """Run the stage `name`, which makes a model without training; with `round_name`, in a round."""
    context = open_context(name, round_name)
    with _naming_the_round(context):
        _once(context, lambda _store, _callbacks: produce(context))


def train(
    name: str, produce: Callable[[TrainingContext], StageResult], round_name: str | None = None
) -> None:
    """Run the stage `name`, which trains, in all processes that have been started.

    The main process holds the lock, writes and reports; the others only train.
    """
    context = open_context(name, round_name)
    module = _module(name)
    if relaunch(module, ["--round", round_name] if round_name else []):
        return
    engine = Engine(getattr(context.params, module).precision)

    def work(store: StateStore, callbacks: Sequence[Callback]) -> StageResult:
        parts = (context.stage, context.data, context.upstream)
        return produce(TrainingContext(*parts, engine, store, callbacks))

    with _naming_the_round(context):
        if engine.is_main:
            _once(context, work, engine)
        elif not engine.broadcast(None):  # the main process sends whether the work is already done
            work(_NoStore(), ())


def trained(
    model: nn.Module, header: Header, fit: loop.FitResult, masks: Masks | None = None
) -> StageResult:
    """The result of a training stage, with the metrics of the epoch whose weights were kept."""
    row = fit.history[fit.kept_epoch - 1] if fit.history else {}
    kept = {key: value for key, value in row.items() if key not in ("epoch", "lr")}
    metrics = kept | {"kept_epoch": float(fit.kept_epoch), "epochs": float(len(fit.history))}
    return StageResult(model, header, masks or {}, metrics=metrics, history=fit.history)


def _once(
    context: StageContext,
    produce: Callable[[StateStore, Sequence[Callback]], StageResult],
    engine: Engine | None = None,
) -> None:
    """Call `produce` under the lock of the stage's fingerprint, and write what it returns.

    If a process has already finished the same work, here or in a copy of the project, its files are
    used instead. The other processes of `engine` wait until this is known.
    """
    name = context.stage.name
    model = model_spec(name)
    outs = [model.folder, str(model.record)]
    with resume.single_flight(context.stage, outs, lambda: console.waiting(name)) as store:
        complete = store.complete
        if engine is not None:
            engine.broadcast(complete)
        if complete:
            store.restore_outs()
            console.taken(name)
            return
        run = _open_run(context, store)
        clock = _Clock(store)
        allocator.resume_collection()  # without the objects that have been imported meanwhile
        try:
            result = produce(store, [run, clock])
        except Exception:
            run.end("FAILED")
            raise
        except BaseException:  # Ctrl-C, SIGTERM: the state first, it matters more than a status
            store.flush()
            run.end("KILLED")
            raise
        _write(context, result, run, clock.total())
        store.finish()


def _write(
    context: StageContext, result: StageResult, late: tracking.LateRun, seconds: float
) -> None:
    """Write the model, its tables and its record, and close the MLflow run."""
    model, stage, info = model_spec(context.stage.name), context.stage, context.data.info
    folder = Path(model.folder)
    sha256 = checkpoint.save(
        model.checkpoint, result.header, result.model, result.masks, result.choices
    )
    for name, network in result.more.items():
        checkpoint.save(folder / f"{name}.safetensors", result.header, network, {})
    if result.history is not None:
        rows = [row | {"epoch": int(row["epoch"])} for row in result.history]
        files.write_text(model.history, Table.of(rows, HISTORY_COLUMNS).csv())
    tables = {"scales": norms.distribution(result.model)} | result.tables
    for name, table in tables.items():
        files.write_text(folder / f"{name}.csv", table.csv())
    for name, text in result.texts.items():
        files.write_text(folder / name, text)
    path = str(model.checkpoint)
    model_id = late.close(result.metrics | {"seconds": seconds}, path, sha256)
    run = late.run
    made = record.RunRecord(
        stage=stage.name,
        fingerprint=stage.fingerprint,
        params=stage.declared,
        metrics=result.metrics,
        model=path,
        sha256=sha256,
        dataset={"name": info.name, "hash": info.hash, **info.counts},
        seconds=round(seconds, 3),
        hardware=machine.hardware(),
        ended=round(time.time(), 3),
        run_id=run.id if run else None,
        model_id=model_id,
        tracking_uri=run.store.uri if run and run.id else None,
        experiment=os.environ.get("DVC_EXP_NAME") or None,
        revision=revision(),
        upstream={maker: found.sha256 for maker, found in context.upstream.items()},
    )
    record.save(model.record, made)


def _open_run(context: StageContext, store: resume.ResumeStore) -> tracking.LateRun:
    """The stage's MLflow run, linked to those of the models it reads; resumed if it exists."""
    upstream = {}
    for maker in context.upstream:
        path = model_spec(maker).record  # only needed for the link, so it may be missing
        upstream[maker] = record.load(path) if path.exists() else None
    info, known = context.data.info, store.note("run_id")

    def begin(began: float) -> tracking.Run:
        run = tracking.Run(Store(), context.stage, upstream)
        dataset = {"name": info.name, "hash": info.hash, **info.counts}
        run.open(known, dataset, began)
        store.note("run_id", run.id)
        return run

    return tracking.LateRun(begin, at_once=known is not None or tracking_live())


class _NoStore:
    """State store of the other processes: the main process saves the state of all."""

    def load(self) -> None:
        """Return nothing: the main process broadcasts its state."""

    def save(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Save nothing."""
        return False


class _Clock(Callback):
    """Wall time of the work over all attempts, stored whenever the state has been saved."""

    def __init__(self, store: resume.ResumeStore) -> None:
        self.store, self.began = store, time.monotonic()
        self.before = float(store.note("seconds") or 0.0)

    def total(self) -> float:
        """Seconds."""
        return self.before + time.monotonic() - self.began

    def on_state_saved(self) -> None:
        """Store the time so far."""
        self.store.note("seconds", self.total())
