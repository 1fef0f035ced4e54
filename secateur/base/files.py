"""Writing files so that a reader sees the old content or the new one, never half of it."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from secateur.base.errors import SecateurError


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


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace `path`, in one step, by the file that `fill` writes.

    Raises SecateurError if it cannot be written (disk full, read-only); what was there before
    stays, and nothing half-written is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(handle)
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise SecateurError(f"{path}: cannot be written: {reason}; nothing was changed") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
