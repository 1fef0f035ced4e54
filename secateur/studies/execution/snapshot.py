"""The project's tracked files as a Git tree, and copies of them for those who work.

Like an experiment of DVC, a study takes the tracked files as they are in the workspace, committed
or not, and leaves the workspace alone.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import configobj

from secateur.base.errors import SecateurError, cut
from secateur.pipeline.tracked import cache_folder

PLACE = Path(".dvc/tmp/studies")


@dataclass(frozen=True)
class Snapshot:
    """One state of the tracked files."""

    root: Path
    """The project."""
    revision: str
    """The commit that is checked out."""
    tree: str
    """Git's hash of the files."""
    cache: Path
    """DVC's cache of the project."""

    def copy(self, name: str, ignored: Sequence[str] = ()) -> Path:
        """A folder with these files, made once, with the project's cache; DVC sees no Git in it.

        `ignored`: files that Git ignores and stages depend on, such as weights.
        """
        folder = self.root / PLACE / self.tree[:12] / name
        marker = folder / ".dvc" / "tmp" / "complete"
        if not marker.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with _index(self.root) as env:
                git(self.root, "read-tree", self.tree, env=env)
                git(self.root, "checkout-index", "-a", f"--prefix={folder}/", env=env)
            self._configure(folder)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        for path in ignored:
            bring(self.root / path, folder / path)
        return folder

    def remove(self, name: str) -> None:
        """Delete a copy."""
        shutil.rmtree(self.root / PLACE / self.tree[:12] / name, ignore_errors=True)

    def _configure(self, folder: Path) -> None:
        """The project's own DVC settings, its cache, and no Git."""
        file = folder / ".dvc" / "config.local"
        own = self.root / ".dvc" / "config.local"
        config = configobj.ConfigObj(str(own) if own.is_file() else None, list_values=False)
        config.filename = str(file)
        config.setdefault("core", {})["no_scm"] = "true"
        config["core"]["autostage"] = "false"
        config.setdefault("cache", {})["dir"] = str(self.cache)
        config.write()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the copies while they are used; delete those of other states that nobody uses."""
        place = self.root / PLACE
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.lock"):
            if old.stem == self.tree[:12]:
                continue
            with old.open("a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place / old.stem, ignore_errors=True)
                old.unlink(missing_ok=True)
        with (place / f"{self.tree[:12]}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield


def take(root: Path) -> Snapshot:
    """The tracked files of the project as they are now; SecateurError without a commit."""
    root = root.resolve()
    revision = git(root, "rev-parse", "--verify", "-q", "HEAD", error="no commit to start from")
    with _index(root) as env:
        shutil.copyfile(git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"),
                        env["GIT_INDEX_FILE"])  # fmt: skip
        git(root, "add", "-u", env=env)
        tree = git(root, "write-tree", env=env)
    return Snapshot(root, revision, tree, cache_folder(root))


@contextlib.contextmanager
def _index(root: Path) -> Iterator[dict[str, str]]:
    """An environment with an index of Git's for once, so that the user's own stays as it is."""
    place = root / PLACE
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield os.environ | {"GIT_INDEX_FILE": str(Path(folder) / "index")}


def git(
    root: Path, *command: str, env: dict[str, str] | None = None, error: str = "", text: str = ""
) -> str:
    """Output of a Git command; SecateurError in one line if it fails."""
    try:
        done = subprocess.run(
            ["git", *command], cwd=root, env=env, input=text, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    except OSError as reason:
        raise SecateurError(f"git: {reason}; experiments need a Git repository") from None
    if done.returncode:
        said = cut(" ".join(done.stderr.split()), 200)
        raise SecateurError(f"git {command[0]}: {error or said}; experiments need a Git repository")
    return done.stdout.strip()


def bring(source: Path, target: Path) -> None:
    """Link or copy a file or folder that Git ignores into a copy, unless it is there."""
    if target.exists() or not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
