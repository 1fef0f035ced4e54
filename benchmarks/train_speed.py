"""Training speed in images per second: Secateur's training loop and a typical research script.

The typical script is `benchmarks/reference.py`. Both train one network on random images of one size
with one batch size, alternately, each in a separate process.

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed --net lenet300 --batch 512
    python -m benchmarks.train_speed --net resnet20 vgg16 densenet100 --turns 2
    python -m benchmarks.train_speed --net resnet20 --batch 1024 --compile --turns 2
    python -m benchmarks.train_speed --net lenet5 --precisions float32 --turns 2
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur.base import plugin
from secateur.base.machine import hardware
from secateur.base.sections import Train
from secateur.data.augment import FileAugment
from secateur.data.batches import Batches
from secateur.data.dataset import Dataset, DatasetInfo, InMemoryImages
from secateur.training import loop, optim
from secateur.training.callbacks import Callback, Row
from secateur.training.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
GREY, COLOUR = [1, 28, 28], [3, 32, 32]
PRECISIONS = ["float32", "bfloat16"]
NETS: dict[str, dict[str, Any]] = {
    "lenet300": {"arch": "lenet300", "settings": {}, "shape": GREY, "images": 60_000},
    "lenet5": {"arch": "lenet5", "settings": {}, "shape": GREY, "images": 6_000},
    "resnet20": {
        "arch": "resnet_cifar",
        "settings": {"depth": 20},
        "shape": COLOUR,
        "images": 1_280,
    },
    "vgg16": {"arch": "vgg", "settings": {"depth": 16}, "shape": COLOUR, "images": 512},
    "densenet100": {
        "arch": "densenet",
        "settings": {"depth": 100, "growth": 12, "bottleneck": True, "compression": 0.5},
        "shape": COLOUR,
        "images": 256,
    },
}
"""Architecture, its settings, shape of an image (C, H, W) and images per epoch, by name."""


def task(net: str, **more: Any) -> dict[str, Any]:
    """The task of one process, with the batch size and optimizer of the original scripts."""
    grey = NETS[net]["shape"] == GREY
    common = {"classes": 10, "batch": 100 if grey else 128, "epochs": 2, "decay": 0.0}
    chosen = NETS[net] | common | {"optimizer": "adam" if grey else "sgd"} | more
    return chosen | {"images": max(chosen["images"], 4 * chosen["batch"])}


def run(script: list[str], what: dict[str, Any]) -> list[float]:
    """Images per second of each epoch, in a separate process; exits with its error output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "MALLOC_"))}
    done = subprocess.run(
        [sys.executable, *script, json.dumps(what)],
        env=clean | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(line) for line in done.stdout.split()]


def reference(net: str, **more: Any) -> float:
    """Images per second of the reference script, with the defaults of glibc and OpenMP."""
    return max(run(["benchmarks/reference.py"], task(net, **more)))


def secateur(net: str, **more: Any) -> float:
    """Images per second of Secateur's training loop."""
    return max(run(["-m", "benchmarks.train_speed", "--one"], task(net, **more)))


def made_up(what: dict[str, Any]) -> Dataset:
    """A data set of random images: the training time does not depend on their content."""
    count, (channels, *_) = what["images"], what["shape"]
    height, width = what["shape"][1:]
    images = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)
    labels = torch.randint(0, what["classes"], (count,))
    crop = FileAugment(pad=4, flip=True) if channels == 3 else FileAugment()
    info = DatasetInfo(
        "made up",
        [str(c) for c in range(what["classes"])],
        what["shape"],
        [0.45] * channels if crop.pad else [0.0],
        [0.2] * channels if crop.pad else [1.0],
        "",
        {},
        crop,
    )
    everything = InMemoryImages.from_pixels(images, labels)
    none = InMemoryImages.from_pixels(images[:0], labels[:0])
    return Dataset(info, everything, none, none)


class Stopwatch(Callback):
    """Prints the images per second of every epoch after the first, which is the warm-up."""

    def __init__(self, images: int) -> None:
        self.images, self.began = images, 0.0

    def on_epoch_end(self, row: Row) -> None:
        """Print the images per second since the previous epoch."""
        now = time.perf_counter()
        if self.began:
            print(self.images / (now - self.began), flush=True)
        self.began = now


class Discard:
    """A StateStore that copies the state, as in a stage, but does not write it."""

    def load(self) -> None:
        """No saved state: every training starts from scratch."""

    def save(self, tensors: Any, info: Any) -> bool:
        """Copy the tensors to the CPU; they are not written to disk."""
        _ = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return False


def settings(what: dict[str, Any]) -> Train:
    """The training settings for a task."""
    return Train(
        epochs=what["epochs"] + 1,
        batch_size=what["batch"],
        optimizer=what["optimizer"],
        weight_decay=0.0 if what["optimizer"] == "adam" else 5e-4,
        precision=what.get("precision", "float32"),
        compile=what.get("compile", False),
    )


def one(what: dict[str, Any]) -> None:
    """Run one task in this process: train with `fit`, as the stages do."""
    data, model, penalty = made_up(what), network(what), None
    if what["decay"]:
        module = plugin.load("penalties", "hoyer_square")
        penalty = module.build(module.Settings(biases=True), model, what["decay"])
    watch = Stopwatch(what["images"])
    loop.fit(model, data, settings(what), 1, Discard(), [watch], penalty=penalty)


