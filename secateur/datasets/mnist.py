"""MNIST: 60,000 + 10,000 handwritten digits of 28x28 pixels.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document
recognition, Proceedings of the IEEE, 1998.
"""

from dataclasses import replace
from pathlib import Path

from secateur.base.sections import Strict
from secateur.data.augment import Augment
from secateur.data.dataset import Images
from secateur.datasets import _torchvision


class Settings(Strict):
    """Scaling of the pixels, and augmentation."""

    normalise: bool = False
    """Subtract the mean 0.1307 and divide by the standard deviation 0.3081; otherwise pixels stay
    in [0, 1]."""
    augment: Augment = Augment()


def read(settings: Settings, root: Path) -> Images:
    """The images from `root`/MNIST/raw, downloaded only if they are not there."""
    images = _torchvision.idx_images(
        "MNIST", root, list("0123456789"), 0.1307, 0.3081, settings.normalise
    )
    return replace(images, augment=settings.augment)
