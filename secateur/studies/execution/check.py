"""Check the settings of all cells before anything runs."""

import json
import subprocess
import sys
from pathlib import Path

from secateur.base.errors import SettingsError
from secateur.studies.plan import Plan


def settings(plan: Plan) -> None:
    """Raise SettingsError, naming the cell, for the first value that is not allowed.

    In a process of its own, since it imports every plug-in, and torch. Only cells with something
    to run are checked: the others have passed.
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


def _main() -> None:
    import yaml

    from secateur.base import settings as checked

    file = Path(".dvc/tmp/checked.yaml")
    for name, params in json.load(sys.stdin).items():
        file.write_text(yaml.safe_dump(params))
        try:
            checked.check(file)
        except SettingsError as error:
            text = str(error).replace(str(file), "params.yaml")
            sys.exit(f"cell {name}: {text}")


if __name__ == "__main__":
    _main()
