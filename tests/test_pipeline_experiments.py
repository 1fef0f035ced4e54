"""Reusing models in another clone, training again, experiments, plots, and sensitivity."""

import csv
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import yaml
from mlflow import MlflowClient
from workspace import ROOT, ran

pytestmark = pytest.mark.pipeline


def test_a_second_clone_reuses_models_and_shows_the_whole_chain(finished, tmp_path):
    first = finished.copy(tmp_path / "first")
    second = first.clone(tmp_path / "second", tmp_path / "shelf")
    log = second.dvc("repro", SECATEUR_TRACKING="on")
    assert set(ran(log)) <= {"evaluate"}
    assert second.model_bytes() == first.model_bytes()
    second.run("python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    kinds = Counter(r.data.tags["stage"] for r in second.runs())
    assert kinds == {"baseline": 1, "sparse-train": 1, "prune": 1, "finetune": 1, "evaluate": 1}
    again = second.run("python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    assert "0 runs written" in again
    head = first.run("git", "rev-parse", "HEAD").strip()
    made = first.run("git", "commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", "kept").strip()
    first.run("git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/kept", made)
    for record in (first.path / "models").glob("*.run.json"):
        record.unlink()  # so that only the experiment's commit has files to restore
    for lost in ("mlflow.db", ".dvc/cache"):  # without .dvc/cache, files come from the remote
        (first.path / lost).rename(tmp_path / Path(lost).name)
        log = first.run("python", "-m", "secateur", "sync", "--all", SECATEUR_TRACKING="on")
        assert "kept: pipeline run written" in log and "5 runs written" in log
        (first.path / "mlflow.db").unlink()


def test_scratch_keeps_the_shape_and_not_the_weights(project):
    project.params(finetune__init="scratch")
    project.dvc("repro")
    load_file = safetensors.torch.load_file
    pruned = load_file(project.path / "models/pruned/model.safetensors")
    final = load_file(project.path / "models/finetuned/model.safetensors")
    assert {k: t.shape for k, t in pruned.items()} == {k: t.shape for k, t in final.items()}
    same = (pruned["fc1.weight"] == final["fc1.weight"]) & (pruned["fc1.weight"] != 0)
    assert not same.any()


def test_sensitivity_is_a_pipeline_of_its_own_whose_suggestion_the_main_one_takes(project):
    log = project.dvc("repro", "stages/sensitivity/dvc.yaml")
    assert "bn_scale is left out" in log
    penalty = project.path / "secateur/penalties/mine.py"
    penalty.write_text((project.path / "secateur/penalties/l1.py").read_text())
    both = ("dvc.yaml", "stages/sensitivity/dvc.yaml")  # the pipeline in stages/export has not run
    assert "up to date" in project.dvc("status", *both)
    table = pd.read_csv(project.path / "metrics/sensitivity.csv")
    dense = json.loads((project.path / "models/baseline.run.json").read_text())
    now = dense["metrics"]["val_accuracy"]
    assert set(table.criterion) == {"l1", "random"} and set(table.layer) == {"fc1", "fc2"}
    assert (table[table.ratio == 0].accuracy - now).abs().max() < 1e-5
    mean = table.groupby("ratio").accuracy.mean()
    assert mean[0.9] < mean[0.1] <= mean[0] + 0.01
    found = yaml.safe_load((project.path / "metrics/sensitivity.yaml").read_text())["l1"]
    project.params(pruner=found["pruner"])
    for key, value in found["pruners"]["magnitude"].items():
        project.params(**{f"pruners__magnitude__{key}": value})
    assert "l1" in project.dvc("repro", "prune")
    plots = project.dvc("plots", "show", "-o", "shown")
    page = (project.path / "shown/index.html").read_text()
    assert "accuracy after pruning outputs of one layer" in page, plots


def specifications(page):
    """Name -> Vega specification of each plot on a page of `dvc plots show`."""
    found = re.findall(r"var spec = (.*);\n\s*vegaEmbed\('#(.*)', spec\)", page)
    return {name: json.loads(content) for content, name in found}


def test_plots_show_the_trainings_in_colours_and_leave_out_what_never_ran(finished):
    shown = finished.path.parent / "shown"
    log = finished.dvc("plots", "show", "-o", str(shown))
    assert "failed" not in log.lower()
    page = (shown / "index.html").read_text()
    plots = specifications(page)
    empty = {name for name, content in plots.items() if not content}
    assert empty == {
        "distribution_of_batch-norm_scales",
        "mean_magnitude_of_kept_and_chosen_weights",
        "metrics_sensitivity_csv",
    }
    assert page.index("document.querySelector(id).remove()") < page.index("var spec = ")
    for name, column in (("training_loss", "train_loss"), ("validation_accuracy", "val_accuracy")):
        text = json.dumps(plots[name])
        assert "<DVC_METRIC" not in text and f"toNumber(datum['{column}'])" in text
        assert plots[name]["encoding"]["color"]["field"] == "curve"
        files = {row["filename"] for row in plots[name]["data"]["values"]}
        assert files == {f"{model}/history.csv" for model in ("baseline", "sparse", "finetuned")}
    assert plots["training_loss"]["encoding"]["y"]["scale"] == {"type": "log"}


@pytest.fixture(scope="module")
def compared(finished, tmp_path_factory):
    """A finished project with a second result, and a third one as experiment `wide`; read only."""
    project = finished.copy(tmp_path_factory.mktemp("compared") / "project")
    project.params(pruners__std__sensitivity=0.5)
    project.dvc("repro", SECATEUR_TRACKING="on")
    wide = ("-n", "wide", "-S", "pruners.std.sensitivity=0.75")
    project.log = project.dvc("exp", "run", *wide, SECATEUR_TRACKING="on")
    return project


def test_an_experiment_runs_what_reads_the_setting_that_it_changes(compared):
    assert ran(compared.log) == ["prune", "finetune", "evaluate"]


def test_runs_are_told_apart_by_their_first_word_and_show_pictures(compared):
    runs = compared.runs("tags.kind = 'pipeline'")
    first = {run.info.run_name.split(":")[0] for run in runs}
    keys = {f"pipeline-{run.data.tags['pipeline.key'][:8]}" for run in runs}
    assert len(runs) == len(first) == 3 and "wide" in first and len(first & keys) == 2
    client = MlflowClient(f"sqlite:///{compared.path / 'mlflow.db'}")
    for run in runs:
        pictures = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
        assert pictures == {"figures/curves.png", "figures/layers.png"}


def test_the_columns_of_the_documented_exp_show_are_few(compared):
    (line,) = re.findall("^dvc (exp show .*)$", (ROOT / "README.md").read_text(), re.M)
    table = compared.run("dvc", *shlex.split(line), "--csv")
    head, *rows = [
        row for row in csv.reader(table.splitlines()) if "Experiment" in row or "wide" in row
    ]
    assert len(rows) == 1 and {"compression", "finetuned.accuracy"} <= set(head)
    assert rows[0][head.index("pruners.std.sensitivity")] == "0.75"
    assert len(head) <= 12 and not any("/" in column for column in head)


def test_what_a_run_leaves_in_git_is_what_the_readme_says_to_commit(finished):
    (added,) = re.findall("^git add (.*) && git commit", (ROOT / "README.md").read_text(), re.M)
    left = finished.run("git", "diff", "--name-only", "HEAD~1", "HEAD").split()
    kept = finished.run("git", "ls-files", *added.split()).split()
    assert set(left) <= set(kept) and {"dvc.lock", "metrics/evaluate.json"} <= set(left)
