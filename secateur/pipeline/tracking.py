"""MLflow: an observer; no result depends on it.

There is one run for every stage that really ran, with the params that dvc.yaml declares for it, and
one `pipeline` run for every result, with the params and metrics of the whole chain and links to its
stage runs. DVC's files are the reference: anything missing in MLflow can be restored from them
(`secateur sync`). A run is started when its stage has worked for LIVE_AFTER; the runs of shorter
stages are written from their records, by `evaluate` or `secateur sync`. Nothing in this file may
stop a stage: the first failure is one line of warning, and the rest of the stage goes untracked.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from secateur.base.errors import SecateurError, cut
from secateur.base.stage import Stage, revision
from secateur.pipeline import figures
from secateur.pipeline.mlflow_store import Store, clone_tags
from secateur.pipeline.params_file import flat
from secateur.pipeline.record import RunRecord, model_spec, stage_spec
from secateur.training.callbacks import Callback, Row

LIVE_AFTER = 20.0
"""Seconds of work after which MLflow, whose import takes two, is used to show a running stage."""

FIGURES = "figures"
"""Folder of the pipeline run's artifacts."""

HEADLINES = ("compression", "theoretical_speedup", "measured_speedup")


class Run(Callback):
    """The MLflow run of one stage; collects epochs and sends them when the state is saved."""

    def __init__(
        self, store: Store, stage: Stage, upstream: Mapping[str, RunRecord | None]
    ) -> None:
        self.store, self.stage = store, stage
        self.upstream = {name: record for name, record in upstream.items() if record}
        self.id: str | None = None
        self.rows: list[tuple[Row, float]] = []

    def open(
        self, run_id: str | None, dataset: Mapping[str, Any], began: float | None = None
    ) -> None:
        """Resume the run `run_id` if this store has it, or create one.

        `began` is when the work began, in seconds since 1970; the default is now.
        """
        began = time.time() if began is None else began
        if self.store.client is None:
            return
        self.id = self.store.attempt(lambda: self._resume(run_id) or self._create(dataset, began))

    def _resume(self, run_id: str | None) -> str | None:
        """Set an interrupted run to RUNNING again; None if this store does not have it."""
        status = self.store.status(run_id)
        if status is None:
            return None
        if status != "RUNNING":
            self.store.client.update_run(run_id, "RUNNING")
        return run_id

    def _create(self, dataset: Mapping[str, Any], began: float) -> str:
        links = {
            f"upstream.{_key(name)}": r.run_id for name, r in self.upstream.items() if r.run_id
        }
        params = flat(self.stage.declared)
        tags = _tags(self.stage.name) | links | {"fingerprint": self.stage.fingerprint}
        name = f"{self.stage.name}-{self.stage.fingerprint[:8]}"
        models = [r.model_id for r in self.upstream.values() if r.model_id]
        return _create_run(self.store, name, tags, params, began, dataset, models)

    def on_train_start(self, epochs: int, steps_per_epoch: int, history: Sequence[Row]) -> None:
        """Log the epochs that were saved but not sent before the process was killed."""
        if self.id is None or not history or self.store.client is None:
            return

        def log_missing() -> None:
            logged = self.store.client.get_metric_history(self.id, "epoch/train_loss")
            steps = {metric.step for metric in logged}
            now = time.time()
            rows = [(row, now) for row in history if int(row["epoch"]) not in steps]
            if rows:
                self.store.log(str(self.id), _metrics(rows))

        self.store.attempt(log_missing)

    def on_epoch_end(self, row: Row) -> None:
        """Remember an epoch."""
        self.rows.append((row, time.time()))

    def on_state_saved(self) -> None:
        """Send the collected epochs: they are safe on disk and will not be computed again."""
        rows, self.rows = self.rows, []
        if self.id is not None and self.store.client is not None and rows:
            self.store.attempt(lambda: self.store.log(str(self.id), _metrics(rows)))

    def close(self, metrics: Mapping[str, float], model: str, sha256: str) -> str | None:
        """End the run as finished; returns the id of its model in MLflow, None if not tracked."""
        self.on_state_saved()
        if self.id is None or self.store.client is None:
            return None
        return self.store.attempt(
            lambda: _close_run(self.store, str(self.id), self.stage.name, metrics, model, sha256)
        )

    def end(self, status: str) -> None:
        """End the run as FAILED, or as KILLED; a process that resumes the stage reopens it."""
        self.on_state_saved()
        if self.id is not None and self.store.client is not None:
            self.store.attempt(lambda: self.store.client.set_terminated(self.id, status))


