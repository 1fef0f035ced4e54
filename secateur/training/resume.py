"""Training state outside DVC's outs: killed stages resume, concurrent equal stages train once.

A stage that trains works in `.resume/<stage>/<fingerprint>/` of the user's project (also from an
experiment's temporary copy), under a lock that is released when the process dies. The fingerprint
covers params, inputs, code and versions, so that equal fingerprints mean equal results. A finished
stage keeps a copy of its outs there for a day: a concurrent process that waited for the lock takes
them over instead of training.
"""

import contextlib
import fcntl
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
from pydantic import Field, TypeAdapter
from torch import Tensor

from secateur.base import files, tensor_files
from secateur.base.documents import read_json, validated
from secateur.base.errors import StateError
from secateur.base.stage import Stage, project_root

STATE, NOTES = "state.safetensors", "notes.json"
KEEP_DAYS = 1.0
"""Finished outs and abandoned state are deleted when they have not changed for this long."""


class ResumeStore:
    """State, notes and finished outs of one fingerprint; only one process holds it at a time.

    It is the `StateStore` of a training stage.
    """

    def __init__(self, folder: Path, outs: list[str]) -> None:
        self.folder, self.outs = folder, outs
        self._unwritten: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._last_write = time.monotonic()
        self._write_seconds = 0.0

    @property
    def complete(self) -> bool:
        """Whether a process has finished this stage; its outs can be restored."""
        return (self.folder / "done" / "complete").exists()

    def restore_outs(self) -> None:
        """Copy the finished outs into the workspace."""
        for out in self.outs:
            files.copy_tree(self.folder / "done" / out, Path(out))

    def finish(self) -> None:
        """Keep a copy of the outs for concurrent processes, and delete state and notes."""
        for out in self.outs:
            files.copy_tree(Path(out), self.folder / "done" / out)
        files.write_text(self.folder / "done" / "complete", "")
        for leftover in (STATE, NOTES):
            (self.folder / leftover).unlink(missing_ok=True)

    def note(self, key: Literal["run_id", "seconds"], value: Any = None) -> Any:
        """Write a small value beside the state if one is given; returns the value of the key."""
        notes = self._notes()
        if value is not None and notes.get(key) != value:
            files.write_text(self.folder / NOTES, json.dumps({**notes, key: value}))
            return value
        return notes.get(key)

    def _notes(self) -> dict[str, Any]:
        """The notes that were written; those of a damaged file are discarded with a warning."""
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

        It is written at most every second, and at most a twentieth of the time is spent on it.
        What a kill loses in between is computed again, to the same bytes.
        """
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self._unwritten = (copies, info)
        if time.monotonic() - self._last_write >= max(1.0, 20 * self._write_seconds):
            self.flush()
            return True
        return False

    def flush(self) -> None:
        """Write the state that is held in memory, if any."""
        if self._unwritten is None:
            return
        start = time.monotonic()
        tensors, info = self._unwritten
        content = safetensors.torch.save(
            {name: t.contiguous() for name, t in tensors.items()}, {"secateur": json.dumps(info)}
        )
        files.write_bytes(self.folder / STATE, content)
        self._unwritten = None
        self._last_write = time.monotonic()
        self._write_seconds = self._last_write - start

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an interrupted process has written, if any.

        A file that is damaged is discarded with a warning.
        """
        path = self.folder / STATE
        if not os.path.lexists(path):
            return None
        try:
            stored = tensor_files.read(path, StateError)
            if not isinstance(stored.header, dict):
                raise StateError(f"{path}: not a state that Secateur has written")
        except StateError as error:
            _discard(path, error)
            return None
        return stored.tensors, stored.header


@dataclass(frozen=True)
class _Notes:
    """Schema of the notes."""

    run_id: str | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] | None = None


_NOTES = TypeAdapter(_Notes)


def _discard(path: Path, error: StateError) -> None:
    """Delete what cannot be read, and warn that its content is computed again."""
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
    """Lock the store of this stage's fingerprint; waits for a concurrent process after `on_wait`.

    If an error ends the stage, the last state held in memory is written before the lock is
    released.
    """
    root = project_root() / ".resume"
    folder = root / stage.name / stage.fingerprint
    with contextlib.closing(_lock(folder, on_wait)):
        _delete_old(root, keep=folder)
        store = ResumeStore(folder, outs)
        try:
            yield store
        except BaseException:
            store.flush()
            raise


def _lock(folder: Path, on_wait: Callable[[], None]) -> TextIO:
    """The folder's lock file, locked until closed; other stages may delete an old folder first."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()


def _delete_old(root: Path, keep: Path) -> None:
    """Delete the stores that are not locked and have not changed for `KEEP_DAYS`."""
    limit = time.time() - KEEP_DAYS * 86_400
    for lock_file in root.glob("*/*/lock"):
        folder = lock_file.parent
        with contextlib.suppress(
            BlockingIOError, FileNotFoundError
        ):  # or a concurrent process deletes it
            if folder == keep or _last_change(folder) > limit:
                continue
            with lock_file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _last_change(folder: Path) -> float:
    """Time of the last change in the folder, whose files may appear and disappear meanwhile."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
