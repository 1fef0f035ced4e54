"""Runs one piece of work in a copy of the project; DVC's cache gets the same as by `dvc repro`.

It runs in a separate process, which may have been forked with everything imported.
"""

import contextlib
import fcntl
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from secateur.base import files
from secateur.base.errors import SecateurError
from secateur.studies.execution.keys import Entry, newest, run_key
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.execution.stages import MAIN, PARAMS


@dataclass(frozen=True)
class Task:
    """One piece of work, as it is sent to a worker."""

    key: str
    """Key in DVC's run cache."""
    stage: str
    """Address of the stage in DVC, from the project's folder."""
    params: str
    """The text of params.yaml."""
    upstream: list[Entry]
    """The finished stages that it reads."""
    root: str
    """The project."""
    revision: str
    tree: str
    cache: str
    ignored: list[str]
    """Files that Git ignores but stages depend on."""
    experiment: str
    """The cell that it runs for."""
    folders: dict[str, list[str]]
    """Deps that are folders into which stages write -> the project's own files in each."""

    @property
    def place(self) -> Path:
        """Folder of its lock, log and result."""
        return Path(self.root, ".dvc/tmp/studies", "work", self.key[:2])

    @property
    def log(self) -> Path:
        """File with the output of the stage."""
        return self.place / f"{self.key}.log"

    @property
    def result(self) -> Path:
        """File with the finished entry, as JSON."""
        return self.place / f"{self.key}.json"

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def loads(text: str) -> Task:
    """The task in a line of JSON."""
    return Task(**json.loads(text))


def snapshot_of(task: Task) -> Snapshot:
    """The state of the project that the task belongs to."""
    return Snapshot(Path(task.root), task.revision, task.tree, Path(task.cache))


def execute(task: Task, folder: Path) -> Entry:
    """Run the stage in a copy of the project, unless the cache has it; returns its entry.

    If another process works on the same key, this one waits for it. If the stage fails, it ends
    this process with SystemExit.
    """
    from dvc.repo import Repo

    task.place.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    busy, lock = folder / ".dvc" / "tmp" / "busy", task.place / f"{task.key}.lock"
    with _locked(busy), _locked(lock), Repo(str(folder)) as repo:
        files.write_text(folder / PARAMS, task.params)
        file, _, name = task.stage.rpartition(":")
        stage_file = folder / (file or MAIN)
        stage_file.with_suffix(".lock").unlink(missing_ok=True)
        stage = repo.stage.load_one(str(stage_file), name)
        _clear(folder, task)
        for finished in task.upstream:  # all outs: records are no deps, but must fit their models
            for out in repo.stage_cache._create_stage(finished).outs:
                out.checkout(force=True)
        found = _run(repo, stage, task)
        files.write_text(task.result, json.dumps(found))
    return found


def _clear(folder: Path, task: Task) -> None:
    """Remove files of other cells' stages from folders that this stage depends on as a whole.

    This includes files left by killed processes, which are in no lock file.
    """
    wanted = [Path(out["path"]) for entry in task.upstream for out in entry["outs"]]
    for path, own in task.folders.items():
        kept = {Path(path, name) for name in own} | {
            out for out in wanted if out.is_relative_to(path)
        }
        for file in (folder / path).rglob("*"):
            place = file.relative_to(folder)
            if not file.is_dir() and not kept & {place, *place.parents}:
                file.unlink()


def _run(repo: Any, stage: Any, task: Task) -> Entry:
    """Take the stage from the run cache, or run it and store its outs."""
    from dvc.stage.run import cmd_run
    from dvc.stage.serialize import to_single_stage_lockfile

    from secateur.pipeline.mlflow_store import tracking_on  # needs torch, as the stages do

    stage.save_deps()
    key = run_key(to_single_stage_lockfile(stage))
    if key != task.key:
        raise SecateurError(f"stage {task.stage}: its key is {key[:12]}, planned {task.key[:12]}")
    entry = newest(Path(repo.stage_cache.cache_dir), key)
    if entry and repo.stage_cache._create_stage(entry).outs_cached():
        return _plain(entry)
    for out in stage.outs:
        out.remove(ignore_remove=False)
    environment = {
        "DVC_ROOT": task.root,
        "DVC_STAGE": stage.addressing,
        "DVC_EXP_NAME": task.experiment,
        "DVC_EXP_BASELINE_REV": task.revision,
    }
    server = os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://"))
    if not (server and tracking_on()):
        environment["SECATEUR_TRACKING"] = "off"  # the coordinator writes the store's file
    os.environ.update(environment)
    module = re.fullmatch(r"python -m ([\w.]+)((?: [\w./=-]+)*)", stage.cmd)
    if module is None:
        cmd_run(stage, run_env=environment)
    else:
        _run_module(module[1], module[2].split())
    stage.save_outs()  # the deps have not changed: no other process uses this copy
    for out in stage.outs:  # objects first, so that the run cache never names missing ones
        out.commit(relink=False)
    repo.stage_cache.save(stage)
    return _plain(to_single_stage_lockfile(stage))


def _run_module(name: str, options: Sequence[str]) -> None:
    """As `python -m NAME OPTIONS`, but in this process; SystemExit if it ends with an error."""
    sys.modules.pop(name, None)
    arguments, sys.argv = sys.argv, [name, *options]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = arguments


def _plain(entry: Entry) -> Entry:
    """The entry as plain dictionaries and lists."""
    plain: Entry = json.loads(json.dumps(entry))
    return plain


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder or a key; an interrupted process keeps it until it has saved."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> NoReturn:
    """Run the task on stdin in this folder, with the exit status and messages of its stage."""
    try:
        execute(loads(sys.stdin.read()), Path.cwd())
    except SecateurError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)


if __name__ == "__main__":
    main()
