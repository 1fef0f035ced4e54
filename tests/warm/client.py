"""`python` and `dvc` on the PATH of tests; the server in server.py runs what it can for them.

Everything else is run by the real programs, including whatever needs a different environment from
the start of its process. The low-level modules below `json`, `signal`, `socket` and `struct`
suffice here, and are imported in a third of the time.
"""

import _signal as signal
import _socket as socket
import _struct as struct
import marshal
import os
import resource
import sys

EARLY = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "ATEN_", "ONEDNN_", "DNNL_", "MALLOC_", "LD_", "PYTHON",
    "CUDA_", "TORCH_", "OPENBLAS_", "NUMEXPR_",
)  # fmt: skip
"""Prefixes of variables that Python or a library reads while it is being loaded."""
LATE = ("PYTHON_EXEC", "TORCH_NCCL_")
"""Exceptions: variables that torch and torchrun read later."""


def early(environment: dict[str, str]) -> dict[str, str]:
    """The variables that cannot be changed any more in a running process."""
    return {
        k: v for k, v in environment.items()
        if k.startswith(EARLY) and not k.startswith(LATE)
        and (v or not k.startswith("PYTHON"))  # Python ignores empty ones
    }  # fmt: skip


def inherited() -> list[int]:
    """Numbers of the open files that the caller has passed on; the three streams come first."""
    found = [0, 1, 2]
    for number in sorted(map(int, os.listdir("/dev/fd"))):  # noqa: PTH208  see main
        try:
            if number > 2 and os.get_inheritable(number):
                found.append(number)
        except OSError:
            pass  # the file of this listing itself
    return found


def limits() -> list[list[int]]:
    """The resource limits of this process; a forked process has those of the server."""
    kinds = (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU)
    return [list(resource.getrlimit(kind)) for kind in kinds]


def run_real(name: str) -> None:
    """Replace this process by the real program."""
    program = sys.executable if name == "python" else sys.executable.removesuffix("python") + name
    os.execv(program, [program, *sys.argv[1:]])


def _answer(server: socket.socket) -> bytes:
    """Wait for the end of the process; a signal that arrives just before the wait is handled."""
    server.settimeout(1)
    while True:
        try:
            return server.recv(4)
        except TimeoutError:
            continue


def main() -> None:
    """Send the request, forward signals, and end like the forked process."""
    name = sys.argv[0].rpartition("/")[2]
    if sys.argv[1:2] == ["-u"]:  # as torchrun starts its processes
        del sys.argv[1]
    modules = ("stages.", "secateur", "tests.", "torch.distributed.run")
    module = sys.argv[2] if sys.argv[1:2] == ["-m"] and len(sys.argv) > 2 else ""
    path = os.environ.get("WARM_SERVER", "")
    if module == "dvc":
        name = sys.argv[0] = "dvc"
        del sys.argv[1:3]
    code = sys.argv[1:2] == ["-c"]
    ours = name == "dvc" or code or module.startswith(modules)
    if not ours or not os.access(path, os.F_OK):
        run_real(name)
    with open(path + ".known", "rb") as file:  # noqa: PTH123  pathlib takes as long as all of this
        environments, limits_of_server = marshal.load(file)
    if early(dict(os.environ)) not in environments or limits() != limits_of_server:
        run_real(name)
    request = {
        "command": [name, *sys.argv[1:]],
        "files": inherited(),
        "folder": os.getcwd(),  # noqa: PTH109
        "environment": dict(os.environ),
        "umask": os.umask(0),
    }
    os.umask(request["umask"])
    content = marshal.dumps(request)
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    files = struct.pack(f"{len(request['files'])}i", *request["files"])
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, files)
    server.sendmsg([struct.pack("i", len(content))], [rights])
    server.sendall(content)
    (pid,) = struct.unpack("i", server.recv(4))
    for number in blocked:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    answer = _answer(server)
    (status,) = struct.unpack("i", answer) if answer else (1,)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
