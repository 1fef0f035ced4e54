"""LeNet-300-100: two hidden layers of 300 and 100 neurons.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document
recognition, Proceedings of the IEEE, 1998. On MNIST 266,610 parameters and 266,200 MACs.
"""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import nn

from secateur.base.sections import Strict


class Settings(Strict):
    """Neurons in each hidden layer."""

    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (300, 100)


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Flatten, then fully connected layers with ReLU between them: logits."""
    widths = [math.prod(shape), *settings.hidden, classes]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        if number > 1:
            layers[f"relu{number - 1}"] = nn.ReLU()
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)
