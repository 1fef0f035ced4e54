"""DenseNet for CIFAR: every layer reads the outputs of all earlier layers of its stage.

Source: G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, Densely connected convolutional
networks, CVPR 2017. For 32x32x3 images and ten classes:

    depth, growth, bottleneck, compression    parameters        MACs
    40,  12, false, 1.0                        1,019,722    264.81 M    plain; gconv-prune
    100, 12, true,  0.5                          769,162    287.9  M    BC; bearpaw, DeepHoyer
    190, 40, true,  0.5                       25,624,430    9.302  G    BC; bearpaw
"""

import math
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.sections import Strict
from secateur.nn import blocks
from secateur.nn.layers import ChannelSelect


class Settings(Strict):
    """Weight layers, channels that each layer adds (growth rate), and options of the BC form."""

    depth: Annotated[int, Field(ge=7, le=2000)] = 40
    """3n+4 for plain layers, 6n+4 with bottlenecks."""
    growth: Annotated[int, Field(ge=1)] = 12
    bottleneck: bool = False
    """A 1x1 convolution before each 3x3, and a stem of twice the growth instead of 16."""
    compression: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the channels that the transition between two stages keeps."""

    @model_validator(mode="after")
    def _depth_is_possible(self) -> Self:
        self.layers_in_a_stage()
        return self

    def layers_in_a_stage(self) -> int:
        """The n of `depth`; ValueError if no n gives this depth."""
        if self.bottleneck:
            return blocks.blocks_per_stage(self.depth, 6, 4, "DenseNets with bottlenecks")
        return blocks.blocks_per_stage(self.depth, 3, 4, "plain DenseNets")


class Plain(nn.Module):
    """BN-ReLU-3x3 to the growth, appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.take = ChannelSelect(range(inputs))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = blocks.conv3x3(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        """The input's channels, then `growth` new ones."""
        y = self.conv1(self.relu1(self.bn1(self.take(x))))
        return torch.cat((x, y), dim=1)


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` to `layer3` with transitions, global average pooling, `fc`: logits.

    Images of at least 4x4 pixels.
    """
    blocks.require_side("densenet", shape, 4)
    growth, count = settings.growth, settings.layers_in_a_stage()
    layer = blocks.DenseBottleneck if settings.bottleneck else Plain
    width = 2 * growth if settings.bottleneck else 16
    modules: dict[str, nn.Module] = {"conv1": blocks.conv3x3(shape[0], width)}
    for number in (1, 2, 3):
        added = (layer(width + k * growth, growth) for k in range(count))
        modules[f"layer{number}"] = nn.Sequential(*added)
        width += count * growth
        if number < 3:
            kept = max(1, math.floor(width * settings.compression))
            modules[f"transition{number}"] = _transition(width, kept)
            width = kept
    return blocks.ConvNet(**modules, **blocks.activated_head(width, classes))


def _transition(inputs: int, outputs: int) -> nn.Sequential:
    """BN-ReLU-1x1, then 2x2 average pooling."""
    transition = nn.Sequential()
    transition.add_module("take", ChannelSelect(range(inputs)))
    transition.add_module("bn", nn.BatchNorm2d(inputs))
    transition.add_module("relu", nn.ReLU())
    transition.add_module("conv", blocks.conv1x1(inputs, outputs))
    transition.add_module("pool", nn.AvgPool2d(2))
    return transition


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification and gconv-prune."""
    return {
        "trans*.bn1": "transition*.bn",
        "trans*.conv1": "transition*.conv",
        "dense*.bn": "layer*.bn1",
        "dense*.conv": "layer*.conv1",
        "dense*": "layer*",
    }
