"""Read and hash ordinary files, and write files atomically: either the old or the new content."""

import contextlib
import csv
import fcntl
import hashlib
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
"""Bytes of memory of the machine; a file that is read as a whole must not be larger."""


@dataclass(frozen=True)
class Table:
    """A small table to be written as CSV, without pandas, which takes 0.4 s to import."""

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> Self:
        """A table with the columns of its rows; `columns` are used if there are no rows."""
        found = dict.fromkeys(key for row in rows for key in row)
        return cls(tuple(found) or tuple(columns), rows)

    def csv(self) -> str:
        """A header and one line per row, numbers in full precision, missing values empty."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self.columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:  # leaves out NaN, the only value that differs from itself
            writer.writerow({key: value for key, value in row.items() if value == value})
        return stream.getvalue()


def file_size(path: Path, error: type[SecateurError], cure: str = "") -> int:
    """Bytes of an ordinary file; raises `error` if it is missing or not an ordinary file.

    Folders, devices and FIFOs are rejected without opening them, which might block forever.
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
    """Whether the path is a folder; raises `error` if that cannot be determined."""
    try:
        return path.is_dir()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None


def read_bytes(
    path: Path, error: type[SecateurError], limit: int | None = None, cure: str = ""
) -> bytes:
    """Content of an ordinary file of at most `limit` bytes, by default the size of the memory.

    Raises `error`, naming the file, for anything else.
    """
    limit = MEMORY if limit is None else limit
    size = file_size(path, error, cure)
    if size > limit:
        raise error(f"{path}: {size:,} bytes; at most {limit:,} are read")
    try:
        with path.open("rb") as file:
            return file.read(size)  # ignores what is appended in the meantime
    except (OSError, MemoryError) as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None


def _reason(error: Exception) -> str:
    """The operating system's message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _kind(mode: int) -> str:
    """The kind of a file that is not ordinary, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def content_hash(path: Path) -> str:
    """sha256 of a file, or of the names and contents in a folder; 'missing' if neither exists."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return "missing"
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    parts = [f"{p.relative_to(path).as_posix()} {content_hash(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` atomically by `content`; see `write`."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, content: str) -> None:
    """Replace the file `path` atomically by `content`; see `write`."""
    write_bytes(path, content.encode())


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file, or a folder file by file; each file is written atomically."""
    if not source.is_dir():
        write_bytes(target, source.read_bytes())
        return
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_bytes(target / path.relative_to(source), path.read_bytes())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[None]:
    """Context in which the folder of `path` exists; an OSError becomes a SecateurError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SecateurError(f"{path}: cannot be written: {reason}; nothing was changed") from None


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace `path` atomically by the file that `fill` writes.

    Raises SecateurError if it cannot be written (disk full, read-only); the previous file then
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
    """Replace the folder `path` by a new one; `fill` is called with an empty temporary folder.

    If `fill` raises, or the process is killed meanwhile, the previous folder stays. If it is killed
    while the two folders are swapped, there is no folder, but never a mixture of old and new.
    Leftovers of killed processes are removed. Raises SecateurError if it cannot be written.
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
    """Context that first removes leftover temporary folders of `path`, unless another process is
    writing there, and in which no other process removes ours. Without file locks, they stay."""
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
    """Wait until the file is on disk, and make it readable for everybody."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o644)
