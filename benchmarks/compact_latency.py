"""Measured latency of compact networks, compared with the speed-up expected from their MACs.

A random fraction of every channel group is removed. Dense and compact networks are timed
alternately on one batch. `MACs` is the theoretical speed-up, dense MACs divided by compact MACs;
`efficiency` is the measured speed-up divided by it. `--round-to` rounds the number of remaining
channels of every group up to a multiple, like `pruners.magnitude.round_to`.

    python -m benchmarks.compact_latency
    python -m benchmarks.compact_latency --nets resnet50 --shares 0.4 --round-to 1 16 --batch 1
"""

import argparse
from typing import Any

import torch

from benchmarks.surgery_time import build
from secateur.base import machine, timing
from secateur.channels.graph import build_channel_graph
from secateur.nn import cost
from secateur.pruning import removal
from secateur.sparsity import choices

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet56": ("resnet_cifar", {"depth": 56}),
    "vgg16": ("vgg", {"depth": 16}),
    "densenet40": ("densenet", {"depth": 40}),
    "resnet_slim18": ("resnet_slim", {"depth": 18}),
    "resnet50": ("torchvision", {"name": "resnet50"}),
    "mobilenet_v2": ("torchvision", {"name": "mobilenet_v2"}),
}
"""Architecture and settings by name; images have 32x32 pixels, torchvision's 224x224."""


def prune(arch: str, chosen: dict[str, Any], ratio: float, multiple: int) -> removal.Compact:
    """The network without a random fraction `ratio` of the channels of each group."""
    model, image = build(arch, chosen)
    graph = build_channel_graph(model, image)
    generator = torch.Generator().manual_seed(0)
    pruned = {}
    for group in graph.groups:
        if group.locked is None:
            order = torch.rand(group.size, generator=generator)
            lost = choices.choose_smallest(order, choices.number_pruned(ratio, group.size))
            kept = choices.keep_at_least(lost, order, multiple=multiple)
            pruned[group.name] = kept.nonzero().flatten()
    return removal.remove(model, graph.removable(pruned), image, {}, graph)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.4, 0.5])
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print(f"{machine.hardware()}; torch {torch.__version__}; median of {options.repeats} passes")
    print("| network | removed | multiple of | batch | dense, ms | MACs | speed-up | efficiency |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.nets:
        arch, chosen = NETS[name]
        dense, image = build(arch, chosen)
        models: dict[str, torch.nn.Module] = {"dense": dense}
        for ratio in options.shares:
            for multiple in options.round_to:
                compact = prune(arch, chosen, ratio, multiple)
                models[f"{ratio:.0%} | {multiple}"] = compact.model.eval()
        theoretical = {
            k: cost.macs(dense, image) / cost.macs(model, image) for k, model in models.items()
        }
        for size in options.batch:
            times = cost.latency(models, image.repeat(size, 1, 1, 1), options.repeats)
            for key, values in list(times.items())[1:]:
                speedup = timing.speedup(times["dense"], values)
                efficiency = speedup / theoretical[key]
                print(
                    f"| {name} | {key} | {size} | {timing.median_and_iqr(times['dense'])[0]:.1f} | "
                    f"{theoretical[key]:.2f}x | {speedup:.2f}x | {efficiency:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
