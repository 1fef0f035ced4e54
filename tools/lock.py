"""Write requirements.lock: exact versions, with hashes, of all that `make` installs.

`make lock` keeps the versions that are there as long as they fit pyproject.toml, `make upgrade`
takes the newest. One file serves all supported versions of Python and all platforms (packages that
only some need have markers). uv resolves it, in a virtual environment that is thrown away: it is
needed for nothing else, and a lock that can no longer be installed can still be mended.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
UV = "uv>=0.9,<1"
GROUP = "dev"
"""The dependency group that `make` installs; it includes the others."""


def add_hashes(lock: str, table: dict[str, list[str]]) -> str:
    """Add the hashes of `table` ("name==version" -> hashes) to those of the lock's entries.

    Raises SystemExit for an entry of the table that the lock does not have.
    """
    for requirement, hashes in table.items():
        lines = lock.splitlines(keepends=True)
        entries = [line.split(" ")[0] for line in lines]
        if requirement not in entries:
            name = requirement.partition("==")[0]
            have = next((entry for entry in entries if entry.startswith(f"{name}==")), "no " + name)
            sys.exit(
                f"pyproject.toml: tool.secateur.hashes has builds of {requirement}, but the lock "
                f"has {have}; write the hashes of its builds, or remove them"
            )
        place = entries.index(requirement) + 1
        lines[place:place] = [f"    --hash={value} \\\n" for value in hashes]
        lock = "".join(lines)
    return lock


def resolve(project: Path, lock: Path, upgrade: bool) -> None:
    """Let uv write `lock` for `project`, a pyproject.toml; versions already in it are preferred."""
    python = tomllib.loads(project.read_text())["project"]["requires-python"].removeprefix(">=")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [f"{folder}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", UV], check=True)
        command = [
            f"{folder}/bin/uv", "pip", "compile", project.name, "--group", GROUP,
            "--universal", "--python-version", python, "--generate-hashes", "--no-config",
            "--custom-compile-command", "make lock", "--quiet", "--output-file", str(lock),
        ]  # fmt: skip
        subprocess.run(command + ["--upgrade"] * upgrade, cwd=project.parent, check=True)


def main() -> None:
    """Write the lock in one step; the old one stays if anything fails."""
    project = ROOT / "pyproject.toml"
    hashes = tomllib.loads(project.read_text())["tool"]["secateur"]["hashes"]
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".lock.") as folder:
        lock = Path(folder) / LOCK.name
        if LOCK.exists():  # without the hashes, which uv would take over, added ones included
            lock.write_text(re.sub(r" \\\n +--hash=\S+", "", LOCK.read_text()))
        try:
            resolve(project, lock, upgrade="--upgrade" in sys.argv[1:])
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # pip or uv has printed why
        lock.write_text(add_hashes(lock.read_text(), hashes))
        os.replace(lock, LOCK)  # noqa: PTH105


if __name__ == "__main__":
    main()
