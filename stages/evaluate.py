"""evaluate: accuracy, parameters, MACs, size and latency of every model of the chain.

Reads   data/<dataset> (its test images, which no other stage has looked at), models/baseline,
        models/sparse, models/pruned, models/finetuned and their *.run.json.
Writes  metrics/evaluate.json and metrics/layers.csv (one row for each layer of each model), and
        the pipeline run in MLflow.
"""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from torch import nn

from secateur.base import files, machine
from secateur.data.dataset import sample
from secateur.nn import cost
from secateur.pipeline import console, record
from secateur.pipeline import runner as chain
from secateur.pipeline import tracking as track
from secateur.sparsity import masks
from secateur.training.evaluation import accuracy

MODELS = {
    "baseline": "baseline",
    "sparse": "sparse-train",
    "pruned": "prune",
    "finetuned": "finetune",
}
"""Name in the report -> stage that made the model."""


def main() -> None:
    """Load all models, measure, report."""
    job = chain.StageContext("evaluate")
    models = {name: job.checkpoint(maker).model() for name, maker in MODELS.items()}
    records = {
        maker: record.load(job.stage.input(f"{record.FOLDERS[maker]}.run.json"))
        for maker in MODELS.values()
    }
    report, layers = measure(job, models)
    outs = [Path("metrics/evaluate.json"), Path("metrics/layers.csv")]
    files.write_text(outs[0], json.dumps(report, indent=2) + "\n")
    files.write_text(outs[1], layers.to_csv(index=False))
    histories = {maker: Path(record.FOLDERS[maker]) / "history.csv" for maker in records}
    store = track.Store()
    run_id = track.pipeline(records, histories, report, outs, store)
    console.summary(report, asked(records, report), store.uri if run_id else None)


def measure(
    job: chain.StageContext, models: dict[str, nn.Module]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The report, and a table with one row for each layer of each model."""
    place, params = machine.device(), job.params
    test, info = job.data.test, job.data.info
    batch = sample(test, info, params.evaluate.latency_batch).to(place)
    rows: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []
    whole: dict[str, int] = {}  # parameters of each layer of the dense network
    for name, model in models.items():
        right, loss = accuracy(model.to(place), test, info)
        costs = cost.layer_costs(model, batch[:1])
        whole = whole or {layer.layer: layer.params for layer in costs}
        layers += [
            {
                "model": name,
                **asdict(layer),
                "sparsity_of_dense": 1 - layer.nonzero / whole[layer.layer],
            }
            for layer in costs
        ]
        size, packed = cost.weight_bytes(model)
        nonzero = sum(layer.nonzero for layer in costs)
        alive = sum(layer.filters_alive * layer.channels_alive for layer in costs)
        rows[name] = {
            "accuracy": right,
            "loss": loss,
            "params": cost.parameters(model),
            "nonzero": nonzero,
            "macs": sum(layer.macs for layer in costs),
            "macs_dense": sum(layer.macs_dense for layer in costs),
            "bytes": size,
            "bytes_gzip": packed,
            "filters_alive": sum(layer.filters_alive for layer in costs),
            "channels_alive": sum(layer.channels_alive for layer in costs),
            "element_sparsity": 1 - nonzero / cost.parameters(models["baseline"]),
            "structural_sparsity": 1 - alive / _products(models["baseline"]),
        }
    times = cost.latency(models, batch, params.evaluate.latency_repeats)
    for name in models:
        rows[name]["latency_ms"], rows[name]["latency_iqr_ms"] = cost.median_and_iqr(times[name])
    dense, final = rows["baseline"], rows["finetuned"]
    pairs = zip(times["baseline"], times["finetuned"], strict=True)
    report = {
        "dataset": params.dataset,
        "arch": params.arch,
        "seed": params.seed,
        "compression": dense["params"] / final["nonzero"],
        "theoretical_speedup": dense["macs_dense"] / final["macs"],
        "measured_speedup": median(before / after for before, after in pairs),
        "latency_batch": len(batch),
        "hardware": machine.hardware(),
        "pruning": job.upstream["prune"].header.notes,
        **rows,
    }
    return report, pd.DataFrame(layers)


def asked(records: dict[str, record.RunRecord], report: dict[str, Any]) -> str:
    """What the user wanted, in words."""
    wanted = records["sparse-train"].params
    return f"{wanted['penalty']} with decay {wanted['decay']}; {report['pruning']['asked']}"


def _products(model: nn.Module) -> int:
    """Sum over layers of outputs times inputs."""
    return sum(m.weight.shape[0] * m.weight.shape[1] for m in masks.layers(model).values())


if __name__ == "__main__":
    console.main(main, "evaluate", __doc__)
