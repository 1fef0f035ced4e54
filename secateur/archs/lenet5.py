"""LeNet-5 in the 20-50-500 form that the pruning literature uses (Caffe's), with ReLU.

Source: Y. LeCun et al., 1998, as adapted by Caffe's MNIST example. On MNIST 431,080 parameters and
2,293,000 MACs.
"""

from collections import OrderedDict
from typing import Annotated

from pydantic import Field
from torch import nn

from secateur.base.sections import Strict

Width = Annotated[int, Field(ge=1)]


class Settings(Strict):
    """Filters of the two convolutions and neurons of the hidden layer."""

    filters: tuple[Width, Width] = (20, 50)
    hidden: Width = 500


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Twice 5x5 convolution, 2x2 max-pooling, ReLU; then two fully connected layers: logits.

    The convolutions have no padding, as in the source, if the image is large enough for both
    (16 pixels a side); smaller images, such as 8x8, are padded to keep their size. Pooling precedes
    ReLU, which gives equal results with a quarter of the computation of ReLU.
    """
    channels, height, width = shape
    first, second = settings.filters
    padding = 0 if min(height, width) >= 16 else 2

    def pooled(side: int) -> int:
        for _ in range(2):
            side = (side - 4 + 2 * padding) // 2
        return side

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5, padding=padding),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 5, padding=padding),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * pooled(height) * pooled(width), settings.hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(settings.hidden, classes),
        )
    )
