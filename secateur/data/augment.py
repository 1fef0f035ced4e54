"""Random crops and flips: drawn for a whole epoch, applied to a whole batch at once."""

import math
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from secateur.base.sections import Strict


class Augment(Strict):
    """Random augmentation of training images; images for evaluation are not augmented."""

    pad: Annotated[int, Field(ge=0, le=512)] = 0
    """Pixels of black padding around an image, before a crop of the original size; 0: off."""
    flip: bool = False
    """Mirror half of the images, left to right."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest angle of the rotation to either side, in degrees; see data/warp.py."""
    elastic: Annotated[float, Field(ge=0, le=64)] = 0.0
    """Standard deviation, in pixels, of the displacements of an elastic distortion."""
    cutout: Annotated[int, Field(ge=0, le=1024)] = 0
    """Side, in pixels, of a square that is hidden in every image; 0: off. See data/cutout.py."""

    @property
    def nothing(self) -> bool:
        """Whether there is no augmentation, so that an image is the same in every epoch."""
        return self == type(self)()


class FileAugment(Augment):
    """Augmentation of images that are decoded anew in every epoch."""

    area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest area of random crops, as a fraction of the image; crops have an aspect ratio of 3:4
    to 4:3 and are resized to the input size. 1: off."""


class SamplePlan(NamedTuple):
    """Order, crops and flips of the images of an epoch, or of a part of it: tensors (count,)."""

    epoch: int
    image: Tensor
    """int64: index of each image."""
    top: Tensor
    """int64: first row of the crop in the padded image, 0 to twice the padding."""
    left: Tensor
    """int64: first column of the crop."""
    flip: Tensor
    """bool: whether the image is mirrored."""

    def part(self, positions: slice) -> "SamplePlan":
        """The plan for a slice of the epoch."""
        return SamplePlan(self.epoch, *(tensor[positions] for tensor in self[1:]))

    def to(self, device: torch.device) -> "SamplePlan":
        """The plan with its tensors on a device."""
        return SamplePlan(self.epoch, *(tensor.to(device) for tensor in self[1:]))


def plan_epoch(count: int, seed: int, epoch: int, augment: Augment) -> SamplePlan:
    """Shuffle `count` images and draw their crops and flips; depends on the arguments alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    index = torch.randperm(count, generator=generator)
    top, left = torch.randint(2 * augment.pad + 1, (2, count), generator=generator)
    flip = torch.randint(2, (count,), generator=generator) < int(augment.flip)
    return SamplePlan(epoch, index, top, left, flip)


def stream_generator(stream: int, seed: int, epoch: int) -> torch.Generator:
    """A generator of random numbers that are independent of those of every other `stream`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, epoch))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def plan_sequential(count: int) -> SamplePlan:
    """All images in the order of the split, neither cropped nor flipped."""
    index, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    return SamplePlan(0, index, zeros, zeros, zeros.bool())


def pad_images(images: Tensor, pad: int) -> Tensor:
    """Images (count, height, width, channels) with `pad` pixels of black on every side."""
    return torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad)) if pad else images


def crop_and_flip(padded: Tensor, plan: SamplePlan, pad: int) -> Tensor:
    """Crop and mirror as planned, in one gather of pixels.

    `padded` comes from `pad_images` and lies on the plan's device. Returns
    (len(plan.image), height, width, channels), height and width being those without padding.
    """
    _, padded_height, padded_width, channels = padded.shape
    height, width = padded_height - 2 * pad, padded_width - 2 * pad
    down = torch.arange(height, device=padded.device)
    across = torch.arange(width, device=padded.device)
    rows = plan.image[:, None] * padded_height + plan.top[:, None] + down
    columns = torch.where(plan.flip[:, None], across.flip(0), across) + plan.left[:, None]
    pixels = rows[:, :, None] * padded_width + columns[:, None, :]
    gathered = padded.view(-1, channels).index_select(0, pixels.flatten())
    return gathered.view(len(plan.image), height, width, channels)


def random_resized_crop(
    size: tuple[int, int], min_area: float, seed: int, epoch: int, index: int
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop of an image of (width, height) `size`.

    The usual crop for ImageNet (C. Szegedy et al., Going deeper with convolutions, CVPR 2015): the
    area is uniform between `min_area` and 1, as a fraction of the image, the logarithm of the
    aspect ratio uniform between those of 3:4 and 4:3. Of ten tries the first that fits is taken; if
    none fits, a centre crop with the nearest aspect ratio. The result depends on the arguments
    alone; `index` is that of the image.
    """
    width, height = size
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, index]))
    max_log_ratio = math.log(4 / 3)
    for u_area, u_ratio, u_top, u_left in rng.random((10, 4)).tolist():
        area = width * height * (min_area + u_area * (1 - min_area))
        ratio = math.exp(max_log_ratio * (2 * u_ratio - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h
