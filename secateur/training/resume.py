"""State outside DVC's outs: killed stages go on where they were, twins train once.

A stage that trains works in `.resume/<stage>/<fingerprint>/` of the user's project (also from an
experiment's temporary copy), under a lock that dies with the process. The fingerprint covers
params, inputs, code and versions, so whoever holds the same one wants the same result. When the
stage is done its outs are kept there for a day: a twin that waited takes them instead of training.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import safetensors
import safetensors.torch
from torch import Tensor

from secateur.base import files
from secateur.base.stage import Stage, project_root

KEEP_DAYS = 1.0
"""Finished work and abandoned state are dropped when nobody has touched them for so long."""


class Work:
    """The work on one fingerprint; only one process holds it at a time."""

    def __init__(self, folder: Path, outs: list[str]) -> None:
        self.folder, self.outs = folder, outs
        self._pending: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._written = time.monotonic()
        self._cost = 0.0

    @property
    def done(self) -> bool:
        """Whether somebody has finished this very work already."""
        return (self.folder / "done" / "complete").exists()

    def take(self) -> None:
        """Bring the finished outs into the workspace."""
        for out in self.outs:
            files.copy_tree(self.folder / "done" / out, Path(out))

    def finish(self) -> None:
        """Keep the outs for twins, and drop the state."""
        for out in self.outs:
            files.copy_tree(Path(out), self.folder / "done" / out)
        files.write_text(self.folder / "done" / "complete", "")
        for leftover in ("state.safetensors", "notes.json"):
            (self.folder / leftover).unlink(missing_ok=True)

    def note(self, key: str, value: Any = None) -> Any:
        """Remember a small value beside the state if one is given; gives what is remembered."""
        path = self.folder / "notes.json"
        notes = json.loads(path.read_text()) if path.exists() else {}
        if value is not None and notes.get(key) != value:
            files.write_text(path, json.dumps(notes | {key: value}))
            return value
        return notes.get(key)

    def keep(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Hold a copy of the state after an epoch; gives whether it was also written.

        It is written when a second has gone by since the last time, or twenty times what writing
        takes, whichever is longer; what is lost by a kill in between is computed again, to the
        same bytes.
        """
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self._pending = (copies, info)
        if time.monotonic() - self._written >= max(1.0, 20 * self._cost):
            self.flush()
            return True
        return False

    def flush(self) -> None:
        """Write the state that is held."""
        if self._pending is None:
            return
        start = time.monotonic()
        tensors, info = self._pending
        content = safetensors.torch.save(
            {name: t.contiguous() for name, t in tensors.items()}, {"secateur": json.dumps(info)}
        )
        files.write_bytes(self.folder / "state.safetensors", content)
        self._pending = None
        self._written = time.monotonic()
        self._cost = self._written - start

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that a killed process left, if it left one."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return None
        with safetensors.safe_open(path, framework="pt") as file:
            info = json.loads(file.metadata()["secateur"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118


@contextlib.contextmanager
def single_flight(stage: Stage, outs: list[str], waiting: Callable[[], None]) -> Iterator[Work]:
    """Hold the work on this stage's fingerprint; a twin waits here, after calling `waiting`.

    Whatever ends the stage early, the last state that is held is written before the lock goes.
    """
    root = project_root() / ".resume"
    folder = root / stage.name / stage.fingerprint
    with contextlib.closing(_locked(folder, waiting)):
        _drop_old(root, keep=folder)
        work = Work(folder, outs)
        try:
            yield work
        except BaseException:
            work.flush()
            raise


def _locked(folder: Path, waiting: Callable[[], None]) -> TextIO:
    """The folder's lock, held until it is closed; another stage may remove an old folder first."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()


def _drop_old(root: Path, keep: Path) -> None:
    """Remove what nobody holds and nobody has touched for a while."""
    limit = time.time() - KEEP_DAYS * 86_400
    for lock_file in root.glob("*/*/lock"):
        folder = lock_file.parent
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # others tidy up too
            if folder == keep or _touched(folder) > limit:
                continue
            with lock_file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _touched(folder: Path) -> float:
    """When anything in the folder last changed; files may come and go meanwhile."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
