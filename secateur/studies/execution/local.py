"""Executor `local`: processes on this machine, forked from a server with everything imported."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from secateur.base import files
from secateur.base.errors import SecateurError
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.execution.work import Task


@dataclass(frozen=True)
class Outcome:
    """Outcome of a piece of work."""

    key: str
    status: int
    """0, an exit status, or minus the signal that ended it."""


class Executor(Protocol):
    """Runs pieces of work, several at the same time."""

    slots: int
    """Number of pieces that run at the same time."""

    def submit(self, task: Task) -> None:
        """Start a piece of work."""

    def wait(self, seconds: float | None = None) -> Sequence[Outcome]:
        """Wait until at least one piece has ended, at most for `seconds`."""

    def close(self) -> None:
        """Interrupt running pieces, so that they can be resumed later, and wait for their end."""


class LocalExecutor:
    """Forks processes from one server, which is restarted if it is killed.

    The server starts importing when the executor is created; the first `submit` waits for it.
    """

    def __init__(
        self, snapshot: Snapshot, slots: int, ignored: Sequence[str], name: str = "worker"
    ) -> None:
        self.snapshot, self.slots, self.ignored = snapshot, slots, list(ignored)
        self.name = name
        """Prefix of the names of its copies of the project."""
        self._running: dict[str, int] = {}
        self._channel: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._ready = False
        self._start()

    def submit(self, task: Task) -> None:
        """Fork a process for the piece, in a copy of the project that no other process uses."""
        slot = next(n for n in range(self.slots) if n not in self._running.values())
        folder = self.snapshot.copy(f"{self.name}-{slot}", self.ignored)
        channel = self._when_ready()
        self._running[task.key] = slot
        line = json.dumps({"task": asdict(task), "folder": str(folder)})
        with contextlib.suppress(OSError):  # the server was killed: `wait` reports it
            channel.sendall(f"{line}\n".encode())

    def wait(self, seconds: float | None = None) -> Sequence[Outcome]:
        """Pieces that have ended since; all running pieces if the server itself was killed."""
        found: list[Outcome] = []
        while not found:
            if seconds is not None and not self._can_read(seconds):
                break
            answer = self._read()
            if answer is None:
                found = [Outcome(key, -9) for key in self._running]
                self._running.clear()
                self._stop()
            elif "key" in answer:
                self._running.pop(str(answer["key"]), None)
                found.append(Outcome(str(answer["key"]), int(str(answer["status"]))))
        return found

    def close(self) -> None:
        """End the server, which interrupts its processes and waits for them."""
        self._running.clear()
        self._stop()

    def _when_ready(self) -> socket.socket:
        """The connection to a server that has imported everything."""
        channel = self._channel or self._start()
        if not self._ready:
            self._ready = self._read() is not None
            if not self._ready:
                self._stop()
                raise SecateurError("the workers could not start (see above)")
        return channel

    def _start(self) -> socket.socket:
        """Start the server in a copy of the project."""
        ours, its = socket.socketpair()
        threads = max(1, processors() // self.slots)
        environment = {"OMP_NUM_THREADS": str(threads), "DVC_ROOT": str(self.snapshot.root)}
        environment |= {k: v for k, v in os.environ.items() if k != "DVC_ROOT"}
        environment["PYTHONPATH"] = ""
        folder = self.snapshot.copy(f"{self.name}-server", self.ignored)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "secateur.studies.execution.workers", str(its.fileno())],
            cwd=folder, env=environment, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        its.close()
        self._channel, self._buffer, self._ready = ours, b"", False
        return ours

    def _can_read(self, seconds: float) -> bool:
        """Whether `_read` would return something, after waiting for it."""
        if self._channel is None or b"\n" in self._buffer:
            return True
        return bool(select.select([self._channel], [], [], seconds)[0])

    def _read(self) -> dict[str, object] | None:
        """The next line from the server; None if it has ended."""
        while b"\n" not in self._buffer:
            if self._channel is None:
                return None
            try:
                more = self._channel.recv(65536)
            except OSError:
                more = b""
            if not more:
                return None
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._server is not None:
            if not self._ready:
                self._server.kill()  # still importing: nothing runs that has a state to save
            self._server.wait()
        self._channel = self._server = None


def processors() -> int:
    """Number of processors that this process may use (as in `base.machine`, but without torch)."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def read_result(task: Task) -> dict[str, object] | None:
    """The entry that a piece of work has written; None if there is none."""
    try:
        content = files.read_bytes(Path(task.result), SecateurError)
    except SecateurError:
        return None
    return dict(json.loads(content))
