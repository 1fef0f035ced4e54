"""Forks processes that start with all libraries imported, for the pipeline tests.

    python server.py SOCKET OWNER

A stage takes half a second to import its own code, and several seconds to import torch, MLflow, DVC
and pandas; the tests start hundreds of stages. This server imports the libraries and forks a
process for each request of `client.py`; the process runs what `python -m <module>`, `python -c
<code>` or `dvc` would run, with the caller's arguments, environment, folder and streams. It uses
the server's copies of the project's own modules if the code is the same (`known.py`). The server
ends when the process OWNER has ended.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import marshal
import os
import re
import runpy
import select
import signal
import socket
import sqlite3
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import known
import sqlalchemy
from client import early, limits
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = [
    "PIL.Image",
    "alembic.command",
    "dulwich.porcelain",
    "dulwich.worktree",
    "dvc.cachemgr",
    "dvc.cli",
    "dvc.cli.parser",
    "dvc.commands.repro",
    "dvc.data_cloud",
    "dvc.repo",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.experiments.executor.local",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.experiments.queue.tasks",
    "dvc.repo.experiments.run",
    "dvc.repo.experiments.show",
    "dvc.repo.graph",
    "dvc.repo.index",
    "dvc.repo.plots",
    "dvc.repo.stage",
    "dvc.repo.trie",
    "dvc.stage.run",
    "dvc.utils.hydra",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile.db.local",
    "dvc_data.index.push",
    "dvc_task.worker",
    "email.policy",
    "filelock",
    "fsspec.implementations.memory",
    "git",
    "hydra",
    "importlib_metadata._adapters",
    "jinja2",
    "lightning_fabric",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.tracing.processor.otel",
    "networkx",
    "opentelemetry.sdk.metrics",
    "pandas",
    "platformdirs",
    "pydantic.dataclasses",
    "pygit2",
    "pyparsing",
    "rich.progress",
    "ruamel.yaml",
    "safetensors.torch",
    "scipy.optimize",
    "scmrepo.git.backend.pygit2",
    "sklearn.datasets",
    "sklearn.model_selection",
    "sqlalchemy.dialects.sqlite",
    "torch._dynamo",  # torch.optim imports it for the first optimizer
    "torch.distributed.run",
    "torch.fx",
    "wcwidth",
]
"""Imports of stages and of DVC's commands; torch and torchvision are imported before them."""
OPTIONAL = ["hypothesis", "onnxscript"]
"""Further imports of the workers of pytest-xdist while they collect the tests."""
LOCK = re.compile(r"schema: '2\.0'\nstages:\n(?!.*(?:#|: [&*]|- [&*]))", re.DOTALL)
"""A lock file of DVC without comments and references."""
OPERATORS: list[Any] = []
"""Operators declared for torchvision where torch lacks them; a reference keeps them alive."""
MOST_FILES = 16
"""Largest number of open files that a caller can pass on."""


def import_libraries() -> dict[str, str]:
    """Import torch as stages do, remove the project's own modules again, and import the rest.

    Returns the environment in which torch was loaded, which is tuned like that of a stage.
    """
    sys.path.insert(0, str(ROOT))
    from secateur.base.allocator import tune_process

    tune_process()
    tuned = early(dict(os.environ))
    from secateur.base import torchvision_import

    torchvision_import.import_torchvision()
    OPERATORS.extend(torchvision_import._KEEP)
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "secateur"]:
        del sys.modules[name]

    for name in LIBRARIES:
        importlib.import_module(name)
    for name in OPTIONAL:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del sys.modules["torch.distributed.run"]  # runs as __main__ later: runpy would warn
    return tuned


def leave_nothing_to_do_at_exit() -> None:
    """Let forked processes skip reports and cleanup of the libraries at exit.

    Torch would import a library to print compile times, of which there are none.
    """
    from torch._dynamo import utils

    atexit.unregister(utils.dump_compile_times)
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False


def as_written(value: Any) -> Any:
    """A value as returned by the comment-preserving parser for a text without comments."""
    if isinstance(value, dict):
        found = CommentedMap()
        for key, each in value.items():
            found[key] = as_written(each)
        return found
    return CommentedSeq(map(as_written, value)) if isinstance(value, list) else value


def remember_documents() -> None:
    """Parse each YAML text once per process, and those of the pipelines only in the server.

    DVC parses the same files dozens of times per command, which is most of its work. Its lock files
    have no comments, so a plain parser suffices to change and rewrite them.
    """
    parse = YAML.load
    known: dict[str, bytes] = {}

    def load(self: YAML, stream: Any) -> Any:
        if self.typ == ["rt"] and isinstance(stream, str) and LOCK.match(stream):
            return as_written(YAML(typ="safe").load(stream))
        if self.typ != ["safe"] or not isinstance(stream, str):
            return parse(self, stream)
        if stream in known:
            return marshal.loads(known[stream])
        result = parse(self, stream)
        with contextlib.suppress(ValueError):  # dates and other values that marshal cannot write
            known[stream] = marshal.dumps(result)
        return result

    YAML.load = load
    for file in (ROOT / "dvc.yaml", *ROOT.glob("stages/*/dvc.yaml")):
        YAML(typ="safe").load(file.read_text())


