"""The files of a project, the keys of its stages in DVC's run cache, and the cached entries.

DVC's own code hashes files, folders and keys. This module only walks over the stages as `dvc repro`
would for each state of the workspace, but without such a workspace.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvc.dependency import loads_from
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA
from dvc.stage import PipelineStage, create_stage
from dvc.stage.cache import _get_cache_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.serialize import load_yaml
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from voluptuous import Invalid

from secateur.base.errors import SecateurError, SettingsError, cut
from secateur.pipeline import params_check, tracked
from secateur.pipeline.params_file import has, value_at
from secateur.studies.execution import stages
from secateur.studies.execution.snapshot import bring, tracked_in
from secateur.studies.execution.stages import PARAMS, ResolvedStage

Entry = dict[str, Any]
"""A stage in the format of dvc.lock and of the run cache: cmd, deps, params, outs."""


class Graph:
    """The stages and files of one copy of the project.

    A copy is a folder with the tracked files of the project, which uses the project's cache.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.ignored: list[str] = []
        """Files that stages depend on but Git does not track, copied from the project."""
        self._tracked = tracked_in(folder)
        self.repo = Repo(str(folder))
        self.wiring = stages.read(folder)
        self.params: dict[str, Any] = load_yaml(str(folder / PARAMS))
        """Values of the copy's params.yaml, as DVC reads them."""
        self.cache = Path(self.repo.cache.local.path)
        """The folder of the objects, sorted by the first digits of their hashes."""
        self._runs = Path(self.repo.stage_cache.cache_dir)
        self._used = stages.Used(self.wiring)
        self._resolved: dict[str, tuple[ResolvedStage, ...]] = {}
        self._files: dict[str, Entry] = {}
        self._folders: dict[tuple[str, ...], Entry] = {}
        self._trees: dict[str, Tree] = {}
        """Dependency that is a folder -> its files."""
        self._whole: dict[str, bool] = {}
        placeholder = {"name": "files", "cmd": "-", "wdir": str(folder), "deps": [], "outs": []}
        self._holder = create_stage(
            PipelineStage, self.repo, str(folder / "dvc.yaml"), **placeholder
        )

    def stages(self, params: Mapping[str, Any]) -> tuple[ResolvedStage, ...]:
        """All stages for these params, each after the stages whose outs it reads.

        Raises SettingsError for the name of a plug-in or file that does not exist.
        """
        used = self._used.values(params)
        if used not in self._resolved:
            params_check.check_names(params, self.root)
            self._resolved[used] = stages.resolve(self.repo, self.wiring, params)
        return self._resolved[used]

    def file(self, path: str) -> Entry:
        """A dependency that no stage makes, in the format of dvc.lock; hashed once."""
        if path not in self._files:
            (dep,) = loads_from(self._holder, [path])
            try:
                if os.path.normpath(path) not in self._tracked:
                    bring(self.root, self.folder, [path])
                    self.ignored.append(path)
                dep.save()
            except (DvcException, OSError) as error:
                raise SettingsError(f"dvc.yaml: {path}: {cut(str(error), 200)}") from None
            if isinstance(dep.obj, Tree):
                self._trees[path] = dep.obj
            self._holder.deps = [dep]
            (self._files[path],) = to_single_stage_lockfile(self._holder)["deps"]
        return self._files[path]

    def own_files(self, path: str) -> list[str]:
        """The project's own files in a folder that stages write into, relative to the folder."""
        self.file(path)
        return ["/".join(key) for key, _, _ in self._trees[path]] if path in self._trees else []

    def shared_folder(self, path: str, outs: Sequence[Entry]) -> Entry:
        """A dependency that is a folder with these outs in it, in the format of dvc.lock.

        DVC hashes it like any folder; its content is known from the hashes of the outs. Like any
        dependency that no stage makes, the folder itself is not in the cache.
        """
        inside = [out for out in outs if out["path"].startswith(f"{path}/")]
        if not inside:
            return self.file(path)
        key = (path, *(f"{out['path']} {out['md5']}" for out in inside))
        if key not in self._folders:
            own = self.file(path)
            whole = Tree()
            for parts, meta, hash_info in self._trees.get(path, ()):
                whole.add(parts, meta, hash_info)
            for out in inside:
                parts = tuple(out["path"].removeprefix(f"{path}/").split("/"))
                for below, md5 in self._content(out):
                    whole.add((*parts, *below), None, HashInfo("md5", md5))
            whole.digest()
            assert whole.hash_info is not None, "digest sets it"
            size = own.get("size", 0) + sum(out.get("size", 0) for out in inside)
            sizes = {"size": size, "nfiles": len(whole)}
            self._folders[key] = own | {"md5": whole.hash_info.value} | sizes
        return self._folders[key]

    def _content(self, out: Entry) -> list[tuple[tuple[str, ...], str]]:
        """Path and hash of each file of an out; if the out is a file, its own."""
        if not out["md5"].endswith(".dir"):
            return [((), out["md5"])]
        files = tracked.contents(self.object(out["md5"]))
        return [(tuple(path.split("/")), md5) for path, md5 in files.items()]

    def declared(self, stage: ResolvedStage, params: Mapping[str, Any]) -> dict[str, Any]:
        """The params that the stage declares, by dotted key in DVC's order."""
        found = {}
        for key in sorted(stage.params):
            found[key] = value_at(params, key)
            if found[key] is None and not has(params, key):
                raise SettingsError(f"params.yaml: {key}: missing; stage {stage.name} declares it")
        return found

    def entry(
        self, stage: ResolvedStage, params: Mapping[str, Any], upstream: Mapping[str, Entry]
    ) -> Entry:
        """The stage before it has run: cmd, deps with their hashes, params, paths of the outs.

        `upstream` has the finished entries of the stages that it reads.
        """
        made = {out["path"]: out for entry in upstream.values() for out in entry["outs"]}
        deps = [self._dependency(stage, path, made) for path in stage.deps]
        declared = {PARAMS: self.declared(stage, params)}
        return {
            "cmd": stage.cmd,
            "deps": deps,
            **({"params": declared} if stage.params else {}),
            "outs": [{"path": path} for path in stage.outs],
        }

    def _dependency(self, stage: ResolvedStage, path: str, made: Mapping[str, Entry]) -> Entry:
        if path in stage.folders:
            return self.shared_folder(path, list(made.values()))
        return dict(made[path]) if path in made else self.file(path)

    def find(self, entry: Entry) -> Entry | None:
        """The entry that DVC would restore: the newest of its key, if all objects are cached."""
        found = newest(self._runs, run_key(entry))
        whole = found and all(self.has_object(out["md5"]) for out in found["outs"])
        return found if whole else None

    def has_object(self, md5: str) -> bool:
        """Whether the cache has a file, or a folder with all its files."""
        if md5 not in self._whole:
            self._whole[md5] = False
            path = self.object(md5)
            if path.is_file():
                inner = tracked.contents(path) if md5.endswith(".dir") else {}
                self._whole[md5] = all(self.object(file).is_file() for file in inner.values())
        return self._whole[md5]

    def object(self, md5: str) -> Path:
        """Path of an object in the cache."""
        return self.cache / md5[:2] / md5[2:]

    def read(self, entry: Entry, path: str) -> bytes:
        """Content of a file that a finished stage has written, possibly within a folder."""
        content = self.read_if_there(entry, path)
        if content is None:
            raise SecateurError(f"{path}: the stage has not written it")
        return content

    def read_if_there(self, entry: Entry, path: str) -> bytes | None:
        """Content of a file that a finished stage has written; None if there is none."""
        place = self.locate(entry, path)
        return None if place is None else place.read_bytes()

    def locate(self, entry: Entry, path: str) -> Path | None:
        """Path in the cache of a file that a finished stage has written; None if it has not."""
        for out in entry["outs"]:
            if out["path"] == path:
                return self.object(out["md5"])
            if path.startswith(f"{out['path']}/") and out["md5"].endswith(".dir"):
                inside = tracked.contents(self.object(out["md5"]))
                if (md5 := inside.get(path.removeprefix(f"{out['path']}/"))) is not None:
                    return self.object(md5)
        return None


def run_key(entry: Entry) -> str:
    """DVC's key of the run cache: sha256 of cmd, deps, params and the paths of the outs."""
    return str(_get_cache_hash(dict(entry), key=True))


def newest(runs: Path, key: str) -> Entry | None:
    """The newest entry of a key in DVC's run cache; None if there is none, or it is damaged."""
    for path in _newest_first(runs / key[:2] / key):
        try:
            found: Entry = COMPILED_LOCK_FILE_STAGE_SCHEMA(load_yaml(str(path)))
        except (DvcException, Invalid, OSError):
            return None
        return found
    return None


def _newest_first(folder: Path) -> Iterator[Path]:
    """The entries of a key, the newest first; another process may be renaming one."""
    times = {}
    try:
        paths = list(folder.iterdir())
    except OSError:
        return
    for path in paths:
        try:
            times[path] = path.stat().st_mtime
        except OSError:
            continue
    yield from sorted((p for p in times if not p.name.endswith(".tmp")), key=lambda p: -times[p])