class LateRun(Callback):
    """The MLflow run of a stage, started when the stage has worked for LIVE_AFTER seconds.

    `begin` opens a run; its argument is when the work began, in seconds since 1970.
    """

    def __init__(self, begin: Callable[[float], Run], at_once: bool) -> None:
        self.since, self.began = time.monotonic(), time.time()
        self.begin, self.run = begin, (begin(self.began) if at_once else None)
        self._training: tuple[int, int, Sequence[Row]] | None = None
        self._rows: list[tuple[Row, float]] = []

    def _look(self, now: bool = False) -> Run | None:
        """The run, which is started if it is due."""
        if self.run is None and (now or time.monotonic() - self.since > LIVE_AFTER):
            self.run = self.begin(self.began)
            if self._training is not None:
                self.run.on_train_start(*self._training)
            self.run.rows += self._rows
        return self.run

    def on_train_start(self, epochs: int, steps_per_epoch: int, history: Sequence[Row]) -> None:
        """Log the epochs of an interrupted process, now or when the run is started."""
        self._training = epochs, steps_per_epoch, list(history)
        if self.run is not None:
            self.run.on_train_start(*self._training)

    def on_step_end(self, epoch: int, step: int) -> None:
        """Start the run if it is due."""
        self._look()

    def on_epoch_end(self, row: Row) -> None:
        """Remember an epoch."""
        if self.run is None:
            self._rows.append((row, time.time()))
        else:
            self.run.on_epoch_end(row)

    def on_state_saved(self) -> None:
        """Send the collected epochs if the run has been started."""
        if (run := self._look()) is not None:
            run.on_state_saved()

    def close(self, metrics: Mapping[str, float], model: str, sha256: str) -> str | None:
        """End a run that has been started, or is due, as finished; returns the id of its model."""
        run = self._look()
        return run.close(metrics, model, sha256) if run is not None else None

    def end(self, status: str) -> None:
        """End the run as FAILED, which starts it if necessary, or as KILLED."""
        run = self._look(now=status == "FAILED")
        if run is not None:
            run.end(status)


def pipeline(
    records: Mapping[str, RunRecord],
    histories: Mapping[str, Sequence[Row]],
    report: Mapping[str, Any],
    files: Sequence[Path],
    store: Store | None = None,
    experiment_name: str | None = None,
) -> str | None:
    """Write the run of the whole chain, once for each chain; returns its id.

    Its duration is the sum over the chain's stages, no matter when they ran and which models came
    from the cache; it ends when it is written. Stage runs that this store does not have (because
    another clone made them, or the store could not be reached) are first restored from the records.
    """
    store = store or Store()

    def write() -> str:
        with store.lock:
            return _pipeline(store, records, histories, report, files, experiment_name)

    return None if store.client is None else store.attempt(write)


def _pipeline(
    store: Store,
    records: Mapping[str, RunRecord],
    histories: Mapping[str, Sequence[Row]],
    report: Mapping[str, Any],
    files: Sequence[Path],
    experiment_name: str | None,
) -> str:
    ids: dict[str, str] = {}
    for name, record in records.items():
        links = {maker: ids[maker] for maker in record.upstream if maker in ids}
        ids[name], _ = restore(store, record, histories.get(name, ()), links)
    models = [model for run_id in ids.values() for model in _models(store, run_id)]
    experiment = experiment_name or os.environ.get("DVC_EXP_NAME")
    seconds = sum(record.seconds for record in records.values())
    found = pipeline_run(store, records)
    tags = {f"run.{_key(name)}": run_id for name, run_id in ids.items()}
    tags |= {"mlflow.note.content": _note(store, ids, report)}
    tags |= _experiments(found.data.tags if found else {}, experiment)
    if found is not None:
        run_id, began = str(found.info.run_id), int(found.info.start_time)
        _log_inputs(store, run_id, models)
    else:
        params: dict[str, Any] = {}
        for record in records.values():
            params |= flat(record.params)
        key = pipeline_key(records)
        tags |= _tags("evaluate") | {"kind": "pipeline", "pipeline.key": key}
        name = f"{experiment or f'pipeline-{key[:8]}'}: {_name(params)}"
        since, dataset = time.time() - seconds, next(iter(records.values())).dataset
        run_id = _create_run(store, name, tags, params, since, dataset, models, "test")
        began = int(1000 * since)
    store.log(run_id, _results(records, report), tags={} if found is None else tags)
    _log_files(store, run_id, histories, files, fresh=found is None)
    store.client.set_terminated(run_id, "FINISHED", end_time=began + round(1000 * seconds))
    return run_id


