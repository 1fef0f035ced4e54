"""Optional packages, imported only when they are needed."""

import importlib
from typing import Any

from secateur.base.errors import SecateurError

INSTALL = "in a clone of Secateur `make setup` installs it, elsewhere `pip install"


def load(module: str, purpose: str, group: str | None = None) -> Any:
    """Import an optional package; `purpose` says what it is needed for, as in "to run .onnx files".

    `group` is the package's dependency group in pyproject.toml if `make setup` does not install it.

    Raises SecateurError with the command that installs the package if it is not installed. Errors
    of a package that is installed but cannot be imported are passed on.
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
