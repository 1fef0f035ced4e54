"""evaluate: accuracy, parameters, MACs, size and latency of every model of the chain.

Reads   data/<dataset> (its test images, which no other stage reads), models/baseline,
        models/sparse, models/pruned, models/finetuned and their *.run.json.
Writes  metrics/evaluate.json and metrics/layers.csv (one row for each layer of each model), and
        the pipeline run in MLflow.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from secateur.base import files, machine, timing
from secateur.data.batches import first_images
from secateur.nn import cost
from secateur.nn.cost import LayerCost
from secateur.pipeline import console, record, runner, tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.record import MODELS
from secateur.sparsity.masks import Masks, prunable
from secateur.training.evaluation import accuracy

REPORT, LAYERS = Path("metrics/evaluate.json"), Path("metrics/layers.csv")


def main() -> None:
    """Load all models, measure, report."""
    context = runner.open_context("evaluate")
    records = {
        stage: record.load(context.stage.input(str(MODELS[stage].record)))
        for stage in context.upstream
    }
    histories = {stage: tracking.read_history(MODELS[stage].history) for stage in records}
    report, layers = measure(context)
    files.write_text(REPORT, json.dumps(report, indent=2) + "\n")
    files.write_text(LAYERS, layers.to_csv(index=False))
    store = Store()
    run_id = tracking.pipeline(records, histories, report, [REPORT, LAYERS], store)
    console.summary(report, asked(records, report), store.uri if run_id else None)


def measure(context: runner.StageContext) -> tuple[dict[str, Any], pd.DataFrame]:
    """Make the report, and a table with one row for each layer of each model."""
    params, test, info = context.params, context.data.test, context.data.info
    device = machine.device()
    models = {MODELS[stage].key: found.model() for stage, found in context.upstream.items()}
    masks = {MODELS[stage].key: found.masks for stage, found in context.upstream.items()}
    batch = first_images(test, info, params.evaluate.latency_batch).to(device)
    rows: dict[str, dict[str, Any]] = {}
    costs: dict[str, list[LayerCost]] = {}
    for name, model in models.items():
        correct, loss = accuracy(model.to(device), test, info)
        costs[name] = cost.layer_costs(model, batch[:1], masks[name])
        rows[name] = {"accuracy": correct, "loss": loss}
        rows[name] |= _sizes(model, masks[name], costs[name], models["baseline"])
    times = cost.latency(models, batch, params.evaluate.latency_repeats)
    for name in models:
        middle, spread = timing.median_and_iqr(times[name])
        rows[name] |= {"latency_ms": middle, "latency_iqr_ms": spread}
    dense, final = rows["baseline"], rows["finetuned"]
    report = {
        "dataset": params.dataset,
        "arch": params.arch,
        "seed": params.seed,
        "compression": cost.compression(
            models["baseline"], models["finetuned"], masks["finetuned"]
        ),
        "theoretical_speedup": dense["macs_dense"] / final["macs"],
        "measured_speedup": timing.speedup(times["baseline"], times["finetuned"]),
        "latency_batch": len(batch),
        "hardware": machine.hardware(),
        "pruning": context.upstream["prune"].header.notes,
        **rows,
    }
    return report, _layers(costs)


def _sizes(
    model: nn.Module, masks: Masks, costs: Sequence[LayerCost], dense: nn.Module
) -> dict[str, Any]:
    """Counts of a whole model, and its sparsity relative to the dense one."""
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


def _layers(costs: Mapping[str, Sequence[LayerCost]]) -> pd.DataFrame:
    """One row for each layer of each model; sparsity also relative to the layer's dense weight."""
    dense = {layer.layer: layer.params for layer in costs["baseline"]}
    rows = []
    for model, found in costs.items():
        for layer in found:
            sparsity = 1 - layer.nonzero / dense[layer.layer]
            rows.append({"model": model, **asdict(layer), "sparsity_of_dense": sparsity})
    return pd.DataFrame(rows)


def asked(records: dict[str, record.RunRecord], report: dict[str, Any]) -> str:
    """Penalty and pruner of this chain in words."""
    wanted = records["sparse-train"].params
    weights = wanted.get("parametrization", "none")
    also = "" if weights == "none" else f", {weights}"
    return f"{wanted['penalty']} with decay {wanted['decay']}{also}; {report['pruning']['asked']}"


def _kernels(model: nn.Module) -> int:
    """Outputs times inputs, summed over all layers."""
    weights = prunable(model, "weights").values()
    return sum(weight.shape[0] * weight.shape[1] for weight in weights)


if __name__ == "__main__":
    console.main(main, "evaluate", __doc__)
