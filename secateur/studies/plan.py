"""The unique pieces of work of a study, as a graph.

Two cells share a piece if DVC would take it from its cache for the second cell: the same command,
declared params and code, with the same pieces as input. N decays, M pruners and S seeds are
therefore S * (1 + N + N * M) trainings.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.base.errors import SettingsError
from secateur.pipeline import params_file
from secateur.studies import rounds
from secateur.studies.definition import PlannedCell
from secateur.studies.execution.keys import Entry, Graph
from secateur.studies.execution.stages import PARAMS, ResolvedStage

MOST_TEXTS = 256
"""Number of cells whose params.yaml is kept as text; their pieces run at the same time."""


@dataclass(frozen=True)
class Work:
    """One stage that has to be run once, for all cells that need its result."""

    id: str
    """Hash of everything that its result depends on; known before anything has run."""
    stage: ResolvedStage
    upstream: Mapping[str, str]
    """Stage that it reads -> id of that piece."""
    cell: int
    """The first cell that needs it; it runs with the params.yaml of this cell."""


@dataclass
class Plan:
    """The pieces of work that a study needs, and which of them are finished."""

    graph: Graph
    cells: Sequence[PlannedCell]
    works: dict[str, Work] = field(default_factory=dict)
    """By id, each after the pieces that it reads."""
    by_cell: list[list[str]] = field(default_factory=list)
    """The pieces of each cell, one per stage."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """Id -> the finished stage, as in dvc.lock."""
    _texts: dict[int, str] = field(default_factory=dict)

    def params(self, cell: int) -> dict[str, Any]:
        """The whole of params.yaml for a cell."""
        return rounds.whole(self.graph.params, self.cells[cell].settings)

    def changes(self, cell: int) -> dict[str, Any]:
        """The settings that a cell changes in params.yaml, by dotted key."""
        return rounds.changes(self.cells[cell].settings, self.graph.params)

    def params_text(self, cell: int) -> str:
        """The text of params.yaml for a cell: the project's text with the cell's values."""
        if cell not in self._texts:
            text = params_file.updated((self.graph.folder / PARAMS).read_text(), self.changes(cell))
            if len(self._texts) == MOST_TEXTS:
                del self._texts[next(iter(self._texts))]
            self._texts[cell] = text
        return self._texts[cell]

    def pending(self, id: str) -> Entry | None:
        """The entry of a piece before it runs; None while a piece that it reads is not finished."""
        work = self.works[id]
        upstream = {}
        for stage, other in work.upstream.items():
            if other not in self.entries:
                return None
            upstream[stage] = self.entries[other]
        return self.graph.entry(work.stage, self.params(work.cell), upstream)

    def look_up(self) -> None:
        """Take all pieces from the cache that it has, as far as their keys are known."""
        for id in self.works:
            if id not in self.entries and (pending := self.pending(id)) is not None:
                found = self.graph.find(pending)
                if found is not None:
                    self.entries[id] = found

    def missing(self) -> list[Work]:
        """Pieces that are not finished, each after the pieces that it reads."""
        return [work for id, work in self.works.items() if id not in self.entries]

    def still_possible(self, failed: Iterable[str]) -> list[Work]:
        """Missing pieces that have not failed and do not depend on a failed one."""
        lost = set(failed)
        for work in self.missing():
            if lost & set(work.upstream.values()):
                lost.add(work.id)
        return [work for work in self.missing() if work.id not in lost]

    def entries_of(self, cell: int) -> dict[str, Entry]:
        """The finished stages of a cell by name."""
        return {self.works[id].stage.name: self.entries[id] for id in self.by_cell[cell]}

    def repeated(self) -> list[str]:
        """A sentence for each cell of the first seed that is an earlier one once more.

        Its settings then differ only in what is not used, such as those of a pruner that is not
        chosen. Controls are left out, since a method may be its own control.
        """
        first: dict[tuple[str, ...], str] = {}
        found = []
        for cell, ids in zip(self.cells, self.by_cell, strict=True):
            if cell.control is None and cell.seed == self.cells[0].seed:
                before = first.setdefault(tuple(ids), cell.name)
                if before != cell.name:
                    found.append(
                        f"{cell.name} is {before} once more: the settings in which they differ "
                        "have no effect"
                    )
        return found

    def finished(self, cell: int) -> bool:
        """Whether every stage of a cell is finished."""
        return all(id in self.entries for id in self.by_cell[cell])


def make(graph: Graph, cells: Sequence[PlannedCell], last: str | None = None) -> Plan:
    """The plan for these cells; nothing is looked up in the cache yet.

    With `last`, it only has that stage (in the last round, if rounds have this stage) and the
    stages whose outs it needs. Raises SettingsError for a cell whose rounds are not a chain, or
    that names something that does not exist.
    """
    plan = Plan(graph, cells)
    for number in range(len(cells)):
        params = plan.params(number)
        try:
            final = rounds.last(params, last or "finetune")
            graph.stages(params)
        except SettingsError as error:
            raise SettingsError(f"cell {cells[number].name}: {error}") from None
        ids: dict[str, str] = {}
        for work in _works(graph, params, number, ids, last and final):
            plan.works.setdefault(work.id, work)
        plan.by_cell.append(list(ids.values()))
    return plan


def trains(plan: Plan, work: Work) -> bool:
    """Whether the stage has a section of params with at least one epoch."""
    declared = plan.graph.declared(work.stage, plan.params(work.cell))
    return bool(epochs(work.stage.name, declared))


def epochs(stage: str, declared: Mapping[str, Any]) -> Any:
    """Epochs in the stage's own section of params.yaml, or in its round; None if it has none."""
    name, _, round_name = stage.partition("@")
    section = name.replace("-", "_")
    found = None
    for key in (section, f"rounds.{round_name}.{section}"):
        own = declared.get(key)
        found = own.get("epochs", found) if isinstance(own, Mapping) else found
    return found


def _works(
    graph: Graph, params: Mapping[str, Any], cell: int, ids: dict[str, str], last: str | None
) -> Iterator[Work]:
    """The pieces of one cell; `ids` gets the id of each stage."""
    needed = _needed(graph.stages(params), last)
    for stage in graph.stages(params):
        if stage.name not in needed:
            continue
        made_by = {name: ids[name] for name in stage.upstream}
        outs = {path for other in graph.stages(params) for path in other.outs}
        key = {
            "stage": stage.name,
            "cmd": stage.cmd,
            "params": graph.declared(stage, params),
            "files": {path: graph.file(path)["md5"] for path in stage.deps if path not in outs},
            "reads": [path for path in stage.deps if path in outs],
            "upstream": made_by,
            "outs": stage.outs,
        }
        text = json.dumps(key, sort_keys=True, default=str)
        ids[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:32]
        yield Work(ids[stage.name], stage, made_by, cell)


def _needed(stages: Sequence[ResolvedStage], last: str | None) -> set[str]:
    """Names of the stage `last` and of all before it; all stages without `last`."""
    if last is None:
        return {stage.name for stage in stages}
    needed = {last}
    for stage in reversed(stages):  # each comes after the stages whose outs it reads
        if stage.name in needed:
            needed.update(stage.upstream)
    return needed
