"""Outputs of the pipeline: models, report, records."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from workspace import MODELS

from secateur.data.dataset import load

pytestmark = pytest.mark.pipeline


def test_the_report_agrees_with_a_forward_pass_in_numpy(finished):
    report = json.loads((finished.path / "metrics/evaluate.json").read_text())
    test = load(finished.path / "data/digits").test
    pixels = test.images.numpy().reshape(len(test), -1) / 255.0
    for name in MODELS:
        path = finished.path / f"models/{name}/model.safetensors"
        w = safetensors.numpy.load_file(path)
        x = pixels
        for number in (1, 2, 3):
            x = x @ w[f"fc{number}.weight"].T.astype(float) + w[f"fc{number}.bias"]
            x = np.maximum(x, 0) if number < 3 else x
        weights = [t for key, t in w.items() if not key.startswith("mask:")]
        row = report[name]
        assert row["accuracy"] == pytest.approx(np.mean(x.argmax(1) == test.labels.numpy()))
        assert row["params"] == sum(t.size for t in weights)
        assert row["nonzero"] == sum(np.count_nonzero(t) for t in weights)
        matrices = [t for t in weights if t.ndim == 2]
        assert row["macs"] == sum(np.count_nonzero(t) for t in matrices)
        assert row["macs_dense"] == sum(t.size for t in matrices)
        assert row["latency_ms"] > 0 and row["latency_iqr_ms"] >= 0
    dense, final = report["baseline"], report["finetuned"]
    assert report["compression"] == pytest.approx(dense["params"] / final["nonzero"])
    assert report["theoretical_speedup"] == pytest.approx(dense["macs"] / final["macs"])
    layers = pd.read_csv(finished.path / "metrics/layers.csv")
    assert list(layers.groupby("model").nonzero.sum()[MODELS]) == [
        report[m]["nonzero"] for m in MODELS
    ]


def test_what_is_pruned_stays_pruned(finished):
    load_file = safetensors.torch.load_file
    pruned = load_file(finished.path / "models/pruned/model.safetensors")
    final = load_file(finished.path / "models/finetuned/model.safetensors")
    masks = [key for key in pruned if key.startswith("mask:")]
    assert masks
    for key in masks:
        gone = ~pruned[key]
        assert gone.any() and not final[key.removeprefix("mask:")][gone].any()


def test_the_models_name_their_parents(finished):
    records = [json.loads((finished.path / f"models/{m}.run.json").read_text()) for m in MODELS]
    for parent, child in itertools.pairwise(records):
        assert child["upstream"] == {parent["stage"]: parent["sha256"]}


def test_a_structural_penalty_shrinks_the_network(project):
    project.params(penalty="group_hoyer_square", decay=0.03, arch="lenet5", pruner="threshold")
    project.params(pruners__threshold__sensitivity=0.01, sparse_train__epochs=10)
    log = project.dvc("repro")
    shapes = {
        key: t.shape
        for key, t in safetensors.torch.load_file(
            project.path / "models/pruned/model.safetensors"
        ).items()
    }
    assert shapes["fc1.weight"][0] < 500, log
    report = json.loads((project.path / "metrics/evaluate.json").read_text())
    assert report["pruning"]["reached"]["difference_float64"] < 1e-9
    assert report["finetuned"]["accuracy"] > 0.8


def test_what_is_zero_after_sparse_train_is_what_chosen_prunes(project):
    """With a parametrization, which is collapsed, and with a penalty that prunes by itself."""
    ways = {
        "str": {"parametrization": "str", "parametrizations__str__initial": -4.0},
        "gradual": {"penalty": "gradual", "penalties__gradual__ranking": "global"},
    }
    for name, way in ways.items():
        changes = {"penalty": "none", "parametrization": "none", "pruner": "chosen"} | way
        project.params(**changes, prune__remove_dead=False)
        project.dvc("repro", "prune")
        sparse, pruned = (
            safetensors.torch.load_file(project.path / f"models/{model}/model.safetensors")
            for model in ("sparse", "pruned")
        )
        chosen = {key for key in sparse if key.startswith("choice:")}
        assert chosen and {key.removeprefix("choice:") for key in chosen} <= {
            f"fc{number}.weight" for number in (1, 2, 3)
        }
        for key in chosen:
            weight = key.removeprefix("choice:")
            assert torch.equal(sparse[key], sparse[weight] == 0)
            assert torch.equal(pruned[f"mask:{weight}"], ~sparse[key])
        assert {key for key in sparse if key not in chosen} == {
            f"fc{number}.{kind}" for number in (1, 2, 3) for kind in ("weight", "bias")
        }
        record = json.loads((project.path / "models/sparse.run.json").read_text())
        history = pd.read_csv(project.path / "models/sparse/history.csv")
        assert record["metrics"]["pruned"] == history.pruned.iloc[-1] > 0, name
        growth = pd.read_csv(project.path / "models/sparse/growth.csv")
        assert bool(len(growth)) == (name == "gradual")
