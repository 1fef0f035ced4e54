"""The connection to MLflow's store, which may fail at any moment without stopping a stage.

The project's own store is `mlflow.db`. A damaged store is renamed and replaced by a new one, since
DVC's files have everything that was in it (see `secateur sync`). A store that is locked, or that
was created by another version of MLflow, is not changed.
"""

import contextlib
import hashlib
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import urlparse

from filelock import FileLock, Timeout

from secateur.base.errors import SecateurError
from secateur.base.logs import muted
from secateur.base.stage import project_root
from secateur.pipeline import mlflow_file
from secateur.pipeline.record import stage_spec
from secateur.training import resume

EXPERIMENT = "secateur"
TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # and not GenAI, where pages ask for it
    "mlflow.note.content": """\
Pruned image classifiers: prepare, baseline, sparse-train, prune, finetune, evaluate.

- `tags.kind = 'pipeline'`: a result, with parameters, metrics and figures of its whole chain.
- `tags.kind = 'stage'`: one training or pruning, with its curves.
- `tags.kind = 'study'`: a comparison of many results, which are its children.

DVC's files are the reference; `make sync` writes the runs that are missing here.
""",
}
"""Tags that the experiment gets unless it has them; the note is the Markdown text of its page."""

LOCK_SECONDS = 120.0
"""Creating a store takes a few seconds; a process that holds the lock for longer is stuck."""

R = TypeVar("R")