def _results(records: Mapping[str, RunRecord], report: Mapping[str, Any]) -> list[Any]:
    """The metrics of a chain: those of its report, and the seconds of its stages."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    results = {key: report[key] for key in HEADLINES if key in report}
    chain = {key: value for key, value in report.items() if isinstance(value, dict)}
    numbers = {"accuracy": report["finetuned"]["accuracy"], **results, **flat(chain, "/")}
    numbers = {key: value for key, value in numbers.items() if _number(value)}
    numbers |= {f"{_key(name)}/seconds": record.seconds for name, record in records.items()}
    rounds = [  # as curves over the rounds
        Metric(f"round/{key}", float(value), now, place)
        for place, row in enumerate(report.get("rounds", {}).values(), 1)
        for key, value in row.items()
    ]
    return [Metric(key, float(value), now, 0) for key, value in numbers.items()] + rounds


def pipeline_key(records: Mapping[str, RunRecord]) -> str:
    """Hash of the identities of all records, in their order."""
    identities = " ".join(record.identity for record in records.values())
    return hashlib.sha256(identities.encode()).hexdigest()[:32]


def pipeline_run(store: Store, records: Mapping[str, RunRecord]) -> Any | None:
    """The chain's run in this store, as an MLflow object; None if there is none."""
    found = store.runs(f"tags.`pipeline.key` = '{pipeline_key(records)}'")
    return found[0] if found else None


def restore(
    store: Store, record: RunRecord, rows: Sequence[Row], upstream: Mapping[str, str]
) -> tuple[str, bool]:
    """Find the run of this record in the store, or restore it; the caller holds `store.lock`.

    `upstream` has the runs of the models that the stage started from, by stage. Returns the run's
    id, and whether it was restored. A restored run that is not finished was left by a process that
    was killed while writing it, and is written again.
    """
    known = store.known_runs.get(record.identity) or _find(store, record)
    if known is not None:
        store.known_runs[record.identity] = known
        return known, False
    tags = _tags(record.stage, record) | {
        "restored": "true",
        "origin.run_id": record.identity,
        "fingerprint": record.fingerprint,
    }
    tags |= {f"upstream.{_key(name)}": run_id for name, run_id in upstream.items()}
    ended = record.ended or time.time()
    began = ended - record.seconds
    name, params = f"{record.stage}-{record.fingerprint[:8]}", flat(record.params)
    models = [model for maker in upstream.values() for model in _models(store, maker)]
    run_id = _create_run(store, name, tags, params, began, record.dataset, models)
    times = [began + record.seconds * place / len(rows) for place in range(1, len(rows) + 1)]
    results = record.metrics, record.model, record.sha256
    curves = _metrics([*zip(rows, times, strict=True)])
    _close_run(store, run_id, record.stage, *results, ended=ended, more=curves, fresh=True)
    store.known_runs[record.identity] = run_id
    return run_id, True


def _find(store: Store, record: RunRecord) -> str | None:
    """The run that the stage itself has written, or a restored one; deletes an incomplete run.

    A run of finished work that did not end as finished is incomplete: the store failed at the time.
    """
    status = store.status(record.run_id)
    if status in ("KILLED", "FAILED"):
        store.client.delete_run(str(record.run_id))
    elif status is not None:
        return str(record.run_id)
    for run in store.runs(f"tags.`origin.run_id` = '{record.identity}'"):
        if run.info.status == "FINISHED":
            return str(run.info.run_id)
        store.client.delete_run(run.info.run_id)
    return None


