"""Pictures in folders, one a class: found, looked over, and decoded or listed.

Expected is `<part>/<class>/<picture>` below the data set's folder, `<part>` being train, test and
perhaps val; folders within a class's folder belong to the class. All orders are by the bytes of the
names, so that neither file system nor number of threads makes a difference.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator
from rich.console import Console
from rich.progress import Progress

from secateur.base import machine
from secateur.base.errors import DataError
from secateur.data.dataset import InMemoryImages
from secateur.data.image_files import GREY, ImageFileList, ImageView, PackedNames, opened

PICTURES = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Endings of pictures, in small letters."""
NOTES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".ini", ".db"}
"""Endings of files that are passed over, as hidden ones are; any other is a mistake."""

T = TypeVar("T")


def _below_the_raw_folder(name: str) -> str:
    if Path(name).is_absolute() or {"..", ""} & set(name.split("/")):
        raise ValueError("a folder's name, below the one that SECATEUR_DATA names")
    return name


FolderName = Annotated[str, AfterValidator(_below_the_raw_folder)]
"""Of a folder below the raw one: where that is differs between machines, and is no setting."""


@dataclass(frozen=True)
class Found:
    """The pictures of a data set by part, before any is opened."""

    base: Path
    folder: str
    classes: list[str]
    parts: dict[str, list[tuple[bytes, int, int]]]
    """train, test and perhaps val: name below the folder, label, size in bytes."""

    def paths(self) -> list[Path]:
        """All pictures, part by part."""
        root = self.base / self.folder
        return [root / os.fsdecode(name) for part in self.parts.values() for name, _, _ in part]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def listings(self, view: ImageView) -> dict[str, ImageFileList]:
        """The pictures as `view` shows them."""
        return {
            key: ImageFileList(
                self.base,
                self.folder,
                PackedNames.pack([name for name, _, _ in part]),
                torch.tensor([label for _, label, _ in part]),
                torch.tensor([size for _, _, size in part]),
                torch.empty(len(part), 0, dtype=torch.uint8),
                view,
            )
            for key, part in self.parts.items()
        }


def find(base: Path, folder: str, parts: Mapping[str, str]) -> Found:
    """Look for the pictures of train, test and perhaps val, whose folders `parts` gives.

    The class folders of train, sorted, are the classes. Raises DataError if there is no such
    folder, a class lacks pictures in any part, a part has a class that train has not, a file is
    neither picture nor note, or a picture lies outside the class folders.
    """
    root = base / folder
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; it is to hold {parts['train']}/<class>/ and "
            f"{parts['test']}/<class>/ with pictures. SECATEUR_DATA names the folder that holds "
            f"{folder}/"
        )
    classes: list[str] = []
    found = {}
    for part, name in parts.items():
        here = root / name
        if not here.is_dir():
            if part == "val":
                continue
            raise DataError(f"{here}: no such folder; it is to hold <class>/ with pictures")
        there = [os.fsdecode(entry.name) for entry in _entries(here) if _is_class(entry)]
        classes = classes or there
        if not classes:
            raise DataError(f"{here}: no class folders; pictures go to {name}/<class>/")
        if unknown := sorted(set(there) - set(classes)):
            raise DataError(f"{here / unknown[0]}: {parts['train']}/ has no such class")
        found[part] = [
            (f"{name}/".encode() + path, label, size)
            for label, title in enumerate(classes)
            for path, size in _pictures(here / title, os.fsencode(title))
        ]
    return Found(base, folder, classes, found)


def view(found: Found, size: int | None, resize: int | None, channels: int | None) -> ImageView:
    """The view that fits: `size` and `channels` where given, else what all pictures have.

    Looks into the header of each picture only where something is not given. With `channels` None
    it is 1 if all are grey, else 3. Raises DataError if sizes differ and `size` is None.
    """
    if size is not None and channels is not None:
        return ImageView(channels, size, size, resize)

    def header(path: Path) -> tuple[tuple[int, int], bool]:
        with opened(path) as picture:
            return picture.size, picture.mode in GREY

    paths = found.paths()
    first: tuple[int, int] | None = None
    grey = True
    for path, (shape, plain) in zip(paths, _each(header, paths, found.folder, "seen"), strict=True):
        first, grey = first or shape, grey and plain
        if size is None and shape != first:
            raise DataError(
                f"{path}: {shape[0]}x{shape[1]} pixels, where {paths[0].name} has "
                f"{first[0]}x{first[1]}; set datasets.<name>.size to bring all to one size"
            )
    assert first is not None, "find() refuses folders without pictures"
    width, height = first
    channels = channels or (1 if grey else 3)
    if size is not None:
        return ImageView(channels, size, size, resize)
    return ImageView(channels, height, width, None)


