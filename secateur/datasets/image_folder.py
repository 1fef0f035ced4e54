"""Your own images: `train/<class>/*.jpg`, `test/<class>/*.jpg` and optionally `val/<class>/*.jpg`.

Also png, bmp, gif (its first frame), ppm, pgm, tif and webp. The class folders of `train`, sorted
by name, are the classes, and each must have images in every split. Folders in a class's folder
belong to the class. Hidden files and notes (txt, md, csv, json, xml, ...) are ignored, any other
file is an error. A `val/` is used to select epochs; `data.validation` is not applied then.

Grey images among coloured ones become coloured; if all are grey, the network sees one channel.
Transparency is dropped, and orientation tags of cameras (EXIF) are ignored, as by torchvision.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from secateur.base.sections import Strict
from secateur.data.augment import FileAugment
from secateur.data.dataset import Images
from secateur.datasets import _folders
from secateur.datasets._normalisation import Normalisation, normalisation


class Settings(Strict):
    """Where the images are, and how they are brought to one size."""

    folder: _folders.FolderName = "images"
    """Folder of the images, below SECATEUR_DATA."""
    size: Annotated[int, Field(ge=4, le=1024)] | None = None
    """Pixels of the shorter side before the centre is cropped; null: all images have one size."""
    channels: Literal[1, 3] | None = None
    """1: grey, 3: red, green and blue; null: 1 if all images are grey."""
    normalise: Normalisation = "imagenet"
    augment: FileAugment = FileAugment(flip=True)
    memory_mb: Annotated[int, Field(ge=0)] = 1024
    """MiB of decoded images that are kept in memory at most, which trains much faster; more images,
    or any with `augment.area` below 1, are decoded by workers while training."""
    version: Annotated[int, Field(ge=0)] = 0
    """Raise it when the images have changed: DVC does not look into the folder."""


def read(settings: Settings, root: Path) -> Images:
    """The images below `root`/`folder`, in memory or as a list of files.

    In both cases each is decoded once. Raises DataError naming the first file that is damaged.
    """
    parts = {"train": "train", "val": "val", "test": "test"}
    found = _folders.scan(root, settings.folder, parts)
    view = _folders.common_view(found, settings.size, settings.size, settings.channels)
    listings = found.file_lists(view)
    fits = len(found) * view.bytes <= settings.memory_mb * 2**20
    images = (
        _folders.decode_all(listings)
        if fits and settings.augment.area == 1
        else _folders.hash_all(listings)
    )
    return Images(
        images["train"],
        images["test"],
        found.classes,
        *normalisation(settings.normalise, view.channels),
        settings.augment,
        images.get("val"),
    )
