"""CIFAR-100: 50,000 + 10,000 colour photographs of 32x32 pixels in a hundred (fine) classes.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

from pathlib import Path

from secateur.base.sections import Strict
from secateur.data.augment import Augment
from secateur.data.dataset import Images
from secateur.datasets import _torchvision
from secateur.datasets._normalisation import Normalisation


class Settings(Strict):
    """Scaling and augmentation."""

    normalise: Normalisation = "cifar100"
    """Published code differs: Regularization-Pruning uses these values, most uses CIFAR-10's."""
    augment: Augment = Augment(pad=4, flip=True)


def read(settings: Settings, root: Path) -> Images:
    """The images from `root`/cifar-100-python, downloaded only if they are not there."""
    return _torchvision.cifar_images("CIFAR100", root, settings.normalise, settings.augment)
