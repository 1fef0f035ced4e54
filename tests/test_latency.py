"""Latency of exported networks, and what sparse kernels gain from single zeros."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from secateur.base import machine, timing
from secateur.base.errors import SecateurError
from secateur.deploy import comparison, latency, runtimes, sparse_inference
from secateur.deploy.sparse_inference import SparseLinear
from secateur.pipeline import console

IMAGES = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)


@pytest.fixture
def clock(monkeypatch):
    """A clock in seconds, in place of the real one, that only the test moves."""
    seconds = [0.0]
    monkeypatch.setattr("secateur.base.timing.time.perf_counter", lambda: seconds[0])
    return seconds


class Passes:
    """A runtime that takes a known time and records how it was opened and what it received."""

    def __init__(self, clock):
        self.clock, self.opened, self.seen = clock, [], []

    def open(self, path, threads):
        self.opened.append((path.name, threads, torch.get_num_threads()))

        def run(images):
            self.seen.append((path.name, images))
            self.clock[0] += (4 if "slow" in path.name else 1) * len(images) / 1e3

        return run


@pytest.fixture
def fake(monkeypatch, tmp_path, clock):
    """Fake runtimes in place of the real ones, and files for them."""
    passes = Passes(clock)
    suffixes = [("one", ".a"), ("two", ".b"), ("three", ".b")]
    found = {name: runtimes.Runtime(name, name, suffix, passes.open) for name, suffix in suffixes}
    monkeypatch.setattr(runtimes, "RUNTIMES", found)
    paths = {name: tmp_path / name for name in ("slow.a", "slow.b", "fast.a", "int8.b")}
    for path in paths.values():
        path.touch()
    networks = {"dense": ["slow.a", "slow.b"], "pruned": ["fast.a"], "int8": ["int8.b"]}
    return passes, {name: [paths[p] for p in files] for name, files in networks.items()}


def test_every_network_is_timed_in_every_runtime_that_opens_it(fake):
    passes, exported = fake
    groups = []
    rows = latency.measure(
        exported, IMAGES, runtime_names=["one", "two", "three"], threads=[1, 2], batches=[1, 5],
        repeats=3, on_group=groups.append,
    )  # fmt: skip
    pairs = [("dense", "one"), ("dense", "two"), ("dense", "three"), ("pruned", "one")]
    pairs += [("int8", "two"), ("int8", "three")]
    order = [(threads, batch) for threads in (1, 2) for batch in (1, 5)]
    assert [(r.threads, r.batch) for r in rows[:: len(pairs)]] == order
    assert [(r.model, r.runtime) for r in rows] == pairs * 4
    assert all(own == torchs for _, own, torchs in passes.opened)
    assert groups == [
        "1 thread, batch 1", "1 thread, batch 5", "2 threads, batch 1", "2 threads, batch 5",
    ]  # fmt: skip
    for row in rows:
        assert row.latency_ms == pytest.approx((4 if row.model == "dense" else 1) * row.batch)
        assert row.latency_iqr_ms == pytest.approx(0, abs=1e-6)
    assert {len(images) for _, images in passes.seen} == {1, 5}
    assert all(
        (images == IMAGES[[0, 1, 2, 0, 1][: len(images)]]).all() for _, images in passes.seen
    )


def test_only_the_runtimes_that_are_asked_for_are_opened(fake):
    passes, exported = fake
    rows = latency.measure(
        exported, IMAGES, runtime_names=["two"], threads=[1], batches=[1], repeats=3
    )
    assert [(r.model, r.runtime) for r in rows] == [("dense", "two"), ("int8", "two")]
    assert len(passes.opened) == 2


def test_torch_has_its_threads_again_after_an_error(fake, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(SecateurError, match="missing"):
        latency.measure(
            {"none": [tmp_path / "none.a"]}, IMAGES, runtime_names=["one"], threads=[before + 1],
            batches=[1], repeats=3,
        )  # fmt: skip
    assert torch.get_num_threads() == before


def test_one_thread_and_all(monkeypatch):
    for processors, counts in [(1, [1]), (2, [1, 2]), (64, [1, 64])]:
        monkeypatch.setattr(machine, "processors", lambda n=processors: n)
        assert latency.thread_counts() == counts


def test_untimed_passes_go_before_each_timed_one(clock):
    calls = []

    def work():
        calls.append(len(calls))
        clock[0] += [7, 5, 0.001 * len(calls)][len(calls) % 3 - 1]

    times = timing.take_turns({"only": work}, 10, untimed=2)
    assert times["only"] == pytest.approx([3.0 * turn for turn in range(4, 14)])
    assert len(calls) == 3 * (3 + 10)


def test_a_speedup_is_the_median_of_the_ratios_turn_by_turn():
    assert timing.speedup([4.0, 8, 100], [2.0, 4, 1]) == 2
    with pytest.raises(ValueError, match="zip"):
        timing.speedup([1.0, 2], [1.0])


def sparse_layer(outputs, inputs, keep, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight *= (
            torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(1)) < keep
        )
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), ()])
def test_a_sparse_layer_computes_what_the_dense_one_does(bias, shape):
    layer = sparse_layer(6, 20, 0.2, bias).double()
    x = torch.randn(*shape, 20, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(SparseLinear(layer)(x), layer(x))


def network(keep):
    layers = [sparse_layer(1024, 1024, keep), nn.ReLU(), sparse_layer(64, 1024, 1.0)]
    return nn.Sequential(nn.Flatten(1), *layers, nn.Linear(64, 10))


def let_take(monkeypatch, clock, layer, seconds):
    """Let every forward pass of these layers take `seconds` on the clock."""
    forward = layer.forward

    def timed(self, x):
        clock[0] += seconds
        return forward(self, x)

    monkeypatch.setattr(layer, "forward", timed)


def test_a_layer_that_is_faster_as_csr_is_found_and_the_network_timed_with_it(clock, monkeypatch):
    """The gain is given here: the real one depends on the processor."""
    let_take(monkeypatch, clock, nn.Linear, 3.0)
    let_take(monkeypatch, clock, SparseLinear, 1.0)
    model = network(0.005)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(64, 1, 32, 32)
    gain = sparse_inference.measure(model, images, 1, 9)
    assert gain == sparse_inference.Gain(1, 64, ["1"], 9e3, 0.0, 7e3, 0.0, 9 / 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    faster = sparse_inference.with_sparse_layers(model, gain.layers)
    with torch.inference_mode():
        torch.testing.assert_close(faster(images), model(images))


def test_where_dense_kernels_are_faster_nothing_is_gained(clock, monkeypatch):
    let_take(monkeypatch, clock, nn.Linear, 1.0)
    let_take(monkeypatch, clock, SparseLinear, 0.96)  # a gain this small may be noise
    gain = sparse_inference.measure(network(0.005), torch.randn(2, 1, 32, 32), 1, 3)
    assert gain.layers == [] and gain.speedup == 1
    assert (gain.sparse_ms, gain.sparse_iqr_ms) == (gain.dense_ms, gain.dense_iqr_ms)


def test_layers_that_gain_nothing_within_the_network_are_given_up(monkeypatch):
    """Each layer alone seems faster; all of them together are not."""
    monkeypatch.setattr(sparse_inference, "_faster", lambda *_: True)
    monkeypatch.setattr(timing, "speedup", lambda *_: 0.9)
    gain = sparse_inference.measure(network(0.005), torch.randn(2, 1, 32, 32), 1, 3)
    assert gain.layers == [] and gain.speedup == 1


def test_layers_without_many_zeros_are_not_tried():
    model = network(0.005)
    found = sparse_inference.layer_inputs(model, torch.randn(2, 1, 32, 32))
    assert {name: tuple(x.shape) for name, x in found.items()} == {"1": (2, 1024)}
    model(torch.randn(3, 1, 32, 32))
    assert len(found["1"]) == 2, "hooks are removed"


LATENCIES = [
    latency.Latency("baseline", "torch", 1, 4, 8.0, 0.5),
    latency.Latency("baseline", "onnxruntime", 1, 4, 4.0, 0.25),
    latency.Latency("finetuned", "torch", 1, 4, 2.0, 0.1),
    latency.Latency("finetuned", "onnxruntime", 1, 4, 2.0, 0.1),
    latency.Latency("finetuned_int8", "onnxruntime", 1, 4, 1.0, 0.1),
]


def report():
    files = {
        "model.onnx": {"bytes": 30, "accuracy": 0.75},
        "model.pt2": {"bytes": 40, "accuracy": 0.5},
    }
    int8 = {"model-int8.onnx": {"bytes": 10, "accuracy": {"onnxruntime": 0.25, "openvino": 0.125}}}
    return {"baseline": dict(files), "finetuned": dict(files), "finetuned_int8": int8}


def test_the_table_has_a_row_for_each_network_in_each_runtime():
    table = comparison.rows(report(), LATENCIES)
    keys = ("network", "precision", "runtime", "bytes", "accuracy", "latency_ms", "speedup")
    assert [tuple(row[key] for key in keys) for row in table] == [
        ("baseline", "float32", "torch", 40, 0.5, 8.0, 1.0),
        ("baseline", "float32", "onnxruntime", 30, 0.75, 4.0, 1.0),
        ("finetuned", "float32", "torch", 40, 0.5, 2.0, 4.0),
        ("finetuned", "float32", "onnxruntime", 30, 0.75, 2.0, 2.0),
        ("finetuned", "int8", "onnxruntime", 10, 0.25, 1.0, 4.0),
    ]
    assert {(row["threads"], row["batch"]) for row in table} == {(1, 4)}


def test_the_report_has_times_by_runtime_threads_and_batch():
    found = report()
    comparison.add_latencies(found, LATENCIES)
    assert found["baseline"]["latency_ms"]["torch"] == {"threads_1": {"batch_4": 8.0}}
    assert found["baseline"]["latency_iqr_ms"]["onnxruntime"] == {"threads_1": {"batch_4": 0.25}}
    assert found["finetuned_int8"]["latency_ms"] == {"onnxruntime": {"threads_1": {"batch_4": 1.0}}}


def test_a_float32_file_has_the_accuracy_of_each_runtime():
    """As `proved` writes it; the accuracy of one runtime is never used for another."""
    found = report()
    found["baseline"]["model.onnx"] = {
        "bytes": 30,
        "accuracy": 0.75,
        "openvino": {"accuracy": 0.625},
    }
    rows = [
        latency.Latency("baseline", runtime, 1, 4, 4.0, 0.25)
        for runtime in ("torch", "onnxruntime", "openvino")
    ]
    assert [row["accuracy"] for row in comparison.rows(found, rows)] == [0.5, 0.75, 0.625]
    del found["baseline"]["model.onnx"]["openvino"]
    with pytest.raises(KeyError):
        comparison.rows(found, rows)


def test_times_stand_below_their_own_heading_whatever_the_order_of_batches(capsys):
    rows = [
        latency.Latency(network, "torch", threads, batch, threads * batch, 0.5)
        for threads in (1, 2)
        for batch in (500, 4)
        for network in ("baseline", "finetuned")
    ]
    console.exported(comparison.rows(report(), rows), {"csr": {}})
    text = capsys.readouterr().out
    headings = re.findall(r"batch (\d+)", text)
    (line,) = [line for line in text.splitlines() if "finetuned" in line]
    assert headings == ["4", "500", "4", "500"]
    assert re.findall(r"(\S+) ± 0.5", line) == ["4", "500", "8", "1e+03"]


def test_the_console_says_what_was_measured_and_what_zeros_are_worth(capsys):
    found = report()
    gains = [
        sparse_inference.Gain(1, 1, [], 2.0, 0.1, 2.0, 0.1, 1.0),
        sparse_inference.Gain(1, 32, ["fc1", "fc2"], 6.0, 0.1, 2.0, 0.1, 3.0),
    ]
    comparison.add_gains(found["finetuned"], gains)
    assert found["finetuned"]["csr"]["threads_1"]["batch_32"]["speedup"] == 3.0
    console.exported(comparison.rows(found, LATENCIES), found["finetuned"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["finetuned", "int8", "onnxruntime", "25.00%", "10", "1", "±", "0.1"] in lines
    assert ["dense", "float32", "torch", "50.00%", "40", "8", "±", "0.5"] in lines
    text = [" ".join(line) for line in lines]
    assert "single zeros, threads 1, batch 1: no gain" in text
    assert "single zeros, threads 1, batch 32: 3.00x in torch with CSR for fc1, fc2" in text