class Store:
    """A connection to MLflow; when it fails, the stage continues without it."""

    def __init__(self, strict: bool = False) -> None:
        """Connect to the store; `strict` is for `secateur sync`, which needs MLflow.

        A strict store raises SecateurError if it fails, and checks the whole file for damage.
        """
        self.strict = strict
        self.uri: str | None = None
        """URI of the store without user and password, for messages and records."""
        self.client: Any = None
        self.experiment = ""
        self.lock = FileLock(project_root() / ".mlflow.lock", timeout=LOCK_SECONDS)
        """Held while a store, a restored run or a pipeline run is written."""
        self.known_runs: dict[str, str] = {}
        """Identity of a record -> its run, if this process has found or written it."""
        self.known_models: dict[str, list[str]] = {}
        """Run -> the models that it has made."""
        if tracking_on():
            self.attempt(self._connect)

    def attempt(self, action: Callable[[], R]) -> R | None:
        """Call `action` and return its result; on an error, warn and stop using MLflow."""
        try:
            return action()
        except Exception as error:  # whatever MLflow raises, the stage continues
            self.client = None
            if self.strict and isinstance(error, SecateurError):
                raise
            reason = _explain(error)
            if self.strict:
                raise SecateurError(f"MLflow ({self.uri}): {reason}") from None
            _warn(
                f"MLflow ({self.uri}) failed, the rest of this stage goes untracked "
                f"(`make sync` can restore it later): {reason}"
            )
            return None

    def _connect(self) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or mlflow_file.store_uri(_own_file())
        uri = mlflow_file.relative_to(project_root(), uri)  # not to an experiment's copy of it
        self.uri = without_password(uri)
        if mlflow_file.in_memory(uri):
            raise SecateurError("MLFLOW_TRACKING_URI: a store in memory is lost; name a file")
        remote = urlparse(uri).scheme in ("http", "https")
        if remote:
            _knock(uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        # an absolute path; otherwise it would depend on where the first stage was run
        place = None if remote else (project_root() / "mlruns" / name).as_uri()
        file = mlflow_file.local_file(uri)
        with muted(logging.INFO), self.lock:  # messages of MLflow and alembic about a new store
            if file is not None:
                self._prepare(file, name, place)
            calm = file is not None and mlflow_file.settled(file)
            try:
                self._open(uri, name, place)
            except Exception as error:
                migrated = calm and _half_migrated(error)
                if file is None or not migrated or not self._replace(file, str(error)):
                    raise
                mlflow_file.create(file, name, place)
                # by another spelling: MLflow keeps connections to the renamed file open
                self._open(mlflow_file.store_uri(file.parent) + f"/./{file.name}", name, place)
            end_abandoned(self)

    def _prepare(self, file: Path, experiment: str, place: str | None) -> None:
        """Create the store if it does not exist or cannot be opened."""
        mlflow_file.remove_unfinished(file)
        if os.path.lexists(file):
            found = mlflow_file.fault(file, thorough=self.strict)
            if found is None:
                return
            if not self._replace(file, found):
                raise SecateurError(f"{file} is {found}; move it away, or name another store")
        mlflow_file.create(file, experiment, place)

    def _replace(self, file: Path, found: str) -> bool:
        """Set a damaged store aside if it is the project's own; returns whether it is."""
        if file != _own_file().resolve():
            return False
        kept = mlflow_file.keep_aside(file)
        cure = "" if self.strict else "; `make sync` writes into it what DVC has"
        _warn(
            f"MLflow's store {file} cannot be opened: {_one_line(found)}. It is kept as "
            f"{kept.name}, and a new one is made{cure}"
        )
        return True

    def _open(self, uri: str, name: str, place: str | None) -> None:
        import mlflow

        # it would print a traceback for an error of the disk, which `attempt` reports in one line
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(name)
        self.experiment = (
            found.experiment_id
            if found
            else client.create_experiment(name, artifact_location=place)
        )
        for key, value in TAGS.items():
            if found is None or key not in found.tags:
                client.set_experiment_tag(self.experiment, key, value)
        self.client = client

    def runs(self, condition: str) -> list[Any]:
        """Runs of the experiment that match an MLflow filter."""
        return list(self.client.search_runs([self.experiment], condition))

    def status(self, run_id: str | None) -> str | None:
        """Status of a run, such as RUNNING; None if it is not in this store, or deleted."""
        if run_id is None:
            return None
        try:
            info = self.client.get_run(run_id).info
        except Exception as error:
            if "RESOURCE_DOES_NOT_EXIST" in str(getattr(error, "error_code", error)):
                return None
            raise
        return str(info.status) if info.lifecycle_stage == "active" else None

    def log(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Sequence[Any] = (),
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Log metrics, params and tags, in as few calls as MLflow allows."""
        from mlflow.entities import RunTag

        given = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, max(len(metrics), 1), 1000):
            batch, first = metrics[start : start + 1000], start == 0
            self.client.log_batch(run_id, batch, params if first else (), given if first else ())


def tracking_on() -> bool:
    """Whether tracking is on; SECATEUR_TRACKING=off turns it off."""
    return os.environ.get("SECATEUR_TRACKING", "on").lower() not in ("off", "0", "false", "no")


def tracking_live() -> bool:
    """Whether runs start together with their stage: without DVC, or with SECATEUR_TRACKING=live.

    A stage run by DVC is part of a chain, at whose end the runs of short stages are written.
    """
    return "DVC_STAGE" not in os.environ or os.environ.get("SECATEUR_TRACKING") == "live"


def without_password(text: str) -> str:
    """The text with users and passwords removed from its addresses."""
    named = re.sub(r"(\w://)(?:[^/?#\s]*|[^:/@\s]*:[^@\s]*)@", r"\1", text)
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", named)


def clone_tags() -> dict[str, str]:
    """Tags that identify this clone and its machine.

    A copy of a clone has another inode and thus counts as another clone; machines made from the
    same image have equal paths and inodes, and differ by host name.
    """
    root = project_root().resolve()
    clone = hashlib.sha256(f"{root} {root.stat().st_ino}".encode()).hexdigest()[:16]
    return {"clone": clone, "host": socket.gethostname()}


def end_abandoned(store: Store) -> None:
    """Set the runs of killed processes of this clone to KILLED; the caller holds `store.lock`.

    A stage holds the lock of its fingerprint while it runs; if the lock is free, the stage counts
    as killed. The process that resumes it sets its run to RUNNING again. Restored runs and pipeline
    runs are only written under `store.lock`.
    """
    tags = clone_tags()
    condition = f"attributes.status = 'RUNNING' and tags.clone = '{tags['clone']}'"
    if mlflow_file.local_file(store.uri or "") != _own_file().resolve():
        condition += f" and tags.host = '{tags['host']}'"
    for run in store.runs(condition):
        stage, fingerprint = run.data.tags.get("stage"), run.data.tags.get("fingerprint", "")
        of_a_stage = run.data.tags.get("kind") == "stage" and "restored" not in run.data.tags
        if of_a_stage and not (_known(stage) and re.fullmatch("[0-9a-f]+", fingerprint)):
            continue
        unused = resume.unused(str(stage), fingerprint) if of_a_stage else _always()
        with unused as killed:
            if killed and store.status(run.info.run_id) == "RUNNING":
                store.client.set_terminated(run.info.run_id, "KILLED")


def _known(stage: str | None) -> bool:
    """Whether a stage of this name exists, in any round."""
    try:
        stage_spec(stage or "")
    except KeyError:
        return False
    return True


@contextlib.contextmanager
def _always() -> Iterator[bool]:
    yield True


def _own_file() -> Path:
    return project_root() / "mlflow.db"


def _half_migrated(error: Exception) -> bool:
    """Whether the store has the tables of one version of MLflow and the number of another."""
    words = ("already exists", "duplicate column", "no such table", "no such column")
    return "sqlite3.OperationalError" in str(error) and any(w in str(error) for w in words)


def _explain(error: Exception) -> str:
    """The error, with what the user can do about it if MLflow does not tell."""
    text = without_password(str(error))
    if isinstance(error, Timeout):
        return f"another process has held {error.lock_file} for {LOCK_SECONDS:.0f} s; end it"
    if "database is locked" in text:
        return "its database is locked by another process; end that, and nothing is lost"
    if "Can't locate revision" in text or "out-of-date database schema" in text:
        return (
            "its database was created by another version of MLflow; install that version, or "
            "copy the database and run `mlflow db upgrade` on it"
        )
    if "malformed" in text or "not a database" in text:
        return f"{_one_line(text)}; `make sync` keeps a damaged store aside and makes a new one"
    return _one_line(text) or type(error).__name__


def _one_line(text: str) -> str:
    """The text without line breaks, and without the SQL statement and link of SQLAlchemy."""
    return " ".join(re.split(r"\[SQL:|\(Background on this error", text)[0].split())[:200]


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _knock(uri: str) -> None:
    """Raise OSError within seconds if no server accepts connections at this address."""
    address = urlparse(uri)
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((address.hostname or "", port), timeout=3).close()
