"""Progressive resizing: smaller images in the first epochs of a training.

The cost of a step falls with the number of pixels, and features learnt on small images are useful
for large images too. Source: M. Tan, Q. Le, EfficientNetV2: Smaller models and faster training,
ICML 2021, section 4 (there the augmentation grows with the images; here it does not). Accuracy on
validation images is always measured at the full size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.base.sections import ImageScale, Train


class ProgressiveResizing:
    """The size of the training images by epoch; the last epoch always has the full size."""

    def __init__(self, settings: Train) -> None:
        self.parts = [
            (min(round(part.until * settings.epochs), settings.epochs - 1), part.scale)
            for part in settings.progressive_resizing
        ]

    def scale(self, epoch: int) -> float:
        """Scale of height and width in an epoch (counted from 0); 1 is the full size."""
        return next((scale for end, scale in self.parts if epoch < end), 1.0)

    def pixels(self, epoch: int) -> float:
        """Number of pixels in an epoch, relative to the full size: about its relative cost."""
        return self.scale(epoch) ** 2

    def __call__(self, images: Tensor, epoch: int) -> Tensor:
        """Resize images (n, channels, height, width) to the size of the epoch.

        Bilinear interpolation with antialiasing. At the full size, `images` itself is returned.
        """
        scale = self.scale(epoch)
        if scale == 1.0 or not len(images):
            return images
        size = scaled(images.shape[-2:], scale)
        return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def scaled(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Height and width at a scale, rounded, at least one pixel each."""
    height, width = (max(1, round(scale * length)) for length in size)
    return height, width


@torch.no_grad()
def check(
    model: nn.Module,
    parts: Sequence[ImageScale],
    shape: Sequence[int],
    what: str = "network",
) -> None:
    """Raise ArgumentError if the network does not accept images of (channels, height, width)
    `shape` at one of the scales; `what` is its role, for the message.

    A network with a linear layer on the pixels of its last feature map accepts only one size, a
    network with global pooling many. The network is called in eval mode, and not changed.
    """
    if not parts:
        return
    training = model.training
    parameter = next(model.parameters())
    model.eval()
    try:
        for part in parts:
            height, width = scaled(shape[-2:], part.scale)
            image = torch.zeros(1, shape[0], height, width, device=parameter.device)
            try:
                model(image)
            except Exception as error:  # of many types: vision transformers assert their size
                reason = " ".join(str(error).split())[:120] or type(error).__name__
                raise ArgumentError(
                    "progressive_resizing",
                    f"the {what} does not take images of {height}x{width} (scale {part.scale:g}), "
                    f"only of {shape[-2]}x{shape[-1]}: {reason}; take none, or a {what} with "
                    "global pooling",
                ) from None
    finally:
        model.train(training)
