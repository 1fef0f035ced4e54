"""Effect of 2 MB pages for the heap on the time of a training step.

Every row is measured in several separate processes. Each of them times steps before and after
`allocator.use_large_pages`; the ratio is the median over the processes.

    OMP_NUM_THREADS=1 python -m benchmarks.large_pages
    OMP_NUM_THREADS=1 python -m benchmarks.large_pages --steps 5 --processes 3
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

from benchmarks.surgery_time import build
from secateur.base import allocator
from secateur.base.machine import cpu_name

ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("lenet5", {}, "float32"),
    ("lenet5", {}, "bfloat16"),
    ("resnet_cifar", {"depth": 20, "shortcut": "A"}, "float32"),
    ("resnet_cifar", {"depth": 20, "shortcut": "A"}, "bfloat16"),
]
BATCH = 128


def measure(number: int, steps: int) -> tuple[float, float]:
    """Milliseconds per step of a row, before and after; once per process."""
    arch, settings, precision = ROWS[number]
    torch.manual_seed(0)
    model, image = build(arch, settings)
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(BATCH, *image.shape[1:]).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))

    def timed() -> float:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    timed()
    before = timed()
    if not allocator.use_large_pages():
        raise SystemExit("this system has no pages of 2 MB for programs that ask for them")
    timed()
    return before, timed()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(options.row, options.steps)))
        return
    print(f"{cpu_name()}; torch {torch.__version__}; batch {BATCH}, 32x32, channels_last")
    print("| network | precision | ms per step | with huge pages | ratio |")
    print("|---|---|---:|---:|---:|")
    command = [sys.executable, "-m", "benchmarks.large_pages", "--steps", str(options.steps)]
    for number, (arch, _, precision) in enumerate(ROWS):
        found = [
            json.loads(subprocess.check_output([*command, "--row", str(number)]))
            for _ in range(options.processes)
        ]
        before, after = (statistics.median(times) for times in zip(*found, strict=True))
        ratio = statistics.median(one / other for one, other in found)
        print(f"| {arch} | {precision} | {before:.1f} | {after:.1f} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
