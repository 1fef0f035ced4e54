"""Check the settings of all cells before anything runs."""

import json
import subprocess
import sys
from typing import Any

from secateur.base.errors import SettingsError
from secateur.studies.plan import Plan


def settings(plan: Plan) -> None:
    """Raise SettingsError, naming the cell, for the first value that is not allowed.

    The check runs in a separate process, since it imports every plug-in, and torch. Only cells with
    missing work are checked: the others have passed before.
    """
    numbers = {work.cell for work in plan.missing()}
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
