"""The contents of MLflow, and runs without it."""

import json
import socket
import subprocess

import pandas as pd
import pytest
from mlflow import MlflowClient
from workspace import MODELS

pytestmark = pytest.mark.pipeline


def test_the_pipeline_run_links_the_stage_runs_and_carries_the_chain(finished):
    (pipeline,) = finished.runs("tags.kind = 'pipeline'")
    stages = {r.data.tags["stage"]: r for r in finished.runs("tags.kind = 'stage'")}
    assert set(stages) == {"baseline", "sparse-train", "prune", "finetune"}
    for name, run in stages.items():
        assert pipeline.data.tags[f"run.{name}"] == run.info.run_id
        assert run.info.run_id in pipeline.data.tags["mlflow.note.content"]
        assert run.info.status == "FINISHED"
        assert run.data.params.items() <= pipeline.data.params.items()
    assert "decay" not in stages["baseline"].data.params, "only declared params are logged"
    report = json.loads((finished.path / "metrics/evaluate.json").read_text())
    assert pipeline.data.metrics["finetuned/accuracy"] == report["finetuned"]["accuracy"]
    assert pipeline.data.metrics["compression"] == report["compression"]
    (data,) = stages["baseline"].inputs.dataset_inputs
    assert data.dataset.name == "digits"
    about = json.loads((finished.path / "data/digits/about.json").read_text())
    assert about["hash"].startswith(data.dataset.digest)
    (tested,) = pipeline.inputs.dataset_inputs
    assert (tested.dataset.name, tested.tags[0].value) == ("digits test", "testing")
    assert json.loads(tested.dataset.profile) == {"num_rows": about["counts"]["test"]}


def seconds_in(project, *stages):
    records = (project.path / f"models/{stage}.run.json" for stage in stages)
    return sum(json.loads(record.read_text())["seconds"] for record in records)


def duration(run):
    return (run.info.end_time - run.info.start_time) / 1000


def test_the_pipeline_run_takes_as_long_as_its_chain(finished):
    (pipeline,) = finished.runs("tags.kind = 'pipeline'")
    assert duration(pipeline) == pytest.approx(seconds_in(finished, *MODELS), abs=1e-3)


def test_the_curves_in_mlflow_are_those_of_the_history(finished):
    client = MlflowClient(f"sqlite:///{finished.path / 'mlflow.db'}")
    (run,) = finished.runs("tags.stage = 'sparse-train'")
    logged = client.get_metric_history(run.info.run_id, "epoch/val_accuracy")
    history = pd.read_csv(finished.path / "models/sparse/history.csv")
    assert [m.value for m in logged] == pytest.approx(list(history.val_accuracy))
    assert [m.step for m in logged] == list(history.epoch)


@pytest.mark.parametrize("damage", ["lost", "junk", "truncated"])
def test_a_lost_store_is_written_again(damage, project):
    store = project.path / "mlflow.db"
    content = {"lost": b"", "junk": b"junk", "truncated": store.read_bytes()[:80_000]}[damage]
    store.unlink()
    if content:
        store.write_bytes(content)
    log = project.run("python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    assert len(project.runs()) == 5
    (pipeline,) = project.runs("tags.kind = 'pipeline'")
    restored = {r.info.run_id for r in project.runs("tags.restored = 'true'")}
    assert duration(pipeline) == pytest.approx(seconds_in(project, *MODELS), abs=1e-3)
    (sparse,) = project.runs("tags.stage = 'sparse-train'")
    assert duration(sparse) == pytest.approx(seconds_in(project, "sparse"), abs=10)
    assert {v for k, v in pipeline.data.tags.items() if k.startswith("run.")} == restored
    kept = [path.read_bytes() for path in project.path.glob("mlflow.db.broken-*")]
    assert kept == ([content] if content else [])
    assert log.count("warning: ") == len(kept)


def test_a_damaged_file_is_named_by_sync_and_changes_nothing(project):
    before = {run.info.run_id for run in project.runs()}
    cases = {
        "models/sparse.run.json": b"{",
        "models/pruned.run.json": b"[1, 2]",
        "models/sparse/history.csv": b"epoch,train_loss\n1,junk\n",
        "metrics/evaluate.json": b'{"baseline": 3}',
    }
    for name, content in cases.items():
        path = project.path / name
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        command = ["python", "-m", "secateur", "sync"]
        log = project.run(*command, ok=False, SECATEUR_TRACKING="on")
        (line,) = [line for line in log.splitlines() if "error: " in line]
        assert name in line and "Traceback" not in log
        path.write_bytes(whole)
    assert {run.info.run_id for run in project.runs()} == before


def test_four_processes_may_start_on_a_fresh_store(unborn):
    code = "from secateur.pipeline.tracking import Store; assert Store().client is not None"
    env = unborn.env(SECATEUR_TRACKING="on")
    command = ["python", "-c", code]
    started = [subprocess.Popen(command, cwd=unborn.path, env=env) for _ in range(4)]
    assert [p.wait(timeout=600) for p in started] == [0, 0, 0, 0]
    assert unborn.runs() == []


def test_a_dead_tracking_server_costs_seconds_and_a_warning(project, tmp_path):
    """MLflow by itself would retry for a quarter of an hour; the timeout would notice that."""
    with socket.socket() as silent, socket.socket() as closed:
        for server in (silent, closed):
            server.bind(("127.0.0.1", 0))
        silent.listen()  # accepts connections and never answers
        started = {}
        for seed, server in enumerate((silent, closed)):
            uri = f"http://127.0.0.1:{server.getsockname()[1]}"
            copy = project.copy(tmp_path / f"copy{seed}")
            copy.params(seed=2 + seed)
            started[uri] = copy, subprocess.Popen(
                ["python", "-m", "stages.baseline"],
                cwd=copy.path, env=copy.env(SECATEUR_TRACKING="live", MLFLOW_TRACKING_URI=uri),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        for uri, (copy, process) in started.items():
            log, _ = process.communicate(timeout=300)
            assert process.returncode == 0, log
            assert log.count("warning: MLflow") == 1 and uri in log
            record = json.loads((copy.path / "models/baseline.run.json").read_text())
            assert record["run_id"] is None


def test_a_damaged_table_of_layers_costs_its_picture_and_not_the_run(project):
    (project.path / "mlflow.db").unlink()
    (project.path / "metrics/layers.csv").write_bytes(b"model,layer\nfinetuned,\xff\n")
    project.run("python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    (run,) = project.runs("tags.kind = 'pipeline'")
    client = MlflowClient(f"sqlite:///{project.path / 'mlflow.db'}")
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "figures")]
    assert pictures == ["figures/curves.png"]


def test_the_experiment_says_what_its_runs_are_and_keeps_what_others_write(project):
    client = MlflowClient(f"sqlite:///{project.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("secateur")
    assert "tags.kind = 'pipeline'" in experiment.tags["mlflow.note.content"]
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "ours")
    project.run("python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    again = MlflowClient(f"sqlite:///{project.path / 'mlflow.db'}")
    assert again.get_experiment_by_name("secateur").tags["mlflow.note.content"] == "ours"
