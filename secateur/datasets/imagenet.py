"""ImageNet (ILSVRC 2012) as unpacked folders: 1.28 million + 50,000 photographs in 1,000 classes.

Source: O. Russakovsky et al., ImageNet large scale visual recognition challenge, IJCV 2015. It
cannot be downloaded without an account: `train/<class>/` and `val/<class>/` must exist. Its
validation images are the test images here; any subset of the classes is accepted.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from secateur.base.sections import Strict
from secateur.data.augment import FileAugment
from secateur.data.dataset import Images
from secateur.data.image_files import ImageView
from secateur.datasets import _folders
from secateur.datasets._normalisation import Normalisation, normalisation


class Settings(Strict):
    """Where the images are, and how they are resized."""

    folder: _folders.FolderName = "imagenet"
    """Folder of the images, inside SECATEUR_DATA."""
    size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Height and width of the network's input, in pixels."""
    resize: Annotated[int, Field(ge=8, le=2048)] = 256
    """Pixels of the shorter side before the centre crop, in evaluation."""
    normalise: Normalisation = "imagenet"
    augment: FileAugment = FileAugment(area=0.08, flip=True)
    version: Annotated[int, Field(ge=0)] = 0
    """Raise it when the files have changed: DVC does not watch the folder."""

    @field_validator("resize")
    @classmethod
    def _holds_the_middle(cls, resize: int, info: ValidationInfo) -> int:
        if resize < info.data.get("size", 0):
            raise ValueError(f"must not be less than size ({info.data['size']})")
        return resize


def read(settings: Settings, root: Path) -> Images:
    """A list of the files in `root`/`folder`; no file is opened.

    Names and sizes are hashed, not contents. A damaged file is an error when training decodes it.
    """
    found = _folders.scan(root, settings.folder, {"train": "train", "test": "val"})
    parts = found.file_lists(ImageView(3, settings.size, settings.size, settings.resize))
    scale = normalisation(settings.normalise)
    return Images(parts["train"], parts["test"], found.classes, *scale, settings.augment)
