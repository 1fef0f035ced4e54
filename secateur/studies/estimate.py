"""Estimates how long pieces of work will take, from the records of finished ones."""

import json
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from secateur.studies import plan as plans
from secateur.studies.execution.keys import Entry
from secateur.studies.execution.stages import PARAMS
from secateur.studies.plan import Plan, Work


class WorkKind(NamedTuple):
    """A kind of work, whose epochs are assumed to take equally long."""

    stage: str
    """Name of the stage in the first round; those of further rounds take as long."""
    dataset: Any
    arch: Any
    trains: bool
    """Whether it has any epochs; a training without epochs only takes seconds."""
    budget: Any
    """For finetune: a budget by computation takes more epochs than declared."""


def seconds(
    plan: Plan,
    works: Sequence[Work],
    spent: Mapping[str, float] = MappingProxyType({}),
    alike: bool = False,
) -> tuple[float, list[str]]:
    """Seconds of these pieces, one after the other, and the stages without records.

    `spent` has the seconds that pieces have been running so far, by id. With `alike`, an epoch of a
    training without records is assumed to take as long as one of another stage on the same network
    and data.
    """
    known: dict[WorkKind, list[float]] = {}
    for id, entry in plan.entries.items():
        if (took := _took(plan, entry)) is not None:
            declared = entry.get("params", {}).get(PARAMS, {})
            kind, epochs = _kind(plan.works[id].stage.name, declared)
            known.setdefault(kind, []).append(took / epochs)
    total, unknown = 0.0, []
    for work in works:
        declared = plan.graph.declared(work.stage, plan.params(work.cell))
        kind, epochs = _kind(work.stage.name, declared)
        samples = known.get(kind) or (_of_others(known, kind) if alike else [])
        if samples:
            whole = statistics.median(samples) * epochs
            total += max(whole - spent.get(work.id, 0.0), 0.0)
        elif kind.trains and kind.stage not in unknown:
            unknown.append(kind.stage)
    return total, unknown


def _of_others(known: Mapping[WorkKind, list[float]], kind: WorkKind) -> list[float]:
    """Seconds for an epoch of other trainings of the same architecture and data set."""
    same = [
        took
        for other, took in known.items()
        if kind.trains and other.trains and (other.dataset, other.arch) == (kind.dataset, kind.arch)
    ]
    return [seconds for took in same for seconds in took]


def _took(plan: Plan, entry: Entry) -> float | None:
    """Seconds by the run record that the stage has written, if it is one that writes one."""
    for out in entry["outs"]:
        if out["path"].endswith(".run.json"):
            try:
                return float(json.loads(plan.graph.object(out["md5"]).read_bytes())["seconds"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
    return None


def _kind(stage: str, declared: Mapping[str, Any]) -> tuple[WorkKind, float]:
    """Kind of the work, and the number of its epochs; 1 of work that does not train."""
    found = plans.epochs(stage, declared)
    epochs = float(found) if isinstance(found, int | float) else 0.0
    name = stage.partition("@")[0]
    own = declared.get(name)
    budget = own.get("budget") if isinstance(own, Mapping) else None
    kind = WorkKind(name, declared.get("dataset"), declared.get("arch"), epochs > 0, budget)
    return kind, epochs or 1.0
