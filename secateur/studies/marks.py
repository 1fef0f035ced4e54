"""What of a study's page and runs in MLflow is up to date, so that both are not made anew.

Only a shortcut: what is marked can be deleted at any time and is then written again.
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
"""Beside the page: what a search has tried."""


def digest(state: Snapshot, study: Study, made: Plan) -> str:
    """Hash of the project's files, of all that the finished cells have made, and of the tables
    beside the page."""
    cells = [
        [cell.name, cell.method, cell.point, cell.control, made.entries_of(number)]
        for number, cell in enumerate(made.cells)
        if made.finished(number)
    ]
    beside = [_content(REPORTS / study.name / name) for name in (LATENCIES, TRIALS)]
    text = json.dumps([state.tree, study.about, cells, beside], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(path: Path) -> str:
    """Of a file; empty if there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def has_page(folder: Path, digest: str) -> bool:
    """Whether the page in this folder was made of the same."""
    try:
        with (folder / PAGE).open("rb") as page:
            return digest.encode() in page.read(1000)
    except OSError:
        return False


class InMlflow:
    """What the store that MLflow uses has been given; looked up before MLflow is imported."""

    def __init__(self, state: Snapshot, study: Study, digest: str) -> None:
        self.file = state.root / PLACE / f"{study.name}.mlflow.json"
        self._own = state.root / "mlflow.db"
        self._named = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow sets it too
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        # as a hash: it may have a password
        store = self._named and hashlib.sha256(self._named.encode()).hexdigest()
        self._about = {"digest": digest, "uri": store, "experiment": experiment}

    def _content(self) -> dict[str, object]:
        """The inode tells the project's own store from one that was made anew."""
        own = self._named is None and self._own.is_file()
        return self._about | {"inode": self._own.stat().st_ino if own else None}

    def complete(self) -> bool:
        """Whether it has been given all of this."""
        try:
            known = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return False
        return bool(known == self._content())

    def set_complete(self) -> None:
        """Note that it has."""
        files.write_text(self.file, json.dumps(self._content()))
