"""Cells as DVC experiments: commits under refs/exps, like those of `dvc exp run`.

All are written by a single call of `git fast-import`, without a workspace.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvc.repo.experiments.refs import ExpRefInfo
from dvc.utils.serialize import dumps_yaml, loads_yaml
from ruamel.yaml.error import YAMLError

from secateur.base.errors import SecateurError, cut
from secateur.studies.execution.keys import Entry
from secateur.studies.execution.snapshot import Snapshot, git
from secateur.studies.execution.stages import PARAMS
from secateur.studies.plan import Plan

NOTE = "Secateur-Cell: "


class Experiments:
    """The experiments of one study, based on the commit that is checked out."""

    def __init__(self, snapshot: Snapshot, plan: Plan, study: str) -> None:
        """Raises SecateurError if a cell has the name of an experiment that the study has not
        written, such as one of `dvc exp run --name` or of a study whose name and label, joined,
        are this one's."""
        self.snapshot, self.plan, self.study = snapshot, plan, study
        self._committer = git(snapshot.root, "var", "GIT_COMMITTER_IDENT")
        self._known, others = _read_refs(snapshot, study)
        for cell in plan.cells:
            if str(ExpRefInfo(snapshot.revision, cell.name)) in others:
                raise SecateurError(
                    f"experiment {cell.name}: there is one already that study {study} has not "
                    f"written; rename it: `dvc exp rename {cell.name} <another name>`"
                )
        locks = {work.stage.lock for work in plan.works.values()}
        self._locks = {lock: _read_lock(plan.graph.folder, lock) for lock in sorted(locks)}

    def write(self) -> int:
        """Write an experiment for every finished cell without one; returns how many."""
        commands: list[bytes] = []
        written: dict[str, str] = {}
        for number, cell in enumerate(self.plan.cells):
            if not self.plan.finished(number):
                continue
            entries = self.plan.entries_of(number)
            content = [self.snapshot.tree, cell.settings, entries]
            text = json.dumps(content, sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()[:32]
            ref = str(ExpRefInfo(self.snapshot.revision, cell.name))
            if self._known.get(ref) != digest:
                commands.append(self._commit(number, ref, entries, digest))
                written[ref] = digest
        if commands:
            _import(self.snapshot, b"".join(commands))
            self._known |= written
        return len(written)

    def _commit(self, number: int, ref: str, entries: Mapping[str, Entry], digest: str) -> bytes:
        """Commands of fast-import for a commit: the project's files, and the cell's changes."""
        cell, graph = self.plan.cells[number], self.plan.graph
        stages = [self.plan.works[id].stage for id in self.plan.by_cell[number]]
        contents = {PARAMS: self.plan.params_text(number).encode()}
        for path in dict.fromkeys(stage.lock for stage in stages):
            lock = {"schema": "2.0", "stages": {}} | self._locks[path]
            own = {stage.name: entries[stage.name] for stage in stages if stage.lock == path}
            contents[path] = dumps_yaml(lock | {"stages": {**lock["stages"], **own}}).encode()
        for stage in stages:
            for path in stage.uncached:
                contents[path] = graph.read(entries[stage.name], path)
        message = f"study {self.study}: {cell.name}\n\n{NOTE}{digest}\n".encode()
        lines = [
            f"commit {ref}\n".encode(),
            f"committer {self._committer}\n".encode(),
            b"data %d\n%s\n" % (len(message), message),
            f"from {self.snapshot.revision}\n".encode(),
            f'M 040000 {self.snapshot.tree} ""\n'.encode(),
        ]
        for path, content in contents.items():
            lines.append(f"M 100644 inline {path}\n".encode())
            lines.append(b"data %d\n%s\n" % (len(content), content))
        return b"".join(lines)


def _read_lock(folder: Path, path: str) -> dict[str, Any]:
    """A lock file of the project; empty if there is none, SecateurError if it is damaged."""
    if not (folder / path).is_file():
        return {}
    try:
        content = loads_yaml((folder / path).read_text()) or {}
        dict(content.get("stages", {}))
    except (YAMLError, AttributeError, TypeError, ValueError) as reason:
        said = cut(" ".join(str(reason).split()), 200)
        raise SecateurError(
            f"{path}: not a lock file of DVC: {said}; restore it by `git checkout`, or remove it: "
            "`dvc repro` takes what is finished from the cache"
        ) from None
    return dict(content)


def _read_refs(snapshot: Snapshot, study: str) -> tuple[dict[str, str], set[str]]:
    """Ref -> digest of the cell, for experiments on this commit that the study has written; and
    the refs of all others."""
    place = str(ExpRefInfo(snapshot.revision))
    shape = "%(refname) %(contents:lines=3)%00"
    listed = git(snapshot.root, "for-each-ref", f"--format={shape}", place)
    found, others = {}, set()
    for item in listed.split("\0"):
        ref, _, message = item.strip().partition(" ")
        if NOTE in message and message.startswith(f"study {study}: "):
            found[ref] = message.partition(NOTE)[2].strip()
        else:
            others.add(ref)
    return found, others


def _import(snapshot: Snapshot, commands: bytes) -> None:
    done = subprocess.run(
        ["git", "fast-import", "--quiet", "--force"], cwd=snapshot.root, input=commands,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SecateurError(f"git fast-import: {cut(done.stderr.decode(errors='replace'), 300)}")
