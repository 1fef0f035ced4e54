"""Read params.yaml, and change values in it; comments and the order of keys are kept."""

import copy
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.base import files, settings
from secateur.base.documents import read_yaml
from secateur.base.errors import SettingsError, shorten

_NULL = "tag:yaml.org,2002:null"


def read(path: Path | str = settings.FILE) -> dict[str, Any]:
    """The values of params.yaml, not validated."""
    content = read_yaml(Path(path), SettingsError)
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: {shorten(content)} in place of a table of settings")
    return content


def update(values: Mapping[str, Any], path: Path | str = settings.FILE) -> None:
    """Set each value at its dotted key, in one step; missing tables are created."""
    files.write_text(Path(path), updated(Path(path).read_text(), values))


def updated(text: str, values: Mapping[str, Any]) -> str:
    """The text of params.yaml with each value set at its dotted key, also in an empty section."""
    params = copy.deepcopy(_parsed(text))
    for key, value in values.items():
        *sections, last = key.split(".")
        table = params
        for section in sections:
            if table.get(section) is None:
                table[section] = {}
            table = table[section]
        table[last] = value
    made = io.StringIO()
    _editor().dump(params, made)
    return made.getvalue()


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Any:
    """The document with its comments; cached, as a study changes the same text for every cell."""
    return _editor().load(text)


def _editor() -> Any:
    """A YAML editor that keeps comments, quotes and the order of keys."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class WithNull(RoundTripRepresenter):
        """None is written as null; representers belong to a class, and DVC uses the original."""

    WithNull.add_representer(type(None), lambda made, _: made.represent_scalar(_NULL, "null"))
    editor = YAML()
    editor.Representer = WithNull
    editor.preserve_quotes = True
    editor.width = 1000  # no line is wrapped
    return editor
