"""Write into MLflow what it lacks, from the files that DVC tracks.

For a store that was lost or could not be reached, another tracking server, or a clone that pulled
its models instead of training them. Goes through the workspace and, with --all, every DVC
experiment of the repository; what is there already is left alone.

    secateur sync [--all]
"""

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.pipeline import console, record, tracking
from secateur.pipeline.record import MODELS, RunRecord

REPORT, LAYERS = "metrics/evaluate.json", "metrics/layers.csv"


@dataclass(frozen=True)
class Source:
    """One state of the project: the workspace, or an experiment."""

    name: str | None
    """Of the experiment; None for the workspace."""
    files: dict[str, bytes]
    """Path -> content of the tracked files that MLflow is written from."""


def command(options: argparse.Namespace) -> None:
    """`secateur sync`: restore runs and pipeline runs from every source."""
    store = tracking.Store()
    if store.client is None:
        console.fail("MLflow cannot be reached, or SECATEUR_TRACKING is off")
    written = 0
    for source in sources(options.all):
        try:
            written += write(store, source)
        except SecateurError as error:
            console.say(f"{source.name or 'workspace'}: {error}")
    console.say(f"{written} runs written; the store is {store.uri}")


def sources(everything: bool) -> Iterator[Source]:
    """The workspace, then every experiment whose records are in the cache or the remote."""
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    wanted = [REPORT, LAYERS]
    wanted += [str(path) for model in MODELS.values() for path in (model.record, model.history)]
    yield Source(None, {p: Path(p).read_bytes() for p in wanted if Path(p).exists()})
    if not everything:
        return
    with Repo() as repo:
        found = repo.experiments.ls(all_commits=True)
    for name, revision in [pair for pairs in found.values() for pair in pairs]:
        tree = DVCFileSystem(rev=revision or name)
        files: dict[str, bytes] = {}
        for path in wanted:
            try:
                files[path] = tree.read_bytes(path)
            except (FileNotFoundError, OSError):  # never pushed, or collected
                continue
        yield Source(name, files)


def write(store: tracking.Store, source: Source) -> int:
    """Restore the stage runs of a source, then its pipeline run; returns how many were missing."""
    where = source.name or "workspace"
    records: dict[str, RunRecord] = {}
    ids: dict[str, str] = {}
    written = 0
    with tempfile.TemporaryDirectory() as scratch:
        histories: dict[str, Path] = {}
        for stage, model in MODELS.items():
            content = source.files.get(str(model.record))
            if content is None:
                console.say(f"{where}: {model.record} is not here (`dvc pull` may bring it)")
                return written
            records[stage] = record.parse(content, str(model.record))
            histories[stage] = Path(scratch) / f"{stage}.csv"
            history = source.files.get(str(model.history))
            if history is not None:
                histories[stage].write_bytes(history)
            rows = tracking.read_history(histories[stage])
            links = {maker: ids[maker] for maker in records[stage].upstream if maker in ids}
            ids[stage], made = tracking.restore(store, records[stage], rows, links)
            if made:
                written += 1
                console.say(f"{where}: {stage} restored as {ids[stage]}")
        if REPORT not in source.files:
            console.say(f"{where}: {REPORT} is not here; `dvc repro` makes it and its run")
            return written
        report: dict[str, Any] = json.load(io.BytesIO(source.files[REPORT]))
        files = []
        for path in (REPORT, LAYERS):
            if path in source.files:
                files.append(Path(scratch) / Path(path).name)
                files[-1].write_bytes(source.files[path])
        known = tracking.find_pipeline(store, records)
        run_id = tracking.pipeline(records, histories, report, files, store, source.name)
        if run_id and not known:
            written += 1
            console.say(f"{where}: pipeline run written as {run_id}")
    return written
