"""Random crops and mirror images: drawn for a whole epoch, made for a whole batch at once."""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from secateur.base.settings import Strict


class Augment(Strict):
    """What happens to training images at random; evaluation sees them as they are."""

    pad: Annotated[int, Field(ge=0, le=512)] = 0
    """Pixels of black put around an image before a crop of its own size is taken; 0 is off."""
    flip: bool = False
    """Mirror half of the images, left to right."""


class FileAugment(Augment):
    """The same for pictures that are decoded anew in every epoch."""

    area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Crops of at least this share of the picture, of 3:4 to 4:3, stretched to size; 1 is off."""


class Draw(NamedTuple):
    """Which images come, in which order, and how far each is moved: tensors (count,)."""

    epoch: int
    image: Tensor
    top: Tensor
    """First row of the crop in the padded image, 0 to twice the padding."""
    left: Tensor
    flip: Tensor
    """Bool: mirrored or not."""

    def part(self, part: slice) -> "Draw":
        """What is drawn for some positions of the epoch."""
        return Draw(self.epoch, *(tensor[part] for tensor in self[1:]))

    def to(self, device: torch.device) -> "Draw":
        """The same on another device."""
        return Draw(self.epoch, *(tensor.to(device) for tensor in self[1:]))


def draw(count: int, seed: int, epoch: int, augment: Augment) -> Draw:
    """Shuffle `count` images and draw their crops; depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    index = torch.randperm(count, generator=generator)
    top, left = torch.randint(2 * augment.pad + 1, (2, count), generator=generator)
    flip = torch.randint(2, (count,), generator=generator) < int(augment.flip)
    return Draw(epoch, index, top, left, flip)


def still(count: int) -> Draw:
    """All images in their order, unmoved."""
    index, nothing = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    return Draw(0, index, nothing, nothing, nothing.bool())


def padded(images: Tensor, pad: int) -> Tensor:
    """(count, height, width, channels) with `pad` pixels of black on every side."""
    return torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad)) if pad else images


def moved(images: Tensor, draw: Draw, pad: int) -> Tensor:
    """Crop and mirror what is drawn from `padded` images, in one gather of pixels.

    `images` and `draw` lie on the same device. Gives (len(draw.image), height, width, channels).
    """
    _, tall, wide, channels = images.shape
    height, width = tall - 2 * pad, wide - 2 * pad
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    rows = draw.image[:, None] * tall + draw.top[:, None] + down
    columns = torch.where(draw.flip[:, None], across.flip(0), across) + draw.left[:, None]
    pixels = rows[:, :, None] * wide + columns[:, None, :]
    found = images.view(-1, channels).index_select(0, pixels.flatten())
    return found.view(len(draw.image), height, width, channels)
