"""Wide ResNet: few pre-activation blocks with many channels, dropout between their convolutions.

Source: S. Zagoruyko, N. Komodakis, Wide residual networks, BMVC 2016. WRN-28-10 for 32x32x3 images
and ten classes: 36,479,194 parameters and 5.243 GMACs.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.sections import Strict
from secateur.nn import blocks
from secateur.nn.layers import ChannelSelect


class Settings(Strict):
    """Weight layers, width and dropout; 28, 10 and 0.3 are WRN-28-10 as published."""

    depth: Annotated[int, Field(ge=10, le=2000)] = 28
    """6n+4."""
    widen: Annotated[int, Field(ge=1)] = 10
    """Width factor: the three stages have 16, 32 and 64 times as many channels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Dropout probability between the two convolutions of a block."""

    @model_validator(mode="after")
    def _depth_is_possible(self) -> Self:
        self.blocks_in_a_stage()
        return self

    def blocks_in_a_stage(self) -> int:
        """The n of `depth`; ValueError if no n gives this depth."""
        return blocks.blocks_per_stage(self.depth, 6, 4, "wide ResNets")


class IdentityBlock(nn.Module):
    """BN-ReLU-3x3, dropout, BN-ReLU-3x3, added to the raw input; the shape does not change."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.take = ChannelSelect(range(channels))
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = blocks.conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = blocks.conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of the input's shape."""
        y = self.conv1(self.relu1(self.bn1(self.take(x))))
        y = self.conv2(self.dropout(self.relu2(self.bn2(y))))
        return x + y


class ProjectionBlock(nn.Module):
    """IdentityBlock that changes the shape; the shortcut is a 1x1 convolution after a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.take = ChannelSelect(range(inputs))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = blocks.conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = blocks.conv3x3(outputs, outputs)
        self.shortcut = blocks.conv1x1(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of `outputs` channels, its sides divided by the stride."""
        x = self.relu1(self.bn1(self.take(x)))
        y = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(x)))))
        return self.shortcut(x) + y


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` to `layer3`, BN-ReLU, global average pooling, `fc`: logits.

    Any image size.
    """
    count, widen = settings.blocks_in_a_stage(), settings.widen

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        if inputs == outputs and stride == 1:
            return IdentityBlock(inputs, settings.dropout)
        return ProjectionBlock(inputs, outputs, stride, settings.dropout)

    return blocks.ConvNetZeroBias(
        conv1=blocks.conv3x3(shape[0], 16),
        layer1=blocks.stage(count, 16, 16 * widen, 1, block),
        layer2=blocks.stage(count, 16 * widen, 32 * widen, 2, block),
        layer3=blocks.stage(count, 32 * widen, 64 * widen, 2, block),
        **blocks.activated_head(64 * widen, classes),
    )


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification."""
    return {
        "block*.layer.*.convShortcut": "layer*.*.shortcut",
        "block*.layer": "layer*",
        "bn1": "bn",
    }
