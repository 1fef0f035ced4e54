"""What a finished study leaves for people: its page."""

from pathlib import Path

from secateur.pipeline import console
from secateur.studies import page
from secateur.studies.definition import Study
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.plan import Plan
from secateur.studies.results import Cell


def write(state: Snapshot, study: Study, made: Plan, folder: Path, sync: bool) -> None:
    """Write the page of the finished cells; MLflow gets its runs from `secateur sync --all`."""
    done = [cell for place, cell in enumerate(made.cells) if made.finished(place)]
    page.write(
        folder,
        study.name,
        [Cell(cell.name, cell.method, cell.point, cell.seed, cell.control) for cell in done],
    )
    if sync:
        console.say("`secateur sync --all` writes the runs that MLflow lacks")
