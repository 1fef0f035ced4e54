"""Images per second of training: this project's loop against the usual research script.

The usual way is `benchmarks/usual.py`. Both train the same network on images of the same size in
batches of the same size, in turns, each in a process of its own as people run it.

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed --net lenet300 --batch 512
    python -m benchmarks.train_speed --net resnet20 vgg16 densenet100 --turns 2
    python -m benchmarks.train_speed --net resnet20 --batch 1024 --compile --turns 2
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
from secateur.base.settings import Train
from secateur.data.augment import FileAugment
from secateur.data.dataset import Batches, Dataset, DatasetInfo, InMemoryImages
from secateur.training import loop, optim
from secateur.training.callbacks import Callback, Row
from secateur.training.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
GREY, COLOUR = [1, 28, 28], [3, 32, 32]
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
"""Network -> plug-in, its settings, shape of an image, and images of an epoch."""


def task(net: str, **more: Any) -> dict[str, Any]:
    """What one process is to do: the batch and the optimizer are the original scripts'."""
    grey = NETS[net]["shape"] == GREY
    common = {"classes": 10, "batch": 100 if grey else 128, "epochs": 2, "decay": 0.0}
    chosen = NETS[net] | common | {"optimizer": "adam" if grey else "sgd"} | more
    return chosen | {"images": max(chosen["images"], 4 * chosen["batch"])}


def run(script: list[str], what: dict[str, Any]) -> list[float]:
    """Images per second of each epoch of a process; empty if it failed."""
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


def usual(net: str, **more: Any) -> float:
    """Images per second of the usual script, left to glibc and OpenMP as they come."""
    return max(run(["benchmarks/usual.py"], task(net, **more)))


def ours(net: str, **more: Any) -> float:
    """Images per second of our loop."""
    return max(run(["-m", "benchmarks.train_speed", "--one"], task(net, **more)))


def made_up(what: dict[str, Any]) -> Dataset:
    """Images that show nothing: the time does not depend on it."""
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
    everything = InMemoryImages.of(images, labels)
    none = InMemoryImages.of(images[:0], labels[:0])
    return Dataset(info, everything, none, none)


class Stopwatch(Callback):
    """Prints the images per second of every epoch after the first, which warms up."""

    def __init__(self, images: int) -> None:
        self.images, self.began = images, 0.0

    def on_epoch_end(self, row: Row) -> None:
        """An epoch is done."""
        now = time.perf_counter()
        if self.began:
            print(self.images / (now - self.began), flush=True)
        self.began = now


class Discard:
    """A state store that copies the state, as the real one does, and does not write it."""

    def load(self) -> None:
        """There is none."""

    def save(self, tensors: Any, info: Any) -> bool:
        """Copy, as the real one does."""
        _ = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return False


def settings(what: dict[str, Any]) -> Train:
    """The stage's settings for a task."""
    return Train(
        epochs=what["epochs"] + 1,
        batch_size=what["batch"],
        optimizer=what["optimizer"],
        weight_decay=0.0 if what["optimizer"] == "adam" else 5e-4,
        precision=what.get("precision", "float32"),
        compile=what.get("compile", False),
    )


def one(what: dict[str, Any]) -> None:
    """Be one process: train with `fit`, as the stages do."""
    data, model, penalty = made_up(what), network(what), None
    if what["decay"]:
        module = plugin.load("penalties", "hoyer_square")
        penalty = module.build(module.Settings(biases=True), model, what["decay"])
    watch = Stopwatch(what["images"])
    loop.fit(model, data, settings(what), 1, Discard(), [watch], penalty=penalty)


def network(what: dict[str, Any]) -> torch.nn.Module:
    """A new network."""
    module = plugin.load("archs", what["arch"])
    built: torch.nn.Module = module.build(
        module.Settings(**what["settings"]), what["classes"], tuple(what["shape"])
    )
    return built


def parts(what: dict[str, Any]) -> None:
    """Where the time of a step goes: print milliseconds of each part, median over an epoch."""
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
    """GFLOP/s of a product of two 2048 x 2048 matrices."""
    left = torch.randn(2048, 2048).to(dtype)
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        left @ left
        taken.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(taken) / 1e9


def flops(net: str) -> float:
    """Floating-point operations of learning from one image: three times those of looking at it."""
    from secateur.nn import cost

    what = task(net)
    return 3 * 2 * cost.macs(network(what), torch.zeros(1, *what["shape"]))


def measure(net: str, turns: int, shared: dict[str, Any], compiled: bool) -> None:
    """Print the speed of each way, and the ratio to the best of the usual ones, turn by turn."""
    grey = NETS[net]["shape"] == GREY
    ways: dict[str, tuple[Callable[..., float], dict[str, Any]]] = {
        f"usual, {w} workers": (usual, {"workers": w}) for w in ((0,) if grey else (0, 2, 4))
    }
    ways["ours, float32"] = (ours, {})
    ways["ours, bfloat16"] = (ours, {"precision": "bfloat16"})
    if compiled:
        ways["ours, bfloat16, compiled"] = (ours, {"precision": "bfloat16", "compile": True})
    if grey:
        ways["usual, 2 workers"] = (usual, {"workers": 2})
        ways["usual + penalty"] = (usual, {"workers": 0, "decay": 1e-6})
    ways["ours, float32 + penalty"] = (ours, {"decay": 1e-6})
    ways["ours, bfloat16 + penalty"] = (ours, {"precision": "bfloat16", "decay": 1e-6})
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, (way, more) in ways.items():
            found[name].append(way(net, **shared, **more))
    speed = {name: statistics.median(values) for name, values in found.items()}
    plain = [name for name in ways if name.startswith("usual,")]
    best = max(plain, key=lambda name: speed[name])
    for name, values in found.items():
        rival = "usual + penalty" if grey and name.endswith("penalty") else best
        ratio = statistics.median(a / b for a, b in zip(values, found[rival], strict=True))
        note = "" if name.startswith("usual") else f"  {ratio:5.1f}x {rival}"
        print(f"{net:12} {name:26} {speed[name]:10,.0f} images/s{note}", flush=True)
    for kind in ("float32", "bfloat16"):
        extra = speed[f"ours, {kind}"] / speed[f"ours, {kind} + penalty"] - 1
        rate = speed[f"ours, {kind}"] * flops(net) / 1e9
        print(f"{net:12} {kind}: hoyer_square adds {extra:.0%}; {rate:.0f} GFLOP/s", flush=True)
        what = task(net, precision=kind, **shared)
        command = [sys.executable, "-m", "benchmarks.train_speed", "--parts", json.dumps(what)]
        done = subprocess.run(command, text=True, capture_output=True, check=True)
        words = ", ".join(
            f"{name} {float(value):.2f} ms"
            for name, value in (line.split() for line in done.stdout.splitlines())
        )
        print(f"{net:12} {kind}: a step is {words}", flush=True)


def main() -> None:
    """Measure the networks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", nargs="+", default=["lenet300", "lenet5"], choices=list(NETS))
    parser.add_argument("--turns", type=int, default=3, help="median over so many")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the sources'")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile beside it")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.parts:
        one(options.one) if options.one else parts(options.parts)
        return
    print(f"{hardware()}; torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"largest matrix products: {peak(dtype):,.0f} GFLOP/s in {dtype}")
    for net in options.net:
        shared = {"batch": options.batch} if options.batch else {}
        measure(net, options.turns, shared, options.compile)


if __name__ == "__main__":
    main()
