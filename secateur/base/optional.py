"""Packages that only some work needs, imported when that work begins."""

import importlib
from typing import Any

from secateur.base.errors import SecateurError

INSTALL = "in a clone of Secateur `make setup` installs it, elsewhere `pip install"


def load(module: str, purpose: str, group: str | None = None) -> Any:
    """Import an optional package; `purpose` says what it is needed for, as in "to run .onnx files".

    `group`: the optional group of pyproject.toml, of those that `make setup` leaves out.

    Raises SecateurError with the command that installs the package if it is not installed. A
    package that is installed and cannot be imported raises whatever it raises.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        install = f"`pip install --group {group}`" if group else f"{INSTALL} {package}`"
        raise SecateurError(
            f"{package} is needed {purpose} and is not installed; {install}"
        ) from None
