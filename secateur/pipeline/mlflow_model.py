"""The exported network as a model that MLflow loads and serves: an output of its chain's run.

It holds the file that DVC tracks, models/export/model.pt2, byte for byte. MLflow writes one of its
own in that place first, which differs by the example that it was traced with, a pickle.
"""

import contextlib
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.base.errors import SecateurError
from secateur.deploy import metadata
from secateur.pipeline import record, tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.record import MODELS, RunRecord

NAME = "exported"
"""Of the model in MLflow."""


def log(
    program: Path,
    report: Mapping[str, Any],
    files: Sequence[Path],
    *,
    example: NDArray[np.float32] | None = None,
    register: str | None = None,
    store: Store | None = None,
    records: Mapping[str, RunRecord] | None = None,
) -> str | None:
    """Attach an exported network, the report of export and `files` to the run of its chain, once.

    `program` is a .pt2 file of `deploy.export`. The numbers of the report become metrics of the
    run, those of the finetuned network of the model, too. `example` has two images as the network
    takes them; None: of zeros. `register` is the name, or `name@alias`, of a registered model that
    becomes this one. `records` are those of the chain, by default the ones in the workspace.
    Returns the model's id in MLflow; None, with a line that says why, if it is not tracked.
    """
    store = store or Store()

    def write() -> str:
        with store.lock:
            run_id = tracking.find_pipeline(store, _records() if records is None else records)
            if run_id is None:
                raise SecateurError("it has no run of this chain; `secateur sync` writes it")
            model_id = _model(store, run_id, program, example)
            _measurements(store, run_id, model_id, report, files)
            if register:
                _register(store, model_id, register)
            return model_id

    return None if store.client is None else store.attempt(write)


def _records() -> dict[str, RunRecord]:
    """The records in the workspace; SecateurError for the first that is missing."""
    return {stage: record.load(model.record) for stage, model in MODELS.items()}


def _model(store: Store, run_id: str, program: Path, example: NDArray[np.float32] | None) -> str:
    """Find the file among the models of the run, or write it; returns the model's id.

    A model that is not ready was left by a process that was killed while it wrote it.
    """
    from mlflow.entities import LoggedModelOutput

    about = metadata.read(program)
    sha256 = hashlib.sha256(program.read_bytes()).hexdigest()
    condition = f"source_run_id = '{run_id}' and name = '{NAME}'"
    for found in store.client.search_logged_models([store.experiment], condition):
        if found.status == "READY" and found.tags.get("sha256") == sha256:
            return str(found.model_id)
        if found.status != "READY":
            store.client.delete_logged_model(found.model_id)
    model = store.client.create_logged_model(
        store.experiment,
        NAME,
        run_id,
        {"sha256": sha256, "dvc.path": str(program), "checkpoint.sha256": about.sha256},
        model_type=MODELS["finetune"].kind,
    )
    _write(store, model.model_id, program, example)
    store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return str(model.model_id)


def _write(store: Store, model_id: str, program: Path, example: NDArray[np.float32] | None) -> None:
    """Write MLflow's files for this network: signature, example, requirements, and itself."""
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
    with _quiet():
        mlflow.pytorch.log_model(
            torch.export.load(program).module(),
            model_id=model_id,
            signature=signature,
            input_example=images,  # two images: of one, torch would take the number for a constant
            pip_requirements=[f"{k}=={v.partition('+')[0]}" for k, v in versions.items()],
            serialization_format="pt2",
            metadata=asdict(about),
        )
    store.client.log_model_artifact(model_id, str(program), "data")


def _measurements(
    store: Store, run_id: str, model_id: str, report: Mapping[str, Any], files: Sequence[Path]
) -> None:
    """Log numbers and files to the run, the numbers of the finetuned network to the model, too."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(f"export/{key}", float(value), now, 0, model_id if _of_model(key) else None)
        for key, value in record.flat(dict(report), "/").items()
        if isinstance(value, int | float)
    ]
    store.log(run_id, metrics)
    for file in files:
        store.client.log_artifact(run_id, str(file))


def _of_model(key: str) -> bool:
    """Whether a number of the report is one of the network that MLflow holds."""
    return key.startswith("finetuned/")


def _register(store: Store, model_id: str, name: str) -> None:
    """Make a new version of the registered model from this one, unless it is the newest already."""
    name, _, alias = name.partition("@")
    if not store.client.search_registered_models(f"name = '{name}'"):
        store.client.create_registered_model(name)
    found = store.client.search_model_versions(f"name = '{name}'")
    newest = max(found, key=lambda version: int(version.version), default=None)
    if newest is None or newest.model_id != model_id:
        source = f"models:/{model_id}"
        newest = store.client.create_model_version(name, source, model_id=model_id)
    if alias:
        store.client.set_registered_model_alias(name, alias, newest.version)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what MLflow and torch say about their own work."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
