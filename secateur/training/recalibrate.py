"""New statistics of batch normalisations; pruning changes what they should be."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.sparsity.masks import BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set running means and variances to the averages over batches of images, in place.

    All batches have equal weight, so they should have one size. Other layers (dropout) stay in eval
    mode, and so does the model afterwards. Returns the number of normalisations.
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
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return len(norms)
