"""Settings `Ratios` and `Skip`: notations for the share of each layer that is pruned.

A ratio is at least 0 and less than 1, and is written in one of these ways:

    0.5                            every layer that can be pruned
    [0, 0.75, 0.75, 0.32, 0]       by stage: stem, layer1, layer2, layer3, the layers after them
    "layer?.*.conv1: 0.75"         by name, as fnmatch matches it; layers without a pattern: 0
    "0-4: 0.5, 7: 0.2"             by number, convolutions and linear layers counted from 0
    {"layer?.*.conv1": 0.75}       names or numbers as a table

If several patterns match a layer, the one with the most characters that are not wildcards counts,
and a number takes precedence over any name. Their order does not matter, since DVC does not keep
it. If layers have numbers as names, as in nn.Sequential, "[3]" is the layer with this name and
"3-3" the layer with this number; "3" is an error unless both are the same layer.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

NUMBERS = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
"""The number of a layer, or a range of numbers."""


@dataclass(frozen=True, repr=False)
class Rules:
    """Ratios as the user wrote them, validated as far as possible without a network."""

    everywhere: float | None = None
    stages: tuple[float, ...] = ()
    named: tuple[tuple[str, float], ...] = ()
    """Name pattern, number or range of numbers, with its ratio."""

    def __repr__(self) -> str:
        """In the notation of a user."""
        if self.everywhere is not None:
            return f"{self.everywhere:g}"
        if self.stages:
            return f"[{', '.join(f'{ratio:g}' for ratio in self.stages)}]"
        return ", ".join(f"{pattern}: {ratio:g}" for pattern, ratio in self.named)


@dataclass(frozen=True, repr=False)
class Skipped:
    """One entry of `skip`."""

    text: str
    number: bool = False
    """Whether YAML read it as a number, which loses trailing zeros: 2.1 may have been 2.10."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        """In the notation of a user."""
        return self.text if self.number else repr(self.text)


def parse_ratios(value: Any) -> Rules:
    """Ratios in any of the notations; raises ValueError saying what is wrong."""
    if isinstance(value, Rules):
        return value
    if isinstance(value, Mapping):
        return Rules(named=_distinct((str(key), ratio) for key, ratio in value.items()))
    if isinstance(value, list | tuple):
        if any(isinstance(item, str) and ":" in item for item in value):
            return Rules(named=_distinct(_pair(str(item)) for item in value))
        if not value:
            raise ValueError("an empty list has no ratios")
        stages = enumerate(value)
        return Rules(stages=tuple(_ratio(ratio, f"stage {number}") for number, ratio in stages))
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            if not (inner := text[1:-1].strip()):
                raise ValueError("an empty list has no ratios")
            return parse_ratios([item.strip() for item in inner.split(",")])
        if ":" in text:
            return parse_ratios([item.strip() for item in text.split(",")])
    return Rules(everywhere=_ratio(value))


def parse_skip(value: Any) -> tuple[Skipped, ...]:
    """Layers to skip, from a list or a text with commas; raises ValueError for anything else."""
    if isinstance(value, str):
        value = [
            item.strip() for item in value.strip().removeprefix("[").removesuffix("]").split(",")
        ]
        value = [item for item in value if item]
    if not isinstance(value, list | tuple):
        raise ValueError("a list of names, stages or blocks is needed, such as ['1.0', 'fc']")
    return tuple(item if isinstance(item, Skipped) else _skipped(item) for item in value)


Ratios = Annotated[Rules, BeforeValidator(parse_ratios)]
"""The share of each layer's units that is pruned; see the top of this file."""

Skip = Annotated[tuple[Skipped, ...], BeforeValidator(parse_skip)]
"""Layers that are not pruned: names as fnmatch matches them, `stage`, `stage.block` or
`stage.block.conv` of a residual network (blocks and their convolutions counted from 0), numbers in
other networks."""


def _pair(text: str) -> tuple[str, Any]:
    """Pattern and ratio of `pattern: ratio`."""
    pattern, colon, ratio = text.rpartition(":")
    if not colon or not pattern.strip():
        raise ValueError(f"'{text}': a name or a number, a colon and a ratio are needed")
    return pattern.strip(), ratio.strip()


def _distinct(pairs: Iterable[tuple[str, Any]]) -> tuple[tuple[str, float], ...]:
    """The pairs with validated ratios; ValueError if there is none, or for a repeated pattern."""
    found: dict[str, float] = {}
    for pattern, ratio in pairs:
        if not pattern or pattern in found:
            raise ValueError(f"'{pattern}' is named twice" if pattern else "a name is empty")
        if (match := NUMBERS.fullmatch(pattern)) and int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"'{pattern}': the second number is less than the first")
        found[pattern] = _ratio(ratio, f"'{pattern}'")
    if not found:
        raise ValueError("an empty table has no ratios")
    return tuple(sorted(found.items()))


def _ratio(value: Any, place: str = "") -> float:
    """A ratio; ValueError unless it is a number of at least 0 and less than 1.

    `place` is its place among several ratios; the whole value is named by the caller.
    """
    named = f"{place} = {value!r}: " if place else ""
    try:
        ratio = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{named}a number is needed") from None
    if not 0 <= ratio < 1:
        raise ValueError(f"{named}must be at least 0 and less than 1")
    return ratio


def _skipped(item: Any) -> Skipped:
    if isinstance(item, bool) or not isinstance(item, str | int | float) or not str(item).strip():
        raise ValueError(f"{item!r}: a name, a stage or a block is needed")
    return Skipped(str(item).strip(), isinstance(item, float))
