"""Processes for the pipeline tests that start with all libraries imported."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LONGEST_PATH = 100
"""Slightly less than the maximum length of a socket's path."""


def start(folder: Path, environment: dict[str, str], owner: int) -> dict[str, str]:
    """Variables that make `python` and `dvc` run `client.py`; none if the path is too long.

    The first call for a folder starts the server, in this environment; the server ends with the
    process `owner`.
    """
    path = folder / "server"
    if len(str(path)) > LONGEST_PATH:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bin").exists():
            _start_server(path, environment, owner)
            _write_programs(folder / "bin")
    return {"WARM_SERVER": str(path), "PATH": f"{folder / 'bin'}:{environment['PATH']}"}


def _write_programs(folder: Path) -> None:
    folder.mkdir()
    code = (HERE / "client.py").read_text()
    for name in ("python", "dvc"):
        (folder / name).write_text(f"#!{sys.executable} -ESsB\n{code}")
        (folder / name).chmod(0o755)


def _start_server(path: Path, environment: dict[str, str], owner: int) -> None:
    with path.with_suffix(".log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(path), str(owner)],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    while not path.exists():
        if server.poll() is not None:
            raise RuntimeError(path.with_suffix(".log").read_text())
        time.sleep(0.05)
