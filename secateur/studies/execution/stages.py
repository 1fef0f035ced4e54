"""The stages of the main chain and its further rounds, with `${...}` filled in for given params.

DVC's own code resolves the templates of both files.
"""

import graphlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.parsing import DataResolver
from dvc.parsing.context import Context
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml

from secateur.base.errors import SettingsError, cut
from secateur.pipeline import params_check
from secateur.pipeline.params_check import OUTS
from secateur.pipeline.params_file import value_at
from secateur.pipeline.record import FIRST, ROUND, STAGES, stage_spec

PARAMS = "params.yaml"
MAIN = STAGES["evaluate"].pipeline
FILES = (MAIN, stage_spec(f"{ROUND[0]}@{FIRST}").pipeline)
"""The pipeline files whose stages a study runs; a file may be missing in a project."""


@dataclass(frozen=True)
class ResolvedStage:
    """A stage of dvc.yaml, with `${...}` filled in."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    """Paths, sorted as in dvc.lock."""
    params: tuple[str, ...]
    """Dotted keys of params.yaml."""
    outs: tuple[str, ...]
    """Paths, sorted."""
    uncached: tuple[str, ...]
    """The outs that are tracked by Git."""
    upstream: tuple[str, ...]
    """Stages whose outs it reads."""
    folders: tuple[str, ...] = ()
    """The deps that are folders into which other stages can write, even if none does."""
    file: str = MAIN
    """The pipeline file that declares it."""

    @property
    def address(self) -> str:
        """Name of the stage in DVC, from the project's folder."""
        return self.name if self.file == MAIN else f"{self.file}:{self.name}"

    @property
    def lock(self) -> str:
        """The lock file that has its hashes."""
        return str(Path(self.file).with_suffix(".lock"))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of the pipeline files, by path."""
    return {file: load_yaml(str(folder / file)) for file in FILES if (folder / file).is_file()}


class Used:
    """The settings that determine which stages there are: those in the files' templates."""

    def __init__(self, wiring: Mapping[str, dict[str, Any]]) -> None:
        text = json.dumps(wiring)
        self._tables = sorted(set(re.findall(r'"foreach": "\$\{([\w.]+)\}"', text)))
        names = set(re.findall(r"\$\{([\w.]+)\}", text)) - {*self._tables}
        self._items = sorted(n.removeprefix("item.") for n in names if n.startswith("item."))
        self._names = sorted(names)

    def values(self, params: Mapping[str, Any]) -> str:
        """Their values as text; of an entry of a `foreach`, only the values that its stages use."""
        found = [value_at(params, name) for name in self._names]
        for name in self._tables:
            table = value_at(params, name)
            if isinstance(table, Mapping):
                table = {k: [value_at(v, item) for item in self._items] for k, v in table.items()}
            found.append(table)
        return json.dumps(found, default=str)


def resolve(
    repo: Repo, wiring: Mapping[str, dict[str, Any]], params: Mapping[str, Any]
) -> tuple[ResolvedStage, ...]:
    """All stages for these params, each after the stages whose outs it reads."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for file, content in wiring.items():
        for name, stage in _filled(repo, file, content, params).items():
            if name in found:
                raise SettingsError(f"{file}: stage {name}: {found[name][0]} has one of this name")
            found[name] = (file, stage)
    outs = {name: _outs(file, name, stage) for name, (file, stage) in found.items()}
    makers = {path: name for name, (paths, _) in outs.items() for path in paths}
    shared = _shared(wiring)
    resolved = {
        name: ResolvedStage(
            name,
            stage["cmd"],
            tuple(sorted(stage["deps"])),
            tuple(_keys(file, name, stage)),
            tuple(outs[name][0]),
            tuple(outs[name][1]),
            tuple(dict.fromkeys(m for dep in stage["deps"] for m in _makers(dep, makers, shared))),
            tuple(sorted(shared & {*stage["deps"]})),
            file,
        )
        for name, (file, stage) in found.items()
    }
    return tuple(_ordered(resolved))


def _filled(
    repo: Repo, file: str, content: dict[str, Any], params: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The stages of one file by name, as DVC resolves them."""
    folder = Path(repo.root_dir, file).parent
    try:
        resolver = DataResolver(repo, str(folder), content)
        context = Context(dict(params))
        for definition in resolver.definitions.values():
            definition.context = context
        resolver.context = context
        found: dict[str, dict[str, Any]] = resolver.resolve()["stages"] or {}
    except DvcException as error:
        raise SettingsError(f"{file}: {cut(str(error), 200)}") from None
    root = Path(repo.root_dir).resolve()
    for name, stage in found.items():
        if (folder / stage.pop("wdir", ".")).resolve() != root:
            raise SettingsError(f"{file}: stage {name}: wdir: a study runs it in the project only")
    return found


def _shared(wiring: Mapping[str, dict[str, Any]]) -> set[str]:
    """The deps below which a stage has an out, both as written in the files, for any params."""
    deps, outs = params_check.deps_and_outs(wiring.values())
    return {dep for dep in deps if any(out.startswith(f"{dep}/") for out in outs)}


def _makers(dep: str, makers: Mapping[str, str], shared: set[str]) -> list[str]:
    """The stages that make a dependency, or files in it."""
    if dep not in shared:
        return [makers[dep]] if dep in makers else []
    return [name for path, name in makers.items() if path.startswith(f"{dep}/")]


def _outs(file: str, name: str, stage: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Paths of all outs of a stage, and of the outs that are tracked by Git."""
    paths, uncached = [], []
    for kind in OUTS:
        for out in stage.get(kind, []):
            path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
            paths.append(path)
            if options.get("cache") is False:
                uncached.append(path)
            if options.get("persist"):
                raise SettingsError(
                    f"{file}: stage {name}: persist: DVC never takes it from its cache"
                )
    refused = next((k for k in ("always_changed", "frozen") if stage.get(k)), None)
    missing = next((k for k in ("cmd", "deps") if not stage.get(k)), None)
    if refused or missing or not paths:
        what = refused or f"no {missing or 'outs'}"
        raise SettingsError(f"{file}: stage {name}: {what}: a study cannot take it from the cache")
    return sorted(paths), uncached


def _keys(file: str, name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    for key in stage.get("params", []):
        if not isinstance(key, str):
            raise SettingsError(f"{file}: stage {name}: params of {PARAMS} only, in a study")
        yield key


def _ordered(stages: Mapping[str, ResolvedStage]) -> Iterator[ResolvedStage]:
    """The stages, each after the stages that it reads."""
    order = graphlib.TopologicalSorter({name: stage.upstream for name, stage in stages.items()})
    try:
        yield from [stages[name] for name in order.static_order()]
    except graphlib.CycleError:
        raise SettingsError("dvc.yaml: stages read each other's outs in a circle") from None
