"""VGG for CIFAR: 3x3 convolutions in five stages, max-pooling between them, one linear layer.

Source: K. Simonyan, A. Zisserman, Very deep convolutional networks for large-scale image
recognition, ICLR 2015, with the usual head for CIFAR, which has 512 inputs. Several networks share
a name. For 32x32x3 images and ten classes, with BN:

    depth                    11           13           16            19
    parameters, with bias    9,231,114    9,416,010    14,728,266    20,040,522
    MACs                     152.8 M      228.3 M      313.2 M       398.1 M

    VGG-19 of                         bias     pools              parameters         MACs
    bearpaw, Network Slimming         true     [1, 2, 3, 4, 5]    20,040,522      398.1 M
    EigenDamage, GReg                 false    [1, 2, 3, 4]       20,035,018      398.1 M
    Torch-Pruning (DepGraph)          false    [1, 2, 3, 5]       20,035,018      511.4 M

The first two differ in how the last 2x2 pixels are pooled: by their maximum or by their mean.
Initial weights of convolutions are He-normal by fan-out, weights of the classifier are normal with
standard deviation 0.01, biases are zero (bearpaw/pytorch-classification).
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator
from torch import nn

from secateur.base.sections import Strict
from secateur.nn import blocks

Depth = Literal[11, 13, 16, 19]
WIDTHS = (64, 128, 256, 512, 512)
COUNTS: dict[Depth, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth -> convolutions of each stage."""


class Settings(Strict):
    """Weight layers, BN, biases of the convolutions, and stages that end in pooling."""

    depth: Depth = 19
    batch_norm: bool = True
    bias: bool = True
    pools: tuple[Annotated[int, Field(ge=1, le=5)], ...] = (1, 2, 3, 4, 5)
    """Stages that end in 2x2 max-pooling; the last feature map is averaged."""

    @field_validator("pools")
    @classmethod
    def _each_stage_once(cls, pools: tuple[int, ...]) -> tuple[int, ...]:
        if list(pools) != sorted(set(pools)):
            raise ValueError("stages must ascend, each named once")
        return pools


class VGG(blocks.ConvNet):
    """The classifier's initial weights are normal with standard deviation 0.01, its bias zero."""

    def reset_parameters(self) -> None:
        """Draw the weights of convolutions and classifier; BN is not changed."""
        super().reset_parameters()
        nn.init.normal_(self.get_parameter("fc.weight"), std=0.01)
        nn.init.zeros_(self.get_parameter("fc.bias"))


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """`conv1`, `bn1`, `relu1` and so on, `pool<stage>`, global average pooling, `fc`: logits.

    Height and width of images must be at least 2 ** (number of pools) pixels.
    """
    blocks.require_side("vgg", shape, 2 ** len(settings.pools))
    modules: dict[str, nn.Module] = {}
    channels, number = shape[0], 0
    for stage, (width, count) in enumerate(
        zip(WIDTHS, COUNTS[settings.depth], strict=True), start=1
    ):
        for _ in range(count):
            number += 1
            modules[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=settings.bias)
            if settings.batch_norm:
                modules[f"bn{number}"] = nn.BatchNorm2d(width)
            modules[f"relu{number}"] = nn.ReLU()
            channels = width
        if stage in settings.pools:
            modules[f"pool{stage}"] = nn.MaxPool2d(2)
    return VGG(
        **modules,
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels, classes),
    )


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification, classifier-pruner and GReg."""
    names, place, number = {"classifier": "fc"}, 0, 0
    for stage, count in enumerate(COUNTS[settings.depth], start=1):
        for _ in range(count):
            number += 1
            names[f"features.{place}"] = f"conv{number}"
            if settings.batch_norm:
                names[f"features.{place + 1}"] = f"bn{number}"
            place += 3 if settings.batch_norm else 2  # with the ReLU
        place += stage in settings.pools
    return names
