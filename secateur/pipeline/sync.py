"""Write missing runs into MLflow, from the files that DVC tracks.

Use it when a store was lost or could not be reached, for another tracking server, or in a clone
that pulled its models instead of training them. It covers the workspace and, with --all, every DVC
experiment of the repository; existing runs are not changed.

    secateur sync [--all]
"""

import argparse
import contextlib
import functools
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.base import files
from secateur.base.documents import parse_json
from secateur.base.errors import SecateurError, cut
from secateur.deploy import metadata
from secateur.pipeline import console, mlflow_model, record, tracked, tracking
from secateur.pipeline.mlflow_store import Store, tracking_on
from secateur.pipeline.record import MODELS, Chain, RunRecord, chain_of
from secateur.training.callbacks import Row

REPORT = "metrics/evaluate.json"
TABLES = ("metrics/layers.csv", "metrics/rounds.csv")
PATHS = (REPORT, *TABLES, mlflow_model.PROGRAM, mlflow_model.REPORT, mlflow_model.TABLE)
"""Tracked files from which runs in MLflow are written, besides those of the chain's models."""


@dataclass(frozen=True)
class Source:
    """One state of the project: the workspace, or an experiment."""

    name: str | None
    """Name of the experiment; None for the workspace."""
    files: dict[str, bytes]
    """Path -> content of the tracked files from which MLflow is written."""


def command(options: argparse.Namespace) -> None:
    """`secateur sync`: restore runs and pipeline runs from every source.

    A damaged source does not prevent the others from being written; a SecateurError at the end
    names it.
    """
    if not tracking_on():
        raise SecateurError("SECATEUR_TRACKING is off, so there is nothing to write into")
    store = Store(strict=True)
    written, errors = 0, []
    for source in sources(options.all):
        try:
            written += write(store, source)
        except SecateurError as error:
            if store.client is None:  # not the source but MLflow
                raise
            errors.append(f"{source.name or 'workspace'}: {error}")
    console.say(f"{written} runs written; the store is {store.uri}")
    for message in errors[:-1]:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if errors:
        raise SecateurError(errors[-1])


def sources(everything: bool) -> Iterator[Source]:
    """The workspace, then every experiment whose records are in the cache or the remote."""

    def in_workspace(path: str) -> bytes | None:
        return files.read_bytes(Path(path), SecateurError) if os.path.lexists(path) else None

    yield Source(None, collected(in_workspace))
    if not everything:
        return
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            found = repo.experiments.ls(all_commits=True)
        pairs = [(name, revision or name) for each in found.values() for name, revision in each]
        yield from _experiments(pairs)
    except (DvcException, sqlite3.Error) as error:
        said = cut(" ".join(str(error).split()), 200)
        raise SecateurError(f"DVC cannot read its experiments: {said}") from None


def _experiments(found: Sequence[tuple[str, str]]) -> Iterator[Source]:
    """The experiments by name and revision."""
    cache = tracked.cache_folder(Path.cwd())
    locked = tracked.outs([revision for _, revision in found])
    kept = tracked.objects([f"{revision}:{path}" for _, revision in found for path in PATHS])
    for name, revision in found:
        in_git = {path: kept[f"{revision}:{path}"] for path in PATHS}
        yield Source(name, collected(_reader(revision, in_git, locked[revision], cache)))


def _reader(
    revision: str, in_git: Mapping[str, bytes | None], locked: Mapping[str, str], cache: Path
) -> Callable[[str], bytes | None]:
    """Reads the files of an experiment from Git and the cache, by the hashes `locked`.

    Only a tracked file that is in neither is requested from DVC, which looks into the remote.
    """

    @functools.cache
    def tree() -> Any:
        from dvc.api import DVCFileSystem

        return DVCFileSystem(rev=revision)

    def in_experiment(path: str) -> bytes | None:
        content = in_git.get(path)
        if content is not None:
            return content
        try:
            return tracked.read(cache, locked, path)
        except tracked.NotCachedError:
            from dvc_data.index import DataIndexDirError

            with contextlib.suppress(OSError, DataIndexDirError):  # never pushed, or collected
                return bytes(tree().read_bytes(path))
            return None

    return in_experiment


