"""Optional packages, imported only when they are needed, and the runtimes of exported networks."""

import importlib
from typing import Any, Literal

from secateur.base.errors import SecateurError

RuntimeName = Literal["torch", "onnxruntime", "openvino"]
"""A runtime that runs exported networks, named like its package."""
RUNTIME_TITLES: dict[RuntimeName, str] = {
    "torch": "torch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
"""All runtimes, with their names in texts."""
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
