"""Reading ordinary files only, and writing them in one step: the old content or the new one."""

import contextlib
import csv
import fcntl
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from secateur.base.errors import SecateurError

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes of the machine; a file that is read as a whole must be smaller."""


@dataclass(frozen=True)
class Table:
    """A small table to be written as CSV: pandas, which reads it later, takes 0.4 s to import."""

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> Self:
        """A table with the columns of its rows; `columns` are those of one without rows."""
        found = dict.fromkeys(key for row in rows for key in row)
        return cls(tuple(found) or tuple(columns), rows)

    def csv(self) -> str:
        """A header and a line for each row, numbers in full; empty where a value is missing."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self.columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:  # only not-a-number differs from itself
            writer.writerow({key: value for key, value in row.items() if value == value})
        return stream.getvalue()


def file_size(path: Path, error: type[SecateurError], cure: str = "") -> int:
    """Bytes of an ordinary file; raises `error` if it is missing, or is no ordinary file.

    Folders, devices and FIFOs are refused without being opened, which might never return.
    `cure` is added to the message about a missing file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        dangling = " (a link to a file that does not exist)" if path.is_symlink() else ""
        raise error(f"{path}: missing{dangling}{cure}") from None
    except (OSError, ValueError) as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: cannot be read: not an ordinary file but {_kind(found.st_mode)}")
    return found.st_size


def is_folder(path: Path, error: type[SecateurError]) -> bool:
    """Whether there is a folder of this path; raises `error` if that cannot be seen."""
    try:
        return path.is_dir()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None


def read_bytes(
    path: Path, error: type[SecateurError], limit: int | None = None, cure: str = ""
) -> bytes:
    """Content of an ordinary file of at most `limit` bytes, by default what memory can hold.

    Raises `error`, naming the file, for everything else.
    """
    limit = MEMORY if limit is None else limit
    size = file_size(path, error, cure)
    if size > limit:
        raise error(f"{path}: {size:,} bytes; at most {limit:,} are read")
    try:
        with path.open("rb") as file:
            return file.read(size)  # what is appended in the meantime is left out
    except (OSError, MemoryError) as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None


def _reason(error: Exception) -> str:
    """What the operating system reports, in words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _kind(mode: int) -> str:
    """What a file is that is not an ordinary one."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, as `write` does."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, content: str) -> None:
    """Replace `path` by `content`, as `write` does."""
    write_bytes(path, content.encode())


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file, or a folder file by file, each in one step."""
    if not source.is_dir():
        write_bytes(target, source.read_bytes())
        return
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_bytes(target / path.relative_to(source), path.read_bytes())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[None]:
    """The folder of `path` exists inside; SecateurError if anything there cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SecateurError(f"{path}: cannot be written: {reason}; nothing was changed") from None


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace `path`, in one step, by the file that `fill` writes.

    Raises SecateurError if it cannot be written (disk full, read-only); what was there before
    stays, and nothing half-written is left behind.
    """
    temporary = None
    try:
        with _replacing(path):
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporary = Path(name)
            os.close(handle)
            fill(temporary)
            _finish(temporary)
            temporary.replace(path)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace the folder `path` by the one that `fill` fills, an empty one beside it at first.

    If `fill` raises, or the process is killed meanwhile, what was there before stays. Whoever is
    killed while the folders change places leaves none: never one that is half old, half new. What
    a killed process has left beside it is removed. Raises SecateurError if it cannot be written.
    """
    temporary = None
    try:
        with _replacing(path), _without_leftovers(path):
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            new = temporary / "new"
            new.mkdir()
            fill(new)
            for file in filter(Path.is_file, new.rglob("*")):
                _finish(file)
            if path.exists():
                path.replace(temporary / "old")
            new.replace(path)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _without_leftovers(path: Path) -> Iterator[None]:
    """Remove temporary folders of `path` unless another process writes beside it; inside, no other
    process removes ours. Where the file system has no locks, they stay."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in path.parent.glob(f".{path.name}.*/"):
                    shutil.rmtree(left, ignore_errors=True)
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield


def _finish(file: Path) -> None:
    """Wait until the file is on the disk, and let everybody read it."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o644)
