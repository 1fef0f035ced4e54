"""Sizes of networks with group convolutions, by the counting rules of Secateur and gconv-prune.

Secateur counts all parameters, and the multiply-accumulates (MACs) of convolutions and linear
layers. gconv-prune counts all parameters in millions, and the "FLOPS" of one image as follows: two
for each multiply-accumulate of a convolution and one for its bias; two for each element of a batch
norm; one for each element of a ReLU; the side of the window for each output element of an average
pooling, one less for a max pooling; 2 n - 1 for each output of a linear layer with n inputs. Global
average pooling, additions and index operations are not counted.

    python -m benchmarks.gconv_sizes
    python -m benchmarks.gconv_sizes --nets resnet34 --configs resnet34_A.json resnet34_B.json
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base import plugin
from secateur.base.errors import PruningError
from secateur.gconv.config import PREFIX
from secateur.nn import cost
from secateur.pruners import gconv
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
NETS: dict[str, tuple[str, dict[str, Any], int, tuple[int, int, int]]] = {
    "preresnet164-c10": ("preresnet", {"depth": 164}, 10, CIFAR),
    "preresnet164-c100": ("preresnet", {"depth": 164}, 100, CIFAR),
    "resnet110-c10": ("resnet_cifar", {"depth": 110, "shortcut": "B"}, 10, CIFAR),
    "resnet110-c100": ("resnet_cifar", {"depth": 110, "shortcut": "B"}, 100, CIFAR),
    "densenet40-c10": ("densenet", {"depth": 40}, 10, CIFAR),
    "densenet40-c100": ("densenet", {"depth": 40}, 100, CIFAR),
    "condensenet86-c10": ("condensenet", {}, 10, CIFAR),
    "condensenet86-c100": ("condensenet", {}, 100, CIFAR),
    "resnet18": ("torchvision", {"name": "resnet18"}, 1000, IMAGENET),
    "resnet34": ("torchvision", {"name": "resnet34"}, 1000, IMAGENET),
    "resnet50": ("torchvision", {"name": "resnet50"}, 1000, IMAGENET),
    "resnet101": ("torchvision", {"name": "resnet101"}, 1000, IMAGENET),
}
"""Architecture, its settings, number of classes and shape of an image (C, H, W), by name."""


def build(net: str) -> tuple[nn.Module, Tensor]:
    """The dense network in eval mode, and one image of zeros, (1, C, H, W)."""
    arch, settings, classes, shape = NETS[net]
    module = plugin.load("archs", arch)
    torch.manual_seed(0)
    return module.build(module.Settings(**settings), classes, shape).eval(), torch.zeros(1, *shape)


def divided(model: nn.Module, image: Tensor, **how: Any) -> dict[str, int]:
    """Number of groups of every convolution, as pruner `gconv` sets it."""
    chosen = {"groups": None, "permutation": "same"} | how
    decision: PruningDecision = gconv.prune(gconv.Settings(**chosen), PruningContext(model, image))
    entries = json.loads(decision.files["groups.json"])
    return {name.removeprefix(PREFIX): entry["G"] for name, entry in entries.items()}


def parameters(model: nn.Module, groups: Mapping[str, int]) -> int:
    """Parameters of the network with these numbers of groups."""
    layers = masks.layers(model)
    less = sum(layers[n].weight.numel() * (g - 1) // g for n, g in groups.items())
    return cost.parameters(model) - less


def macs(model: nn.Module, image: Tensor, groups: Mapping[str, int]) -> int:
    """MACs of the network with these numbers of groups."""
    rows = cost.layer_costs(model, image)
    return sum(row.macs_dense // groups.get(row.layer, 1) for row in rows)


@torch.no_grad()
def published(model: nn.Module, image: Tensor, groups: Mapping[str, int]) -> int:
    """Operations of one image by the counting rules of gconv-prune."""
    total = 0
    names = {module: name for name, module in model.named_modules()}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        entries = output.numel()
        if isinstance(module, nn.Conv2d):
            reads = module.weight[0].numel() // groups.get(names[module], 1)
            total += entries * (2 * reads + (module.bias is not None))
        elif isinstance(module, nn.Linear):
            total += entries * (2 * module.in_features - 1)
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * entries
        elif isinstance(module, nn.ReLU):
            total += entries
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            size = module.kernel_size
            side = size[0] if isinstance(size, tuple) else size
            total += entries * (side - isinstance(module, nn.MaxPool2d))

    handles = [m.register_forward_hook(count) for m in names if not list(m.children())]
    try:
        model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return total


def main() -> None:
    """Print one row for each network and group configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--groups", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--channels-per-group", nargs="*", type=int, default=[])
    parser.add_argument("--configs", nargs="*", default=[], help="files in recipes/groups/")
    chosen = parser.parse_args()
    ways: list[tuple[str, dict[str, Any]]] = [(f"G = {g}", {"groups": g}) for g in chosen.groups]
    ways += [(f"{n} per group", {"channels_per_group": n}) for n in chosen.channels_per_group]
    ways += [(config, {"config": config}) for config in chosen.configs]
    print("| network | groups | parameters | MACs | parameters, M | gconv-prune FLOPS, M |")
    print("|---|---|---:|---:|---:|---:|")
    for net in chosen.nets:
        model, image = build(net)
        for label, how in [("dense", {}), *ways]:
            try:
                groups = divided(model, image, **how) if how else {}
            except PruningError:  # no layer of this network can have so many groups
                continue
            size, products = parameters(model, groups), macs(model, image, groups)
            operations = published(model, image, groups) / 1e6
            print(
                f"| {net} | {label} | {size:,} | {products:,} | {size / 1e6:.4f} | "
                f"{operations:.1f} |"
            )


if __name__ == "__main__":
    main()
