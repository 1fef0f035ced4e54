"""Small rotations and elastic distortions, drawn separately for every image of a batch.

torchvision's transforms draw once per batch, so they would have to be called image by image.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.data.augment import Augment, stream_generator

GRID = 4
"""Rows and columns of the coarse grid on which elastic displacements are drawn."""
_WARP_STREAM = 0x77617270
"""Separates these random numbers from those for shuffling, crops and flips."""


class WarpPlan(NamedTuple):
    """The distortions of the images of an epoch, or of a part of it, in the order of the epoch."""

    angle: Tensor
    """float32 (count,): counter-clockwise, in radians."""
    displacement: Tensor
    """float32 (count, 2, GRID, GRID): displacement of the place that a pixel is taken from, to the
    right and down, in pixels."""

    def part(self, positions: slice) -> "WarpPlan":
        """The plan for a slice of the epoch."""
        return WarpPlan(self.angle[positions], self.displacement[positions])

    def to(self, device: torch.device) -> "WarpPlan":
        """The plan with its tensors on a device."""
        return WarpPlan(self.angle.to(device), self.displacement.to(device))


def plan_warps(count: int, seed: int, epoch: int, augment: Augment) -> WarpPlan | None:
    """Draw the distortions of `count` images; they depend on the arguments alone.

    Angles are uniform up to `augment.rotate` degrees to both sides, displacements are normal. None
    if both are off.
    """
    if not augment.rotate and not augment.elastic:
        return None
    generator = stream_generator(_WARP_STREAM, seed, epoch)
    angle = (torch.rand(count, generator=generator) * 2 - 1) * np.deg2rad(augment.rotate)
    coarse = torch.zeros(count, 2, GRID, GRID)
    if augment.elastic:
        coarse = torch.randn(coarse.shape, generator=generator) * augment.elastic
    return WarpPlan(angle.float(), coarse)


def warp(pixels: Tensor, plan: WarpPlan) -> Tensor:
    """Distort images (count, height, width, channels) of any type; returns float32, same shape.

    Each pixel is interpolated linearly at the place that it is taken from; outside of the image is
    black. That place is the pixel's position rotated about the centre, plus a displacement, which
    is interpolated by cubic polynomials from the coarse grid, whose corners are the corners of the
    image (as O. Ronneberger et al., U-Net, MICCAI 2015, after P. Simard et al., ICDAR 2003).
    """
    _, height, width, _ = pixels.shape
    across = torch.arange(width, device=pixels.device) - (width - 1) / 2
    down = torch.arange(height, device=pixels.device) - (height - 1) / 2
    sine, cosine = plan.angle.sin()[:, None, None], plan.angle.cos()[:, None, None]
    x = cosine * across - sine * down[:, None]  # rows point down: counter-clockwise when displayed
    y = sine * across + cosine * down[:, None]
    fine = F.interpolate(plan.displacement, (height, width), mode="bicubic", align_corners=True)
    x, y = x + fine[:, 0], y + fine[:, 1]
    places = torch.stack([x / max((width - 1) / 2, 0.5), y / max((height - 1) / 2, 0.5)], 3)
    images = pixels.permute(0, 3, 1, 2).float()
    return F.grid_sample(images, places, align_corners=True).permute(0, 2, 3, 1)
