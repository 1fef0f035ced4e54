"""ImageNet (ILSVRC 2012) as unpacked folders: 1.28 million + 50,000 photographs in 1,000 classes.

Source: O. Russakovsky et al., ImageNet large scale visual recognition challenge, IJCV 2015. It
cannot be downloaded without an account: `train/<class>/` and `val/<class>/` must be there. Its
validation images are the test images here; any subset of the classes will do.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from secateur.base.settings import Strict
from secateur.data.augment import FileAugment
from secateur.data.dataset import Images
from secateur.data.image_files import ImageView
from secateur.datasets import _folders as pictures
from secateur.datasets._normalisation import Normalisation, normalisation


class Settings(Strict):
    """Where it is, and how photographs become images of one size."""

    folder: pictures.FolderName = "imagenet"
    """Its folder, below the one that SECATEUR_DATA names."""
    size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Pixels of each side of what the network sees."""
    resize: Annotated[int, Field(ge=8, le=2048)] = 256
    """In evaluation the shorter side is brought to so many pixels, and the middle is cut out."""
    normalise: Normalisation = "imagenet"
    augment: FileAugment = FileAugment(area=0.08, flip=True)
    version: Annotated[int, Field(ge=0)] = 0
    """Raise it when the files have changed: DVC does not look into the folder."""

    @field_validator("resize")
    @classmethod
    def _holds_the_middle(cls, resize: int, info: ValidationInfo) -> int:
        if resize < info.data.get("size", 0):
            raise ValueError(f"must not be less than size ({info.data['size']})")
        return resize


def read(settings: Settings, root: Path) -> Images:
    """A list of the photographs below `root`/`folder`, none of them opened yet.

    What is hashed of them is names and sizes. A damaged one is named when training comes to it.
    """
    found = pictures.find(root, settings.folder, {"train": "train", "test": "val"})
    parts = found.listings(ImageView(3, settings.size, settings.size, settings.resize))
    scale = normalisation(settings.normalise)
    return Images(parts["train"], parts["test"], found.classes, *scale, settings.augment)