def read_history(path: Path) -> list[Row]:
    """The rows of a history.csv; none if there is no such file."""
    return parse_history(path.read_bytes(), str(path)) if path.is_file() else []


def parse_history(content: bytes, where: str) -> list[Row]:
    """Parse the content of a history.csv; raises SecateurError that begins with `where`."""
    try:
        lines = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        rows = [{key: float(value) for key, value in row.items() if value} for row in lines]
        if [row["epoch"] for row in rows] != [*range(1, len(rows) + 1)]:
            raise ValueError("its rows are not the epochs 1, 2, ...")
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        raise SecateurError(f"{where}: not a table of epochs: {cut(str(reason))}") from None
    return rows


def _create_run(
    store: Store,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    began: float,
    dataset: Mapping[str, Any],
    models: Sequence[str],
    part: Literal["train", "test"] = "train",
) -> str:
    """Create a run; `began` is in seconds since 1970, `models` are the models that it read."""
    from mlflow.entities import Param

    run = store.client.create_run(
        store.experiment,
        start_time=int(1000 * began),
        tags={**tags, "data.hash": str(dataset["hash"])},
        run_name=name,
    )
    run_id = str(run.info.run_id)
    store.log(run_id, params=[Param(_key(k), str(v)) for k, v in params.items()])
    _log_inputs(store, run_id, models, [_dataset(dataset, part)])
    return run_id


def _key(name: str) -> str:
    """A name with only characters that MLflow allows: params may be patterns of layer names, and
    stages of further rounds contain an @."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _close_run(
    store: Store,
    run_id: str,
    stage: str,
    metrics: Mapping[str, float],
    model: str,
    sha256: str,
    *,
    ended: float | None = None,
    more: Sequence[Any] = (),
    fresh: bool = False,
) -> str:
    """Log final metrics, and the checkpoint as a model stored by DVC; returns the model's id.

    The run ends now, or at the time `ended`, in seconds since 1970. `more` are further metrics. A
    `fresh` run was created by this process; other runs may already have their model, because a
    process may have been killed after logging it.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

    end = int(1000 * (ended or time.time()))
    store.log(run_id, [*more, *(Metric(k, float(v), end, 0) for k, v in metrics.items())])
    model_id = None if fresh else _logged(store, run_id, sha256)
    if model_id is None:
        made = mlflow.create_external_model(
            name=stage,
            source_run_id=run_id,
            model_type=model_spec(stage).kind,
            tags={"dvc.path": model, "sha256": sha256},
            experiment_id=store.experiment,
        )
        model_id = str(made.model_id)
    if fresh or model_id not in _models(store, run_id):
        store.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
    store.known_models[run_id] = [model_id]
    store.client.set_terminated(run_id, "FINISHED", end_time=end)
    return model_id


def _logged(store: Store, run_id: str, sha256: str) -> str | None:
    """The model with this hash that the run has logged, if any."""
    found = store.client.search_logged_models([store.experiment], f"source_run_id = '{run_id}'")
    same = [str(model.model_id) for model in found if model.tags.get("sha256") == sha256]
    return same[0] if same else None


def _models(store: Store, run_id: str) -> list[str]:
    """Ids of the models that a run has made."""
    if run_id not in store.known_models:
        outputs = store.client.get_run(run_id).outputs
        models = outputs.model_outputs if outputs else []
        store.known_models[run_id] = [output.model_id for output in models]
    return store.known_models[run_id]


def _log_inputs(
    store: Store, run_id: str, models: Sequence[str], datasets: Sequence[Any] = ()
) -> None:
    """Log the models and data sets that a run reads."""
    from mlflow.entities import LoggedModelInput

    inputs = [LoggedModelInput(model) for model in models]
    if inputs or datasets:
        store.client.log_inputs(run_id, models=inputs, datasets=[*datasets])


