"""ResNet-18 to 152 for small images: ImageNet's four stages after a 3x3 stem without pooling.

Source: K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition, CVPR 2016,
in the form that work after Network Slimming prunes on CIFAR (classifier-pruner). Shortcuts are
projections (1x1 convolution with BN) where the shape changes; initial weights are torch's. For
32x32x3 images and ten classes:

    depth       18            34            50            101           152
    parameters  11,173,962    21,282,122    23,520,842    42,512,970    58,156,618
    MACs        555.42 M      1159.40 M     1297.83 M     2509.98 M     3722.14 M
"""

from collections import OrderedDict
from typing import Literal

from torch import nn

from secateur.base.sections import Strict
from secateur.nn import blocks

Depth = Literal[18, 34, 50, 101, 152]
COUNTS: dict[Depth, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Depth -> blocks of each stage: basic ones up to 34, bottlenecks from 50 on."""
WIDTH = 64
"""Filters of the stem and of the first stage, before the bottlenecks' expansion."""


class Settings(Strict):
    """Number of weight layers."""

    depth: Depth = 18


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` to `layer4`, global average pooling, `fc`: logits. Any image size."""
    basic = settings.depth < 50
    expansion = 1 if basic else blocks.EXPANSION

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = blocks.projection(inputs, outputs, stride)
        if basic:
            return blocks.Basic(inputs, outputs, stride, shortcut)
        return blocks.Bottleneck(inputs, outputs // expansion, outputs, stride, shortcut)

    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=blocks.conv3x3(shape[0], WIDTH), bn1=nn.BatchNorm2d(WIDTH), relu1=nn.ReLU()
    )
    inputs = WIDTH
    for number, count in enumerate(COUNTS[settings.depth]):
        outputs = WIDTH * 2**number * expansion
        stride = 1 if number == 0 else 2
        layers[f"layer{number + 1}"] = blocks.stage(count, inputs, outputs, stride, block)
        inputs = outputs
    return nn.Sequential(layers | blocks.head(inputs, classes))


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of classifier-pruner."""
    return blocks.RESIDUAL_NAMES
