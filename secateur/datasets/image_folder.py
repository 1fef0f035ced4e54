"""Your own pictures: `train/<class>/*.jpg` and `test/<class>/*.jpg`, perhaps `val/<class>/*.jpg`.

Also png, bmp, gif (its first picture), ppm, pgm, tif and webp. The class folders of `train`, sorted
by name, are the classes, and each must have pictures in every part. Folders in a class's folder
belong to the class. Hidden files and notes (txt, md, csv, json, xml, ...) are passed over, any
other file is refused. A `val/` of theirs picks the epochs; `data.validation` is not applied then.

Grey pictures among coloured ones become coloured; if all are grey, the network sees one channel.
Transparency is dropped, and rotation marks of cameras (EXIF) are not followed, as by torchvision.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from secateur.base.settings import Strict
from secateur.data.augment import FileAugment
from secateur.data.dataset import Images
from secateur.datasets import _folders as pictures
from secateur.datasets._normalisation import Normalisation, normalisation


class Settings(Strict):
    """Where the pictures are, and how they become images of one size."""

    folder: pictures.FolderName = "images"
    """Their folder, below the one that SECATEUR_DATA names."""
    size: Annotated[int, Field(ge=4, le=1024)] | None = None
    """Bring the shorter side to so many pixels and cut out the middle; null: all have one size."""
    channels: Literal[1, 3] | None = None
    """1: grey, 3: red, green and blue; null: 1 if all pictures are grey."""
    normalise: Normalisation = "imagenet"
    augment: FileAugment = FileAugment(flip=True)
    memory_mb: Annotated[int, Field(ge=0)] = 1024
    """Decoded pictures of up to so many MiB are kept in memory, which trains much faster; more of
    them, or any with `augment.area` below 1, are decoded by workers while training."""
    version: Annotated[int, Field(ge=0)] = 0
    """Raise it when the pictures have changed: DVC does not look into the folder."""


def read(settings: Settings, root: Path) -> Images:
    """The pictures below `root`/`folder`, in memory or as a list of files.

    Either way each is decoded once, so that a damaged one is named now.
    """
    parts = {"train": "train", "val": "val", "test": "test"}
    found = pictures.find(root, settings.folder, parts)
    view = pictures.view(found, settings.size, settings.size, settings.channels)
    listings = found.listings(view)
    fits = len(found) * view.bytes <= settings.memory_mb * 2**20
    images = (
        pictures.decoded(listings)
        if fits and settings.augment.area == 1
        else pictures.checked(listings)
    )
    return Images(
        images["train"],
        images["test"],
        found.classes,
        *normalisation(settings.normalise, view.channels),
        settings.augment,
        images.get("val"),
    )
