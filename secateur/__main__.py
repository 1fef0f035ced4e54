"""`python -m secateur`, and the console script `secateur` of an installed package."""

import os
import sys
from pathlib import Path

from secateur.cli import main


def script() -> None:
    """The console script: in a project's root, the project's own code runs.

    An installed copy stands aside there, so that a change of the code, or an experiment's temporary
    copy, means the same to `secateur` and to `python -m stages.<name>`.
    """
    own, project = Path(__file__).resolve().parent, Path.cwd() / "secateur"
    in_project = Path("dvc.yaml").is_file() and (project / "__main__.py").is_file()
    if in_project and project.resolve() != own:
        os.execv(sys.executable, [sys.executable, "-m", "secateur", *sys.argv[1:]])
    main()


if __name__ == "__main__":
    main()
