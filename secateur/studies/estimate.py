"""How long pieces of work will take, by the records of those that have run."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.studies import plan as plans
from secateur.studies.execution.keys import PARAMS, Entry, value_at
from secateur.studies.plan import Plan, Work

FEWEST_EPOCHS = 1.0
"""Work without epochs counts as one."""


def seconds(plan: Plan, works: Sequence[Work]) -> tuple[float, list[str]]:
    """Seconds of these pieces, one after the other, and stages of which there are no records."""
    known: dict[tuple[str, Any, Any], list[float]] = {}
    for id, entry in plan.entries.items():
        name = plan.works[id].stage.name
        if (took := _took(plan, entry)) is not None:
            declared = entry.get("params", {}).get(PARAMS, {})
            kind = (name, declared.get("dataset"), declared.get("arch"))
            known.setdefault(kind, []).append(took / _epochs(name, declared))
    total, unknown = 0.0, []
    for work in works:
        declared = plan.graph.declared(work.stage, plan.params(work.cell))
        kind = (work.stage.name, declared.get("dataset"), declared.get("arch"))
        if kind in known:
            total += statistics.median(known[kind]) * _epochs(work.stage.name, declared)
        elif plans.trains(plan, work) and work.stage.name not in unknown:
            unknown.append(work.stage.name)
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


def _epochs(stage: str, declared: Mapping[str, Any]) -> float:
    """Epochs of the stage's own section."""
    found = value_at(declared.get(plans.section(stage), {}), "epochs")
    return max(float(found), FEWEST_EPOCHS) if isinstance(found, int | float) else FEWEST_EPOCHS
