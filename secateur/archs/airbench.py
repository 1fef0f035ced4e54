"""The network of airbench94, whose seven convolutions learn CIFAR-10 in a few epochs.

Source: K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU, arXiv 2404.00498, 2024. For
32x32x3 images and ten classes: 1,972,802 parameters and 118.1 MMACs, most of them in convolutions
of 64 and 256 channels. In bfloat16 on a processor with AMX, a step takes about as long as one of
ResNet-20, whose 40.8 MMACs are spread over many thin layers.

Differences from the source: the first layer is learnt, instead of being set to a whitening
transform of the training images; ReLU in place of GELU; the scales of batch normalisations are
learnt; initial weights are He-normal, without identities; logits are not divided by nine.
"""

from typing import Annotated

from pydantic import Field
from torch import nn

from secateur.base.sections import Strict
from secateur.nn import blocks

Width = Annotated[int, Field(ge=1)]


class Settings(Strict):
    """Filters of each convolution: of the 2x2 one at the entrance, and by stage of the others."""

    entrance: Width = 24
    widths: tuple[Width, Width, Width] = (64, 256, 256)


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """2x2 convolution; three stages of two 3x3 convolutions; global max-pooling, `fc`: logits.

    A stage pools between its first convolution and the BN. Images must have at least 9x9 pixels.
    """
    blocks.require_side("airbench", shape, 9)
    modules: dict[str, nn.Module] = {
        "conv0": nn.Conv2d(shape[0], settings.entrance, 2),
        "relu0": nn.ReLU(),
    }
    channels = settings.entrance
    for stage, width in enumerate(settings.widths, start=1):
        for number, pools in ((2 * stage - 1, True), (2 * stage, False)):
            modules[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            if pools:
                modules[f"pool{stage}"] = nn.MaxPool2d(2)
            modules[f"bn{number}"] = nn.BatchNorm2d(width)
            modules[f"relu{number}"] = nn.ReLU()
            channels = width
    return blocks.ConvNetZeroBias(
        **modules,
        pool=nn.AdaptiveMaxPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels, classes),
    )
