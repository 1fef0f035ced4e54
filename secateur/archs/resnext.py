"""ResNeXt for CIFAR: bottlenecks with a grouped 3x3 convolution.

Source: S. Xie, R. Girshick, P. Dollár, Z. Tu, K. He, Aggregated residual transformations for deep
neural networks, CVPR 2017. For 32x32x3 images and ten classes, depth 29 and groups of 64 channels:

    cardinality    parameters        MACs
    8              34,426,698     5.387 G
    16             68,155,210    10.689 G
"""

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import nn

from secateur.base.sections import Strict
from secateur.nn import blocks

Width = Annotated[int, Field(ge=1)]


class Settings(Strict):
    """Weight layers, groups and widths; 29, 8 and 64 are ResNeXt-29 8x64d."""

    depth: Annotated[int, Field(ge=11, le=2000)] = 29
    """9n+2."""
    cardinality: Width = 8
    """Groups of each 3x3 convolution."""
    base_width: Width = 64
    """Channels of a group in the first stage; doubled in each further stage."""
    widen: Width = 4
    """Outputs of the first stage in units of 64; doubled in each further stage."""

    @model_validator(mode="after")
    def _depth_is_possible(self) -> Self:
        self.blocks_in_a_stage()
        return self

    def blocks_in_a_stage(self) -> int:
        """The n of `depth`; ValueError if no n gives this depth."""
        return blocks.blocks_per_stage(self.depth, 9, 2, "ResNeXts")


class ResNeXt(blocks.ConvNet):
    """ConvNet whose classifier has He-normal initial weights too, by fan-in, and a bias of zero."""

    def reset_parameters(self) -> None:
        """Draw the weights of convolutions and classifier; BN is not changed."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.get_parameter("fc.weight"))
        nn.init.zeros_(self.get_parameter("fc.bias"))


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` to `layer3`, global average pooling, `fc`: logits. Any image size."""
    count, groups, width = settings.blocks_in_a_stage(), settings.cardinality, 64 * settings.widen

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        inner = groups * settings.base_width * outputs // width
        shortcut = blocks.projection(inputs, outputs, stride)
        return blocks.Bottleneck(inputs, inner, outputs, stride, shortcut, groups)

    return ResNeXt(
        conv1=blocks.conv3x3(shape[0], 64),
        bn1=nn.BatchNorm2d(64),
        relu1=nn.ReLU(),
        layer1=blocks.stage(count, 64, width, 1, block),
        layer2=blocks.stage(count, width, 2 * width, 2, block),
        layer3=blocks.stage(count, 2 * width, 4 * width, 2, block),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(4 * width, classes),
    )


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification."""
    inner = {
        "conv_reduce": "conv1",
        "bn_reduce": "bn1",
        "conv_conv": "conv2",
        "bn": "bn2",
        "conv_expand": "conv3",
        "bn_expand": "bn3",
        "shortcut.shortcut_conv": "shortcut.conv",
        "shortcut.shortcut_bn": "shortcut.bn",
    }
    names = {"conv_1_3x3": "conv1", "bn_1": "bn1", "classifier": "fc"}
    for stage in (1, 2, 3):
        for theirs, ours in inner.items():
            names[f"stage_{stage}.stage_{stage}_bottleneck_*.{theirs}"] = f"layer{stage}.*.{ours}"
    return names