def collected(read: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """The files that exist; the report of stage evaluate tells which models there are."""
    found = {path: read(path) for path in PATHS}
    for model in chain_in(found[REPORT]).models.values():
        found |= {str(path): read(str(path)) for path in (model.record, model.history)}
    return {path: content for path, content in found.items() if content is not None}


def chain_in(report: bytes | None) -> Chain:
    """The chain of a report; without a report, or with a damaged one, a chain of a single round."""
    with contextlib.suppress(SecateurError):
        return chain_of(_parse_report(report or b""))
    return Chain()


def write(store: Store, source: Source) -> int:
    """Restore the stage runs of a source, then its pipeline run; returns how many were missing."""
    where = source.name or "workspace"
    records: dict[str, RunRecord] = {}
    histories: dict[str, list[Row]] = {}
    chain = chain_in(source.files.get(REPORT))
    for stage, model in chain.models.items():
        content = source.files.get(str(model.record))
        if content is None:
            console.say(f"{where}: {model.record} is missing (`dvc pull` may fetch it)")
            break
        records[stage] = record.parse(content, str(model.record))
        history = source.files.get(str(model.history))
        if history is not None:
            histories[stage] = tracking.parse_history(history, str(model.history))
    written = store.attempt(lambda: _write_runs(store, where, records, histories)) or 0
    if len(records) < len(chain.models):
        return written
    if REPORT not in source.files:
        console.say(f"{where}: {REPORT} is missing; `dvc repro` makes it and its run")
        return written
    report = _parse_report(source.files[REPORT])
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = []
        for path in (REPORT, *TABLES):
            if path in source.files:
                artifacts.append(Path(scratch) / Path(path).name)
                artifacts[-1].write_bytes(source.files[path])
        known = store.attempt(lambda: tracking.pipeline_run(store, records))
        run_id = tracking.pipeline(records, histories, report, artifacts, store, source.name)
    if run_id and not known:
        written += 1
        console.say(f"{where}: pipeline run written as {run_id}")
    return written + (_write_exported(store, source, records, run_id) if run_id else 0)


def _write_exported(
    store: Store, source: Source, records: Mapping[str, RunRecord], run_id: str
) -> int:
    """Restore the model of an exported network if it belongs to this chain; returns how many."""
    parts = (mlflow_model.PROGRAM, mlflow_model.REPORT, mlflow_model.TABLE)
    if not all(part in source.files for part in parts):
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        program, report, table = (Path(scratch) / Path(part).name for part in parts)
        for path, part in zip((program, report, table), parts, strict=True):
            path.write_bytes(source.files[part])
        try:
            about = metadata.read(program)
            plain = parse_json(source.files[mlflow_model.REPORT])
            if not isinstance(plain, dict):
                raise ValueError("not a report of export")
        except SecateurError as error:
            named = str(error).replace(str(program), mlflow_model.PROGRAM)
            raise SecateurError(named) from None
        except ValueError as error:
            raise SecateurError(f"{mlflow_model.REPORT}: {cut(str(error))}") from None
        final = [*records.values()][-1]  # that of the last finetuning
        if about.sha256 != final.sha256:
            return 0  # exported before the chain ran again
        known = store.attempt(lambda: mlflow_model.find(store, run_id, program))
        made = mlflow_model.log(program, plain, [report, table], store=store, records=records)
    if made and not known:
        console.say(f"{source.name or 'workspace'}: exported network written as {made}")
    return int(bool(made) and not known)


def _write_runs(
    store: Store,
    where: str,
    records: Mapping[str, RunRecord],
    histories: Mapping[str, list[Row]],
) -> int:
    """Restore the runs of these stages, in their order; returns how many were missing."""
    ids: dict[str, str] = {}
    written = 0
    with store.lock:
        for stage, found in records.items():
            links = {maker: ids[maker] for maker in found.upstream if maker in ids}
            ids[stage], made = tracking.restore(store, found, histories.get(stage, []), links)
            if made:
                written += 1
                console.say(f"{where}: {stage} restored as {ids[stage]}")
    return written


def _parse_report(content: bytes) -> dict[str, Any]:
    """The report of evaluate; SecateurError if it is not one."""
    try:
        report = parse_json(content)
        rows = [report[model.key] for model in MODELS.values()]
        rows += [row for name, row in report.get("rounds", {}).items()]
        chain_of(report)
        numbers = [row["accuracy"] for row in rows] + [report[key] for key in tracking.HEADLINES]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("a value that is not a number")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise SecateurError(f"{REPORT}: not a report of evaluate: {cut(str(reason))}") from None
    return report
