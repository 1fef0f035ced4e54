"""Batches of a data set: shuffled and augmented for training, sequential for evaluation."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur.base import allocator
from secateur.data import augment, cutout, warp
from secateur.data.augment import Augment, SamplePlan
from secateur.data.dataset import DatasetInfo, InMemoryImages, Split, channels_first
from secateur.data.image_loader import ImageFileLoader

_CPU = torch.device("cpu")


class Batches:
    """Shuffled mini-batches of training images, augmented and normalised.

    Order and augmentation depend on seed and epoch alone, so that training can resume at any epoch.
    The number of workers or processes, and whether images are in memory or files, has no influence.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        seed: int,
        *,
        device: torch.device = _CPU,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`batch_size` is the number of images over all `world` processes."""
        self.split, self.info, self.batch_size, self.seed = split, info, batch_size, seed
        self.device, self.rank, self.world = device, rank, world
        self.normalise = Normalise(info.mean, info.std, device)
        self.loader: _InMemoryLoader | ImageFileLoader
        if isinstance(split, InMemoryImages):
            self.loader = _InMemoryLoader(split, info.augment, device)
        else:
            self.loader = ImageFileLoader(split, info.augment, seed, device, world)

    def __len__(self) -> int:
        """Steps per epoch, equal for every process."""
        return -(-len(self.split) // self.batch_size)

    def order(self, number: int) -> Tensor:
        """Positions in the split of this process's images of an epoch, in order: int64."""
        image = augment.plan_epoch(len(self.split), self.seed, number, self.info.augment).image
        parts = _rank_slices(len(self.split), self.batch_size, self.rank, self.world)
        return torch.cat([image[part] for part in parts])

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once: float32 (batch, channels, height, width), and int64 labels (batch,).

        With several processes, each gets every `world`-th image of the global batch, starting at
        its rank; if the last batch is smaller than `world`, the last ranks get an empty batch
        (0, channels, ...). Raises DataError naming the file if an image cannot be decoded.
        """
        settings, count, (_, *size) = self.info.augment, len(self.split), self.info.shape
        plan = augment.plan_epoch(count, self.seed, number, settings)
        warps = warp.plan_warps(count, self.seed, number, settings)
        squares = cutout.plan_cutouts(count, self.seed, number, settings.cutout, size)
        labels = self.split.labels[plan.image].to(self.device)
        parts = _rank_slices(count, self.batch_size, self.rank, self.world)
        for pixels, part in zip(self.loader.batches(plan, parts), parts, strict=True):
            allocator.trim()
            if warps is not None:
                pixels = warp.warp(pixels, warps.part(part).to(self.device))
            images = self.normalise(channels_first(pixels))
            if squares is not None:
                cutout.hide_squares(images, squares[part].to(self.device), settings.cutout)
            yield images, labels[part]

    def close(self) -> None:
        """Stop the worker processes, if there are any."""
        self.loader.close()


class _InMemoryLoader:
    """Uint8 batches from images on the device, which are padded once in advance."""

    def __init__(self, split: InMemoryImages, settings: Augment, device: torch.device) -> None:
        self.settings = settings
        self.padded = augment.pad_images(split.pixels.to(device), settings.pad)

    def batches(self, plan: SamplePlan, parts: list[slice]) -> Iterator[Tensor]:
        """One batch per part of the plan: uint8 (batch, height, width, channels)."""
        plan = plan.to(self.padded.device)
        augmented = self.settings.pad or self.settings.flip
        for part in map(plan.part, parts):
            if augmented:
                yield augment.crop_and_flip(self.padded, part, self.settings.pad)
            else:
                yield self.padded.index_select(0, part.image)  # ten times as fast as [image]

    def close(self) -> None:
        """Nothing to stop."""


def sequential_batches(
    split: Split,
    info: DatasetInfo,
    *,
    device: torch.device,
    size: int = 1000,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in the order of the split, without augmentation; see `Batches.epoch`.

    A batch has `size` images over all processes, or fewer if it would exceed 64 MiB as float32. The
    last batch may be smaller, and empty for the last ranks.
    """
    size = max(1, min(size, 2**24 // math.prod(info.shape)))
    normalise = Normalise(info.mean, info.std, device)
    parts = _rank_slices(len(split), size, rank, world)
    labels = split.labels.to(device)
    if isinstance(split, InMemoryImages):
        images = split.pixels
        batches: Iterator[Tensor] = (images[part].to(device) for part in parts)
    else:
        loader = ImageFileLoader(split, None, 0, device, world)
        batches = loader.batches(augment.plan_sequential(len(split)), parts)
    for pixels, part in zip(batches, parts, strict=True):
        allocator.trim()
        yield normalise(channels_first(pixels)), labels[part]


def first_images(split: Split, info: DatasetInfo, count: int) -> Tensor:
    """The first `count` images (at most all), normalised: (count, channels, height, width).

    On the CPU; image files are decoded in this process.
    """
    return _images(split, info, torch.arange(min(count, len(split))))


def evenly_spaced_images(split: Split, info: DatasetInfo, count: int) -> Tensor:
    """`count` images (at most all), evenly spaced in the order of the split; see `first_images`.

    Image folders list one class after the other, so their first images belong to a single class.
    """
    count = min(count, len(split))
    return _images(split, info, torch.arange(count) * len(split) // max(count, 1))


def _images(split: Split, info: DatasetInfo, indices: Tensor) -> Tensor:
    """Images by their positions in the split, normalised, on the CPU."""
    if isinstance(split, InMemoryImages):
        pixels = split.pixels[indices]
    else:
        pixels = torch.from_numpy(np.stack([split.decode(int(index)) for index in indices]))
    return Normalise(info.mean, info.std, _CPU)(channels_first(pixels))


def example_batch(split: Split, info: DatasetInfo) -> tuple[Tensor, Tensor]:
    """The first images, normalised, and their labels; about as many pixels as 256 images of 32x32.

    At least 8 and at most 256 images, if the split has as many.
    """
    images = first_images(split, info, _example_size(info))
    return images, split.labels[: len(images)]


def stratified_batch(split: Split, info: DatasetInfo) -> tuple[Tensor, Tensor]:
    """A stratified sample of the split: images, normalised, and their labels.

    It has as many images as `example_batch`; the number of images of each class is proportional to
    its share of the split, to within one, whatever the order of the split.
    """
    count = min(_example_size(info), len(split))
    places = torch.arange(count) * len(split) // max(count, 1)
    indices = split.labels.argsort(stable=True)[places]
    return _images(split, info, indices), split.labels[indices]


def _example_size(info: DatasetInfo) -> int:
    """Images with as many pixels as 256 of 32x32, at least 8 and at most 256."""
    _, height, width = info.shape
    return max(8, min(256, 256 * 32 * 32 // (height * width)))


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float], white: int = 255, *, device: torch.device = _CPU
) -> tuple[Tensor, Tensor]:
    """Factor and summand that normalise pixels from 0 to `white`, each (1, channels, 1, 1).

    `mean` and `std`, one value per channel or one for all, are those of pixels in [0, 1].
    """
    deviation = torch.tensor(std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    return 1 / (white * deviation), -centre / deviation


class Normalise:
    """Turns uint8 pixels into float32: (pixel / 255 - mean) / std, by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        """`mean` and `std` have one value per channel and apply to pixels in [0, 1]."""
        self.scale, self.shift = scale_and_shift(mean, std, device=device)
        self.centred = any(mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch (count, channels, height, width); its memory format is preserved."""
        batch = pixels * self.scale
        return batch.add_(self.shift) if self.centred else batch


def _rank_slices(count: int, size: int, rank: int, world: int) -> list[slice]:
    """Positions of one process in each global batch of `size` images."""
    starts = range(0, count, size)
    return [slice(start + rank, min(start + size, count), world) for start in starts]
