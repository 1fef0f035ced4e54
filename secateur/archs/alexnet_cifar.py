"""AlexNet for CIFAR: five convolutions, the first with stride 4, and one linear layer.

Source: A. Krizhevsky, I. Sutskever, G. Hinton, ImageNet classification with deep convolutional
neural networks, NeurIPS 2012, as bearpaw/pytorch-classification cut it down for 32x32 pixels. For
ten classes 2,472,266 parameters and 15.0 MMACs. Initial weights are torch's.
"""

from collections import OrderedDict

from torch import nn

from secateur.base.sections import Strict
from secateur.nn import blocks


class Settings(Strict):
    """AlexNet has no settings."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """`conv1` to `conv5` with ReLU, three times max-pooling, mean, `fc`: logits.

    Images of at least 29x29 pixels.
    """
    blocks.require_side("alexnet_cifar", shape, 29)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], 64, 11, stride=4, padding=5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 192, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(192, 384, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 256, 3, padding=1),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(256, 256, 3, padding=1),
            relu5=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(256, classes),
        )
    )


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of bearpaw/pytorch-classification."""
    places = enumerate((0, 3, 6, 8, 10), start=1)
    return {"classifier": "fc"} | {f"features.{n}": f"conv{k}" for k, n in places}