def remember_migrations() -> Callable[[], None]:
    """Load MLflow's migration scripts, which every opening of a store loads, and run them once.

    After a call of the returned function, a new store is a copy of the one made here.
    """
    from alembic.util import pyfiles
    from mlflow.store.db import utils

    load, initialise = pyfiles.load_module_py, utils._initialize_tables
    read_once = functools.cache(load)

    def load_or_remember(name: str, path: str) -> ModuleType:
        migration = Path(path).parent.name == "versions"
        return read_once(name, str(path)) if migration else load(name, path)

    pyfiles.load_module_py = load_or_remember
    engine = sqlalchemy.create_engine("sqlite://")
    initialise(engine)
    with contextlib.closing(engine.raw_connection()) as made:
        store = made.driver_connection.serialize()

    def copy(engine: sqlalchemy.Engine) -> None:
        if engine.dialect.name != "sqlite" or sqlalchemy.inspect(engine).get_table_names():
            initialise(engine)
            return
        source = sqlite3.connect(":memory:")
        source.deserialize(store)
        with contextlib.closing(source), contextlib.closing(engine.raw_connection()) as target:
            source.backup(target.driver_connection)

    def use_copy() -> None:
        utils._initialize_tables = copy

    return use_copy


def name_frames_quickly() -> None:
    """Let torchrun find the name of a caller without reading the source of all frames.

    It would search the module of each frame among all imported modules, thousands in this process.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    if hasattr(dynamic_rendezvous, "get_method_name"):
        dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


def serve(path: str, owner: int) -> tuple[list[str], str]:
    """Answer requests until the owner has ended; in a forked process, return the command to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)  # noqa: PTH104
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, wake_read, *running.values()], [], [], 2)
        if not ready and not _alive(owner):
            for pid in running:
                _kill(pid)
            os._exit(0)
        for source in ready:
            if source is listener:
                connection, _ = listener.accept()
                request, files = receive(connection)
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    for other in running.values():
                        other.close()
                    connection.close()
                    signal.set_wakeup_fd(-1)
                    os.close(wake_read)
                    os.close(wake_write)
                    return become(request, files)
                for file in files:
                    os.close(file)
                connection.sendall(struct.pack("i", pid))
                running[pid] = connection
            elif source is wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
                reap(running)
            elif source in running.values():  # the client has ended before its process
                pid = next(p for p, connection in running.items() if connection is source)
                _kill(pid)
                running.pop(pid).close()


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """Read a request: its length, its open files, its content."""
    head, files, _, _ = socket.recv_fds(connection, 4, MOST_FILES)
    (size,) = struct.unpack("i", head)
    content = b""
    while len(content) < size:
        content += connection.recv(size - len(content))
    return marshal.loads(content), list(files)


def reap(running: dict[int, socket.socket]) -> None:
    """Send exit statuses to the clients whose processes have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if connection := running.pop(pid, None):
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
            connection.close()


def become(request: dict, files: list[int]) -> tuple[list[str], str]:
    """Take over files, folder and environment of the client; returns command and sys.path entry."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    above = max(request["files"]) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(request["files"], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = os.environ.get("WARM_EXECUTABLE", sys.executable)
    return request["command"], request["folder"]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run(
    command: list[str], folder: str, modules: dict[str, known.Module], use_copy: Callable[[], None]
) -> None:
    """Run the command as Python itself would: `dvc`, `python -c` or `python -m`.

    With `python -c`, as workers of pytest-xdist run, MLflow's migrations create new stores.
    """
    sys.path.pop(0)
    if command[1:2] != ["-c"]:
        use_copy()
    if command[0] == "dvc":
        from dvc.cli import main as dvc

        sys.argv = [str(Path(sys.executable).parent / "dvc"), *command[1:]]
        sys.exit(dvc())
    sys.path.insert(0, "" if command[1] == "-c" else folder)
    main = command[2] if command[1] == "-m" else ""
    sys.meta_path.insert(0, known.Finder(modules, Path(folder), main))
    if command[1] == "-c":
        sys.argv = ["-c", *command[3:]]
        sys.modules["__main__"] = ModuleType("__main__")  # this file is not the main module
        exec(compile(command[2], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def end(error: BaseException | None) -> NoReturn:
    """End the process as Python does, but without freeing its memory.

    Cleaning up two thousand modules takes longer than most commands run, and a forked process would
    have to copy all of their memory.
    """
    status = 0
    if isinstance(error, SystemExit):
        status = error.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            status = 120
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((status or 0) & 0xFF)


def main() -> NoReturn:
    """Import and serve; in each forked process, run the requested command."""
    gc.disable()
    path, owner = sys.argv[1], int(sys.argv[2])
    fits = [early(dict(os.environ)), import_libraries()]
    modules = known.learn(ROOT)
    leave_nothing_to_do_at_exit()
    remember_documents()
    name_frames_quickly()
    use_copy = remember_migrations()
    Path(path + ".known").write_bytes(marshal.dumps([fits, limits()]))
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # as in conftest.py
    gc.enable()
    try:
        run(*serve(path, owner), modules, use_copy)
    except BaseException as error:
        end(error)
    end(None)


if __name__ == "__main__":
    main()
