"""Read JSON and YAML of limited size and depth, and validate values against a schema."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from secateur.base import files
from secateur.base.errors import SecateurError, cut, shorten
from secateur.base.mistakes import first_mistake

MAX_BYTES = 2**20
"""Limit for files that people write: params.yaml, recipes, configurations of groups."""
MAX_DEPTH = 32
"""Limit of nested tables and lists."""
MAX_VALUES = 100_000
"""Limit of values in a YAML file, with aliases expanded wherever they are used."""

YAML_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C if available: ten times as fast, and it limits the depth."""

T = TypeVar("T")

_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)
"""A string or a bracket of JSON."""


def read_json(path: Path, error: type[SecateurError], cure: str = "") -> Any:
    """The value in a JSON file; raises `error` naming the file if it cannot be read.

    `cure` is added to the message about a missing file.
    """
    try:
        return parse_json(files.read_bytes(path, error, MAX_BYTES, cure))
    except ValueError as reason:
        raise error(f"{path}: cannot be read as JSON: {cut(str(reason), 200)}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError if it is malformed, nested too deep or repeats a key.

    NaN and infinity are accepted, as `json` writes them.
    """
    if isinstance(text, bytes):
        text = text.decode()
    depth = 0
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shorten(twice)} occurs twice")
    return found


def read_yaml(path: Path, error: type[SecateurError], cure: str = "") -> Any:
    """The value in a YAML file; raises `error` naming the file if it cannot be read.

    `cure` is added to the message about a missing file.
    """
    content = files.read_bytes(path, error, MAX_BYTES, cure)
    try:
        value = yaml.load(content.decode(), _Loader)
        _check_size(value)
    except Exception as reason:  # besides YAMLError: ValueError, KeyError, AttributeError, ...
        words = " ".join(str(reason).replace('in "<unicode string>", ', "").split())
        if isinstance(reason, RecursionError) or "maximum nesting depth" in words:
            words = f"nested more than {MAX_DEPTH} deep"
        elif not isinstance(reason, yaml.YAMLError | ValueError):
            words = f"a value that its type does not allow: {words}"
        text = cut(words or type(reason).__name__, 200)
        raise error(f"{path}: not valid YAML: {text}") from None
    return value


class _Loader(YAML_LOADER):  # type: ignore[misc, valid-type]
    """A loader that rejects a key that occurs twice, as DVC does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The table; YAMLError if a key occurs twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name != "<<" and name in lines:
                raise yaml.YAMLError(f"{cut(name)} occurs twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """The whole number; YAMLError if it has more digits than Python can convert."""
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            line, length = node.start_mark.line + 1, len(node.value)
            raise yaml.YAMLError(
                f"line {line}: {cut(node.value, 20)} ({length:,} characters): not a whole number, "
                "or one with too many digits"
            ) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_size(value: Any) -> None:
    """ValueError if there are too many values, nested too deep, or a value contains itself."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                inner += item
            if count + len(inner) > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES:,} values")
        count += len(inner)
        level = inner
    if level:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")


def validated(adapter: TypeAdapter[T], value: Any, where: str, error: type[SecateurError]) -> T:
    """The value, converted to the type of `adapter`; raises `error` naming the first bad field."""
    try:
        if not isinstance(value, dict):
            raise error(f"{where}: {shorten(value)}: a table is needed")
        return adapter.validate_python(value)
    except ValidationError as reason:
        mistake = first_mistake(reason, value)
        key = ".".join(shorten(part, 40).strip("'") for part in mistake.path) or "its content"
        text = mistake.sentence(key, adapter._type)
        raise error(f"{where}: {cut(text, 400)}{mistake.more}") from None
