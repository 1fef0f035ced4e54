"""Training state outside of DVC's outs: killed stages resume, equal concurrent stages train once.

A training stage works in `.resume/<stage>/<fingerprint>/` of the user's project (also if it runs in
an experiment's temporary copy), under a lock that is released when the process dies. The
fingerprint covers params, inputs, code and versions, so equal fingerprints mean equal results. A
finished stage keeps a copy of its outs there for a day: a concurrent process that has waited for
the lock copies them instead of training.

State and outs carry a hash of their content. Damaged ones are reported in one line and discarded:
they only save time, and the stage starts again without them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import safetensors.torch
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from secateur.base import files, machine, tensor_files
from secateur.base.documents import read_json, validated
from secateur.base.errors import SecateurError, StateError
from secateur.base.files import content_hash
from secateur.base.stage import Stage, project_root

STATE, NOTES = "state.safetensors", "notes.json"
KEEP_DAYS = 1.0
"""Finished outs and abandoned state are deleted after this many days without a change."""


class ResumeStore:
    """State, notes and finished outs of one fingerprint, used by only one process at a time.

    This is the `StateStore` of a training stage.
    """

    def __init__(self, folder: Path, outs: list[str]) -> None:
        self.folder, self.outs = folder, outs
        self._unwritten: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._interval = machine.save_interval()
        self._last_write = time.monotonic()
        self._write_seconds = 0.0

    @property
    def complete(self) -> bool:
        """Whether a process has finished this stage with intact outs; discards damaged ones."""
        done = self.folder / "done"
        if not os.path.lexists(done / "complete"):
            return False
        try:
            hashes = read_json(done / "complete", StateError)
            if hashes != {out: content_hash(done / out) for out in self.outs}:
                raise StateError(f"{done}: not the outs that were kept here")
        except (StateError, OSError) as error:
            _discard(done, error)
            return False
        return True

    def restore_outs(self) -> None:
        """Copy the finished outs into the workspace."""
        for out in self.outs:
            files.copy_tree(self.folder / "done" / out, Path(out))

    def finish(self) -> None:
        """Keep a copy of the outs for concurrent processes, and delete state and notes."""
        done = self.folder / "done"
        if os.path.lexists(done) and not done.is_dir():
            _discard(done, StateError(f"{done}: not a folder"))
        for out in self.outs:
            files.copy_tree(Path(out), done / out)
        hashes = {out: content_hash(done / out) for out in self.outs}
        files.write_text(done / "complete", json.dumps(hashes))
        for leftover in (STATE, NOTES):
            (self.folder / leftover).unlink(missing_ok=True)

    def note(self, key: Literal["run_id", "seconds"], value: Any = None) -> Any:
        """Store a small value next to the state if one is given; returns the value of the key."""
        notes = self._notes()
        if value is not None and notes.get(key) != value:
            files.write_text(self.folder / NOTES, json.dumps({**notes, key: value}))
            return value
        return notes.get(key)

    def _notes(self) -> dict[str, Any]:
        """The stored notes; a damaged file is discarded with a warning."""
        path = self.folder / NOTES
        if not os.path.lexists(path):
            return {}
        try:
            notes = validated(_NOTES, read_json(path, StateError), str(path), StateError)
        except StateError as error:
            _discard(path, error)
            return {}
        return {key: value for key, value in asdict(notes).items() if value is not None}

    def save(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Copy the state after an epoch to memory; returns whether it was also written to disk.

        By default it is written at most every second (`machine.save_interval`), and writing takes
        at most a twentieth of the time, unless every epoch is to be saved. Epochs that are lost
        when the process is killed are computed again, to the same bytes.
        """
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self._unwritten = (copies, info)
        pause = max(self._interval, 20 * self._write_seconds) if self._interval else 0.0
        if time.monotonic() - self._last_write >= pause:
            self.flush()
            return True
        return False

    def flush(self) -> None:
        """Write the state that is held in memory, if any."""
        if self._unwritten is None:
            return
        start = time.monotonic()
        tensors, info = self._unwritten
        header = {"info": info, "sha256": self._digest(tensors, info)}
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        content = safetensors.torch.save(contiguous, {tensor_files.KEY: json.dumps(header)})
        files.write_bytes(self.folder / STATE, content)
        self._unwritten = None
        self._last_write = time.monotonic()
        self._write_seconds = self._last_write - start

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an interrupted process has written, or None.

        A damaged file is discarded with a warning.
        """
        path = self.folder / STATE
        if not os.path.lexists(path):
            return None
        try:
            stored = tensor_files.read(path, StateError)
            header = stored.header if isinstance(stored.header, dict) else {}
            info = header.get("info")
            if not isinstance(info, dict):
                raise StateError(f"{path}: not a state that Secateur has written")
            if header.get("sha256") != self._digest(stored.tensors, info):
                raise StateError(f"{path}: not the state that was written here")
        except StateError as error:
            _discard(path, error)
            return None
        return stored.tensors, info

    def _digest(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
        """sha256 of a state, and of the fingerprint that it belongs to."""
        text = json.dumps(info, sort_keys=True)
        found = hashlib.sha256(f"{self.folder.name}\n{text}".encode())
        for name, tensor in sorted(tensors.items()):
            found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            if tensor.numel():
                found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


@dataclass(frozen=True)
class _Notes:
    """Schema of the notes."""

    run_id: str | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] | None = None


_NOTES = TypeAdapter(_Notes)


def _discard(path: Path, error: Exception) -> None:
    """Delete a damaged file or folder, and warn that its content is computed again."""
    print(f"warning: {error}; discarded, its work is done again", file=sys.stderr, flush=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def single_flight(
    stage: Stage, outs: list[str], on_wait: Callable[[], None]
) -> Iterator[ResumeStore]:
    """Lock the store of this stage's fingerprint; calls `on_wait` before it waits for another
    process.

    If an error ends the stage, the last state held in memory is written before the lock is
    released.
    """
    root = project_root() / ".resume"
    folder = root / stage.name / stage.fingerprint
    _clear_way(root, folder)
    with contextlib.closing(_lock(folder, on_wait)):
        _delete_old(root, keep=folder)
        store = ResumeStore(folder, outs)
        try:
            yield store
        except BaseException:
            store.flush()
            raise


@contextlib.contextmanager
def unused(stage: str, fingerprint: str) -> Iterator[bool]:
    """Whether no process uses this fingerprint; if so, none can start before the context ends."""
    path = project_root() / ".resume" / stage / fingerprint / "lock"
    if not path.is_file():
        yield True
        return
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _clear_way(root: Path, folder: Path) -> None:
    """Remove anything that blocks the path of a folder or of the lock file.

    An unrelated file named `.resume` is renamed, not deleted.
    """
    if os.path.lexists(root) and not root.is_dir():
        kept = root.with_name(f"{root.name}.{time.time_ns()}")
        try:
            root.rename(kept)
        except OSError as error:
            raise SecateurError(f"{root}: not a folder; it cannot be renamed: {error}") from None
        print(f"warning: {root}: not a folder; renamed to {kept.name}", file=sys.stderr, flush=True)
    for path in (folder.parent, folder):
        if os.path.lexists(path) and not path.is_dir():
            _discard(path, StateError(f"{path}: not a folder"))
    lock = folder / "lock"
    if os.path.lexists(lock) and not lock.is_file():
        _discard(lock, StateError(f"{lock}: not an ordinary file"))


def _lock(folder: Path, on_wait: Callable[[], None]) -> TextIO:
    """The folder's lock file, locked until it is closed.

    Other stages may delete an old folder meanwhile, so this retries. Raises SecateurError if the
    file cannot be written or locked.
    """
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SecateurError(
                f"{path}: cannot be locked: {error.strerror or error}; a stage that trains needs a "
                "folder .resume that it can write"
            ) from None
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()


def _delete_old(root: Path, keep: Path) -> None:
    """Delete the stores that are not locked and have not changed for `KEEP_DAYS`."""
    limit = time.time() - KEEP_DAYS * 86_400
    for lock_file in root.glob("*/*/lock"):
        folder = lock_file.parent
        with contextlib.suppress(OSError):  # locked, deleted meanwhile, or owned by another user
            if folder == keep or _last_change(folder) > limit or not lock_file.is_file():
                continue
            with lock_file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _last_change(folder: Path) -> float:
    """Time of the last change in the folder; its files may appear and disappear meanwhile."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
