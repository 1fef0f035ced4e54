"""Folders of images, one per class: scanned, checked, and decoded or listed.

The layout is `<split>/<class>/<image>` in the data set's folder, where `<split>` is train, test and
optionally val; subfolders of a class's folder belong to the class. Everything is sorted by the
bytes of the names, so that the result depends neither on the file system nor on threads.
"""

import hashlib
import os
import stat
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
from secateur.base.errors import DataError, cut
from secateur.base.files import file_size, is_folder
from secateur.data.dataset import InMemoryImages
from secateur.data.image_files import (
    GREY_MODES,
    IMAGE_SUFFIXES,
    ImageFileList,
    ImageView,
    PackedNames,
    open_image,
)

IGNORED_SUFFIXES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".ini", ".db"}
"""Suffixes of files that are ignored, like hidden files; any other suffix is an error."""

MAX_DEPTH = 32
"""Limit of nested folders in a class's folder."""

T = TypeVar("T")


def _require_relative(name: str) -> str:
    if Path(name).is_absolute() or {"..", ""} & set(name.split("/")):
        raise ValueError("a folder's name, below the one that SECATEUR_DATA names")
    return name


FolderName = Annotated[str, AfterValidator(_require_relative)]
"""Path of a folder relative to SECATEUR_DATA, which differs between machines."""


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a data set by split, before any file is opened."""

    base: Path
    folder: str
    classes: list[str]
    splits: dict[str, list[tuple[bytes, int, int]]]
    """train, test and optionally val -> path relative to the folder, label, size in bytes."""

    def paths(self) -> list[Path]:
        """Paths of all images, split by split."""
        root = self.base / self.folder
        return [root / os.fsdecode(name) for files in self.splits.values() for name, _, _ in files]

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def file_lists(self, view: ImageView) -> dict[str, ImageFileList]:
        """A list of files for each split, to be decoded according to `view`; without digests."""
        return {
            key: ImageFileList(
                self.base,
                self.folder,
                PackedNames.pack([name for name, _, _ in files]),
                torch.tensor([label for _, label, _ in files]),
                torch.tensor([size for _, _, size in files]),
                torch.empty(len(files), 0, dtype=torch.uint8),
                view,
            )
            for key, files in self.splits.items()
        }


def scan(base: Path, folder: str, splits: Mapping[str, str]) -> ImageFolder:
    """Find the images of train, test and optionally val; `splits` maps each to its folder's name.

    The class folders of train, sorted, are the classes. Raises DataError if a folder is missing, a
    class has no images in some split, a split has a class that train does not have, a file is
    neither an image nor ignored, or an image is outside of the class folders.
    """
    root = base / folder
    if not is_folder(root, DataError):
        raise DataError(
            f"{root}: no such folder; it must contain {splits['train']}/<class>/ and "
            f"{splits['test']}/<class>/ with images. SECATEUR_DATA names the folder that holds "
            f"{folder}/"
        )
    classes: list[str] = []
    found = {}
    for split, name in splits.items():
        here = root / name
        if not is_folder(here, DataError):
            if split == "val":
                continue
            raise DataError(f"{here}: no such folder; it must contain <class>/ with images")
        there = [os.fsdecode(entry.name) for entry in _entries(here) if _is_class(entry)]
        classes = classes or there
        if not classes:
            raise DataError(f"{here}: no class folders; images go to {name}/<class>/")
        if unknown := sorted(set(there) - set(classes)):
            raise DataError(f"{here / unknown[0]}: {splits['train']}/ has no such class")
        found[split] = [
            (f"{name}/".encode() + path, label, size)
            for label, title in enumerate(classes)
            for path, size in _class_images(here / title, os.fsencode(title))
        ]
    return ImageFolder(base, folder, classes, found)


def common_view(
    found: ImageFolder, size: int | None, resize: int | None, channels: int | None
) -> ImageView:
    """The view with `size` and `channels`; a value that is None is taken from the images.

    Only then the header of every image is read. `channels` is 1 if all images are grey, else 3.
    Raises DataError if `size` is None and the images differ in size.
    """
    if size is not None and channels is not None:
        return ImageView(channels, size, size, resize)

    def header(path: Path) -> tuple[tuple[int, int], bool]:
        with open_image(path) as image:
            return image.size, image.mode in GREY_MODES

    paths = found.paths()
    first: tuple[int, int] | None = None
    grey = True
    for path, (shape, plain) in zip(paths, _map(header, paths, found.folder, "read"), strict=True):
        first, grey = first or shape, grey and plain
        if size is None and shape != first:
            raise DataError(
                f"{path}: {shape[0]}x{shape[1]} pixels, where {paths[0].name} has "
                f"{first[0]}x{first[1]}; set datasets.image_folder.size to bring all to one size"
            )
    assert first is not None, "scan() refuses folders without images"
    width, height = first
    channels = channels or (1 if grey else 3)
    if size is not None:
        return ImageView(channels, size, size, resize)
    return ImageView(channels, height, width, None)


def decode_all(file_lists: dict[str, ImageFileList]) -> dict[str, InMemoryImages]:
    """Decode all images into memory, resized and cropped as for evaluation.

    Raises DataError naming the first file that is damaged.
    """
    splits = {}
    for key, files in file_lists.items():
        channels, height, width = files.shape
        pixels = torch.empty(len(files), height, width, channels, dtype=torch.uint8)
        target = pixels.numpy()

        def put(index: int, files: ImageFileList = files, target: np.ndarray = target) -> None:
            target[index] = files.decode(index)

        for _ in _map(put, range(len(files)), f"{files.folder} {key}", "decoded"):
            pass
        splits[key] = InMemoryImages.from_pixels(pixels, files.labels)
    return splits


def hash_all(file_lists: dict[str, ImageFileList]) -> dict[str, ImageFileList]:
    """The lists with the sha256 of every file; each file is decoded once as a check.

    Raises DataError naming the first file that is damaged.
    """
    hashed = {}
    for key, files in file_lists.items():

        def check(index: int, files: ImageFileList = files) -> bytes:
            files.decode(index)
            return hashlib.sha256(files.path(index).read_bytes()).digest()

        found = list(_map(check, range(len(files)), f"{files.folder} {key}", "checked"))
        digests = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(files), 32)
        hashed[key] = replace(files, digests=torch.from_numpy(digests.copy()))
    return hashed


def _entries(folder: Path) -> list[os.DirEntry[bytes]]:
    """Entries of a folder except hidden ones, sorted by the bytes of their names."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from None
    return sorted(shown, key=lambda entry: entry.name)


