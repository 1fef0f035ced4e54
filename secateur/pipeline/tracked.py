"""Tracked files of any commit, without DVC: from Git, and from DVC's cache by the lock files.

DVC itself takes a second per commit, because it resolves all stages; this module reads a hundred
commits in less. Files that are missing in the cache may still be in a remote, which only DVC reads.
"""

import hashlib
import io
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from secateur.base.documents import YAML_LOADER, parse_json
from secateur.base.errors import SecateurError, cut
from secateur.pipeline.params_file import value_at, with_numbers
from secateur.pipeline.record import ROUND, STAGES, stage_spec

MAIN_LOCK = "dvc.lock"
ROUNDS_LOCK = str(Path(stage_spec(f"{ROUND[0]}@x").pipeline).with_suffix(".lock"))
_PIPELINES = [*(spec.pipeline for spec in STAGES.values()), stage_spec(f"{ROUND[0]}@x").pipeline]
LOCKS = tuple(dict.fromkeys(str(Path(file).with_suffix(".lock")) for file in _PIPELINES))
"""The lock files of all pipelines, including that of further rounds."""


def cache_folder(root: Path) -> Path:
    """The folder of the project's cache, which need not exist."""
    from dvc.config import Config
    from dvc.exceptions import DvcException

    try:
        named = Config(dvc_dir=str(root / ".dvc"))["cache"].get("dir")
    except DvcException as error:
        raise SecateurError(f".dvc/config: {cut(str(error), 200)}") from None
    return Path(named or root / ".dvc" / "cache")


def objects(names: Sequence[str]) -> dict[str, bytes | None]:
    """Content of Git objects `<revision>:<path>`; None for an object that does not exist.

    Raises SecateurError with Git's message if it refuses, or if an object is damaged.
    """
    asked = "".join(f"{name}\n" for name in names).encode()
    done = subprocess.run(["git", "cat-file", "--batch"], input=asked, capture_output=True)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise SecateurError(f"git cat-file: {cut(said, 200)}")
    found: dict[str, bytes | None] = {}
    answers = io.BytesIO(done.stdout)
    for name in names:
        header = answers.readline().rstrip(b"\n")
        found[name] = None
        if not header.endswith((b" missing", b" ambiguous")):
            found[name] = answers.read(int(header.rsplit(b" ", 1)[1]))
            answers.readline()
    return found


def outs(commits: Iterable[str]) -> dict[str, dict[str, str]]:
    """Commit -> path -> hash of the outs in its lock files."""
    commits = [*commits]
    locks = objects([f"{commit}:{lock}" for commit in commits for lock in LOCKS])
    found: dict[str, dict[str, str]] = {}
    for commit in commits:
        found[commit] = {}
        for lock in LOCKS:
            found[commit] |= _in_lock(locks[f"{commit}:{lock}"])
    return found


def outdated_stage(folder: Path, params: Mapping[str, Any], report: str) -> str | None:
    """A stage that led to this folder's `report` with settings other than `params`; None if none.

    This is a stage whose parameters in the lock file differ from params.yaml, or whose inputs are
    not the outs of the stages before it, as after an interrupted run. Optional pipelines and
    removed rounds do not affect the report. Also None if the lock file belongs to another report,
    as after stages that were run without DVC.
    """
    stages: dict[str, Any] = {}
    for lock in (MAIN_LOCK, ROUNDS_LOCK):
        if (folder / lock).exists():
            content = yaml.load((folder / lock).read_bytes(), YAML_LOADER) or {}
            stages |= content.get("stages", {})
    rounds = {"", *params.get("rounds", {})}
    stages = {name: stage for name, stage in stages.items() if name.partition("@")[2] in rounds}
    made = {
        out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", ())
    }
    if made.get(report) != hashlib.md5((folder / report).read_bytes()).hexdigest():
        return None
    for name, stage in stages.items():
        if _differs(stage.get("params", {}).get("params.yaml", {}), params):
            return name
        if any(made.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in stage["deps"]):
            return name
    return None


def is_outdated(folder: Path, params: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage of the main pipeline has not run in this folder with these settings."""
    try:
        content = yaml.load((folder / MAIN_LOCK).read_bytes(), YAML_LOADER)
        return _differs(content["stages"][stage]["params"]["params.yaml"], params)
    except (OSError, yaml.YAMLError, KeyError, AttributeError, TypeError):
        return True


def _differs(locked: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether `params` has another value for a key that a lock file has."""
    return any(
        with_numbers(value_at(params, key)) != with_numbers(value) for key, value in locked.items()
    )


def _in_lock(lock: bytes | None) -> dict[str, str]:
    """Path -> hash of the outs in a dvc.lock; none if it is damaged."""
    try:
        content: Any = yaml.load(lock or b"", YAML_LOADER) or {}
        return {
            out["path"]: out["md5"]
            for stage in content.get("stages", {}).values()
            for out in stage.get("outs", [])
            if "md5" in out
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return {}


class NotCachedError(LookupError):
    """The cache lacks an object that a lock file names."""


def read(cache: Path, locked: Mapping[str, str], path: str) -> bytes | None:
    """A file that is an out, or inside one, by the hashes `locked`; None if there is none.

    Raises NotCachedError if only a remote may have it.
    """
    parents = map(str, Path(path).parents)
    out = next((out for out in (path, *parents) if out in locked), None)
    if out is None:
        return None
    md5: str | None = locked[out]
    if out != path:
        files = listing(cache, locked[out])
        if files is None:
            raise NotCachedError(path)
        md5 = files.get(path[len(out) + 1 :])
    try:
        return None if md5 is None else place(cache, md5).read_bytes()
    except OSError:
        raise NotCachedError(path) from None


def file_in(cache: Path, md5: str | None, file: str) -> bytes | None:
    """A file of a folder in the cache; None if either is not there."""
    try:
        return place(cache, (listing(cache, md5) or {})[file]).read_bytes()
    except (OSError, KeyError):
        return None


def listing(cache: Path, md5: str | None) -> dict[str, str] | None:
    """File -> hash of a folder in the cache; None if it is not there."""
    try:
        return contents(place(cache, str(md5)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def contents(object: Path) -> dict[str, str]:
    """File -> hash of the folder that a `.dir` object lists."""
    return {entry["relpath"]: entry["md5"] for entry in parse_json(object.read_bytes())}


def place(cache: Path, md5: str) -> Path:
    """Path of an object in the cache."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]
