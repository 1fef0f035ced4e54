"""The stage `export` after a finished pipeline: files, report, table, and the model in MLflow."""

import json
import sys

import pandas as pd
import pytest

from secateur.deploy import latency, metadata

pytestmark = pytest.mark.pipeline
pytest.importorskip("onnxscript")
NETWORKS = ("baseline", "pruned", "finetuned")


def test_export_writes_files_a_report_a_table_and_a_model_in_mlflow(project):
    project.params(
        export__latency_repeats=3, export__latency_batches=[1, 4], export__runtimes=["onnxruntime"],
        export__calibration_images=100, export__register_as="digits@champion",
    )  # fmt: skip
    log = project.stage("export", SECATEUR_TRACKING="on")
    folder = project.path / "models/export"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model-int8.onnx",
        "model.onnx",
        "model.pt2",
    ]
    assert metadata.read(folder / "model-int8.onnx") == metadata.read(folder / "model.onnx")

    report = json.loads((project.path / "metrics/export.json").read_text())
    evaluated = json.loads((project.path / "metrics/evaluate.json").read_text())
    for name in NETWORKS:
        for file in ("model.onnx", "model.pt2"):
            assert report[name][file]["accuracy"] == pytest.approx(evaluated[name]["accuracy"])
    for name in ("baseline", "finetuned"):
        (int8,) = report[f"{name}_int8"]["model-int8.onnx"]["accuracy"].values()
        assert int8 == pytest.approx(evaluated[name]["accuracy"], abs=0.05)
    assert set(report["finetuned"]["csr"]) == {f"threads_{n}" for n in latency.thread_counts()}

    table = pd.read_csv(project.path / "metrics/export.csv")
    passes = table.groupby(["network", "precision"]).size()
    assert dict(passes) == dict.fromkeys(
        [("baseline", "float32"), ("baseline", "int8"), ("finetuned", "float32"),
         ("finetuned", "int8"), ("pruned", "float32")], 2 * len(latency.thread_counts()),
    )  # fmt: skip
    assert (table.latency_ms > 0).all() and set(table.runtime) == {"onnxruntime"}
    assert "mlflow.pyfunc.load_model('models:/digits@champion')" in log

    (run,) = project.runs("tags.kind = 'pipeline'")
    sizes = {k: v for k, v in run.data.metrics.items() if k.endswith("model-int8.onnx/bytes")}
    assert sizes["export/finetuned_int8/model-int8.onnx/bytes"] == sum(
        file.stat().st_size for file in folder.glob("*int8*")
    )
    (link,) = run.outputs.model_outputs
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.path / 'mlflow.db'}")
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.source == f"models:/{link.model_id}"


def test_a_missing_runtime_stops_export_before_any_work(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    log = project.stage_here("export", ok=False)
    assert log.startswith("error: openvino is needed to run .onnx files in OpenVINO")
    assert log.count("\n") == 1
    assert not (project.path / "models/export").exists()
