"""Accuracy and loss of a network on a split."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from secateur.data.batches import sequential_batches
from secateur.data.dataset import DatasetInfo, Split
from secateur.training.engine import Engine


@torch.no_grad()
def accuracy(
    model: nn.Module, split: Split, info: DatasetInfo, engine: Engine | None = None
) -> tuple[float, float]:
    """Fraction of the images that are classified correctly, and the mean cross-entropy.

    Computed in float32 on the model's device; with an engine, in its precision and divided among
    its processes. The model is left in eval mode. It can be trained afterwards even if it caches
    tensors, since inference_mode is not used.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(2, device=device)  # correct predictions, cross-entropy
    rank, world = (engine.rank, engine.world) if engine else (0, 1)
    for images, labels in sequential_batches(split, info, device=device, rank=rank, world=world):
        with engine.autocast() if engine else contextlib.nullcontext():
            logits = model(images)
        logits = logits.float()
        sums[0] += (logits.argmax(1) == labels).sum()
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
    if engine:
        sums = engine.all_reduce(sums)
    return float(sums[0]) / len(split), float(sums[1]) / len(split)
