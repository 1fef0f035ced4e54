"""Speed-up of coupled groups whose widths are rounded to multiples, in three runtimes.

A network with random weights is pruned to a share of its MACs: by filters, and by channel groups
with any width or with multiples (`pruners.magnitude.round_to`). Dense and pruned networks are timed
alternately; a time is the shortest of all passes. Images have 32x32 pixels.

    python -m benchmarks.width_multiples
    python -m benchmarks.width_multiples --net mobilenet_v3_small --share 0.75
    python -m benchmarks.width_multiples --share 0.3 --multiples 1 8 --runtimes torch
"""

import argparse
from typing import Any

import torch
from torch import nn

import secateur
from benchmarks.surgery_time import build
from secateur.base.machine import cpu_name
from secateur.base.optional import RUNTIME_TITLES
from secateur.deploy import layer_times
from secateur.nn import cost

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet20": ("resnet_cifar", {"depth": 20, "shortcut": "B"}),
    "mobilenet_v3_small": ("torchvision", {"name": "mobilenet_v3_small"}),
}


def pruned(model: nn.Module, images: torch.Tensor, share: float, multiple: int) -> nn.Module:
    """The network pruned to about that share of its MACs; multiple 0 prunes by filters."""
    chosen = {"granularity": "group", "round_to": multiple} if multiple else {}
    pruner = secateur.pruners.magnitude(
        **{"granularity": "filter", **chosen}, criterion="l2", target={"macs": share}
    )
    return secateur.prune(model, images, pruner).model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="resnet20", choices=NETWORKS)
    parser.add_argument("--share", type=float, default=0.5, help="requested share of the MACs")
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--runtimes", nargs="+", default=[*RUNTIME_TITLES], choices=RUNTIME_TITLES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    dense, _ = build(*NETWORKS[options.net])
    image = torch.randn(1, 3, 32, 32)
    models = {"dense": dense, "filters": pruned(dense, image, options.share, 0)}
    for multiple in options.multiples:
        name = f"groups, multiples of {multiple}" if multiple > 1 else "groups, any width"
        models[name] = pruned(dense, image, options.share, multiple)
    times = {
        runtime: layer_times.compare(
            models, image, runtime=runtime, batch=options.batch, threads=options.threads,
            repeats=options.repeats,
        )
        for runtime in options.runtimes
    }  # fmt: skip
    print(f"{cpu_name()}; torch {torch.__version__}; batch {options.batch}")
    print(f"| network | MACs left % | {' | '.join(options.runtimes)} |")
    print("|---|---:|" + "---:|" * len(options.runtimes))
    for name, model in models.items():
        macs = cost.macs(model, image) / cost.macs(dense, image)
        speed = [f"{taken['dense'] / taken[name]:.2f}x" for taken in times.values()]
        print(f"| {name} | {macs:.1%} | {' | '.join(speed)} |")


if __name__ == "__main__":
    main()
