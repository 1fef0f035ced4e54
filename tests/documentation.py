"""The pages of the documentation, built once for the tests that read them."""

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from workspace import ROOT

PAGES, STATUS, MESSAGES = "pages", "status", "messages"
"""What is in the folder of a site: the pages, the status of mkdocs, and what it has said."""


def build(folder: Path) -> tuple[int, str]:
    """Status and messages of mkdocs, whose pages are in `folder`; it runs once for a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / STATUS).exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
            # 600 runs of ruff wrap signatures, and colours take a third of the rest
            env = os.environ | {"DOCS_LINE_LENGTH": "100000", "DOCS_COLOURS": "false"}
            done = subprocess.run(
                [*command, "--site-dir", str(folder / PAGES)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            )  # fmt: skip
            (folder / MESSAGES).write_text(done.stdout)
            (folder / STATUS).write_text(str(done.returncode))
    return int((folder / STATUS).read_text()), (folder / MESSAGES).read_text()


def start(folder: Path) -> None:
    """Begin to build in a process of its own, for which nobody waits."""
    folder.mkdir(parents=True)
    subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    build(Path(sys.argv[1]))
