"""Your own images: `train/<class>/*.jpg`, `test/<class>/*.jpg` and optionally `val/<class>/*.jpg`.

Also png, bmp, gif (its first frame), ppm, pgm, tif and webp. The class folders of `train`, sorted
by name, are the classes, and each must have images in every split. Subfolders of a class's folder
belong to the class. Hidden files and text files (txt, md, csv, json, xml, ...) are ignored, any
other file is an error. If there is a `val/`, it is used to select epochs, and `data.validation` is
not applied.

Grey images among colour images are converted to RGB; if all are grey, the network gets one channel.
Transparency is dropped, and orientation tags of cameras (EXIF) are ignored, as in torchvision.
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
    """Where the images are, and how they are resized."""

    folder: _folders.FolderName = "images"
    """Folder of the images, inside SECATEUR_DATA."""
    size: Annotated[int, Field(ge=4, le=1024)] | None = None
    """Height and width in pixels to which images are resized and centre-cropped; null: all images
    must have one size."""
    channels: Literal[1, 3] | None = None
    """1: greyscale, 3: RGB; null: 1 if all images are grey, otherwise 3."""
    normalise: Normalisation = "imagenet"
    augment: FileAugment = FileAugment(flip=True)
    memory_mb: Annotated[int, Field(ge=0)] = 1024
    """Largest size in MiB of decoded images that are held in memory, which makes training much
    faster. Larger data sets, and any with `augment.area` below 1, are decoded during training."""
    version: Annotated[int, Field(ge=0)] = 0
    """Raise it when the images have changed: DVC does not watch the folder."""


def read(settings: Settings, root: Path) -> Images:
    """The images in `root`/`folder`, in memory or as a list of files.

    In both cases every image is decoded once. Raises DataError naming the first damaged file.
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
