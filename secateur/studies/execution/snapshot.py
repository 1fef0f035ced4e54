"""The project's tracked files as a Git tree, and copies of them for workers.

Like a DVC experiment, a study takes the tracked files as they are in the workspace, committed or
not, and does not change the workspace.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import configobj

from secateur.base import files
from secateur.base.errors import SecateurError, cut
from secateur.pipeline.tracked import cache_folder

PLACE = Path(".dvc/tmp/studies")
TRACKED = Path(".dvc/tmp/tracked")
"""In a complete copy, the names of its tracked files, each followed by a zero byte."""


@dataclass(frozen=True)
class Snapshot:
    """One state of the tracked files."""

    root: Path
    """Folder of the project."""
    revision: str
    """The commit that is checked out."""
    tree: str
    """Git's hash of the files."""
    cache: Path
    """DVC's cache of the project."""

    def copy(self, name: str, ignored: Sequence[str] = ()) -> Path:
        """A folder with these files, created once, that uses the project's cache and has no Git.

        `ignored`: files that Git does not track but stages depend on, such as weights.
        """
        folder = self.root / PLACE / self.tree[:12] / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / TRACKED).is_file():
                self._make(folder)
        bring(self.root, folder, ignored)
        return folder

    def remove(self, name: str) -> None:
        """Delete a copy that nobody else uses."""
        folder = self.root / PLACE / self.tree[:12] / name
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Write the files; their names come last, as a mark that the copy is complete."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with _index(self.root) as env:
            git(self.root, "read-tree", self.tree, env=env)
            git(self.root, "checkout-index", "-a", f"--prefix={folder}/", env=env)
            names = git(self.root, "ls-files", "-z", env=env)
        self._configure(folder)
        listing = folder / TRACKED
        listing.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(listing, os.fsencode(names))

    def _configure(self, folder: Path) -> None:
        """Configure DVC with the project's own settings and cache, and without Git."""
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
        """Keep the copies while they are in use; delete unused copies of other states."""
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
    if prefix := git(root, "rev-parse", "--show-prefix"):
        raise SecateurError(
            f"the project is in the folder {prefix} of its Git repository; a study needs a "
            "repository of the project's own"
        )
    revision = git(root, "rev-parse", "--verify", "-q", "HEAD", error="no commit to start from")
    with _index(root) as env:
        # with its time: Git reads files again that are not older than the index that lists them
        shutil.copy2(git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"),
                     env["GIT_INDEX_FILE"])  # fmt: skip
        git(root, "add", "-u", env=env)
        tree = git(root, "write-tree", env=env)
    return Snapshot(root, revision, tree, cache_folder(root))


@contextlib.contextmanager
def _index(root: Path) -> Iterator[dict[str, str]]:
    """An environment with a temporary Git index, so that the user's index is not changed."""
    place = root / PLACE
    try:
        place.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=place)
    except OSError as error:
        raise SecateurError(f"{PLACE}: cannot be written to: {error.strerror}") from None
    with made as folder:
        yield os.environ | {"GIT_INDEX_FILE": str(Path(folder) / "index")}


def git(root: Path, *command: str, env: dict[str, str] | None = None, error: str = "") -> str:
    """Output of a Git command; SecateurError in one line if it fails."""
    surroundings = (env or os.environ) | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *command], cwd=root, env=surroundings, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="surrogateescape", check=False,
        )  # fmt: skip
    except OSError as reason:
        raise SecateurError(f"git: {reason}; experiments need Git") from None
    if done.returncode:
        said = cut(" ".join(done.stderr.split()), 200)
        if "not a git repository" in said:
            error = f"{said}; experiments need a Git repository"
        raise SecateurError(f"git {command[0]}: {error or said}")
    return done.stdout.strip()


def tracked_in(folder: Path) -> set[str]:
    """Paths of the tracked files in a copy, and of all their folders."""
    found = {"."}
    for name in os.fsdecode((folder / TRACKED).read_bytes()).split("\0"):
        while name and name not in found:
            found.add(name)
            name = name.rpartition("/")[0]
    return found


def bring(root: Path, folder: Path, paths: Iterable[str]) -> None:
    """Copy files and folders that Git does not track from the project into a copy.

    Files with the same size and time are left alone; files that the project lacks are removed.
    """
    with _locked(folder):
        for path in paths:
            _mirror(root / path, folder / path, folder / ".dvc" / "tmp" / "brought")


def _mirror(source: Path, target: Path, scratch: Path) -> None:
    """Make one file, or all files in a folder, equal to the source."""
    if source == target:  # an absolute path: all copies share it
        return
    if not source.is_dir():
        _replace(source, target, scratch)
        return
    wanted = {
        Path(place, name).relative_to(source)
        for place, _, names in os.walk(source, followlinks=True)
        for name in names
    }
    if target.is_dir():
        for old in list(target.rglob("*")):
            if not old.is_dir() and old.relative_to(target) not in wanted:
                old.unlink()
    else:
        target.unlink(missing_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        _replace(source / name, target / name, scratch)


def _replace(source: Path, target: Path, scratch: Path) -> None:
    """Copy a file atomically, unless the target is already equal."""
    if source.exists() and target.is_file():
        ours, its = target.stat(), source.stat()
        if (ours.st_size, ours.st_mtime_ns) == (its.st_size, its.st_mtime_ns):
            return
    if target.is_dir():
        shutil.rmtree(target)
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, scratch)
    scratch.replace(target)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.copy-lock")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock for creating a copy or copying files into it."""
    with _lock_of(folder).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
