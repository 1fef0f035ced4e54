"""The SQLite file of an MLflow store: created atomically, and set aside if it is damaged.

MLflow creates a store in place by some seventy migrations. A process that is killed in between
leaves a file that MLflow can neither complete nor open. Here the store is created in a temporary
folder and renamed when it is complete. Callers hold the lock of the project's store.
"""

import contextlib
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

EMPTY, UNFINISHED = "empty", "unfinished (the process that created it was killed)"
"""Faults of a store that another program may be creating at this moment."""
SETTLE_SECONDS = 10.0
"""A file with such a fault counts as damaged once it has not changed for this long."""
LOCK_SECONDS = 20.0
"""How long to wait for a store that another program has locked; MLflow waits as long."""
COMPANIONS = ("-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database."""


def store_uri(path: Path) -> str:
    """The URI of the SQLite store in this file, from which `local_file` returns it."""
    # SQLAlchemy decodes escapes in a path, and takes what follows a question mark for options
    name = str(path).replace("%", "%25").replace("?", "%3F")
    # for a URI that starts with `sqlite:`, MLflow creates the folder without decoding its name
    return f"{'sqlite' if name == str(path) else 'sqlite+pysqlite'}:///{name}"


def local_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other store, and for one in memory."""
    from sqlalchemy.engine import make_url

    if not uri.startswith("sqlite") or in_memory(uri):
        return None
    name = make_url(uri).database or ""
    return None if name.startswith("file:") else Path(name).resolve()


def in_memory(uri: str) -> bool:
    """Whether it is the URI of an SQLite store that ends with its process."""
    from sqlalchemy.engine import make_url

    return uri.startswith("sqlite") and (make_url(uri).database or ":memory:") == ":memory:"


def relative_to(folder: Path, uri: str) -> str:
    """The URI of a store; the file of an SQLite store is relative to `folder`, unless absolute."""
    from sqlalchemy.engine import make_url

    if local_file(uri) is None or Path(name := make_url(uri).database or "").is_absolute():
        return uri
    return str(make_url(uri).set(database=str(folder / name)))


def create(path: Path, experiment: str, artifacts: str | None) -> None:
    """Create a store that has the experiment; if `path` exists by then, it is not changed."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    try:
        whole = folder / path.name
        with _unsynchronised():
            client = MlflowClient(store_uri(whole))
            client.create_experiment(experiment, artifact_location=artifacts)
        with whole.open("rb+") as file:
            os.fsync(file)
        _remove_companions(path)
        _install(whole, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove the folders of processes that were killed while they created the store."""
    for folder in path.parent.glob(f".{path.name}.new-*"):
        shutil.rmtree(folder, ignore_errors=True)


def fault(path: Path, thorough: bool = False) -> str | None:
    """Why the store cannot be opened, in a few words; None if it is intact.

    A store that another program may be creating is watched until it has settled. `thorough` also
    looks for damage within the file, in time proportional to its size. Raises sqlite3.Error for
    errors that are not damage: a lock, missing permissions, an error of the disk.
    """
    while (found := _fault(path, thorough)) in (EMPTY, UNFINISHED):
        if settled(path):
            break
        time.sleep(0.1)
    return found


def settled(path: Path) -> bool:
    """Whether the store has not changed for `SETTLE_SECONDS`."""
    return not 0 <= time.time() - path.stat().st_mtime < SETTLE_SECONDS


def keep_aside(path: Path) -> Path:
    """Rename the store and the files that SQLite keeps beside it; returns the new path."""
    name = f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}"
    target, number = path.with_name(name), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{name}-{number}")
    path.rename(target)
    for ending in COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(target.with_name(target.name + ending))
    return target


@contextlib.contextmanager
def _unsynchronised() -> Iterator[None]:
    """Context in which SQLite does not wait for the disk at commits: migrations have hundreds.

    It applies to the connections that are opened in this process in the meantime.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def switch_off(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", switch_off)
    try:
        yield
    finally:
        event.remove(Engine, "connect", switch_off)


def _install(whole: Path, path: Path) -> None:
    """Move the store to its path, unless another program has created one in the meantime."""
    try:
        os.link(whole, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        whole.rename(path)


def _remove_companions(path: Path) -> None:
    """Remove the journals of a deleted database: SQLite would apply them to the new one."""
    for ending in COMPANIONS:
        path.with_name(path.name + ending).unlink(missing_ok=True)


def _fault(path: Path, thorough: bool) -> str | None:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        return "a folder" if stat.S_ISDIR(found.st_mode) else "not an ordinary file"
    if found.st_size == 0:
        return EMPTY
    with path.open("rb") as file:
        header = file.read(100)
    if not header.startswith(b"SQLite format 3\0"):
        return "not an SQLite database"
    page = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big") if header[24:28] == header[92:96] else 0
    beside = any(path.with_name(path.name + ending).exists() for ending in COMPANIONS)
    size = path.stat().st_size  # by now, the commit that wrote this header has ended
    if not beside and size < pages * (65_536 if page == 1 else page):
        return f"truncated ({size:,} bytes)"
    return _content_fault(path, thorough)


def _content_fault(path: Path, thorough: bool) -> str | None:
    """Fault of the content: MLflow adds the first experiment when all migrations are done."""
    address = f"file:{quote(str(path))}?mode=rw"
    try:
        opened = sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS)
        with contextlib.closing(opened) as database:
            (experiments,) = database.execute("SELECT count(*) FROM experiments").fetchone()
            if thorough:
                (words,) = database.execute("PRAGMA quick_check(1)").fetchone()
                if words != "ok":
                    return f"damaged ({' '.join(str(words).split())[:100]})"
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return f"damaged ({error})"
        if code != sqlite3.SQLITE_ERROR:
            raise
        return UNFINISHED  # no table of this name
    return None if experiments else UNFINISHED
