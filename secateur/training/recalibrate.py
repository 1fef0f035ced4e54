"""Measure batch-norm statistics again, since pruning changes the activations."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from secateur.base.errors import TrainingError
from secateur.data.batches import Batches
from secateur.data.dataset import Dataset
from secateur.sparsity.masks import BatchNorm

BATCH = 128
"""Images per batch over which statistics are computed."""


def recalibrate_on(
    model: nn.Module, data: Dataset, images: int, device: torch.device
) -> tuple[int, int]:
    """Recalibrate on at most `images` training images, a random sample that is always the same.

    The network must be on `device`. Returns the numbers of normalisations and of images.
    """
    size = min(BATCH, images, len(data.train))
    whole = max(1, min(images, len(data.train)) // size)  # of equal size, so that all weigh equally
    batches = Batches(data.train, data.info, size, 0, device=device)
    try:
        norms = recalibrate(model, (x for x, _ in islice(batches.epoch(0), whole)))
    finally:
        batches.close()
    return norms, whole * size


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set running means and variances to the averages over batches of images, in place.

    All batches have equal weight, so they should have the same size. Other layers (dropout) are in
    eval mode, and so is the model afterwards. Returns the number of normalisations. Raises
    TrainingError for a batch of one image if a normalisation has feature maps of one pixel.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    try:
        for images in batches:
            model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "recalibrate: a single image is too few for a batch normalisation of single pixels; "
            "ask for more images, or for 0 to keep the statistics"
        ) from None
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return len(norms)
