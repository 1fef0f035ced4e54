"""How long pieces of work will take, by the records of those that have run."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.studies import plan as plans
from secateur.studies.execution.keys import Entry
from secateur.studies.execution.stages import PARAMS
from secateur.studies.plan import Plan, Work

Kind = tuple[str, Any, Any, bool]
"""What a record tells about other work: stage, data set, architecture, and whether it trains."""


def seconds(plan: Plan, works: Sequence[Work]) -> tuple[float, list[str]]:
    """Seconds of these pieces, one after the other, and stages of which there are no records."""
    known: dict[Kind, list[float]] = {}
    for id, entry in plan.entries.items():
        if (took := _took(plan, entry)) is not None:
            declared = entry.get("params", {}).get(PARAMS, {})
            kind, epochs = _kind(plan.works[id].stage.name, declared)
            known.setdefault(kind, []).append(took / epochs)
    total, unknown = 0.0, []
    for work in works:
        declared = plan.graph.declared(work.stage, plan.params(work.cell))
        kind, epochs = _kind(work.stage.name, declared)
        if kind in known:
            total += statistics.median(known[kind]) * epochs
        elif plans.trains(plan, work) and kind[0] not in unknown:
            unknown.append(kind[0])
    return total, unknown


def _took(plan: Plan, entry: Entry) -> float | None:
    """Seconds by the run record that the stage has written, if it is one that writes one."""
    for out in entry["outs"]:
        if out["path"].endswith(".run.json"):
            try:
                return float(json.loads(plan.graph.object(out["md5"]).read_bytes())["seconds"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
    return None


def _kind(stage: str, declared: Mapping[str, Any]) -> tuple[Kind, float]:
    """Kind of the work, and the epochs that its time grows with; 1 of what does not train.

    Stages of further rounds take as long as those of the first. A training of no epochs takes
    seconds, whatever one of some epochs takes.
    """
    found = plans.epochs(stage, declared)
    epochs = float(found) if isinstance(found, int | float) else 0.0
    name = stage.partition("@")[0]
    return (name, declared.get("dataset"), declared.get("arch"), epochs > 0), epochs or 1.0
