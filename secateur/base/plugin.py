"""Find a data set, architecture, penalty or pruner: the file name is the registry."""

import difflib
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from secateur.base.errors import SettingsError

Kind = Literal["datasets", "archs", "penalties", "pruners"]
KEYS: dict[Kind, str] = {
    "datasets": "dataset",
    "archs": "arch",
    "penalties": "penalty",
    "pruners": "pruner",
}
"""Folder of plug-ins -> the top-level key of params.yaml that names the one in use."""

_PACKAGE = Path(__file__).resolve().parents[1]


def names(kind: Kind) -> list[str]:
    """All plug-ins of a kind, sorted."""
    return sorted(p.stem for p in (_PACKAGE / kind).glob("*.py") if not p.stem.startswith("_"))


def find(kind: Kind, name: str, key: str | None = None) -> Path:
    """File of the plug-in; SettingsError with the names there are if there is none."""
    path = _PACKAGE / kind / f"{name}.py"
    if kind not in get_args(Kind) or not re.fullmatch(r"[a-z]\w*", name) or not path.is_file():
        close = difflib.get_close_matches(name, names(kind), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(
            f"params.yaml: {key or KEYS[kind]} = {name!r}: there is no secateur/{kind}/{name}.py; "
            f"there are: {', '.join(names(kind))}{hint}"
        )
    return path


def load(kind: Kind, name: str) -> ModuleType:
    """Import the plug-in `secateur/<kind>/<name>.py`, and no other."""
    find(kind, name)
    return importlib.import_module(f"secateur.{kind}.{name}")
