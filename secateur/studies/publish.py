"""Results of a finished study for readers: its page, and its runs in MLflow."""

import argparse
import contextlib
import io
import time
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.pipeline import console, sync, tracking
from secateur.pipeline.mlflow_store import Store, clone_tags, tracking_on
from secateur.pipeline.record import RunRecord, parse
from secateur.studies import results
from secateur.studies.definition import Study
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.plan import Plan
from secateur.studies.report import page
from secateur.studies.results import Cell


def write_mlflow(study: Study, made: Plan, folder: Path) -> bool:
    """Write the runs that MLflow lacks, and a parent run of the study with its page.

    They are written from the files in DVC's cache, one cell after the other, without a workspace. A
    failure of MLflow is reported in one line. Returns whether MLflow has everything.
    """
    if not tracking_on():
        return False
    store, began, written = Store(), time.monotonic(), 0
    parent = store.attempt(lambda: _parent(store, study)) if store.client is not None else None
    if parent is None:
        return False
    whole = True
    for number in range(len(made.cells)):
        if not made.finished(number) or store.client is None:
            continue
        source = sync.Source(made.cells[number].name, _files(made, number))
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a line for each run
                written += sync.write(store, source)
            store.attempt(lambda n=number, s=source: _adopt(store, made, n, s, parent))  # type: ignore[misc]
        except SecateurError as error:
            console.say(f"{source.name}: {error}")
            whole = False
    if store.client is not None:
        store.attempt(lambda: _finish(store, parent, folder))
        seconds = time.monotonic() - began
        console.say(f"MLflow: {written} runs written in {seconds:.0f} s; the store is {store.uri}")
    return whole and store.client is not None


def _parent(store: Store, study: Study) -> str:
    """The run of the study, which is created once for each name."""
    found = store.runs(f"tags.kind = 'study' and tags.study = '{study.name}'")
    if found:
        return str(found[0].info.run_id)
    tags = {"kind": "study", "study": study.name, "mlflow.note.content": study.about}
    run = store.client.create_run(
        store.experiment, tags=tags | clone_tags(), run_name=f"study {study.name}"
    )
    return str(run.info.run_id)


def _adopt(store: Store, made: Plan, number: int, source: sync.Source, parent: str) -> None:
    """Make the pipeline run of a cell a child of the study, under the cell's name."""
    records = _records(source)
    run = tracking.pipeline_run(store, records)
    if run is None:
        return
    cell, known = made.cells[number], run.data.tags
    if known.get("mlflow.runName") != cell.name:
        store.client.set_tag(run.info.run_id, "mlflow.runName", cell.name)
    tags = {
        "mlflow.parentRunId": parent,
        "study.method": cell.method,
        "study.point": cell.point,
        "study.control": cell.control or "",
    }
    new = {key: value for key, value in tags.items() if known.get(key, "") != value}
    if new:
        store.log(run.info.run_id, tags=new)


def _records(source: sync.Source) -> dict[str, RunRecord]:
    """The run records in the files of a cell, by stage."""
    found = {}
    for stage, model in sync.chain_in(source.files.get(sync.REPORT)).models.items():
        path = str(model.record)
        if path in source.files:
            found[stage] = parse(source.files[path], path)
    return found


def _files(made: Plan, number: int) -> dict[str, bytes]:
    """The files of a cell from which MLflow is written, by path."""
    entries = [made.entries[id] for id in made.by_cell[number]]

    def in_cache(path: str) -> bytes | None:
        found = (made.graph.read_if_there(entry, path) for entry in entries)
        return next((content for content in found if content is not None), None)

    return sync.collected(in_cache)


def _finish(store: Store, parent: str, folder: Path) -> None:
    """Attach the page with its tables and plots, and end the run."""
    if folder.is_dir():
        store.client.log_artifacts(parent, str(folder))
    store.client.set_terminated(parent, "FINISHED")


def measure_latency(state: Snapshot, made: Plan, folder: Path, options: argparse.Namespace) -> None:
    """Measure the latencies of the finished cells' networks with these options."""
    names = [c.name for number, c in enumerate(made.cells) if made.finished(number)]
    page.measure(folder, results.read(names, state.revision), options)


def write_page(state: Snapshot, study: Study, made: Plan, folder: Path, digest: str) -> None:
    """Write the page about the finished cells, from their experiments on the study's commit."""
    cells = [
        Cell(c.name, c.method, c.point, c.seed, c.control)
        for number, c in enumerate(made.cells)
        if made.finished(number)
    ]
    objectives = study.space.search.objectives if study.space else ()
    page.write(folder, study.name, cells, digest, study.remarks, objectives, state.revision)
