"""CIFAR-10: 50,000 + 10,000 colour photographs of 32x32 pixels in ten classes.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009. Padding by 4,
random crop and mirror images are the usual augmentation since C.-Y. Lee et al., Deeply-supervised
nets, AISTATS 2015.
"""

from pathlib import Path

from secateur.base.sections import Strict
from secateur.data.augment import Augment
from secateur.data.dataset import Images
from secateur.datasets import _torchvision
from secateur.datasets._normalisation import Normalisation


class Settings(Strict):
    """Scaling and augmentation."""

    normalise: Normalisation = "cifar10"
    """Published code differs: most uses CIFAR-10's values, Regularization-Pruning ImageNet's."""
    augment: Augment = Augment(pad=4, flip=True)


def read(settings: Settings, root: Path) -> Images:
    """The images from `root`/cifar-10-batches-py, downloaded only if they are not there."""
    return _torchvision.cifar_images("CIFAR10", root, settings.normalise, settings.augment)
