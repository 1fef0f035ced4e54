"""The documentation site, built once for the tests that read its pages."""

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from workspace import ROOT

PAGES, STATUS, MESSAGES = "pages", "status", "messages"
"""Contents of a site's folder: the pages, the exit status of mkdocs, and its output."""


def build(folder: Path) -> tuple[int, str]:
    """Exit status and output of mkdocs, which writes into `folder`; it runs once per folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / STATUS).exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
            # wrapping signatures takes 600 runs of ruff; colours take a third of the other time
            env = os.environ | {"DOCS_LINE_LENGTH": "100000", "DOCS_COLOURS": "false"}
            done = subprocess.run(
                [*command, "--site-dir", str(folder / PAGES)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            )  # fmt: skip
            (folder / MESSAGES).write_text(done.stdout)
            (folder / STATUS).write_text(str(done.returncode))
    return int((folder / STATUS).read_text()), (folder / MESSAGES).read_text()


def start(folder: Path) -> None:
    """Start the build in a separate process, without waiting for it."""
    folder.mkdir(parents=True)
    subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    build(Path(sys.argv[1]))
