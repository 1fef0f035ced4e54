"""export: write the finetuned network for other runtimes, prove the files equal to it, time them.

Reads   data/<dataset> (its test images; for int8 also training images), models/baseline,
        models/pruned, models/finetuned and models/finetuned.run.json; with several rounds, the
        pruned and the finetuned network of the last round, in models/rounds.
Writes  models/export (model.onnx, model.pt2, model-int8.onnx), metrics/export.json (size, accuracy,
        difference from float64 and latency of dense, pruned and finetuned network) and
        metrics/export.csv (one row for each network, precision, runtime, threads and batch); the
        network as a model of the chain's run in MLflow.

Run it with `make export`, or `dvc repro stages/export/dvc.yaml`. Nothing is written before every
float32 file has been proved equal to its network, in every runtime in which it is timed.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.base import files, machine
from secateur.data.batches import evenly_spaced_images, first_images
from secateur.data.image_files import ImageFileList
from secateur.deploy import (
    comparison,
    export,
    latency,
    metadata,
    parity,
    quantisation,
    runtimes,
    sparse_inference,
)
from secateur.deploy.metadata import Metadata
from secateur.deploy.runtimes import RUNTIMES, open_model
from secateur.nn.checkpoint import Checkpoint
from secateur.nn.modes import in_eval_mode
from secateur.pipeline import console, mlflow_model, record, runner

FOLDER = Path("models/export")
REPORT, TABLE = Path("metrics/export.json"), Path("metrics/export.csv")
ROWS = {stage: record.MODELS[stage].key for stage in ("baseline", "prune", "finetune")}
"""Stage -> row of the report, with the name that `evaluate` gives it."""
Files = dict[str, Mapping[str, Path]]
"""Row of the report -> suffix -> exported file."""


def main() -> None:
    """Export, prove, compare, report."""
    context = runner.open_context("export")
    settings = context.params.export
    export.check_packages()
    runtimes.check_packages(settings.runtimes)
    report: dict[str, Any] = {}
    table: list[dict[str, Any]] = []

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            exported = make(context, folder, Path(scratch), report)
            table.extend(compare(context, exported, report))

    files.write_folder(FOLDER, fill)
    files.write_text(REPORT, json.dumps(report, indent=2) + "\n")
    files.write_text(TABLE, pd.DataFrame(table).to_csv(index=False))
    console.exported(table, report["finetuned"])
    model = mlflow_model.log(
        FOLDER / export.PT2,
        report,
        [REPORT, TABLE],
        example=images_for(context, first_images(context.data.test, context.data.info, 2)),
        register=settings.register_as,
        chain=context.chain,
    )
    console.say(f"see          {FOLDER}, {REPORT}, {TABLE}")
    if model:
        console.say(
            f"load         mlflow.pyfunc.load_model('models:/{settings.register_as or model}')"
        )


def make(
    context: runner.StageContext, folder: Path, scratch: Path, report: dict[str, Any]
) -> Files:
    """Write the finetuned network into `folder` and the others into `scratch`; fill the report."""
    exported: Files = {}
    for stage, row in ROWS.items():
        place = folder if row == "finetuned" else scratch / row
        place.mkdir(exist_ok=True)
        model, about = network(context, stage)
        exported[row] = export.write(model, about.shape, about, place)
        report[row] = prove(context, model, exported[row])
        console.say(f"export: {row}: both files compute what the network computes")
    if context.params.export.int8:
        for row in (comparison.DENSE, "finetuned"):  # dense for comparison: int8 without pruning
            target = exported[row][".onnx"].with_name(comparison.INT8_FILE)
            report[row + comparison.INT8] = quantise(context, exported[row][".onnx"], target)
            console.say(f"export: {row}: int8 calibrated and tested")
            exported[row + comparison.INT8] = {".onnx": target}
    return exported


def network(context: runner.StageContext, stage: str) -> tuple[nn.Module, Metadata]:
    """The network that is exported for the model of `stage`, and the metadata of its files."""
    found, inside = context.last(stage), context.params.export.preprocessing == "inside"
    model = found.model()
    if inside:
        model = export.PixelNetwork(model, found.header.mean, found.header.std)
    return in_eval_mode(model), describe(context, stage, found)


def describe(context: runner.StageContext, stage: str, found: Checkpoint) -> Metadata:
    """Metadata of the model of `stage`, whose origin is taken from its run record."""
    origin: dict[str, str] = {}
    if stage == "finetune":
        last = context.chain.models[context.chain.last[stage]]
        made = record.load(context.stage.input(str(last.record)))
        origin = {
            "fingerprint": made.fingerprint,
            "experiment": made.experiment or "",
            "revision": made.revision or "",
        }
    how = context.params.export.preprocessing
    test = context.data.test
    resize = test.view.resize if isinstance(test, ImageFileList) else None
    return metadata.from_header(found.header, found.sha256, how, resize=resize, **origin)


def prove(
    context: runner.StageContext, model: nn.Module, paths: Mapping[str, Path]
) -> dict[str, Any]:
    """One row of the report; raises SecateurError if a file computes anything else."""
    settings, data = context.params.export, context.data
    opened = {
        (path, runtime): open_model(path, runtime)
        for path in paths.values()
        for runtime in runtimes.tested_in(path, settings.runtimes)
    }
    titles = {key: f"{key[0].name} in {RUNTIMES[key[1]].title}" for key in opened}
    found = parity.verify(
        model,
        {titles[key]: run for key, run in opened.items()},
        data.test,
        data.info,
        pixels=settings.preprocessing == "inside",
    )
    return comparison.proved({key: found[title] for key, title in titles.items()})


def quantise(context: runner.StageContext, source: Path, target: Path) -> dict[str, Any]:
    """Write the int8 version of a file; returns its row of the report."""
    data, settings = context.data, context.params.export
    some = evenly_spaced_images(data.train, data.info, settings.calibration_images)
    quantisation.quantise(source, target, images_for(context, some))
    pixels = settings.preprocessing == "inside"
    right = {
        runtime: parity.accuracy(open_model(target, runtime), data.test, data.info, pixels=pixels)
        for runtime in runtimes.tested_in(target, settings.runtimes)
    }
    return {target.name: {"bytes": target.stat().st_size, "accuracy": right}}


def compare(
    context: runner.StageContext, exported: Files, report: dict[str, Any]
) -> list[dict[str, Any]]:
    """Time all files, and sparse layers of the finetuned network; returns the rows of the table."""
    settings, data = context.params.export, context.data
    images = first_images(data.test, data.info, max(settings.latency_batches))
    times = latency.measure(
        {row: list(paths.values()) for row, paths in exported.items()},
        images_for(context, images),
        runtime_names=settings.runtimes,
        threads=latency.thread_counts(),
        batches=settings.latency_batches,
        repeats=settings.latency_repeats,
        on_group=lambda what: console.say(f"export: latency, {what}"),
    )
    comparison.add_latencies(report, times)
    model = context.last("finetune").model()
    batches = [
        torch.from_numpy(latency.images_of(images.numpy(), count))
        for count in settings.latency_batches
    ]
    gains = [
        sparse_inference.measure(model, some, threads, settings.latency_repeats)
        for threads in latency.thread_counts()
        for some in batches
    ]
    comparison.add_gains(report["finetuned"], gains)
    report["hardware"] = machine.cpu_name()
    return comparison.rows(report, times)


def images_for(context: runner.StageContext, images: Any) -> NDArray[np.float32]:
    """The input of the exported files for these normalised images."""
    pixels = context.params.export.preprocessing == "inside"
    found: NDArray[np.float32] = parity.as_input(images, context.data.info, pixels).numpy()
    return found


if __name__ == "__main__":
    console.main(main, "export", __doc__)
