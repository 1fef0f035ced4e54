"""Times of the single operations in a training step of LeNet-5, in both memory layouts.

Each operation is timed alone, in float32 with the shapes of a training step; a time is the lower
quartile of all calls. The table also contains the matrix products that could replace the
convolutions, and the copy of all windows (im2col) that they need.

    OMP_NUM_THREADS=1 python -m benchmarks.lenet5_operations
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.base.machine import hardware

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Operations = dict[str, tuple[Callable[[], Any], int]]
"""A call and its floating-point operations, by name; 0 if the operation has no such count."""


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Lower quartile of the times of the call, after five calls for warming up."""
    taken = []
    for _ in range(5 + repeats):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.quantiles(taken[5:], n=4)[0]


def convolution(name: str, x: Tensor, filters: int, layout: torch.memory_format) -> Operations:
    """Forward pass, gradients and equivalent matrix products of a 5x5 convolution of `x`."""
    batch, channels, height, width = x.shape
    x = x.to(memory_format=layout)
    weight = torch.randn(filters, channels, 5, 5).to(memory_format=layout)
    out = F.conv2d(x, weight)
    grad, windows = torch.randn_like(out), x.permute(0, 2, 3, 1).unfold(1, 5, 1).unfold(2, 5, 1)
    columns, matrix = windows.reshape(-1, channels * 25), weight.reshape(filters, -1).contiguous()
    rows = torch.randn(len(columns), filters)
    flops = 2 * batch * filters * channels * 25 * (height - 4) * (width - 4)

    def backward(*wanted: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, [filters], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
        )

    found: Operations = {
        "forward": (lambda: F.conv2d(x, weight), flops),
        "gradient of weights": (backward(False, True, True), flops),
        "im2col": (lambda: windows.reshape(-1, channels * 25), 0),
        "product, forward": (lambda: columns @ matrix.T, flops),
        "product, gradient of weights": (lambda: rows.T @ columns, flops),
    }
    if channels > 1:  # the first layer needs no input gradient
        found["gradient of input"] = (backward(True, False, False), flops)
        found["product, gradient of input"] = (lambda: rows @ matrix, flops)
    return {f"{name}, {what}": operation for what, operation in found.items()}


def pooling(batch: int, layout: torch.memory_format) -> Operations:
    """The first max-pooling layer."""
    x = torch.randn(batch, 20, 24, 24).to(memory_format=layout)
    out, places = F.max_pool2d(x, 2, return_indices=True)
    grad = torch.randn_like(out)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    both = [2, 2], [2, 2], [0, 0], [1, 1], False
    return {
        "pool1, forward": (lambda: F.max_pool2d(x, 2), 0),
        "pool1, gradient": (lambda: backward(grad, x, *both, places), 0),
    }


def linear(batch: int) -> Operations:
    """The first linear layer."""
    x, weight, grad = torch.randn(batch, 800), torch.randn(500, 800), torch.randn(batch, 500)
    flops = 2 * batch * 800 * 500
    return {
        "fc1, forward": (lambda: x @ weight.T, flops),
        "fc1, gradient of weights": (lambda: grad.T @ x, flops),
        "fc1, gradient of input": (lambda: grad @ weight, flops),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    square = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / milliseconds(lambda: square @ square, 12) / 1e6
    print(f"{hardware()}; torch {torch.__version__}; products of matrices {peak:.0f} GFLOP/s")
    print("| operation | layout | ms | GFLOP/s |")
    print("|---|---|---:|---:|")
    for title, layout in LAYOUTS.items():
        operations = {
            **convolution("conv1", torch.randn(options.batch, 1, 28, 28), 20, layout),
            **convolution("conv2", torch.randn(options.batch, 20, 12, 12), 50, layout),
            **pooling(options.batch, layout),
            **linear(options.batch),
        }
        for name, (call, flops) in operations.items():
            taken = milliseconds(call, options.repeats)
            rate = f"{flops / taken / 1e6:.0f}" if flops else ""
            print(f"| {name} | {title} | {taken:.2f} | {rate} |", flush=True)


if __name__ == "__main__":
    main()
