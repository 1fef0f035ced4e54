"""MLflow: an observer; no result depends on it.

One run for every stage that really ran, with the params that dvc.yaml declares for it, and one
`pipeline` run for every result, with the params and metrics of the whole chain and links to its
stage runs. DVC's files are the truth: whatever is missing here can be written again from them
(`python -m secateur.sync`). Nothing in this file may stop a stage: the first failure is one line
of warning, and the rest of the stage goes untracked.
"""

import contextlib
import csv
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from filelock import FileLock

from secateur.base.stage import Stage, project_root
from secateur.pipeline.record import MODELS, STAGES, RunRecord, flat
from secateur.training.callbacks import Callback, Row

EXPERIMENT = "secateur"
HEADLINES = ("compression", "theoretical_speedup", "measured_speedup")

R = TypeVar("R")


class Store:
    """A connection to MLflow; when it fails, the stage goes on without it."""

    def __init__(self) -> None:
        self.uri: str | None = None
        self.client: Any = None
        self.experiment = ""
        if os.environ.get("SECATEUR_TRACKING", "on").lower() not in ("off", "0", "false", "no"):
            self.attempt(self._connect)

    def attempt(self, action: Callable[[], R]) -> R | None:
        """Call `action` and return its result; on an error warn, and use MLflow no more."""
        try:
            return action()
        except Exception as error:  # whatever MLflow throws, the stage goes on
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(
                f"warning: MLflow ({self.uri}) failed, the rest of this stage goes untracked "
                f"(`make sync` makes up for it later): {reason}",
                file=sys.stderr,
                flush=True,
            )
            self.client = None
            return None

    def _connect(self) -> None:
        root = project_root()
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
        remote = urlparse(self.uri).scheme in ("http", "https")
        if remote:
            _knock(self.uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # two processes that make a fresh store at the same time destroy it
        with _quiet_start(), FileLock(root / ".mlflow.lock"):
            import mlflow

            mlflow.set_tracking_uri(self.uri)
            client = mlflow.MlflowClient(self.uri)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = client.get_experiment_by_name(name)
            # named outright, else it lies wherever the first stage happened to run
            place = None if remote else (root / "mlruns" / name).as_uri()
            self.experiment = (
                found.experiment_id
                if found
                else client.create_experiment(name, artifact_location=place)
            )
        self.client = client

    def runs(self, condition: str) -> list[Any]:
        """Runs of the experiment that match an MLflow filter."""
        return list(self.client.search_runs([self.experiment], condition))

    def knows(self, run_id: str | None) -> bool:
        """Whether the run is in this store, and not deleted."""
        if run_id is None:
            return False
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except Exception as error:
            if "RESOURCE_DOES_NOT_EXIST" in str(getattr(error, "error_code", error)):
                return False
            raise

    def log(self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        """Log any number of metrics and params in as few calls as MLflow allows."""
        metrics = list(metrics)
        for start in range(0, max(len(metrics), 1), 1000):
            batch = metrics[start : start + 1000]
            self.client.log_batch(run_id, metrics=batch, params=params if start == 0 else ())


class Run(Callback):
    """The MLflow run of one stage; collects epochs and sends them when the state is saved."""

    def __init__(
        self, store: Store, stage: Stage, upstream: Mapping[str, RunRecord | None]
    ) -> None:
        self.store, self.stage = store, stage
        self.upstream = {name: record for name, record in upstream.items() if record}
        self.id: str | None = None
        self.rows: list[tuple[Row, float]] = []

    def open(self, run_id: str | None, dataset: Mapping[str, Any]) -> None:
        """Resume the run `run_id` if this store has it, or begin one."""
        if self.store.client is None:
            return
        if run_id and self.store.attempt(lambda: self.store.knows(run_id)):
            self.id = run_id
        elif self.store.client is not None:
            self.id = self.store.attempt(lambda: self._create(dataset))

    def _create(self, dataset: Mapping[str, Any]) -> str:
        links = {f"upstream.{name}": r.run_id for name, r in self.upstream.items() if r.run_id}
        params = flat(self.stage.declared)
        tags = _tags(self.stage.name) | links | {"fingerprint": self.stage.fingerprint}
        run_id = _create_run(self.store, self.stage.name, self.stage.fingerprint, tags, params)
        _log_dataset(self.store, run_id, dataset)
        inputs = [r.model_id for r in self.upstream.values() if r.model_id]
        if inputs:
            from mlflow.entities import LoggedModelInput

            self.store.client.log_inputs(run_id, models=[LoggedModelInput(i) for i in inputs])
        return run_id

    def on_epoch_end(self, row: Row) -> None:
        """Remember an epoch."""
        self.rows.append((row, time.time()))

    def on_state_saved(self) -> None:
        """Send what has been collected: what is safe on disk is not computed again."""
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

    def fail(self) -> None:
        """End the run as failed."""
        self.on_state_saved()
        if self.id is not None and self.store.client is not None:
            self.store.attempt(lambda: self.store.client.set_terminated(self.id, "FAILED"))


def pipeline(
    records: Mapping[str, RunRecord],
    histories: Mapping[str, Path],
    report: Mapping[str, Any],
    files: Sequence[Path],
    store: Store | None = None,
    experiment_name: str | None = None,
) -> str | None:
    """Write the run of the whole chain, once for each chain; returns its id.

    Stage runs that this store does not know (another clone made them, or it could not be reached
    at the time) are restored from the records first.
    """
    store = store or Store()
    if store.client is None:
        return None
    return store.attempt(
        lambda: _pipeline(store, records, histories, report, files, experiment_name)
    )


def _pipeline(
    store: Store,
    records: Mapping[str, RunRecord],
    histories: Mapping[str, Path],
    report: Mapping[str, Any],
    files: Sequence[Path],
    experiment_name: str | None,
) -> str:
    ids: dict[str, str] = {}
    for name, record in records.items():
        rows = read_history(histories[name]) if name in histories else []
        ids[name], _ = restore(
            store, record, rows, {k: ids[k] for k in record.upstream if k in ids}
        )
    params: dict[str, Any] = {}
    for record in records.values():
        params |= flat(record.params)
    key = pipeline_key(records)
    run_id = find_pipeline(store, records) or ""
    if not run_id:
        tags = _tags("evaluate") | {"kind": "pipeline", "pipeline.key": key}
        run_id = _create_run(store, "evaluate", key, tags, params, name=_name(params))
        _log_dataset(store, run_id, next(iter(records.values())).dataset)
    from mlflow.entities import LoggedModelInput, Metric

    now = int(time.time() * 1000)
    results = {key: report[key] for key in HEADLINES if key in report}
    chain = {key: value for key, value in report.items() if isinstance(value, dict)}
    numbers = {"accuracy": report["finetuned"]["accuracy"], **results, **flat(chain, "/")}
    numbers = {key: value for key, value in numbers.items() if _number(value)}
    seconds = {f"{name}/seconds": record.seconds for name, record in records.items()}
    store.log(run_id, [Metric(k, float(v), now, 0) for k, v in (numbers | seconds).items()])
    for name, stage_id in ids.items():
        store.client.set_tag(run_id, f"run.{name}", stage_id)
    models = [r.model_id for n, r in records.items() if r.model_id and ids[n] == r.run_id]
    if models:
        store.client.log_inputs(run_id, models=[LoggedModelInput(model) for model in models])
    _add_name(store, run_id, experiment_name or os.environ.get("DVC_EXP_NAME"))
    store.client.set_tag(run_id, "mlflow.note.content", _note(store, ids, report))
    for file in files:
        store.client.log_artifact(run_id, str(file))
    store.client.set_terminated(run_id, "FINISHED")
    return run_id


def pipeline_key(records: Mapping[str, RunRecord]) -> str:
    """Hash of the identities of all records, in their order."""
    identities = " ".join(record.identity for record in records.values())
    return hashlib.sha256(identities.encode()).hexdigest()[:32]


def find_pipeline(store: Store, records: Mapping[str, RunRecord]) -> str | None:
    """Id of the chain's run in this store, if it has one."""
    found = store.runs(f"tags.`pipeline.key` = '{pipeline_key(records)}'")
    return str(found[0].info.run_id) if found else None


def restore(
    store: Store, record: RunRecord, rows: Sequence[Row], upstream: Mapping[str, str]
) -> tuple[str, bool]:
    """Find the run of this record in the store, or make it from the record.

    Returns its id, and whether it was made.
    """
    if store.knows(record.run_id):
        return str(record.run_id), False
    if found := store.runs(f"tags.`origin.run_id` = '{record.identity}'"):
        return str(found[0].info.run_id), False
    tags = _tags(record.stage) | {
        "restored": "true",
        "origin.run_id": record.identity,
        "fingerprint": record.fingerprint,
    }
    tags |= {f"upstream.{name}": run_id for name, run_id in upstream.items()}
    run_id = _create_run(store, record.stage, record.fingerprint, tags, flat(record.params))
    _log_dataset(store, run_id, record.dataset)
    store.log(run_id, _metrics([(row, time.time()) for row in rows]))
    _close_run(store, run_id, record.stage, record.metrics, record.model, record.sha256)
    return run_id, True


def read_history(path: Path) -> list[Row]:
    """The rows of a history.csv; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]


def _create_run(
    store: Store,
    stage: str,
    key: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    name: str | None = None,
) -> str:
    from mlflow.entities import Param

    run = store.client.create_run(
        store.experiment, tags=dict(tags), run_name=name or f"{stage}-{key[:8]}"
    )
    store.log(run.info.run_id, params=[Param(_key(k), str(v)) for k, v in params.items()])
    return str(run.info.run_id)


def _key(name: str) -> str:
    """A param's name as MLflow allows it: keys may be patterns of layer names."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _close_run(
    store: Store, run_id: str, stage: str, metrics: Mapping[str, float], model: str, sha256: str
) -> str:
    """Log final metrics and the checkpoint as a model that DVC holds; returns the model's id."""
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

    now = int(time.time() * 1000)
    store.log(run_id, [Metric(k, float(v), now, 0) for k, v in metrics.items()])
    entry = mlflow.create_external_model(
        name=stage,
        source_run_id=run_id,
        model_type=MODELS[stage].kind,
        tags={"dvc.path": model, "sha256": sha256},
        experiment_id=store.experiment,
    )
    store.client.log_outputs(run_id, [LoggedModelOutput(entry.model_id, 0)])
    store.client.set_terminated(run_id, "FINISHED")
    return str(entry.model_id)


def _log_dataset(store: Store, run_id: str, dataset: Mapping[str, Any]) -> None:
    """Log name and hash of the data, and where DVC keeps it; not the data itself."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, digest = str(dataset["name"]), str(dataset["hash"])
    source = json.dumps({"uri": f"data/{name}"})  # relative to the project: DVC restores it there
    entity = Dataset(name, digest[:32], "local", source)
    training = DatasetInput(entity, [InputTag("mlflow.data.context", "training")])
    store.client.log_inputs(run_id, datasets=[training])
    store.client.set_tag(run_id, "data.hash", digest)


def _tags(stage: str) -> dict[str, str]:
    """Tags of a stage: its script, the commit, and what DVC says in the environment."""
    tags = {
        "kind": "stage",
        "stage": stage,
        "dvc.stage": os.environ.get("DVC_STAGE", ""),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "mlflow.source.name": f"stages/{STAGES[stage].module}.py",
        "mlflow.source.git.commit": _commit(),
    }
    return {key: value for key, value in tags.items() if value}


@functools.cache
def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _name(params: Mapping[str, Any]) -> str:
    """Name of the chain in a table of runs: penalty, pruner, seed, network and data."""
    pruner = params.get("pruner", "")
    own = {key.removeprefix(f"pruners.{pruner}."): value for key, value in params.items()}
    amounts = [own[key] for key in ("sensitivity", "ratio", "ratios", "groups") if key in own]
    how_much = f"{amounts[0]} " if amounts and amounts[0] is not None else ""
    return (
        f"{params.get('decay')} {params.get('penalty')}, {how_much}{pruner}, "
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


def _add_name(store: Store, run_id: str, name: str | None) -> None:
    """Add the name of a DVC experiment to the tag that lists those with this result."""
    if not name:
        return
    tags = store.client.get_run(run_id).data.tags
    known = [n for n in tags.get("dvc.exp_names", "").split(",") if n]
    if name not in known:
        store.client.set_tag(run_id, "dvc.exp_names", ",".join([*known, name]))


def _metrics(rows: Sequence[tuple[Row, float]]) -> list[Any]:
    """Epochs as MLflow takes them."""
    from mlflow.entities import Metric

    return [
        Metric(f"epoch/{key}", value, int(when * 1000), int(row["epoch"]))
        for row, when in rows
        for key, value in row.items()
        if key != "epoch"
    ]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _knock(uri: str) -> None:
    """Raise OSError within seconds if no server listens at `uri`."""
    address = urlparse(uri)
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((address.hostname or "", port), timeout=3).close()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Suppress the lines that MLflow and alembic print while they make a fresh store."""
    import logging

    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(previous)
