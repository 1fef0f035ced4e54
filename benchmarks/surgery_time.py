"""Time of structured pruning: build the channel graph, remove channels, remove dead channels.

The networks are the published CIFAR networks at 32x32 pixels and large networks of torchvision at
224x224. A random quarter of every channel group is removed. Then a quarter of the scales and shifts
in the batch norms of the remaining network are set to zero, which makes their filters dead. The
check of equality in stage `prune`, two forward passes, is not included. Times are medians over
several repetitions; imported modules are frozen for the garbage collector, as in a stage.

    python -m benchmarks.surgery_time
    python -m benchmarks.surgery_time --only preresnet densenet --profile
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base import plugin, settings
from secateur.base.machine import hardware
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.pruning import removal

BC = {"bottleneck": True, "compression": 0.5}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("alexnet_cifar", {}),
    ("vgg", {"depth": 16}),
    ("vgg", {"depth": 19}),
    ("resnet_cifar", {"depth": 56}),
    ("resnet_cifar", {"depth": 110}),
    ("resnet_cifar", {"depth": 164, "block": "bottleneck", "shortcut": "B"}),
    ("preresnet", {"depth": 110, "block": "basic"}),
    ("preresnet", {"depth": 164}),
    ("resnet_slim", {"depth": 18}),
    ("resnet_slim", {"depth": 50}),
    ("resnet_slim", {"depth": 152}),
    ("wide_resnet", {}),
    ("resnext", {"cardinality": 8}),
    ("resnext", {"cardinality": 16}),
    ("densenet", {"depth": 40}),
    ("densenet", {"depth": 100, **BC}),
    ("densenet", {"depth": 190, "growth": 40, **BC}),
    ("condensenet", {}),
    ("torchvision", {"name": "resnet50"}),
    ("torchvision", {"name": "resnet152"}),
    ("torchvision", {"name": "densenet121"}),
    ("torchvision", {"name": "convnext_tiny"}),
]


def build(arch: str, chosen: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The network in eval mode and a random image, (1, 3, H, W)."""
    module = plugin.load("archs", arch)
    large = arch == "torchvision"
    shape = (3, 224, 224) if large else (3, 32, 32)
    options = settings.validate(module.Settings, chosen, arch)
    model: nn.Module = module.build(options, 1000 if large else 10, shape)
    return model.eval(), torch.randn(1, *shape)


def selected(graph: ChannelGraph, ratio: float) -> dict[str, Tensor]:
    """A removable selection of a random fraction `ratio` of every channel group."""
    generator = torch.Generator().manual_seed(0)
    free = [group for group in graph.groups if group.locked is None]
    return graph.removable(
        {g.name: torch.randperm(g.size, generator=generator)[: int(ratio * g.size)] for g in free}
    )


@torch.no_grad()
def silence(model: nn.Module, ratio: float) -> None:
    """Set a random fraction of the scales and shifts of every batch norm to zero, in place."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            dead = torch.randperm(norm.num_features, generator=generator)
            dead = dead[: int(ratio * norm.num_features)]
            norm.weight[dead], norm.bias[dead] = 0, 0


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result of the call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(arch: str, chosen: dict[str, Any]) -> list[float]:
    """Seconds of graph, selection, remove and remove_dead."""
    model, image = build(arch, chosen)
    gc.collect()  # release networks of earlier repetitions: a stage has none
    followed, graph = timed(lambda: build_channel_graph(model, image))
    fitted, selection = timed(lambda: selected(graph, 0.25))
    removed, compact = timed(lambda: removal.remove(model, selection, image, {}, graph))
    silence(compact.model, 0.25)
    dead, _ = timed(lambda: removal.remove_dead(compact.model, {}, image))
    return [followed, fitted, removed, dead]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="substrings of network names")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print a profile by function")
    options = parser.parse_args()
    print(f"{hardware()}; seconds, median of {options.repeats}")
    gc.freeze()
    heads = ("graph", "selection", "remove", "remove_dead", "total")
    print(f"{'':62}" + "".join(f"{head:>13}" for head in heads))
    for arch, chosen in NETWORKS:
        name = " ".join([arch, *(f"{k}={v}" for k, v in chosen.items())])
        if options.only and not any(part in name for part in options.only):
            continue
        profile = cProfile.Profile()
        if options.profile:
            profile.enable()
        turns = [
            [*turn, sum(turn)] for turn in (measure(arch, chosen) for _ in range(options.repeats))
        ]
        seconds = [statistics.median(column) for column in zip(*turns, strict=True)]
        profile.disable()
        print(f"{name:62}" + "".join(f"{s:13.2f}" for s in seconds), flush=True)
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
