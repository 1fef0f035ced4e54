"""Fashion-MNIST: 60,000 + 10,000 pictures of clothing, 28x28 pixels, in MNIST's format.

Source: H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017.
"""

from dataclasses import replace
from pathlib import Path

from secateur.base.sections import Strict
from secateur.data.augment import Augment
from secateur.data.dataset import Images
from secateur.datasets import _torchvision

_CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip


class Settings(Strict):
    """Scaling of the pixels, and augmentation."""

    normalise: bool = False
    """Subtract the mean 0.2860 and divide by the standard deviation 0.3530; otherwise pixels stay
    in [0, 1]."""
    augment: Augment = Augment()


def read(settings: Settings, root: Path) -> Images:
    """The images from `root`/FashionMNIST/raw, downloaded only if they are not there."""
    images = _torchvision.idx_images(
        "FashionMNIST", root, _CLASSES, 0.2860, 0.3530, settings.normalise
    )
    return replace(images, augment=settings.augment)
