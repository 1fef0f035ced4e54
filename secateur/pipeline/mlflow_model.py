"""The exported network as a model that MLflow loads and serves: an output of its chain's run.

MLflow traces models/export/model.pt2 again and writes its own archive. It contains one pickle: the
example input of the trace, only tensors, which MLflow accepts even where pickles are forbidden
(MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false). DVC's file has no such example, so MLflow would refuse
it there.
"""

import contextlib
import io
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.base.errors import SecateurError
from secateur.base.files import content_hash
from secateur.base.logs import muted
from secateur.deploy import metadata, pt2_archive, stack_traces
from secateur.pipeline import record, tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.params_file import flat
from secateur.pipeline.record import MODELS, Chain, RunRecord

NAME = "exported"
"""Name of the model in MLflow."""
PROGRAM, REPORT, TABLE = "models/export/model.pt2", "metrics/export.json", "metrics/export.csv"
"""Files of stage export from which MLflow is written."""
_OWN = "export/finetuned/"
"""Prefix of the metrics of the network that MLflow holds."""


def log(
    program: Path,
    report: Mapping[str, Any],
    files: Sequence[Path],
    *,
    example: NDArray[np.float32] | None = None,
    register: str | None = None,
    store: Store | None = None,
    records: Mapping[str, RunRecord] | None = None,
    chain: Chain = Chain(),  # noqa: B008
) -> str | None:
    """Attach an exported network, the report of export and `files` to the run of its chain, once.

    `program` is a .pt2 file of `deploy.export`. The numbers of the report become metrics of the
    run; those of the finetuned network become metrics of the model too. `example` has two images,
    prepared for the network; None: images of zeros. `register` is the name, or `name@alias`, of a
    registered model that gets this model as a new version. `records` are those of `chain`, by
    default the records in the workspace. Returns the model's id in MLflow; None, with a warning
    that tells the reason, if it is not tracked.
    """
    store = store or Store()

    def write() -> str:
        with store.lock:
            made_from = _records(chain) if records is None else records
            run = tracking.pipeline_run(store, made_from)
            if run is None:
                raise SecateurError("it has no run of this chain; `secateur sync` writes it")
            run_id = str(run.info.run_id)
            model_id = _model(store, run_id, program, example)
            _measurements(store, run_id, model_id, report, files)
            if register:
                _register(store, model_id, register)
            return model_id

    return None if store.client is None else store.attempt(write)


def find(store: Store, run_id: str, program: Path) -> str | None:
    """Id of the run's model that has this file, if it was written completely."""
    sha256 = content_hash(program)
    for model in _of_run(store, run_id):
        if model.status == "READY" and model.tags.get("sha256") == sha256:
            return str(model.model_id)
    return None


def _of_run(store: Store, run_id: str) -> Iterable[Any]:
    """The models of this name that belong to the run, including incomplete ones."""
    condition = f"source_run_id = '{run_id}' and name = '{NAME}'"
    found: Iterable[Any] = store.client.search_logged_models([store.experiment], condition)
    return found


def _records(chain: Chain) -> dict[str, RunRecord]:
    """The records in the workspace; SecateurError for the first that is missing."""
    return {stage: record.load(model.record) for stage, model in chain.models.items()}


def _model(store: Store, run_id: str, program: Path, example: NDArray[np.float32] | None) -> str:
    """Find the file among the models of the run, or write it; returns the model's id.

    A model that is not ready was left behind by a process that was killed while writing it.
    """
    from mlflow.entities import LoggedModelOutput

    about = metadata.read(program)
    known = find(store, run_id, program)
    if known is not None:
        return known
    for found in _of_run(store, run_id):
        if found.status != "READY":
            store.client.delete_logged_model(found.model_id)
    model = store.client.create_logged_model(
        store.experiment,
        NAME,
        run_id,
        {"sha256": content_hash(program), "dvc.path": PROGRAM, "checkpoint.sha256": about.sha256},
        model_type=MODELS["finetune"].kind,
    )
    _write(store, model.model_id, program, example)
    store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return str(model.model_id)


def _write(store: Store, model_id: str, program: Path, example: NDArray[np.float32] | None) -> None:
    """Write MLflow's files for this network: signature, example, requirements and program."""
    import mlflow
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    about = metadata.read(program)
    images = np.zeros((2, *about.shape), np.float32) if example is None else example[:2]
    kind = np.dtype(np.float32)
    signature = ModelSignature(
        Schema([TensorSpec(kind, (-1, *about.shape))]),
        Schema([TensorSpec(kind, (-1, len(about.classes)))]),
    )
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    pt2_archive.check(program)
    with _quiet(), stack_traces.omitted():
        mlflow.pytorch.log_model(
            torch.export.load(program).module(),
            model_id=model_id,
            signature=signature,
            input_example=images,  # two: for one, torch would treat the batch size as a constant
            pip_requirements=[f"{k}=={v.partition('+')[0]}" for k, v in versions.items()],
            serialization_format="pt2",
            metadata=asdict(about),
        )


def _measurements(
    store: Store, run_id: str, model_id: str, report: Mapping[str, Any], files: Sequence[Path]
) -> None:
    """Log numbers and files to the run, and those of the finetuned network to the model too."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    known = store.client.get_run(run_id).data.metrics
    numbers = flat(dict(report), "/")
    numbers = {f"export/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
    metrics = [
        Metric(key, float(value), now, 0, model_id if key.startswith(_OWN) else None)
        for key, value in numbers.items()
        if known.get(key) != value  # the pages list every value that was ever logged
    ]
    store.log(run_id, metrics)
    for file in files:
        store.client.log_artifact(run_id, str(file))


def _register(store: Store, model_id: str, name: str) -> None:
    """Register this model as a new version, unless it already is the newest version."""
    import mlflow

    name, _, alias = name.partition("@")
    source = f"models:/{model_id}"
    found = store.client.search_model_versions(f"name = '{name}'")
    newest = max(found, key=lambda version: int(version.version), default=None)
    if newest is None or newest.source != source:
        with _quiet():
            newest = mlflow.register_model(source, name)  # the model's page then shows it
    if alias:
        store.client.set_registered_model_alias(name, alias, newest.version)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the messages of MLflow and torch about their own work."""
    with muted(logging.WARNING, warn=False), contextlib.redirect_stderr(io.StringIO()):
        yield
