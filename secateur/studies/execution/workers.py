"""A server that has imported everything that stages need, and forks a process for each piece.

    python -m secateur.studies.execution.workers SOCKET

`local` starts it in a copy of the project, so that it has the code of the study. A piece of work
then starts within some hundredths of a second. The processes end with the server, and the server
with the process that started it; a stage that is interrupted in this way saves its state first.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from secateur.base import allocator
from secateur.base.errors import SecateurError
from secateur.studies.execution import work

LAST_WORDS = 30.0
"""Seconds that interrupted processes have to save their state."""


def import_everything() -> None:
    """Import everything that the stages of dvc.yaml import, including plug-ins."""
    import stages  # noqa: F401  memory policy, before torch

    commands = re.findall(r"cmd: python -m ([\w.]+)", Path("dvc.yaml").read_text())
    for name in commands:
        importlib.import_module(name)
    for name in ("dvc.repo", "dvc.stage.run", "dvc.output", "sklearn.datasets", "scipy.optimize"):
        importlib.import_module(name)
    from secateur.base import settings

    with contextlib.suppress(SecateurError):  # each cell is checked by itself
        settings.check()


def serve(channel: socket.socket) -> tuple[work.Task, Path]:
    """Answer requests until the other end closes; in a forked process, returns its task."""
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started us decides
    signal.signal(signal.SIGTERM, lambda *_: None)
    running: dict[int, str] = {}
    unread = b""
    channel.sendall(b'{"ready": true}\n')
    while True:
        ready, _, _ = select.select([channel.fileno(), wake_read], [], [])
        if channel.fileno() in ready:
            more = _received(channel)
            if not more:
                _end(running)
            *lines, unread = (unread + more).split(b"\n")
            for line in lines:  # all of them: `select` does not see what has been read already
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for end in (wake_read, wake_write):
                        os.close(end)
                    channel.close()
                    return work.Task(**request["task"]), Path(request["folder"])
                running[pid] = request["task"]["key"]
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
            for pid, status in _ended():
                answer = json.dumps({"key": running.pop(pid), "status": status})
                with contextlib.suppress(OSError):
                    channel.sendall(f"{answer}\n".encode())


def _received(channel: socket.socket) -> bytes:
    """The bytes that have arrived; empty if the other end is closed or was killed."""
    try:
        return channel.recv(65536)
    except ConnectionError:
        return b""


def _ended() -> list[tuple[int, int]]:
    """Processes that have ended, with their exit status, or minus the signal."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _end(running: dict[int, str]) -> NoReturn:
    """Interrupt the processes, wait until they have saved their state, and end."""
    limit = time.monotonic() + LAST_WORDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while running and time.monotonic() < limit:
            for pid, _ in _ended():
                running.pop(pid, None)
            time.sleep(0.02)
    os._exit(0)


def become(task: work.Task) -> None:
    """Set up a forked process as a separate one: streams, signals, end with its parent."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    task.place.mkdir(parents=True, exist_ok=True)
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, stream in ((0, nothing), (1, log), (2, log)):
        os.dup2(stream, number)
    os.close(log)
    os.close(nothing)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def run(task: work.Task, folder: Path) -> int:
    """Run the task; returns the exit status, and prints one line on stderr for a user error."""
    try:
        work.execute(task, folder)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> NoReturn:
    """Import, serve, and in each forked process run one piece of work."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    import_everything()
    gc.collect()
    allocator.resume_collection()
    task, folder = serve(channel)
    become(task)
    status = run(task, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
