"""Scores of channel groups compared with those of Torch-Pruning, and targets reached by groups.

Torch-Pruning (MIT) is not a dependency: run `pip install torch-pruning==1.6.1` first; without it,
the first table is left out. For each network, reduction and normalisation, the scores of every
group that can be pruned are compared with GroupMagnitudeImportance; the table shows the largest
difference, relative to the group's largest score.

The second table is about torchvision's networks with random weights, pruned by groups to half of
their MACs: the remaining share of MACs, the narrowest layer, and the seconds that the decision and
`secateur.prune` as a whole take.
"""

import argparse
import importlib.util
import time
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.base import plugin
from secateur.base.machine import hardware
from secateur.base.torchvision_import import import_torchvision
from secateur.nn import cost
from secateur.pruning.decision import PruningContext
from secateur.pruning.group_scores import (
    Reduction,
    ScoreNormalisation,
    StructuralRanking,
    score_groups,
)
from secateur.sparsity import masks

REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "max", "prod")
NORMALISATIONS: tuple[ScoreNormalisation, ...] = ("none", "sum", "mean", "max")
RANKINGS: tuple[StructuralRanking, ...] = ("layer", "global", "isomorphic")
NETWORKS = ("resnet18", "mobilenet_v3_small", "efficientnet_b0")


def small(arch: str, **chosen: Any) -> nn.Module:
    """A network of the zoo for images of 32x32 pixels."""
    module = plugin.load("archs", arch)
    model: nn.Module = module.build(module.Settings(**chosen), 10, (3, 32, 32))
    return model


def trained_like(model: nn.Module) -> nn.Module:
    """The network in eval mode, with different scales in its norms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def torchvision_model(name: str) -> nn.Module:
    """A network of torchvision with random weights."""
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision().models, name)(weights=None)
    return trained_like(model)


def largest_difference(
    pruning: Any, model: nn.Module, image: Tensor, ways: tuple[Reduction, ScoreNormalisation]
) -> tuple[int, float]:
    """Number of groups, and the largest relative difference of scores to those of Torch-Pruning."""
    reduction, normalisation = ways
    found, _ = score_groups(PruningContext(model, image), "l2", reduction, normalisation)
    norm = None if normalisation == "none" else normalisation
    importance = pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction=reduction, normalizer=norm
    )
    followed = pruning.DependencyGraph().build_dependency(model, example_inputs=image)
    worst = 0.0
    for group in found:
        layer = model.get_submodule(group.groups[0])
        prune = (
            pruning.prune_conv_out_channels
            if isinstance(layer, nn.Conv2d)
            else pruning.prune_linear_out_channels
        )
        index = list(range(len(group.scores)))
        theirs = importance(followed.get_pruning_group(layer, prune, index)).double()
        ours = group.scores
        worst = max(worst, float(((ours - theirs).abs().max() / ours.abs().max()).detach()))
    return len(found), worst


def compare() -> None:
    """Print the first table."""
    if importlib.util.find_spec("torch_pruning") is None:
        print("torch-pruning is not installed: scores are not compared")
        return
    pruning: Any = importlib.import_module("torch_pruning")
    print(f"\nscores, largest difference to Torch-Pruning {pruning.__version__}")
    print(" " * 30 + "".join(f"{normalisation:>10}" for normalisation in NORMALISATIONS))
    torch.manual_seed(0)
    networks = {
        "vgg19": (trained_like(small("vgg", depth=19)), 32),
        "resnet56 B": (trained_like(small("resnet_cifar", depth=56, shortcut="B")), 32),
        "resnet18": (torchvision_model("resnet18"), 64),
    }
    for name, (model, side) in networks.items():
        image = torch.randn(1, 3, side, side)
        for reduction in REDUCTIONS:
            rows = [
                largest_difference(pruning, model, image, (reduction, normalisation))
                for normalisation in NORMALISATIONS
            ]
            differences = "".join(f"{worst:10.1e}" for _, worst in rows)
            print(f"{name:12}{rows[0][0]:4} groups  {reduction:6}{differences}", flush=True)


def halve(name: str) -> None:
    """Print the rows of the second table for one network."""
    model, images = torchvision_model(name), torch.randn(2, 3, 224, 224)
    dense = cost.macs(model, images[:1])
    width = {n: layer.weight.shape[0] for n, layer in masks.layers(model).items()}
    for ranking in RANKINGS:
        pruner = secateur.pruners.magnitude(
            granularity="group", criterion="l2", ranking=ranking, target={"macs": 0.5}
        )
        start = time.perf_counter()
        context = PruningContext(model, images)
        plugin.load("pruners", "magnitude").prune(pruner.settings, context)
        decided = time.perf_counter() - start
        start = time.perf_counter()
        result = secateur.prune(model, images, pruner)
        taken = time.perf_counter() - start
        left = {
            n: layer.weight.shape[0] / width[n] for n, layer in masks.layers(result.model).items()
        }
        narrowest = min(left, key=lambda n: left[n])
        macs = cost.macs(result.model, images[:1]) / dense
        print(
            f"{name:20}{ranking:12}{macs:8.4f}{left[narrowest]:10.3f} {narrowest:28}"
            f"{decided:8.2f}{taken:8.2f}{result.differences['difference_float64']:10.1e}",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), help="networks of table 2")
    options = parser.parse_args()
    print(hardware())
    compare()
    heads = f"{'network':20}{'ranking':10}{'MACs left':>10}{'width':>10} {'narrowest layer':28}"
    print(f"\n{heads}{'decide s':>8}{'prune s':>8}{'float64':>10}")
    for name in options.only:
        halve(name)


if __name__ == "__main__":
    main()