def _dataset(dataset: Mapping[str, Any], part: Literal["train", "test"]) -> Any:
    """Name and hash of the data, and its path in DVC; not the data itself.

    MLflow shows the training images under the data set's name, and the test images as
    "<name> test"; the hash is that of the whole data set.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, digest = str(dataset["name"]), str(dataset["hash"])
    source = json.dumps({"uri": f"data/{name}"})  # relative to the project: DVC restores it there
    shown = name if part == "train" else f"{name} {part}"
    profile = json.dumps({"num_rows": dataset[part]}) if part in dataset else None
    entity = Dataset(shown, digest[:32], "local", source, profile=profile)
    context = {"train": "training", "test": "testing"}[part]
    return DatasetInput(entity, [InputTag("mlflow.data.context", context)])


def _tags(stage: str, record: RunRecord | None = None) -> dict[str, str]:
    """Tags of a stage: script, commit and DVC experiment, from its record or the environment."""
    tags = {
        "kind": "stage",
        "stage": stage,
        "mlflow.source.name": f"stages/{stage_spec(stage.partition('@')[0]).module}.py",
        **clone_tags(),
    }
    if record is not None:
        tags["dvc.exp_name"] = record.experiment or ""
        tags["mlflow.source.git.commit"] = record.revision or ""
    else:
        names = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
        tags |= {name.lower().replace("_", ".", 1): os.environ.get(name, "") for name in names}
        tags["mlflow.source.git.commit"] = revision() or ""
    return {key: value for key, value in tags.items() if value}


def _log_files(
    store: Store,
    run_id: str,
    histories: Mapping[str, Sequence[Row]],
    files: Sequence[Path],
    fresh: bool,
) -> None:
    """Log files and figures; figures only if the run lacks them, since they take time to draw."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in files:
            shutil.copy(file, scratch)
        if fresh or not store.client.list_artifacts(run_id, FIGURES):
            drawn = {"curves": figures.curves(histories)}
            for table in [file for file in files if file.name == "layers.csv"]:
                with contextlib.suppress(ValueError, KeyError, TypeError, csv.Error):  # damaged
                    drawn["layers"] = figures.layers(table)
            (Path(scratch) / FIGURES).mkdir()
            for name, figure in drawn.items():
                figure.savefig(Path(scratch, FIGURES, f"{name}.png"))
        store.client.log_artifacts(run_id, scratch)


def _name(params: Mapping[str, Any]) -> str:
    """Name of a run in MLflow's table: penalty, parametrization, pruner, seed, network and data."""
    pruner = params.get("pruner", "")
    own = {key.removeprefix(f"pruners.{pruner}."): value for key, value in params.items()}
    amounts = [own[key] for key in ("sensitivity", "ratio", "ratios", "groups") if key in own]
    how_much = f"{amounts[0]} " if amounts and amounts[0] is not None else ""
    weights = params.get("parametrization", "none")
    also = "" if weights == "none" else f"{weights}, "
    return (
        f"{params.get('decay')} {params.get('penalty')}, {also}{how_much}{pruner}, "
        f"seed {params.get('seed')}, {params.get('arch')} on {params.get('dataset')}"
    )


def _note(store: Store, ids: Mapping[str, str], report: Mapping[str, Any]) -> str:
    """Markdown for the page of the run: the result, and links to the stage runs."""
    finetuned, baseline = report["finetuned"], report["baseline"]
    runs = f"#/experiments/{store.experiment}/runs"
    links = " · ".join(f"[{name}]({runs}/{run_id})" for name, run_id in ids.items())
    return (
        f"Test accuracy **{finetuned['accuracy']:.2%}** (dense {baseline['accuracy']:.2%}) at "
        f"**{report['compression']:.1f}x** compression.\n\nMade by: {links}"
    )


def _experiments(tags: Mapping[str, str], name: str | None) -> dict[str, str]:
    """The tag that lists the DVC experiments with this result: those in `tags`, and `name`.

    Empty without a name.
    """
    if not name:
        return {}
    known = [n for n in tags.get("dvc.exp_names", "").split(",") if n]
    return {"dvc.exp_names": ",".join(known if name in known else [*known, name])}


def _metrics(rows: Sequence[tuple[Row, float]]) -> list[Any]:
    """Epochs as MLflow metrics."""
    from mlflow.entities import Metric

    return [
        Metric(f"epoch/{_key(key)}", value, int(when * 1000), int(row["epoch"]))
        for row, when in rows
        for key, value in row.items()
        if key != "epoch"
    ]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
