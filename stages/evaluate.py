"""evaluate: accuracy, parameters, MACs, size and latency of every model of the chain.

Reads   data/<dataset> (its test images, which no other stage reads), models/baseline,
        models/sparse, models/pruned, models/finetuned and their *.run.json, and those of all
        further rounds in models/rounds.
Writes  metrics/evaluate.json, metrics/layers.csv (one row for each layer of each model),
        metrics/rounds.csv (one row for the dense network and one for the result of each round), and
        the pipeline run in MLflow.

With several rounds, `sparse`, `pruned` and `finetuned` are the models of the last round; the
results of all rounds are under `rounds`. Models in models/rounds of rounds that params.yaml no
longer has are removed; DVC has them in its cache.
"""

import contextlib
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from secateur.base import files, machine, timing
from secateur.base.files import Table
from secateur.base.sections import Evaluate
from secateur.data.batches import first_images
from secateur.nn import cost
from secateur.nn.cost import LayerCost
from secateur.pipeline import console, record, runner, tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.record import FIRST, MODELS, ROUND, Chain
from secateur.sparsity.masks import Masks, prunable
from secateur.training.callbacks import Row
from secateur.training.evaluation import accuracy

REPORT, LAYERS, ROUNDS = (Path("metrics", n) for n in ("evaluate.json", "layers.csv", "rounds.csv"))


def main() -> None:
    """Load all models, measure, report."""
    context = runner.open_context("evaluate")
    remove_old_rounds(context.chain)
    models = context.chain.models
    records = {
        stage: record.load(context.stage.input(str(model.record)))
        for stage, model in models.items()
    }
    histories = {stage: tracking.read_history(model.history) for stage, model in models.items()}
    report, layers = measure(context, records)
    for stage, model in MODELS.items():
        last = end_of_training(histories[context.chain.last[stage]], context.params.evaluate)
        report[model.key] |= last
    files.write_text(REPORT, json.dumps(report, indent=2) + "\n")
    files.write_text(LAYERS, layers.csv())
    seconds = sum(records[stage].seconds for stage in ROUND)
    files.write_text(ROUNDS, rounds_table(report, seconds).csv())
    store = Store()
    written = [REPORT, LAYERS, ROUNDS]
    run_id = tracking.pipeline(records, histories, report, written, store)
    console.summary(report, asked(context, report), store.uri if run_id else None)


def end_of_training(history: Sequence[Row], settings: Evaluate) -> dict[str, dict[str, float]]:
    """Mean of the accuracy on val over the last epochs of a training, and its deviation (n - 1);
    empty if it is not requested, or there are no val images."""
    rows = history[-settings.last_epochs :] if settings.last_epochs else []
    found = [row["val_accuracy"] for row in rows if "val_accuracy" in row]
    if not found:
        return {}
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    figures = {"mean": statistics.fmean(found), "deviation": deviation, "epochs": float(len(found))}
    return {"val_accuracy_at_end": figures}


def remove_old_rounds(chain: Chain, folder: Path = Path("models/rounds")) -> None:
    """Remove models of rounds that are not in the chain: models/rounds is a dependency."""
    for old in sorted(folder.glob("*/")):
        if old.name in chain.rounds:
            continue
        try:
            models = Chain((old.name,)).models
        except KeyError:  # not the name of a round: the folder is not ours
            continue
        for model in models.values():
            if Path(model.folder).parent == old:
                shutil.rmtree(model.folder, ignore_errors=True)
                model.record.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else lies there too
            old.rmdir()
        console.say(f"evaluate: {old}: no round of params.yaml; its models are removed")


def measure(
    context: runner.StageContext, records: Mapping[str, record.RunRecord]
) -> tuple[dict[str, Any], Table]:
    """Make the report, and a table with one row for each layer of each model."""
    params, test, info = context.params, context.data.test, context.data.info
    device = machine.device()
    chosen = _measured(context.chain)
    models = {name: context.upstream[stage].model() for name, stage in chosen.items()}
    masks = {name: context.upstream[stage].masks for name, stage in chosen.items()}
    batch = first_images(test, info, params.evaluate.latency_batch).to(device)
    rows: dict[str, dict[str, Any]] = {}
    costs: dict[str, list[LayerCost]] = {}
    for name, model in models.items():
        correct, loss = accuracy(model.to(device), test, info)
        costs[name] = cost.layer_costs(model, batch[:1], masks[name])
        rows[name] = {"accuracy": correct, "loss": loss}
        rows[name] |= _sizes(model, masks[name], costs[name], models["baseline"])
    shown = {model.key: models[model.key] for model in MODELS.values()}
    times = cost.latency(shown, batch, params.evaluate.latency_repeats)
    for name in shown:
        median, iqr = timing.median_and_iqr(times[name])
        rows[name] |= {"latency_ms": median, "latency_iqr_ms": iqr}
    dense, final = rows["baseline"], rows["finetuned"]
    report = {
        "dataset": params.dataset,
        "arch": params.arch,
        "seed": params.seed,
        "compression": dense["params"] / final["nonzero"],
        "theoretical_speedup": dense["macs_dense"] / final["macs"],
        "measured_speedup": timing.speedup(times["baseline"], times["finetuned"]),
        "latency_batch": len(batch),
        "hardware": machine.hardware(),
        "pruning": context.last("prune").header.notes,
        **{name: rows[name] for name in shown},
    }
    if context.chain.rounds:
        report["rounds"] = _rounds(context.chain, rows, records)
    return report, _layers(costs)


