"""Check the settings of all cells before anything runs."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from typing import Any

from secateur.base.errors import SettingsError
from secateur.studies.plan import Plan


def settings(plan: Plan) -> None:
    """Raise SettingsError, naming the cell, for the first value that is not allowed.

    The check runs in a separate process, since it imports every plug-in, and torch. It is left out
    for cells whose work is finished, or that of another cell: what their stages declare has passed
    before.
    """
    numbers = {work.cell for work in plan.missing()}
    numbers |= {number for number in range(len(plan.cells)) if _has_unread_key(plan, number)}
    if not numbers:
        return
    cells = {plan.cells[n].name: plan.params(n) for n in sorted(numbers)}
    done = subprocess.run(
        [sys.executable, "-m", "secateur.studies.execution.check"],
        input=json.dumps(cells), text=True, capture_output=True, check=False,
        cwd=plan.graph.folder,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the check of the settings failed"]
        raise SettingsError(lines[-1])


def _has_unread_key(plan: Plan, number: int) -> bool:
    """Whether a cell has a key that params.yaml lacks and no stage of the cell declares."""
    works = (plan.works[id] for id in plan.by_cell[number])
    declared = {key for work in works for key in work.stage.params}
    return any(_new_keys(plan.cells[number].settings, plan.graph.params, declared))


def _new_keys(
    settings: Mapping[str, Any], params: Mapping[str, Any], left_out: Set[str], prefix: str = ""
) -> Iterator[str]:
    """Dotted keys of the tables in `settings` that `params` lacks, except below `left_out`."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in left_out:
            continue
        if key not in params:
            yield name
        elif isinstance(value, Mapping) and isinstance(params[key], Mapping):
            yield from _new_keys(value, params[key], left_out, f"{name}.")


def refused(cell: str, params: dict[str, Any]) -> str | None:
    """The first error in the params.yaml of a cell, in one line; None if all values are allowed."""
    from secateur.base import settings as checked

    try:
        checked.check_values(params)
    except SettingsError as error:
        return f"cell {cell}: {error}"
    return None


def _main() -> None:
    found = (refused(cell, params) for cell, params in json.load(sys.stdin).items())
    sys.exit(next(filter(None, found), None))


if __name__ == "__main__":
    _main()
