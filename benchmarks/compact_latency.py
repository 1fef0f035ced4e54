"""Latency of compact networks beside their share of the dense network's MACs.

The same share of every group of channels goes, at random. The networks take turns on the same
batch. `reached` is the measured speed-up over the one that the MACs promise. With `--round-to` what
stays of every group is brought up to a multiple, as `pruners.magnitude.round_to` does.

    python -m benchmarks.compact_latency
    python -m benchmarks.compact_latency --nets resnet50 --shares 0.4 --round-to 1 16 --batch 1
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.surgery_time import build
from secateur.base import machine
from secateur.channels import graph as channels
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
"""Networks at 32x32 pixels, torchvision's at 224x224."""


def without(arch: str, chosen: dict[str, Any], share: float, multiple: int) -> removal.Compact:
    """The network without that share of each group, at random."""
    model, image = build(arch, chosen)
    graph = channels.build_channel_graph(model, image)
    chance = torch.Generator().manual_seed(0)
    gone = {}
    for group in graph.groups:
        if group.locked is None:
            order = torch.rand(group.size, generator=chance)
            lost = choices.smallest_choice(order, choices.number_pruned(share, group.size))
            gone[group.name] = choices.spare(lost, order, multiple=multiple).nonzero().flatten()
    return removal.remove(model, graph.removable(gone), image, {}, graph)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.4, 0.5])
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--repeats", type=int, default=20)
    asked = parser.parse_args()
    print(f"{machine.hardware()}; torch {torch.__version__}; median of {asked.repeats}")
    print("| network | gone | multiple of | batch | dense, ms | MACs | speed-up | reached |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in asked.nets:
        arch, chosen = NETS[name]
        dense, image = build(arch, chosen)
        models: dict[str, torch.nn.Module] = {"dense": dense}
        for share in asked.shares:
            for multiple in asked.round_to:
                compact = without(arch, chosen, share, multiple)
                models[f"{share:.0%} | {multiple}"] = compact.model.eval()
        promised = {
            k: cost.macs(dense, image) / cost.macs(model, image) for k, model in models.items()
        }
        for size in asked.batch:
            times = cost.latency(models, image.repeat(size, 1, 1, 1), asked.repeats)
            for key, values in list(times.items())[1:]:
                ratios = [d / t for d, t in zip(times["dense"], values, strict=True)]
                speedup = statistics.median(ratios)
                print(
                    f"| {name} | {key} | {size} | {cost.median_and_iqr(times['dense'])[0]:.1f} | "
                    f"{promised[key]:.2f}x | {speedup:.2f}x | {speedup / promised[key]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
