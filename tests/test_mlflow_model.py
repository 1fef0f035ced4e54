"""The exported network in MLflow: loaded or served, it predicts the same as the network itself."""

import io
import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlparse

import mlflow
import numpy as np
import pytest
import torch
from mlflow.pyfunc import scoring_server
from PIL import Image
from test_mlflow_store import enter
from torch import nn

from secateur.base.errors import SecateurError
from secateur.deploy import export, predict
from secateur.deploy.metadata import Metadata
from secateur.pipeline import mlflow_model, sync, tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.record import MODELS, RunRecord

pytestmark = pytest.mark.usefixtures("one_registry")
SHAPE, CLASSES = [1, 4, 4], ["circle", "square", "star"]
REPORT = {
    "baseline": {"model.onnx": {"bytes": 9}},
    "finetuned": {"latency_ms": {"torch": {"batch_1": 0.5}}, "csr": {"layers": ["fc"]}},
    "hardware": "a processor",
}
with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8, 3)).eval()
    nn.init.normal_(NETWORK[3].weight)  # so that the picture decides, not the bias


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with an exported network and a store that has no run of its chain."""
    folder = tmp_path_factory.mktemp("made")
    about = Metadata(
        classes=CLASSES, shape=SHAPE, mean=[0.5], std=[0.25], resize=None, split="00",
        preprocessing="outside", sha256="ab" * 32, arch="toy",
    )  # fmt: skip
    program = export.pt2_bytes(export.trace(NETWORK, SHAPE), about)
    (folder / "models/export").mkdir(parents=True)
    (folder / mlflow_model.PROGRAM).write_bytes(program)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        Store(strict=True)
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "project")
    enter(monkeypatch, tmp_path / "project")
    return tmp_path / "project"


def records():
    common = {
        "params": {"seed": 1}, "metrics": {}, "sha256": "ab" * 32, "seconds": 1.0, "hardware": "",
        "dataset": {"name": "toy", "hash": "00", "train": 1, "val": 1, "test": 1},
    }  # fmt: skip
    return {
        stage: RunRecord(
            stage=stage, fingerprint=f"{k:032x}", model=str(model.checkpoint), **common
        )
        for k, (stage, model) in enumerate(MODELS.items())
    }


def chain(store):
    """Write the run of the chain as evaluate does."""
    report = {model.key: {"accuracy": 0.5} for model in MODELS.values()} | {"compression": 2.0}
    return tracking.pipeline(records(), {}, report, [], store)


def log(project, store, **options):
    (project / "table.csv").write_text("a\n1\n")
    files = [project / "table.csv"]
    given = {"store": store, "records": records()} | options
    return mlflow_model.log(project / mlflow_model.PROGRAM, REPORT, files, **given)


def test_loaded_from_the_registry_it_predicts_what_the_network_predicts(project):
    store = Store(strict=True)
    run_id = chain(store)
    images = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    model_id = log(project, store, register="shapes@champion", example=images[:2])
    with torch.inference_mode():
        wanted = NETWORK(torch.from_numpy(images)).numpy()
    loaded = mlflow.pyfunc.load_model("models:/shapes@champion")
    for count in (5, 1):
        np.testing.assert_allclose(loaded.predict(images[:count]), wanted[:count], rtol=1e-6)
    about = loaded.metadata
    assert about.model_id == model_id and about.metadata["classes"] == CLASSES
    assert about.metadata["mean"] == [0.5] and about.metadata["std"] == [0.25]
    assert about.get_input_schema().inputs[0].shape == (-1, *SHAPE)
    assert about.get_output_schema().inputs[0].shape == (-1, 3)
    example = mlflow.models.Model.load(f"models:/{model_id}").load_input_example()
    np.testing.assert_allclose(example, images[:2], rtol=1e-6)
    run = store.client.get_run(run_id)
    assert [m.model_id for m in run.outputs.model_outputs] == [model_id]


def test_its_metrics_are_attached_to_it_and_all_to_the_run(project):
    store = Store(strict=True)
    run_id = chain(store)
    for _ in range(2):
        model_id = log(project, store)
    run = store.client.get_run(run_id)
    ours = {k: v for k, v in run.data.metrics.items() if k.startswith("export/")}
    own = {"export/finetuned/latency_ms/torch/batch_1": 0.5}
    assert ours == {"export/baseline/model.onnx/bytes": 9} | own
    attached = store.client.get_logged_model(model_id).metrics
    assert [(metric.key, metric.value) for metric in attached] == list(own.items())
    assert "table.csv" in [file.path for file in store.client.list_artifacts(run_id)]


def test_it_is_written_once_and_a_half_written_one_is_made_anew(project):
    store = Store(strict=True)
    run_id = chain(store)
    half = store.client.create_logged_model(store.experiment, mlflow_model.NAME, run_id)
    first = log(project, store, register="shapes@champion")
    assert log(project, store, register="shapes@champion") == first
    found = store.client.search_logged_models([store.experiment], f"source_run_id = '{run_id}'")
    assert [model.model_id for model in found] == [first] and half.model_id != first
    (version,) = store.client.search_model_versions("name = 'shapes'")
    assert version.source == f"models:/{first}"


def test_without_the_run_of_its_chain_it_is_not_tracked_and_one_line_says_why(project, capfd):
    assert log(project, Store()) is None
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "no run of this chain; `secateur sync` writes it" in lines[0]


def test_what_is_pickled_in_its_archive_are_tensors_alone(project, monkeypatch):
    """So it loads even where MLflow and torch accept no other pickles."""
    store = Store(strict=True)
    chain(store)
    model_id = log(project, store)
    place = urlparse(store.client.get_logged_model(model_id).artifact_location).path
    (archive,) = Path(place).rglob("model.pt2")
    with zipfile.ZipFile(archive) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    pickled = [n for n, d in content.items() if d.startswith(b"PK\3\4") or d[-1:] == b"."]
    assert [name.rpartition("/data/")[2] for name in pickled] == ["sample_inputs/model.pt"]
    (images,), options = torch.load(io.BytesIO(content[pickled[0]]), weights_only=True)
    assert images.shape == (2, *SHAPE) and options == {}
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    assert mlflow.pyfunc.load_model(f"models:/{model_id}") is not None


def source(project, changes=()):
    """The files of a chain and its export that DVC tracks, with other contents for some of them."""
    models = [model.key for model in MODELS.values()]
    report = {key: {"accuracy": 0.5} for key in models} | dict.fromkeys(tracking.HEADLINES, 2.0)
    found = {
        sync.REPORT: json.dumps(report).encode(),
        mlflow_model.PROGRAM: (project / mlflow_model.PROGRAM).read_bytes(),
        mlflow_model.REPORT: json.dumps(REPORT).encode(),
        mlflow_model.TABLE: b"a\n1\n",
    }
    for stage, made in records().items():
        found[str(MODELS[stage].record)] = json.dumps(asdict(made)).encode()
    return sync.Source(None, found | dict(changes))


def test_sync_restores_it_from_what_dvc_tracks(project, capfd):
    store = Store(strict=True)
    assert sync.write(store, source(project)) == 6, "four stages, the chain, and the network"
    (run,) = store.runs("tags.kind = 'pipeline'")
    (link,) = run.outputs.model_outputs
    assert f"exported network written as {link.model_id}" in capfd.readouterr().out
    assert run.data.metrics["export/baseline/model.onnx/bytes"] == 9
    assert mlflow.pyfunc.load_model(f"models:/{link.model_id}") is not None
    assert sync.write(store, source(project)) == 0


def test_sync_leaves_out_what_was_exported_from_another_network(project):
    store = Store(strict=True)
    other = records()["finetune"]
    path = str(MODELS["finetune"].record)
    changed = {path: json.dumps(asdict(other) | {"sha256": "cd" * 32}).encode()}
    assert sync.write(store, source(project, changed)) == 5
    (run,) = store.runs("tags.kind = 'pipeline'")
    assert not run.outputs.model_outputs


@pytest.mark.parametrize(
    ("name", "content"),
    [(mlflow_model.PROGRAM, b"junk"), (mlflow_model.REPORT, b"{"), (mlflow_model.REPORT, b"[1]")],
)
def test_sync_names_a_damaged_file_of_export(name, content, project):
    store = Store(strict=True)
    with pytest.raises(SecateurError) as error:
        sync.write(store, source(project, {name: content}))
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)


def test_what_mlflow_serves_is_the_class_that_predict_gives(project):
    """Through the function that answers requests in `mlflow models serve`, without a server."""
    store = Store(strict=True)
    chain(store)
    loaded = mlflow.pyfunc.load_model(f"models:/{log(project, store)}")
    pixels = np.random.default_rng(1).choice(np.array([0, 9, 255], np.uint8), (6, 4, 4))
    pictures = [project / f"{number}.png" for number in range(6)]
    for path, picture in zip(pictures, pixels, strict=True):
        Image.fromarray(picture).save(path)
    classifier = predict.open_classifier(project / mlflow_model.PROGRAM)
    wanted = [found.label for found in classifier.predict(pictures)]
    images = (pixels[:, None] / 255 - 0.5) / 0.25
    schema = loaded.metadata.get_input_schema()
    for count in (6, 1):
        request = json.dumps({"inputs": images[:count].tolist()})
        answer = scoring_server.invocations(request, "application/json", loaded, schema)
        assert answer.status == 200
        logits = np.array(json.loads(answer.response)["predictions"])
        assert [CLASSES[k] for k in logits.argmax(1)] == wanted[:count]
    assert len(set(wanted)) > 1, "pictures are of different classes"
