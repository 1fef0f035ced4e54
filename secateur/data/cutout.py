"""Cutout: hide a square at a random place of every training image.

Source: T. DeVries, G. Taylor, Improved regularization of convolutional neural networks with cutout,
arXiv 1708.04552, 2017. `torchvision.transforms.RandomErasing` draws once for a whole batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.data.augment import stream_generator

_CUTOUT_STREAM = 0x63757430
"""Separates these random numbers from those that shuffle, crop, flip and distort."""


def plan_cutouts(
    count: int, seed: int, epoch: int, side: int, size: Sequence[int]
) -> Tensor | None:
    """Draw the centres of the squares of `count` images: int64 (count, 2), row and column.

    The centres are uniform over the pixels of images of (height, width) `size`, and depend on the
    arguments alone. None if `side` is 0.
    """
    if not side:
        return None
    generator = stream_generator(_CUTOUT_STREAM, seed, epoch)
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in size], 1)


def hide_squares(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Fill squares of normalised images (count, channels, height, width) with 0, the mean colour.

    A square of `side` pixels begins side // 2 pixels above and to the left of its centre, and is
    clipped at the borders of the image. Changes `images` in place, and returns them.
    """
    hidden = []
    for length, centre in zip(images.shape[-2:], centres.T, strict=True):
        position = torch.arange(length, device=images.device)
        first = (centre - side // 2)[:, None]
        hidden.append((position >= first) & (position < first + side))
    rows, columns = hidden
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