def _measured(chain: Chain) -> dict[str, str]:
    """Name of each model that is measured -> its stage: the models of the last round, and the
    finetuned models of all earlier rounds."""
    stages = {model.key: chain.last[stage] for stage, model in MODELS.items()}
    before = [FIRST, *chain.rounds][:-1]
    return stages | {_earlier(name): chain.of_round(name)["finetune"] for name in before}


def _earlier(round_name: str) -> str:
    """Name of the finetuned model of an earlier round."""
    return f"finetuned, {round_name}"


def _rounds(
    chain: Chain,
    rows: Mapping[str, dict[str, Any]],
    records: Mapping[str, record.RunRecord],
) -> dict[str, dict[str, Any]]:
    """By round: size, MACs and accuracy of its finetuned model, and its seconds."""
    keys = ("accuracy", "loss", "params", "nonzero", "macs", "macs_dense", "bytes")
    found = {}
    for name in [FIRST, *chain.rounds]:
        row = rows[_earlier(name)] if _earlier(name) in rows else rows["finetuned"]
        seconds = sum(records[stage].seconds for stage in chain.of_round(name).values())
        compression = rows["baseline"]["params"] / row["nonzero"]
        found[name] = {key: row[key] for key in keys}
        found[name] |= {"compression": compression, "seconds": round(seconds, 3)}
    return found


def _sizes(
    model: nn.Module, masks: Masks, costs: Sequence[LayerCost], dense: nn.Module
) -> dict[str, Any]:
    """Counts of a whole model, and its sparsity relative to the dense network."""
    size, packed = cost.weight_bytes(model)
    nonzero = cost.nonzero(model, masks)
    alive = sum(layer.filters_alive * layer.channels_alive for layer in costs)
    return {
        "params": cost.parameters(model),
        "nonzero": nonzero,
        "macs": sum(layer.macs for layer in costs),
        "macs_dense": sum(layer.macs_dense for layer in costs),
        "bytes": size,
        "bytes_gzip": packed,
        "filters_alive": sum(layer.filters_alive for layer in costs),
        "channels_alive": sum(layer.channels_alive for layer in costs),
        "element_sparsity": 1 - nonzero / cost.parameters(dense),
        "structural_sparsity": 1 - alive / _kernels(dense),
    }


def _layers(costs: Mapping[str, Sequence[LayerCost]]) -> Table:
    """One row for each dense layer of each model; sparsity also relative to its dense weight."""
    rows = []
    for model, found in costs.items():
        left = {layer.layer: layer for layer in found}
        for dense in costs["baseline"]:
            layer = left.get(dense.layer) or cost.removed(dense)
            sparsity = 1 - layer.nonzero / dense.params
            rows.append({"model": model, **asdict(layer), "sparsity_of_dense": sparsity})
    return Table.of(rows)


def rounds_table(report: Mapping[str, Any], seconds: float) -> Table:
    """One row for the dense network, as round 0, and one for the result of each round.

    `seconds` are those of a chain with a single round, whose report does not have them.
    """
    columns = ["round", "name", "accuracy", "nonzero", "compression", "macs", "seconds"]
    only = {FIRST: report["finetuned"] | {"compression": report["compression"], "seconds": seconds}}
    dense = report["baseline"] | {"compression": 1.0, "seconds": 0.0}
    found = {"dense": dense, **report.get("rounds", only)}
    rows = [{"round": k, "name": name, **row} for k, (name, row) in enumerate(found.items())]
    return Table(columns, [{key: row.get(key) for key in columns} for row in rows])


def asked(context: runner.StageContext, report: Mapping[str, Any]) -> str:
    """Penalty and pruner of the last round in words."""
    penalty, count = context.last("sparse-train").header.notes, len(context.chain.rounds)
    rounds = f"{1 + count} rounds, the last one with " if count else ""
    how = f"{penalty['penalty']} with decay {penalty['decay']}"
    how += f", {penalty['parametrization']}" if "parametrization" in penalty else ""
    return f"{rounds}{how}; {report['pruning']['asked']}"


def _kernels(model: nn.Module) -> int:
    """Outputs times inputs, summed over all layers."""
    weights = prunable(model, "weights").values()
    return sum(weight.shape[0] * weight.shape[1] for weight in weights)


if __name__ == "__main__":
    console.main(main, "evaluate", __doc__)
