"""Records: the small tracked file beside each model that says which run really made it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.base import files
from secateur.base.errors import SecateurError

FOLDERS = {
    "baseline": "models/baseline",
    "sparse-train": "models/sparse",
    "prune": "models/pruned",
    "finetune": "models/finetuned",
}
"""Stage -> folder of the model it makes; its record lies beside the folder as <folder>.run.json."""


@dataclass(frozen=True)
class RunRecord:
    """One training or pruning that really ran; restored by DVC together with its model."""

    stage: str
    fingerprint: str
    params: dict[str, Any]
    """As dvc.yaml declares them for the stage."""
    metrics: dict[str, float]
    """Of the model that was kept."""
    model: str
    """Path of the checkpoint."""
    sha256: str
    """Of the checkpoint."""
    dataset: dict[str, Any]
    seconds: float
    """Wall time of the work, over all tries."""
    hardware: str
    run_id: str | None = None
    """MLflow run; None if nothing could be tracked."""
    model_id: str | None = None
    tracking_uri: str | None = None
    upstream: dict[str, str] = field(default_factory=dict)
    """Stage -> sha256 of the checkpoint that this one was made from."""

    @property
    def identity(self) -> str:
        """Tells this piece of work from every other: its MLflow run, or else its fingerprint."""
        return self.run_id or self.fingerprint


def save(path: Path, record: RunRecord) -> None:
    """Write one record in one step."""
    files.write_text(path, json.dumps(asdict(record), indent=2, sort_keys=True) + "\n")


def load(path: Path) -> RunRecord:
    """Read one record; SecateurError if it is missing or not one."""
    try:
        return from_json(path.read_text())
    except FileNotFoundError:
        raise SecateurError(f"{path}: missing; run `dvc repro` to make it") from None
    except (ValueError, TypeError) as error:
        raise SecateurError(f"{path}: not a run record: {error}") from None


def from_json(text: str) -> RunRecord:
    """A record from its JSON."""
    return RunRecord(**json.loads(text))


def flat(tree: dict[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with joined keys; lists and plain values stay as they are."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            result |= flat(value, separator, f"{name}{separator}")
        else:
            result[name] = value
    return result
