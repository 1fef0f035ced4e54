"""ResNet for CIFAR: three stages of 16, 32 and 64 channels, ReLU after each sum.

Source: K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition, CVPR 2016,
section 4.2. A name such as ResNet-56 may mean two networks, which differ in `shortcut`. For 32x32x3
images and ten classes:

    depth, block, shortcut    parameters        MACs     used by
    20,  basic, B                272,474     40.81 M     bearpaw/pytorch-classification, DeepHoyer
    56,  basic, A                853,018    125.49 M     He et al.; GReg (Wang et al., ICLR 2021)
    56,  basic, B                855,770    125.75 M     bearpaw/pytorch-classification
    110, basic, B              1,730,714    253.15 M     bearpaw; gconv-prune
    164, bottleneck, B         1,704,154    247.65 M     bearpaw, under the name ResNet-110

Convolutions have He-normal initial weights by fan-out, as in bearpaw's and gconv-prune's networks.
"""

from typing import Literal

from torch import nn

from secateur.nn import blocks
from secateur.nn.layers import ChannelSelect


class Settings(blocks.Residual):
    """Weight layers, type of block, and shortcut of a block that changes the shape."""

    depth: blocks.Depth = 56
    block: blocks.Block = "basic"
    shortcut: Literal["A", "B"] = "A"
    """A: every second pixel, padded with channels of zeros, half of them before and half after the
    input's channels. B: 1x1 convolution with BN."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` to `layer3`, global average pooling, `fc`: logits. Any image size."""
    count = settings.blocks_in_a_stage()
    expansion = 1 if settings.block == "basic" else blocks.EXPANSION
    make_shortcut = _subsample if settings.shortcut == "A" else blocks.projection

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = make_shortcut(inputs, outputs, stride)
        if settings.block == "basic":
            return blocks.Basic(inputs, outputs, stride, shortcut)
        return blocks.Bottleneck(inputs, outputs // expansion, outputs, stride, shortcut)

    return blocks.ConvNet(
        conv1=blocks.conv3x3(shape[0], 16),
        bn1=nn.BatchNorm2d(16),
        relu1=nn.ReLU(),
        layer1=blocks.stage(count, 16, 16 * expansion, 1, block),
        layer2=blocks.stage(count, 16 * expansion, 32 * expansion, 2, block),
        layer3=blocks.stage(count, 32 * expansion, 64 * expansion, 2, block),
        **blocks.head(64 * expansion, classes),
    )


def _subsample(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Shortcut A, without weights: every `stride`-th pixel, by pooling windows of one pixel.

    A ChannelSelect adds the channels of zeros, so that channels on both sides can be pruned
    independently.
    """
    if inputs == outputs and stride == 1:
        return nn.Identity()
    before = (outputs - inputs) // 2
    shortcut = nn.Sequential()
    shortcut.add_module("pool", nn.AvgPool2d(1, stride))
    zeros = [-1] * before, [-1] * (outputs - inputs - before)
    shortcut.add_module("take", ChannelSelect([*zeros[0], *range(inputs), *zeros[1]]))
    return shortcut


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification, DeepHoyer, GReg and gconv-prune."""
    return blocks.RESIDUAL_NAMES
