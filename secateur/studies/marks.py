"""Marks that a study's page and its runs in MLflow are up to date, so that they are not rewritten.

They are only a shortcut and can be deleted at any time; page and runs are then written again.
"""

import hashlib
import json
import os
from pathlib import Path

from secateur.base import files
from secateur.studies.definition import Study
from secateur.studies.execution.snapshot import PLACE, Snapshot
from secateur.studies.plan import Plan

REPORTS, PAGE = Path("report"), "index.html"
"""Folder of the reports, and the page in each of them."""
LATENCIES = "latency.csv"
"""Beside the page: latencies that were measured for it."""
TRIALS = "trials.csv"
"""Beside the page: the trials of a search."""


def digest(state: Snapshot, study: Study, made: Plan) -> str:
    """Hash of the project's files, of all results of the finished cells, and of the tables beside
    the page."""
    cells = [
        [cell.name, cell.method, cell.point, cell.control, made.entries_of(number)]
        for number, cell in enumerate(made.cells)
        if made.finished(number)
    ]
    beside = [_content(REPORTS / study.name / name) for name in (LATENCIES, TRIALS)]
    text = json.dumps(
        [state.tree, study.about, study.remarks, cells, beside], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(path: Path) -> str:
    """Content of a file; empty if it does not exist."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def has_page(folder: Path, digest: str) -> bool:
    """Whether the page in this folder was made from the state with this digest."""
    try:
        with (folder / PAGE).open("rb") as page:
            return digest.encode() in page.read(1000)
    except OSError:
        return False


class InMlflow:
    """Whether MLflow's store is up to date; known without importing MLflow."""

    def __init__(self, state: Snapshot, study: Study, digest: str) -> None:
        self.file = state.root / PLACE / f"{study.name}.mlflow.json"
        self._own = state.root / "mlflow.db"
        self._named = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow sets it too
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        # as a hash: it may have a password
        store = self._named and hashlib.sha256(self._named.encode()).hexdigest()
        self._about = {"digest": digest, "uri": store, "experiment": experiment}

    def _content(self) -> dict[str, object]:
        """Content of the mark; the inode distinguishes the project's store from a new one."""
        own = self._named is None and self._own.is_file()
        return self._about | {"inode": self._own.stat().st_ino if own else None}

    def complete(self) -> bool:
        """Whether the store has everything."""
        try:
            known = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return False
        return bool(known == self._content())

    def set_complete(self) -> None:
        """Mark that the store has everything."""
        files.write_text(self.file, json.dumps(self._content()))
