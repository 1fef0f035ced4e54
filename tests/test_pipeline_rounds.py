"""Further rounds with real DVC: what runs, what comes from the cache, and what stays pruned."""

import json

import pytest
import safetensors.torch
from workspace import ran

pytestmark = pytest.mark.pipeline
ROUND = (
    "{sparse_train: {epochs: 2}, prune: {pruners: {std: {sensitivity: 0.4}}}, finetune: {epochs: 1}"
)
STAGES = ("sparse-train", "prune", "finetune")


def add(project, name, after):
    return project.dvc("exp", "run", "-S", f"+rounds.{name}={ROUND}, after: {after}}}")


def stages(name):
    return [f"stages/rounds/dvc.yaml:{stage}@{name}" for stage in STAGES]


def test_a_round_that_is_added_reuses_all_before_and_holds_their_masks(project):
    before = project.model_bytes()
    assert ran(add(project, "round2", "finetuned")) == [*stages("round2"), "evaluate"]
    second = (project.path / "models/rounds/round2/finetuned/model.safetensors").read_bytes()
    assert ran(add(project, "round3", "rounds/round2/finetuned")) == [*stages("round3"), "evaluate"]
    assert project.model_bytes() == before
    again = (project.path / "models/rounds/round2/finetuned/model.safetensors").read_bytes()
    assert again == second
    report = json.loads((project.path / "metrics/evaluate.json").read_text())
    left = [row["nonzero"] for row in report["rounds"].values()]
    assert list(report["rounds"]) == ["round1", "round2", "round3"] and left == sorted(left)[::-1]
    for model in ("sparse", "pruned", "finetuned"):
        path = project.path / f"models/rounds/round3/{model}/model.safetensors"
        tensors = safetensors.torch.load_file(path)
        masks = {name for name in tensors if name.startswith("mask:")}
        assert masks
        for name in masks:
            assert not tensors[name.removeprefix("mask:")][~tensors[name]].any()
