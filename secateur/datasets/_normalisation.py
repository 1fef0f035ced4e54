"""Means and standard deviations of pixels in common use, by the data set they describe."""

from typing import Literal

Normalisation = Literal["cifar10", "cifar100", "imagenet", "none"]
"""Data set whose mean and standard deviation are used; none: pixels stay in [0, 1]."""
_NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0,) * 3, (1.0,) * 3),
}


def normalisation(
    name: Normalisation, channels: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1].

    With one channel, the averages over the three channels. cifar10's standard deviations are
    averages over single images (over all pixels they are near 0.25); most published code uses them.
    """
    mean, std = _NORMALISATIONS[name]
    if channels == 1:
        return (sum(mean) / 3,), (sum(std) / 3,)
    return mean, std
