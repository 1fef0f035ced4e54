"""Building blocks of architectures: residual blocks, stages, initial weights, checks.

Every layer is a module that is called once, so that torch.fx can trace it.
"""

from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.nn.layers import ChannelSelect

Block = Literal["basic", "bottleneck"]
Depth = Annotated[int, Field(ge=8, le=2000)]
"""6n+2 for basic blocks (20, 32, 44, 56, 110, 1202), 9n+2 for bottlenecks (164, 1001)."""
EXPANSION = 4
"""Output channels of a bottleneck, divided by its inner channels."""
RESIDUAL_NAMES = {
    "*.downsample.0": "*.shortcut.conv",
    "*.downsample.1": "*.shortcut.bn",
    "*.shortcut.0": "*.shortcut.conv",
    "*.shortcut.1": "*.shortcut.bn",
    "linear": "fc",
}
"""Names in other implementations -> names of `projection` and `head`, as in nn.matching.Names."""


class ConvNet(nn.Sequential):
    """Convolutional network: layers in sequence, with the initial weights of He et al.

    Convolutions: normal with variance 2 / fan-out, biases zero; other layers as torch initialises
    them. Source: K. He, X. Zhang, S. Ren, J. Sun, Delving deep into rectifiers, ICCV 2015. The
    fan-out follows from the current shape, so a pruned network draws weights for its own shape.
    """

    def __init__(self, *layers: nn.Module, **named: nn.Module) -> None:
        super().__init__(*layers)
        for name, layer in named.items():
            self.add_module(name, layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of all convolutions; other layers are not changed."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class ConvNetZeroBias(ConvNet):
    """ConvNet whose classifier `fc` has an initial bias of zero."""

    def reset_parameters(self) -> None:
        """Draw the weights of all convolutions, and set the classifier's bias to zero."""
        super().reset_parameters()
        nn.init.zeros_(self.get_parameter("fc.bias"))


class Residual(Strict):
    """Settings of a residual network for small images: number of weight layers, type of block."""

    depth: Depth
    block: Block

    @model_validator(mode="after")
    def _depth_is_possible(self) -> Self:
        self.blocks_in_a_stage()
        return self

    def blocks_in_a_stage(self) -> int:
        """The n of `depth`; ValueError if no n gives this depth."""
        if self.block == "basic":
            return blocks_per_stage(self.depth, 6, 2, "basic blocks")
        return blocks_per_stage(self.depth, 9, 2, "bottlenecks")


class Basic(nn.Module):
    """Two 3x3 convolutions with a shortcut, ReLU after the sum.

    Source: K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning, CVPR 2016.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of `outputs` channels, its sides divided by the stride."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with a shortcut, ReLU after the sum; the 3x3 has the stride.

    With groups, it is the block of ResNeXt. Source: see `Basic`.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        stride: int,
        shortcut: nn.Module,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(inner, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of `outputs` channels, its sides divided by the stride."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu3(y + self.shortcut(x))


class DenseBottleneck(nn.Module):
    """BN-ReLU-1x1 to four times the growth, BN-ReLU-3x3 to the growth, appended to the input.

    With `groups`, both convolutions are grouped. Source: G. Huang, Z. Liu, L. van der Maaten, K.
    Weinberger, DenseNet, CVPR 2017.
    """

    def __init__(self, inputs: int, growth: int, groups: int = 1) -> None:
        super().__init__()
        self.take = ChannelSelect(range(inputs))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(inputs, EXPANSION * growth, groups=groups)
        self.bn2 = nn.BatchNorm2d(EXPANSION * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(EXPANSION * growth, growth, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """The input's channels, then `growth` new ones."""
        y = self.conv1(self.relu1(self.bn1(self.take(x))))
        y = self.conv2(self.relu2(self.bn2(y)))
        return torch.cat((x, y), dim=1)


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Shortcut B of He et al.: 1x1 convolution and BN if the shape changes, else the identity."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    shortcut = nn.Sequential()
    shortcut.add_module("conv", conv1x1(inputs, outputs, stride))
    shortcut.add_module("bn", nn.BatchNorm2d(outputs))
    return shortcut


def head(width: int, classes: int) -> dict[str, nn.Module]:
    """Layers after the last block: global average pooling, classifier `fc`."""
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(width, classes),
    }


def activated_head(width: int, classes: int) -> dict[str, nn.Module]:
    """`head` for pre-activation blocks, whose output needs BN-ReLU first."""
    norm = {"take": ChannelSelect(range(width)), "bn": nn.BatchNorm2d(width), "relu": nn.ReLU()}
    return norm | head(width, classes)


def stage(
    count: int, inputs: int, outputs: int, stride: int, block: Callable[[int, int, int], nn.Module]
) -> nn.Sequential:
    """`count` blocks in sequence, each built by `block(inputs, outputs, stride)`."""
    rest = (block(outputs, outputs, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, outputs, stride), *rest)


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the sides, or divides them by the stride."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)


def blocks_per_stage(depth: int, layers: int, others: int, name: str) -> int:
    """Blocks in each stage: the n in `depth` = `layers` * n + `others`.

    If there is no such n of at least 1, raises ValueError naming the nearest possible depths.
    """
    n, rest = divmod(depth - others, layers)
    if rest or n < 1:
        near = [layers * k + others for k in (n, n + 1) if k >= 1]
        allowed = " or ".join(map(str, near))
        raise ValueError(f"depth = {depth}: {name} need {layers}n+{others}, such as {allowed}")
    return n


def require_side(arch: str, shape: tuple[int, int, int], side: int) -> None:
    """Raise ArgumentError if images of `shape` (C, H, W) have less than `side` pixels a side."""
    _, height, width = shape
    if min(height, width) < side:
        raise ArgumentError(
            "arch",
            f"images of {height}x{width} pixels are too small for it with these settings: "
            f"{side}x{side} are needed",
            arch,
        )
