"""int8 files: bounds on the rounding of weights, activations and outputs, in both runtimes."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from secateur.base.errors import SecateurError
from secateur.deploy.quantisation import quantise
from secateur.deploy.runtimes import open_model

RNG = np.random.default_rng(0)
RUNTIMES = ["onnxruntime", "openvino"]


def save(path, nodes, weights, shape, outputs):
    """Write a float32 network by hand: nodes from 'x' (n, *shape) to 'y' (n, outputs)."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    model.metadata_props.add(key="classes", value='["a", "b"]')
    onnx.save(model, path)
    return path


def linear(path, weight, bias):
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1),
    ]
    return save(path, nodes, {"w": weight, "b": bias}, (1, 1, weight.shape[1]), len(weight))


def residual(path):
    """Convolutions, and a shortcut with stride 2 that pads channels with zeros."""
    names = ("stem", "first", "second")
    shapes = ((8, 3, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3))
    weights = {
        name: (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in zip(names, shapes, strict=True)
    }
    weights["pads"] = np.array([0, 4, 0, 0, 0, 4, 0, 0])
    weights["w"] = RNG.normal(size=(10, 16)).astype(np.float32)
    weights["b"] = RNG.normal(size=10).astype(np.float32)

    def node(operator, *names, **attributes):
        return helper.make_node(operator, list(names[:-1]), [names[-1]], **attributes)

    nodes = [
        node("Conv", "x", "stem", "a", pads=[1] * 4),
        node("Relu", "a", "a2"),
        node("Conv", "a2", "first", "b1", pads=[1] * 4, strides=[2, 2]),
        node("Relu", "b1", "b2"),
        node("Conv", "b2", "second", "b3", pads=[1] * 4),
        node("AveragePool", "a2", "s1", kernel_shape=[1, 1], strides=[2, 2]),
        node("Pad", "s1", "pads", "s2"),
        node("Add", "b3", "s2", "c"),
        node("Relu", "c", "c2"),
        node("GlobalAveragePool", "c2", "d"),
        node("Flatten", "d", "d2"),
        node("Gemm", "d2", "w", "b", "y", transB=1),
    ]
    return save(path, nodes, weights, (3, 16, 16), 10)


def images(count, *shape):
    return RNG.normal(size=(count, *shape)).astype(np.float32)


def dequantised(path):
    """Name -> (integers, scale, zero point) of each tensor that is stored as integers."""
    model = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            found[node.input[0]] = tuple(stored.get(name) for name in node.input)
    return found


def test_weights_are_rounded_by_output_to_seven_bits(tmp_path):
    weight = RNG.normal(size=(5, 40)).astype(np.float32) * np.array([[1], [10], [0.1], [3], [100]])
    source = linear(tmp_path / "a.onnx", weight.astype(np.float32), np.zeros(5, np.float32))
    quantise(source, tmp_path / "b.onnx", images(16, 1, 1, 40))
    integers, scale, zero = dequantised(tmp_path / "b.onnx")["w_quantized"]
    assert integers.dtype == np.int8 and not zero.any() and scale.shape == (5,)
    assert abs(integers.astype(int)).max() <= 64
    error = abs(integers * scale[:, None].astype(float) - weight)
    assert (error <= scale[:, None] * 0.5001).all()
    assert (scale <= abs(weight).max(axis=1) / 63 * 1.001).all(), "outputs use all of their bits"


def test_the_images_set_the_range_of_the_activations(tmp_path):
    calibration = images(100, 1, 1, 40)
    calibration[63, 0, 0, 7], calibration[99, 0, 0, 0] = -9.0, 21.5  # one in each batch
    source = linear(tmp_path / "a.onnx", images(5, 40), np.zeros(5, np.float32))
    quantise(source, tmp_path / "b.onnx", calibration)
    _, scale, zero = dequantised(tmp_path / "b.onnx")["flat"]
    assert zero.dtype == np.uint8 and scale == pytest.approx(30.5 / 255, rel=1e-5)
    assert int(zero) == round(9.0 / (30.5 / 255))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_outputs_err_by_no_more_than_the_rounding(runtime, tmp_path):
    """Each product errs by at most half a step of each factor, the output by half of its own."""
    pytest.importorskip(runtime)
    weight, bias, x = images(4, 40), images(4), images(32, 1, 1, 40)
    quantise(linear(tmp_path / "a.onnx", weight, bias), tmp_path / "b.onnx", x)
    found = dequantised(tmp_path / "b.onnx")
    step_w, step_x = found["w_quantized"][1].astype(float), float(found["flat"][1])
    exact = x.reshape(32, 40).astype(float) @ weight.T.astype(float) + bias
    step_y = (exact.max() - exact.min()) / 255 * 1.05
    most = abs(x).reshape(32, 40).sum(1)[:, None] * step_w / 2  # error of the weights
    most = most + (abs(weight).sum(1) + 40 * step_w / 2) * step_x / 2  # error of the activations
    most = most + step_x * step_w / 2 + step_y  # errors of the bias and of the output
    error = abs(open_model(tmp_path / "b.onnx", runtime)(x) - exact)
    assert (error <= most).all()
    assert error.max() > 0, "rounding has an effect"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_residual_network_computes_the_same_in_both_runtimes(runtime, tmp_path):
    """With signed activations, OpenVINO computes wrong results or none."""
    pytest.importorskip(runtime)
    source, target = residual(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    quantise(source, target, images(64, 3, 16, 16))
    x = images(50, 3, 16, 16)
    exact, rounded = open_model(source)(x), open_model(target, runtime)(x)
    exact = exact - exact.mean(axis=0)  # the part of the logits that differs between images
    rounded = rounded - rounded.mean(axis=0)
    assert np.linalg.norm(rounded - exact) < 0.2 * np.linalg.norm(exact)


def test_the_file_is_a_quarter_and_keeps_its_metadata_and_its_dynamic_batch(tmp_path):
    weight = images(100, 1000)
    source = linear(tmp_path / "a.onnx", weight, np.zeros(100, np.float32))
    quantise(source, tmp_path / "b.onnx", images(8, 1, 1, 1000))
    assert (tmp_path / "b.onnx").stat().st_size < 0.26 * source.stat().st_size
    (kept,) = onnx.load(tmp_path / "b.onnx").metadata_props
    assert (kept.key, kept.value) == ("classes", '["a", "b"]')
    for count in (1, 3):
        assert open_model(tmp_path / "b.onnx")(images(count, 1, 1, 1000)).shape == (count, 100)


def test_equal_networks_and_images_give_equal_bytes(tmp_path):
    source, x = residual(tmp_path / "a.onnx"), images(8, 3, 16, 16)
    for name in "bc":
        quantise(source, tmp_path / f"{name}.onnx", x)
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def test_what_cannot_be_quantised_is_named_in_one_line_and_nothing_is_written(
    tmp_path, monkeypatch
):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(SecateurError, match=r"a\.onnx: cannot be quantised: ") as error:
        quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", images(2, 1, 1, 4))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SecateurError, match="`pip install onnx`"):
        quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", images(2, 1, 1, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
