"""What the pipeline makes: models, report, records."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import safetensors.torch
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
    project.params(penalty="group_hoyer_square", decay=0.01, arch="lenet5", pruner="threshold")
    project.params(pruners__threshold__sensitivity=0.01, sparse_train__epochs=25)
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
