"""Exported files in torch, ONNX Runtime and OpenVINO."""

import ast
import sys
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from test_wiring import CODE, ROOT
from torch import nn

from secateur.base import optional, sections
from secateur.base.errors import SecateurError
from secateur.base.optional import RUNTIME_TITLES, RuntimeName
from secateur.deploy import runtimes
from secateur.deploy.runtimes import RUNTIMES, open_model

WEIGHT = np.array([[1.0, -2.0, 0.5, 3.0], [0.25, 1.0, -1.0, 2.0]], dtype=np.float32)
BIAS = np.array([0.5, -0.25], dtype=np.float32)


def network() -> nn.Module:
    linear = nn.Linear(4, 2)
    linear.weight.data.copy_(torch.from_numpy(WEIGHT))
    linear.bias.data.copy_(torch.from_numpy(BIAS))
    return nn.Sequential(nn.Flatten(1), linear).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Suffix -> a file with the network above, written without the project's code."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("exported")
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network(), (torch.zeros(2, 1, 2, 2),), dynamic_shapes=(batch,))
    program._example_inputs = None  # these would be pickled
    torch.export.save(program, folder / "model.pt2")
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"], transB=1)],
        "two outputs",
        [value("x", onnx.TensorProto.FLOAT, ["n", 1, 2, 2])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 2])],
        [tensor(WEIGHT, "w"), tensor(BIAS, "b")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx"
    )
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_computes_the_network_for_any_batch(name, threads, exported):
    if name != "torch":
        pytest.importorskip(name)
    run = open_model(exported[RUNTIMES[name].suffix], name, threads)
    before = torch.get_num_threads()
    for count in (1, 2, 5):
        images = np.random.default_rng(count).normal(size=(count, 1, 2, 2)).astype(np.float32)
        wanted = images.reshape(count, 4).astype(np.float64) @ WEIGHT.T + BIAS
        logits = run(images)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)
    assert torch.get_num_threads() == before


def test_every_list_of_runtimes_has_the_same():
    """That of the settings, of the files that each opens, and of the pipeline that measures."""
    measured = yaml.safe_load((ROOT / "stages/latency/dvc.yaml").read_text())["stages"]["latency"]
    allowed = get_args(sections.Prune.model_fields["latency"].annotation)
    assert [*RUNTIMES] == [*RUNTIME_TITLES] == measured["foreach"] == [*allowed][1:]
    assert get_args(RuntimeName) == (*RUNTIME_TITLES,) and allowed[0] == "none"


def test_results_of_one_pass_outlive_the_next(exported):
    for name, runtime in RUNTIMES.items():
        run = open_model(exported[runtime.suffix], name)
        first = run(np.ones((1, 1, 2, 2), np.float32))
        run(np.zeros((1, 1, 2, 2), np.float32))
        np.testing.assert_allclose(first[0], WEIGHT.sum(1) + BIAS, rtol=1e-6)


def test_the_suffix_chooses_the_runtime(exported):
    image = np.ones((1, 1, 2, 2), np.float32)
    for path in exported.values():
        np.testing.assert_allclose(open_model(path)(image)[0], WEIGHT.sum(1) + BIAS, rtol=1e-6)


def test_torch_keeps_its_threads_unless_told(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    now = torch.get_num_threads()
    with runtimes.torch_threads(0), runtimes.torch_threads(now):
        assert set_to == []
    with runtimes.torch_threads(now + 1):
        assert set_to == [now + 1]
    assert set_to == [now + 1, now]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("content", [b"", b"no model", None, "folder"])
def test_a_file_that_cannot_be_opened_is_named_in_one_line(suffix, content, tmp_path):
    path = tmp_path / f"model{suffix}"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for runtime in [r.name for r in RUNTIMES.values() if r.suffix == suffix]:
        with pytest.raises(SecateurError) as error:
            open_model(path, runtime)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_runtime_that_does_not_open_such_files_is_refused(exported):
    with pytest.raises(SecateurError, match=r"no file for openvino; there are torch \(.pt2\)"):
        open_model(exported[".pt2"], "openvino")
    with pytest.raises(SecateurError, match=r"no file for any runtime"):
        open_model(exported[".pt2"].with_suffix(".tflite"))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, exported):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    with pytest.raises(SecateurError, match=r"openvino .*`pip install openvino`"):
        open_model(exported[".onnx"], "openvino")
    with pytest.raises(SecateurError, match="no_such_package is needed to fly"):
        optional.load("no_such_package.wings", "to fly")


def test_a_package_that_is_broken_is_not_taken_for_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import something_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs"):
        optional.load("broken_package", "for a test")


OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "openvino"}


@pytest.mark.parametrize("file", CODE)
def test_optional_packages_are_imported_only_when_they_are_used(file):
    """The first run neither needs nor imports them; `optional.load` names one that is missing."""
    source = (ROOT / file).read_text()
    names = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    }
    assert not OPTIONAL & {name.partition(".")[0] for name in names}