def network(what: dict[str, Any]) -> torch.nn.Module:
    """The newly initialised network of a task."""
    module = plugin.load("archs", what["arch"])
    built: torch.nn.Module = module.build(
        module.Settings(**what["settings"]), what["classes"], tuple(what["shape"])
    )
    return built


def parts(what: dict[str, Any]) -> None:
    """Print the milliseconds of each part of a training step, median over the steps."""
    data, model = made_up(what), network(what)
    chosen, engine = settings(what), Engine(what.get("precision", "float32"))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.optimizer(model, chosen)
    batches = Batches(data.train, data.info, what["batch"], 1)
    module = plugin.load("penalties", "hoyer_square")
    penalty = module.build(module.Settings(), model, 1e-6)
    times: dict[str, list[float]] = {}

    def lap(name: str, since: float) -> float:
        now = time.perf_counter()
        times.setdefault(name, []).append((now - since) * 1e3)
        return now

    for epoch in range(3):
        now = time.perf_counter()
        for images, labels in itertools.islice(batches.epoch(epoch), 200):
            now = lap("data", now)
            optimizer.zero_grad()
            with engine.autocast():
                logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            now = lap("forward", now)
            loss.backward()
            now = lap("backward", now)
            extra = penalty(0)
            extra.backward()
            now = lap("penalty", now)
            optimizer.step()
            now = lap("optimizer", now)
    for name, values in times.items():
        print(f"{name} {statistics.median(values[len(values) // 3 :])}")


def peak(dtype: torch.dtype) -> float:
    """Throughput of a product of two 2048 x 2048 matrices, in GFLOP/s."""
    left = torch.randn(2048, 2048).to(dtype)
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        left @ left
        taken.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(taken) / 1e9


def flops(net: str) -> float:
    """Floating-point operations of one training image: three times those of inference."""
    from secateur.nn import cost

    what = task(net)
    return 3 * 2 * cost.macs(network(what), torch.zeros(1, *what["shape"]))


def measure(
    net: str, turns: int, shared: dict[str, Any], compiled: bool, precisions: list[str]
) -> None:
    """Print the speed of each variant, and its speed-up over the fastest reference."""
    grey = NETS[net]["shape"] == GREY
    variants: dict[str, tuple[Callable[..., float], dict[str, Any]]] = {
        f"reference, {w} workers": (reference, {"workers": w})
        for w in ((0,) if grey else (0, 2, 4))
    }
    variants["secateur, float32"] = (secateur, {})
    variants["secateur, bfloat16"] = (secateur, {"precision": "bfloat16"})
    if compiled:
        variants["secateur, bfloat16, compiled"] = (
            secateur,
            {"precision": "bfloat16", "compile": True},
        )
    if grey:
        variants["reference, 2 workers"] = (reference, {"workers": 2})
        variants["reference + penalty"] = (reference, {"workers": 0, "decay": 1e-6})
    variants["secateur, float32 + penalty"] = (secateur, {"decay": 1e-6})
    variants["secateur, bfloat16 + penalty"] = (secateur, {"precision": "bfloat16", "decay": 1e-6})
    variants = {
        name: variant
        for name, variant in variants.items()
        if name.startswith("reference") or any(kind in name for kind in precisions)
    }
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(turns):
        for name, (measured, more) in variants.items():
            found[name].append(measured(net, **shared, **more))
    speed = {name: statistics.median(values) for name, values in found.items()}
    plain = [name for name in variants if name.startswith("reference,")]
    best = max(plain, key=lambda name: speed[name])
    for name, values in found.items():
        compared = "reference + penalty" if grey and name.endswith("penalty") else best
        ratio = statistics.median(a / b for a, b in zip(values, found[compared], strict=True))
        note = "" if name.startswith("reference") else f"  {ratio:5.1f}x {compared}"
        print(f"{net:12} {name:28} {speed[name]:10,.0f} images/s{note}", flush=True)
    for kind in precisions:
        extra = speed[f"secateur, {kind}"] / speed[f"secateur, {kind} + penalty"] - 1
        rate = speed[f"secateur, {kind}"] * flops(net) / 1e9
        print(f"{net:12} {kind}: hoyer_square adds {extra:.0%}; {rate:.0f} GFLOP/s", flush=True)
        what = task(net, precision=kind, **shared)
        command = [sys.executable, "-m", "benchmarks.train_speed", "--parts", json.dumps(what)]
        done = subprocess.run(command, text=True, capture_output=True, check=True)
        listed = ", ".join(
            f"{name} {float(value):.2f} ms"
            for name, value in (line.split() for line in done.stdout.splitlines())
        )
        print(f"{net:12} {kind}: one step: {listed}", flush=True)


def main() -> None:
    """Measure the networks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", nargs="+", default=["lenet300", "lenet5"], choices=list(NETS))
    parser.add_argument("--turns", type=int, default=3, help="repetitions; the median is printed")
    parser.add_argument(
        "--batch", type=int, help="batch size; default: that of the original scripts"
    )
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.parts:
        one(options.one) if options.one else parts(options.parts)
        return
    print(f"{hardware()}; torch {torch.__version__}")
    for precision in options.precisions:
        rate = peak(getattr(torch, precision))
        print(f"largest matrix products: {rate:,.0f} GFLOP/s in {precision}")
    for net in options.net:
        shared = {"batch": options.batch} if options.batch else {}
        measure(net, options.turns, shared, options.compile, options.precisions)


if __name__ == "__main__":
    main()
