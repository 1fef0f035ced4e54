"""Settings by dotted keys: values in nested tables, and changes of values in params.yaml.

Comments and the order of keys in params.yaml are kept.
"""

import copy
import functools
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.base import files, settings

_NULL = "tag:yaml.org,2002:null"


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has(tree: Mapping[str, Any], key: str) -> bool:
    """Whether there is a value at a dotted key, possibly null."""
    sections, _, last = key.rpartition(".")
    table = value_at(tree, sections) if sections else tree
    return isinstance(table, Mapping) and last in table


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables from values by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        table = found
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return found


def short_key(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key, with as many parts before it as tell it from other keys."""
    parts, others = key.split("."), set(keys) - {key}
    names = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((n for n in names if not any(f".{o}".endswith(f".{n}") for o in others)), key)


def label(value: Any) -> str:
    """A value of a setting as part of a name: the same text for equal numbers, without brackets."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | dict):
        return re.sub(r"[\[\]{}'\" ]", "", str(value)).replace(",", "-")
    return str(value)


def flat(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """One table with joined keys from nested tables; lists are kept."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            result |= flat(value, separator, f"{name}{separator}")
        else:
            result[name] = value
    return result


def as_number(value: Any) -> Any:
    """The number, if YAML 1.1 has left one as text, as in 1e-4; any other value unchanged."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def with_numbers(tree: Any) -> Any:
    """The tree with numbers where YAML 1.1 has left text, as in 1e-4; DVC reads params.yaml so."""
    if isinstance(tree, Mapping):
        return {key: with_numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_numbers(value) for value in tree]
    return as_number(tree)


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
