"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: no download.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test
part). A fifth of them, stratified by class, is held out as test images.
"""

from pathlib import Path

import torch

from secateur.base.sections import Strict
from secateur.data.dataset import Images, InMemoryImages


class Settings(Strict):
    """The digits have no settings."""


def read(settings: Settings, root: Path) -> Images:
    """All digits as (1, 8, 8) images; the original grey levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    everything = InMemoryImages(pixels, torch.from_numpy(digits.target).long())
    return Images(
        everything.take(sorted(train)),
        everything.take(sorted(test)),
        list("0123456789"),
        (0,),
        (1,),
    )
