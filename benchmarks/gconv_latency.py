"""Latency of group convolutions: dense, masked and converted networks.

Converted networks are timed twice: with an index layer before and after every group convolution,
and with these permutations folded into the channel order where possible (gconv/conversion.py). All
networks are timed alternately on one batch. A ratio below 1 is slower than the dense network.

    python -m benchmarks.gconv_latency
    python -m benchmarks.gconv_latency --what layers --batch 1
    python -m benchmarks.gconv_latency --what nets --nets preresnet164-c10 --groups 2 8
"""

import argparse
import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.gconv_sizes import NETS, build
from secateur.base import machine, timing
from secateur.gconv.conversion import convert, group_convolution_counts
from secateur.nn import cost
from secateur.pruners import gconv
from secateur.pruning.decision import PruningContext
from secateur.sparsity import masks

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Input and output channels of a 3x3 convolution, and the side of its image in pixels."""


def versions(model: nn.Module, image: Tensor, groups: int) -> dict[str, nn.Module]:
    """The four versions of a network, in eval mode; `image` has shape (1, C, H, W)."""
    decision = gconv.prune(gconv.Settings(groups=groups), PruningContext(model, image))
    masked = copy.deepcopy(model)
    masks.apply(masked, decision.masks)
    plain = convert(masked, decision.masks, image, fold=False).model
    folded = convert(masked, decision.masks, image).model
    return {"dense": model, "masked": masked, "indexed": plain, "folded": folded}


def layer(channels: int) -> nn.Module:
    """A 3x3 convolution between two 1x1 convolutions, so that its channels can be permuted."""
    ends = [nn.Conv2d(1, channels, 1), nn.Conv2d(channels, 1, 1)]
    middle = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(ends[0], middle, ends[1]).eval()


def rows(
    label: str, models: Mapping[str, nn.Module], batch: Tensor, repeats: int, groups: int
) -> str:
    """One row of the table: milliseconds, and the speed-up of each version over dense."""
    times = cost.latency(models, batch, repeats)
    middle = {name: timing.median_and_iqr(values)[0] for name, values in times.items()}
    ratio = {name: timing.speedup(times["dense"], values) for name, values in times.items()}
    index = {
        name: int(group_convolution_counts(model)["index_layers"]) for name, model in models.items()
    }
    cells = [f"{middle['dense']:.2f}"]
    cells += [f"{middle[n]:.2f} ({ratio[n]:.2f}x)" for n in ("masked", "indexed", "folded")]
    return f"| {label} | {groups} | {' | '.join(cells)} | {index['indexed']}, {index['folded']} |"


def single(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The middle convolution of each version."""
    return {name: model.get_submodule("1") for name, model in models.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=["layers", "nets"], choices=["layers", "nets"])
    parser.add_argument(
        "--nets", nargs="+", default=["preresnet164-c10", "condensenet86-c10", "resnet34"],
        choices=list(NETS),
    )  # fmt: skip
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args()
    place = machine.device()
    print(
        f"{machine.hardware()}; batch size {chosen.batch}, milliseconds, "
        f"median of {chosen.repeats} passes"
    )
    print("| | groups | dense | masked | indexed | folded | index layers |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for channels, side in LAYERS if "layers" in chosen.what else ():
        torch.manual_seed(0)
        model, batch = layer(channels), torch.randn(chosen.batch, channels, side, side)
        for groups in chosen.groups:
            made = single(versions(model, torch.zeros(1, 1, side, side), groups))
            label = f"3x3, {channels} channels, {side}x{side}"
            print(rows(label, _to(made, place), batch.to(place), chosen.repeats, groups))
    for net in chosen.nets if "nets" in chosen.what else ():
        model, image = build(net)
        batch = torch.randn(chosen.batch, *image.shape[1:]).to(place)
        for groups in chosen.groups:
            made = versions(model, image, groups)
            print(rows(net, _to(made, place), batch, chosen.repeats, groups), flush=True)


def _to(models: Mapping[str, nn.Module], place: torch.device) -> dict[str, nn.Module]:
    return {name: model.to(place) for name, model in models.items()}


if __name__ == "__main__":
    main()