def _is_class(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry of a split is a class folder; DataError for an image or unknown file."""
    if _size(entry) is None:
        return True
    if _is_image(entry):
        raise DataError(f"{os.fsdecode(entry.path)}: an image outside of the class folders")
    return False


def _size(entry: os.DirEntry[bytes]) -> int | None:
    """Bytes of a file, None for a folder; DataError for anything else, such as a FIFO.

    A link to a folder that contains the link is rejected too, since following it would never end.
    """
    path = os.fsdecode(entry.path)
    try:
        if not stat.S_ISDIR(entry.stat().st_mode):
            return file_size(Path(path), DataError)
        if entry.is_symlink() and Path(path).resolve() in Path(path).absolute().parents:
            raise DataError(f"{path}: a link to a folder that it is in")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    return None


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    suffix = Path(os.fsdecode(entry.name)).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in IGNORED_SUFFIXES:
        return False
    raise DataError(
        f"{os.fsdecode(entry.path)}: neither an image ({' '.join(sorted(IMAGE_SUFFIXES))}) nor a "
        f"file to ignore ({' '.join(sorted(IGNORED_SUFFIXES))})"
    )


def _class_images(folder: Path, name: bytes) -> list[tuple[bytes, int]]:
    """Paths, relative to the split's folder, and sizes of a class's images; DataError if none."""
    if not is_folder(folder, DataError):
        raise DataError(f"{folder}: no such folder; every class needs images in every split")
    found = list(_walk(folder, name))
    if not found:
        raise DataError(f"{folder}: no images in it; every class needs some in every split")
    return sorted(found)


def _walk(folder: Path, name: bytes) -> Iterator[tuple[bytes, int]]:
    """Paths and sizes of the images in a folder and in its subfolders."""
    for entry in _entries(folder):
        below = name + b"/" + entry.name
        size = _size(entry)
        if size is None:
            if below.count(b"/") > MAX_DEPTH:
                path = cut(os.fsdecode(entry.path))
                raise DataError(f"{path}: folders within folders, more than {MAX_DEPTH} deep")
            yield from _walk(folder / os.fsdecode(entry.name), below)
        elif _is_image(entry):
            yield below, size


def _map(
    function: Callable[[Any], T], items: Any, title: str, done: str, chunk: int = 64
) -> Iterator[T]:
    """Apply `function` to every item in threads; yields the results in order and shows progress.

    `title` and `done` are the words of the progress line: "<title>: 64 of 128 <done>".
    """

    def apply(part: Any) -> list[T]:
        return [function(item) for item in part]

    count, began = len(items), time.monotonic()
    terminal = Console().is_terminal
    with (
        ThreadPoolExecutor(max(1, machine.workers())) as pool,
        Progress(disable=not terminal, transient=True) as bar,
    ):
        task = bar.add_task(title, total=count)
        chunks = [items[first : first + chunk] for first in range(0, count, chunk)]
        finished = 0
        try:
            for results in pool.map(apply, chunks):
                yield from results
                finished += len(results)
                bar.update(task, completed=finished)
                if not terminal and time.monotonic() - began > 10:
                    began = time.monotonic()
                    print(f"{title}: {finished:,} of {count:,} {done}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
