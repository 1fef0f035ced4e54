"""Change values in params.yaml; its comments and the order of its keys stay."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.base import files, settings

_NULL = "tag:yaml.org,2002:null"


def update(values: Mapping[str, Any], path: Path | str = settings.FILE) -> None:
    """Set each value at its dotted key, in one step; missing tables on the way are made."""
    from ruamel.yaml import YAML

    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1000  # no line is wrapped
    editor.representer.add_representer(
        type(None), lambda made, _: made.represent_scalar(_NULL, "null")
    )
    params = editor.load(Path(path).read_text())
    for key, value in values.items():
        *sections, last = key.split(".")
        table = params
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    text = io.StringIO()
    editor.dump(params, text)
    files.write_text(Path(path), text.getvalue())
