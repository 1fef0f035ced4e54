"""Latency targets: what was requested, what the table predicts, and what is measured afterwards.

For each network and runtime, the layers are measured and the network is pruned by channel groups to
the requested share of its time. Dense and pruned network are then timed alternately, three times;
the table shows the median of the three. Weights are random, since they do not influence the time.

    python -m benchmarks.latency_target
    python -m benchmarks.latency_target --nets resnet18 --runtimes torch --share 0.3
"""

import argparse
import statistics
import time

import torch
from torch import nn

import secateur
from secateur.base.machine import cpu_name
from secateur.base.optional import RuntimeName
from secateur.base.torchvision_import import import_torchvision
from secateur.deploy import layer_times
from secateur.nn import cost

NETWORKS = ("resnet18", "mobilenet_v3_small")
HEADINGS = ("network", "runtime", "measuring, s", "multiple", "dense, ms", "asked", "predicted",
            "measured", "off by", "MACs left")  # fmt: skip


def network(name: str) -> nn.Module:
    """A network of torchvision with random weights, and different scales in its norms."""
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision().models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def row(name: str, runtime: RuntimeName, options: argparse.Namespace) -> list[str]:
    """One row of the table: measure, prune, measure again."""
    model, images = network(name), torch.randn(2, 3, 224, 224)
    start = time.perf_counter()
    table = secateur.measure_latency(
        model, images, runtime, batch=options.batch, threads=options.threads
    )
    seconds = time.perf_counter() - start
    pruner = secateur.pruners.magnitude(
        granularity="group", criterion="l2", target={"latency": options.share}
    )
    result = secateur.prune(model, images, pruner, latency=table)
    times = [
        layer_times.compare(
            {"dense": model, "pruned": result.model},
            images[:1],
            runtime=table.runtime,
            batch=options.batch,
            threads=options.threads,
            repeats=options.repeats,
        )
        for _ in range(3)
    ]
    measured = statistics.median(taken["pruned"] / taken["dense"] for taken in times)
    macs = cost.macs(result.model, images[:1]) / cost.macs(model, images[:1])
    return [
        name, runtime, f"{seconds:.0f}", f"{result.notes['round_to']:.0f}",
        f"{statistics.median(taken['dense'] for taken in times):.2f}", f"{options.share:g}",
        f"{result.notes['latency_left_reached']:.3f}", f"{measured:.3f}",
        f"{measured / options.share - 1:+.1%}", f"{macs:.3f}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    print(f"{cpu_name()}; torch {torch.__version__}; batch {options.batch}")
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---|---|" + "---:|" * (len(HEADINGS) - 2))
    for name in options.nets:
        for runtime in options.runtimes:
            try:
                print(f"| {' | '.join(row(name, runtime, options))} |", flush=True)
            except secateur.SecateurError as error:
                print(f"| {name} | {runtime} | {error} |", flush=True)


if __name__ == "__main__":
    main()
