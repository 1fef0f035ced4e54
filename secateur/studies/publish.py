"""What a finished study leaves for people: its page, and its runs in MLflow."""

from pathlib import Path

from secateur.pipeline import console
from secateur.studies.definition import Study
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.plan import Plan


def write(state: Snapshot, study: Study, made: Plan, folder: Path, sync: bool) -> None:
    """Write the page of the finished cells, and sync MLflow."""
    console.say(f"{folder}: later")
