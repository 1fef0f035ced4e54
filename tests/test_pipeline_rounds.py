"""Further rounds with real DVC: what runs, what comes from the cache, and what stays pruned."""

import json
import time

import pytest
import safetensors.torch
from test_pipeline_resume import kill
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


def test_a_round_that_is_added_reuses_all_before_also_in_a_clone_and_holds_masks(project, tmp_path):
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
    clone = project.clone(tmp_path / "clone", tmp_path / "shelf")
    assert set(ran(clone.dvc("repro"))) <= {"evaluate"}
    files = [f"models/rounds/{name}/finetuned/model.safetensors" for name in ("round2", "round3")]
    for file in files:
        assert (clone.path / file).read_bytes() == (project.path / file).read_bytes()
    said = clone.run("python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    (chain,) = clone.runs("tags.kind = 'pipeline'")
    assert "warning" not in said and {"prune_round3/seconds"} <= chain.data.metrics.keys()
    (last,) = clone.runs("tags.stage = 'finetune@round3'")
    assert chain.data.tags["run.finetune_round3"] == last.info.run_id
    assert chain.data.metrics["round/accuracy"] == report["rounds"]["round3"]["accuracy"]


def test_a_round_that_was_killed_ends_with_the_same_bytes(project, tmp_path):
    """kill -9 in the middle of round 2; the undisturbed round has its own project."""
    undisturbed = project.copy(tmp_path / "undisturbed")
    arguments, stage = ("sparse_train", "--round", "round2"), "sparse-train@round2"
    for epochs in (20, 100, 1000):  # a fast machine may finish earlier
        length = {"epochs": epochs}
        whole = {"after": "finetuned", "sparse_train": length, "prune": {}, "finetune": {}}
        project.params(rounds={"round2": whole})
        process = project.start(*arguments)
        while process.poll() is None and not project.saved_states(stage):
            time.sleep(0.02)
        kill(process, project, stage)
        if project.saved_states(stage):
            break
    undisturbed.params(rounds={"round2": whole})
    undisturbed.stage(*arguments)
    assert "resuming after epoch" in project.stage(*arguments)
    for file in ("model.safetensors", "history.csv"):
        ours, theirs = (
            p.path / "models/rounds/round2/sparse" / file for p in (project, undisturbed)
        )
        assert ours.read_bytes() == theirs.read_bytes(), file