def decoded(listings: dict[str, ImageFileList]) -> dict[str, InMemoryImages]:
    """The pictures themselves, in memory, as evaluation sees them.

    Raises DataError naming the first file that is damaged.
    """
    splits = {}
    for key, listing in listings.items():
        channels, height, width = listing.shape
        pixels = torch.empty(len(listing), height, width, channels, dtype=torch.uint8)
        target = pixels.numpy()

        def put(index: int, listing: ImageFileList = listing, target: np.ndarray = target) -> None:
            target[index] = listing.image(index)

        for _ in _each(put, range(len(listing)), f"{listing.folder} {key}", "decoded"):
            pass
        splits[key] = InMemoryImages.of(pixels, listing.labels)
    return splits


def checked(listings: dict[str, ImageFileList]) -> dict[str, ImageFileList]:
    """The same with the hash of every file's content; each is decoded once to see that it can be.

    Raises DataError naming the first file that is damaged.
    """
    done = {}
    for key, listing in listings.items():

        def check(index: int, listing: ImageFileList = listing) -> bytes:
            listing.image(index)
            return hashlib.sha256(listing.path(index).read_bytes()).digest()

        found = list(_each(check, range(len(listing)), f"{listing.folder} {key}", "checked"))
        digests = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(listing), 32)
        done[key] = replace(listing, digests=torch.from_numpy(digests.copy()))
    return done


def _entries(folder: Path) -> list[os.DirEntry[bytes]]:
    """What a folder holds, hidden things left out, sorted by the bytes of the names."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from None
    return sorted(shown, key=lambda entry: entry.name)


def _is_class(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry beside the class folders is one; DataError if it has no business there."""
    if entry.is_dir():
        return True
    if _is_picture(entry):
        raise DataError(f"{os.fsdecode(entry.path)}: a picture outside of the class folders")
    return False


def _is_picture(entry: os.DirEntry[bytes]) -> bool:
    ending = Path(os.fsdecode(entry.name)).suffix.lower()
    if ending in PICTURES:
        return True
    if ending in NOTES:
        return False
    raise DataError(
        f"{os.fsdecode(entry.path)}: neither a picture ({' '.join(sorted(PICTURES))}) nor a note "
        f"to pass over ({' '.join(sorted(NOTES))})"
    )


def _pictures(folder: Path, name: bytes) -> list[tuple[bytes, int]]:
    """Names below the part's folder, and sizes, of a class's pictures; DataError if none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; every class needs pictures in every part")
    found = list(_below(folder, name))
    if not found:
        raise DataError(f"{folder}: no pictures in it; every class needs some in every part")
    return sorted(found)


def _below(folder: Path, name: bytes) -> Iterator[tuple[bytes, int]]:
    for entry in _entries(folder):
        below = name + b"/" + entry.name
        try:
            if entry.is_dir():
                yield from _below(folder / os.fsdecode(entry.name), below)
            elif _is_picture(entry):
                yield below, entry.stat().st_size
        except OSError as error:
            path = os.fsdecode(entry.path)
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _each(
    work: Callable[[Any], T], items: Any, what: str, done: str, chunk: int = 64
) -> Iterator[T]:
    """`work` on every item in several threads: results in order, with progress for the user."""

    def several(part: Any) -> list[T]:
        return [work(item) for item in part]

    count, began = len(items), time.monotonic()
    terminal = Console().is_terminal
    with (
        ThreadPoolExecutor(max(1, machine.workers())) as pool,
        Progress(disable=not terminal, transient=True) as bar,
    ):
        task = bar.add_task(what, total=count)
        window = [items[first : first + chunk] for first in range(0, count, chunk)]
        finished = 0
        try:
            for results in pool.map(several, window):
                yield from results
                finished += len(results)
                bar.update(task, completed=finished)
                if not terminal and time.monotonic() - began > 10:
                    began = time.monotonic()
                    print(f"{what}: {finished:,} of {count:,} {done}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
