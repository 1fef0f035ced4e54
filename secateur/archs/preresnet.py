"""Pre-activation ResNet for CIFAR: BN and ReLU before each convolution, none after the sum.

Source: K. He, X. Zhang, S. Ren, J. Sun, Identity mappings in deep residual networks, ECCV 2016. A
block that changes the shape has a 1x1 convolution without BN as its shortcut, on the raw input, as
in bearpaw/pytorch-classification and gconv-prune. For 32x32x3 images and ten classes:

    depth, block        parameters        MACs
    110, basic           1,730,522    253.15 M
    164, bottleneck      1,703,258    247.65 M    bearpaw's table calls it PreResNet-110
"""

from torch import Tensor, nn

from secateur.nn import blocks
from secateur.nn.layers import ChannelSelect


class Settings(blocks.Residual):
    """Number of weight layers and type of block."""

    depth: blocks.Depth = 164
    block: blocks.Block = "bottleneck"


class Basic(nn.Module):
    """Twice BN-ReLU-3x3, with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.take = ChannelSelect(range(inputs))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = blocks.conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = blocks.conv3x3(outputs, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of `outputs` channels, its sides divided by the stride."""
        y = self.conv1(self.relu1(self.bn1(self.take(x))))
        y = self.conv2(self.relu2(self.bn2(y)))
        return y + self.shortcut(x)


class Bottleneck(nn.Module):
    """BN-ReLU before each of a 1x1, a 3x3 and a 1x1 convolution, with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // blocks.EXPANSION
        self.take = ChannelSelect(range(inputs))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = blocks.conv1x1(inputs, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv2 = blocks.conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.relu3 = nn.ReLU()
        self.conv3 = blocks.conv1x1(inner, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of `outputs` channels, its sides divided by the stride."""
        y = self.conv1(self.relu1(self.bn1(self.take(x))))
        y = self.conv2(self.relu2(self.bn2(y)))
        y = self.conv3(self.relu3(self.bn3(y)))
        return y + self.shortcut(x)


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` to `layer3`, BN-ReLU, global average pooling, `fc`: logits.

    Any image size.
    """
    count = settings.blocks_in_a_stage()
    block, expansion = (Basic, 1) if settings.block == "basic" else (Bottleneck, blocks.EXPANSION)
    return blocks.ConvNet(
        conv1=blocks.conv3x3(shape[0], 16),
        layer1=blocks.stage(count, 16, 16 * expansion, 1, block),
        layer2=blocks.stage(count, 16 * expansion, 32 * expansion, 2, block),
        layer3=blocks.stage(count, 32 * expansion, 64 * expansion, 2, block),
        **blocks.activated_head(64 * expansion, classes),
    )


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return blocks.conv1x1(inputs, outputs, stride)


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification and gconv-prune."""
    return {"*.downsample.0": "*.shortcut"}
