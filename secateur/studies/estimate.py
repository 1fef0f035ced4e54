"""How long pieces of work will take, by the records of those that have run."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.studies import plan as plans
from secateur.studies.execution.keys import Entry
from secateur.studies.execution.stages import PARAMS
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
            kind = (_base(name), declared.get("dataset"), declared.get("arch"))
            known.setdefault(kind, []).append(took / _epochs(name, declared))
    total, unknown = 0.0, []
    for work in works:
        declared = plan.graph.declared(work.stage, plan.params(work.cell))
        name = _base(work.stage.name)
        kind = (name, declared.get("dataset"), declared.get("arch"))
        if kind in known:
            total += statistics.median(known[kind]) * _epochs(work.stage.name, declared)
        elif plans.trains(plan, work) and name not in unknown:
            unknown.append(name)
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


def _base(stage: str) -> str:
    """The stage of the first round: those of further ones take as long."""
    return stage.partition("@")[0]


def _epochs(stage: str, declared: Mapping[str, Any]) -> float:
    """Epochs of the stage's own section."""
    found = plans.epochs(stage, declared)
    return max(float(found), FEWEST_EPOCHS) if isinstance(found, int | float) else FEWEST_EPOCHS
