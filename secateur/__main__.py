"""`python -m secateur`, and the console script `secateur` of an installed package."""

import os
import sys
from pathlib import Path

from secateur.cli import main

RUN_FROM = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module('secateur', run_name='__main__', alter_sys=True)"
)
"""As `python -m secateur`, with the folder of the package as the first argument."""


def script() -> None:
    """The console script: anywhere in a project, the project's own code runs.

    An installed copy stands aside there, so that a change of the code, or an experiment's temporary
    copy, means the same to `secateur` and to `python -m stages.<name>`.
    """
    here, own = Path.cwd(), Path(__file__).resolve().parent
    for folder in (here, *here.parents):
        package = folder / "secateur"
        if (folder / "dvc.yaml").is_file() and (package / "__main__.py").is_file():
            if package.resolve() != own:
                arguments = [sys.executable, "-c", RUN_FROM, str(folder), *sys.argv[1:]]
                os.execv(sys.executable, arguments)
            break
    main()


if __name__ == "__main__":
    main()
