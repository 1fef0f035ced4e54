"""export: the finetuned network as files that other runtimes read, proved equal to it.

Reads   data/<dataset> (its test images), models/baseline, models/pruned, models/finetuned and
        models/finetuned.run.json.
Writes  models/export (model.onnx, model.pt2) and metrics/export.json (size, accuracy and
        difference from float64 of dense, pruned and finetuned network).

Run it by `make export`, or `dvc repro stages/export/dvc.yaml`. Nothing is written before every file
has been proved equal to its network.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from secateur.base import files
from secateur.deploy import export, metadata, parity
from secateur.deploy.metadata import Metadata
from secateur.deploy.runtimes import open_model
from secateur.nn.checkpoint import Checkpoint
from secateur.pipeline import console, record, runner
from secateur.pipeline.record import MODELS

FOLDER, REPORT = Path("models/export"), Path("metrics/export.json")
ROWS = {"baseline": "dense", "prune": "pruned", "finetune": "finetuned"}
"""Stage -> row of the report."""


def main() -> None:
    """Export, prove, report."""
    context = runner.open_context("export")
    export.check_packages()
    report: dict[str, Any] = {}
    files.write_folder(FOLDER, lambda folder: report.update(make(context, folder)))
    files.write_text(REPORT, json.dumps(report, indent=2) + "\n")
    console.say(f"see          {FOLDER}, {REPORT}")


def make(context: runner.StageContext, folder: Path) -> dict[str, Any]:
    """Write the finetuned network into `folder`; returns the report on all rows."""
    with tempfile.TemporaryDirectory() as scratch:
        exported: dict[str, Mapping[str, Path]] = {}
        report: dict[str, Any] = {}
        for stage, row in ROWS.items():
            place = folder if stage == "finetune" else Path(scratch) / row
            place.mkdir(exist_ok=True)
            model, about = network(context, stage)
            exported[row] = export.write(model, about.shape, about, place)
            report[row] = prove(context, model, row, exported[row])
    return report


def network(context: runner.StageContext, stage: str) -> tuple[nn.Module, Metadata]:
    """The network that is exported for the model of `stage`, and what its files say about it."""
    found, inside = context.upstream[stage], context.params.export.preprocessing == "inside"
    model = found.model()
    if inside:
        model = export.PixelNetwork(model, found.header.mean, found.header.std)
    return model.eval(), describe(context, stage, found)


def describe(context: runner.StageContext, stage: str, found: Checkpoint) -> Metadata:
    """Metadata of the model of `stage`: where it comes from is what its run record says."""
    origin: dict[str, str] = {}
    if stage == "finetune":
        made = record.load(context.stage.input(str(MODELS[stage].record)))
        origin = {
            "fingerprint": made.fingerprint,
            "experiment": made.experiment or "",
            "revision": made.revision or "",
        }
    how = context.params.export.preprocessing
    return metadata.from_header(found.header, found.sha256, how, **origin)


def prove(
    context: runner.StageContext, model: nn.Module, row: str, paths: Mapping[str, Path]
) -> dict[str, Any]:
    """One row of the report; raises SecateurError if a file computes anything else."""
    opened = {path.name: open_model(path) for path in paths.values()}
    pixels = context.params.export.preprocessing == "inside"
    found = parity.verify(model, opened, context.data.test, context.data.info, pixels=pixels)
    return {
        name: {"bytes": paths[Path(name).suffix].stat().st_size, **asdict(result)}
        for name, result in found.items()
    }


if __name__ == "__main__":
    console.main(main, "export", __doc__)
