"""One training step in float64, in this process or under torchrun: `-m tests.one_step <folder>`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from secateur.base import plugin
from secateur.base.sections import Train
from secateur.data import dataset
from secateur.training import loop
from secateur.training.engine import Engine

LR = 0.1
BATCH = 68
CASES = [(count, parts) for count in (68, 67, 3, 1) for parts in (1, 2)]
"""Images in the only batch (the second process may get none), and parts it is divided into."""


class Network(nn.Module):
    """Two layers in float64; its batches and logits are float32."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 16, dtype=torch.float64)
        self.out = nn.Linear(16, 10, dtype=torch.float64)
        self.passes = 0

    def forward(self, images):
        self.passes += self.training
        return self.out(torch.relu(self.hidden(images.flatten(1).double())))


class Nowhere:
    """A state store for a training that is never interrupted."""

    def load(self):
        return None

    def save(self, tensors, info):
        return False


def digits(count):
    """The data set digits with the first `count` training images."""
    module = plugin.load("datasets", "digits")
    prepared = dataset.prepare("digits", module.read(module.Settings(), None), 0.1, 0)
    return replace(prepared, train=prepared.train.take(range(count)))


def network():
    torch.manual_seed(0)
    return Network()


def epochs_with_norm(kind, engine):
    """A network with a batch norm after two epochs, and the history.

    `kind` is that of the average; its statistics are those of the network.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    average = {"kind": kind, "decay": 0.5, "recalibrate": 0}
    settings = Train(epochs=2, batch_size=100, lr=0.01, keep="last", average=average)
    result = loop.fit(model, digits(300), settings, 0, Nowhere(), (), engine=engine)
    return model, result.history


def step(count, parts, engine=None):
    """The network after one step on `count` images, and the row of this step in the history."""
    model = network()
    settings = Train(
        epochs=1, batch_size=BATCH, optimizer="sgd", lr=LR, schedule="constant", warmup=0,
        accumulate_grad_batches=parts, keep="last",
    )  # fmt: skip
    result = loop.fit(model, digits(count), settings, 0, Nowhere(), (), engine=engine)
    return model, result.history[0]


if __name__ == "__main__":
    together = Engine()
    for kind in ("none", "ema"):
        trained, rows = epochs_with_norm(kind, together)
        path = Path(sys.argv[1]) / f"norm-{kind}-{together.rank}.safetensors"
        safetensors.torch.save_file(
            trained.state_dict(), path, {"row": json.dumps(rows[-1]), "passes": "0"}
        )
    for case in CASES:
        trained, row = step(*case, together)
        name = "-".join(map(str, (*case, together.rank)))
        header = {"row": json.dumps(row), "passes": str(trained.passes)}
        path = Path(sys.argv[1]) / f"{name}.safetensors"
        safetensors.torch.save_file(trained.state_dict(), path, header)
