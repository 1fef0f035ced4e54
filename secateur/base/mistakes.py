"""Turn a validator's errors into messages for people who write params.yaml and other files."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ValidationError

from secateur.base.errors import cut, did_you_mean, shorten
from secateur.base.sections import types_in

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


@dataclass(frozen=True)
class Mistake:
    """One field or key that a validator has rejected, described for people who write files."""

    path: tuple[str, ...]
    """Keys, and positions in lists, that lead to it."""
    kind: str
    """The validator's name for this kind of mistake."""
    value: Any
    words: str
    """What is allowed."""
    more: str
    """The number of other mistakes, in brackets; empty if there is none."""
    is_key: bool = False
    """Whether the value is a key of the table at `path`."""

    @property
    def is_unknown(self) -> bool:
        """Whether the last key of the path is one that the type does not have."""
        return self.kind in _UNKNOWN

    def sentence(self, key: str, schema: Any) -> str:
        """Key, value and what is allowed; `key` is how the path is written, `schema` the type."""
        if self.is_unknown:
            allowed = sorted(fields_at(schema, self.path[:-1]))
            hint = did_you_mean(self.path[-1], allowed)
            return f"{key}: unknown key; allowed: {', '.join(allowed)}{hint}"
        if self.kind in _MISSING:
            return f"{key}: missing"
        if self.is_key:
            return f"{key}: key {shorten(self.value)}: {self.words}"
        begins = re.match(r"\w+", self.words)
        of_table = self.kind == "value_error" and isinstance(self.value, Mapping)
        if of_table and begins and begins[0] in fields_at(schema, self.path):
            return f"{key + '.' if key else ''}{self.words}"  # about several of its keys
        return f"{key} = {shorten(self.value)}: {self.words}"


def first_mistake(error: ValidationError, raw: Any) -> Mistake:
    """The first mistake in `raw`.

    Where several types are allowed, the validator has tried each of them. The mistake is then that
    of the type that came furthest or, if all stopped at the same place, names what each needs.
    """
    found = [_Found(each, raw) for each in error.errors(include_url=False)]
    unknown = [one for one in found if one.kind in _UNKNOWN]
    if found[0].kind in _MISSING:  # a misspelt key is reported as missing too
        beside = [one for one in unknown if one.path[:-1] == found[0].path[:-1]]
        found = [*beside[:1], *(one for one in found if one not in beside[:1])]
    first, tried = found[0], found[:1]
    if first.choice is not None:
        tried = [one for one in found if one.choice == first.choice]
        deepest = max(tried, key=lambda one: len(one.path))
        first, tried = deepest, [one for one in tried if one.path == deepest.path]
    others = [one for one in found[1:] if first.choice is None or one.choice != first.choice]
    others = [one for one in others if one.kind != "too_short"]  # for its wrong items
    more = f" (and {len(others)} more)" if others else ""
    path = first.path[:-1] if first.is_key else first.path
    return Mistake(path, first.kind, first.value, _allowed(tried), more, first.is_key)


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument")
_KEY = "[key]"
"""What the validator appends to the location if the key itself is wrong."""


class _Found:
    """One of the validator's mistakes; its location consists of keys of the value only.

    The validator's own location also contains the names of the types that it has tried.
    """

    def __init__(self, error: "ErrorDetails", raw: Any) -> None:
        self.kind, self.value, self.error = error["type"], error["input"], error
        self.is_key = error["loc"][-1:] == (_KEY,)
        parts = error["loc"][:-1] if self.is_key else error["loc"]
        path: list[str] = []
        self.choice: tuple[str, ...] | None = None
        """First location at which several types were tried; None if only one is allowed."""
        for number, part in enumerate(parts):
            absent = self.kind in _MISSING and number == len(parts) - 1
            inside = {str(k): v for k, v in _items(raw)}
            if str(part) not in inside and not absent:
                self.choice = self.choice or tuple(path)
                continue
            raw = inside.get(str(part))
            path.append(str(part))
        self.path = tuple(path)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Keys of a table, or positions of a list, with their values; empty for any other value."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


_NEEDED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a table",
    "mapping": "a table",
    "model": "a table",
    "dataclass": "a table",
}
"""First word of the validator's name for a wrong type -> the type that is needed, in words."""


def _allowed(tried: Sequence[_Found]) -> str:
    """What is allowed, in words, for a value that none of the types tried accepts."""
    first = tried[0]
    if all(one.kind == "literal_error" for one in tried):
        return _one_of([one.error["ctx"]["expected"] for one in tried], first.value)
    of_the_type = [one for one in tried if _needed(one) is None]
    if of_the_type:
        return _words(of_the_type[0])
    needed = dict.fromkeys(map(_needed, tried))
    if "a number" in needed:
        needed.pop("a whole number", None)
    words = f"{' or '.join(map(str, needed))} is needed"
    simple = isinstance(first.value, str | int | float) and not isinstance(first.value, bool)
    if [*needed] == ["a list"] and simple:
        words += f", such as [{cut(str(first.value), 40)}]"
    if [*needed] == ["text"] and simple:
        words += f", such as '{cut(str(first.value), 40)}' in quotes"
    return words


def _one_of(expected: Sequence[str], value: Any) -> str:
    """`must be ...` with the values of all lists such as `'a', 'b' or 'c'`, and the nearest one."""
    names = [name for text in expected for name in re.split(r", | or ", text)]
    *others, last = names
    text = f"{', '.join(others)} or {last}" if others else last
    near = did_you_mean(cut(str(value)), [name.strip("'") for name in names])
    return f"must be {text}{near if isinstance(value, str) else ''}"


def _needed(found: _Found) -> str | None:
    """The type that is needed, if the type is wrong; else None."""
    if found.kind == "literal_error":
        return str(found.error["ctx"]["expected"])
    name, _, rest = found.kind.partition("_")
    wrong = ("type", "parsing", "from_float", "parsing_size", "attributes_type")
    return _NEEDED.get(name) if rest in wrong else None


def _words(found: _Found) -> str:
    """What is allowed, for a value of the right type."""
    context = found.error.get("ctx", {})
    least, most = context.get("min_length"), context.get("max_length")
    if found.kind == "too_short":
        return f"at least {'one is' if least == 1 else f'{least} are'} needed"
    if found.kind == "too_long":
        return f"at most {most} are allowed"
    if found.kind == "string_too_short":
        return "must not be empty" if least == 1 else f"at least {least} characters are needed"
    if found.kind == "string_too_long":
        return f"at most {most} characters are allowed"
    text = re.sub("^(Input|String) should be ", "must be ", found.error["msg"])
    text = cut(text.removeprefix("Value error, "), 300)
    return text[:1].lower() + text[1:]


def fields_at(schema: Any, path: Iterable[str]) -> list[str]:
    """Names of the fields that the table at this path may have; empty if any are allowed."""
    kinds = types_in(schema)
    for part in path:
        fields = next(filter(None, map(_fields, kinds)), {})
        if part in fields:  # else the key of a free table, or a position in a list
            kinds = types_in(fields[part])
    return list(next(filter(None, map(_fields, kinds)), {}))


def _fields(kind: Any) -> dict[str, Any]:
    """Name and type of each field of a model or dataclass; empty for any other type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return get_type_hints(kind) if isinstance(kind, type) and is_dataclass(kind) else {}
