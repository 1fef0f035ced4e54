"""Settings `Ratios` and `Skip`: what a user writes -> the share of each layer that goes.

A ratio is at least 0 and less than 1, and is written in one of these ways:

    0.5                            every layer that may be pruned
    [0, 0.75, 0.75, 0.32, 0]       by stage: stem, layer1, layer2, layer3, what comes after them
    "layer?.*.conv1: 0.75"         by name, as fnmatch matches it; layers without a pattern: 0
    "0-4: 0.5, 7: 0.2"             by place, convolutions and linear layers counted from 0
    {"layer?.*.conv1": 0.75}       names or places as a table

Where several patterns match a layer, the one with the most characters that are no wildcards wins,
and a place wins over every name; the order has no say, since DVC does not see it. Stages and blocks
are read from names such as `layer2.0.conv1`.

Source of stages, places and `skip`: the code of H. Wang et al., Neural pruning via growing
regularization, ICLR 2021.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import nn

from secateur.base.errors import SettingsError
from secateur.sparsity import masks
from secateur.sparsity.choices import Granularity

PLACE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
BLOCK = re.compile(r"(?:.*\.)?layer(\d+)\.(\d+)\.(.+)")
SHORTCUTS = {"shortcut", "downsample"}


@dataclass(frozen=True)
class Rules:
    """Ratios as they were written, checked as far as that goes without a network."""

    everywhere: float | None = None
    stages: tuple[float, ...] = ()
    named: tuple[tuple[str, float], ...] = ()
    """Pattern or place, with its ratio."""

    def __str__(self) -> str:
        if self.everywhere is not None:
            return f"{self.everywhere:g}"
        if self.stages:
            return f"[{', '.join(f'{ratio:g}' for ratio in self.stages)}]"
        return ", ".join(f"{pattern}: {ratio:g}" for pattern, ratio in self.named)


@dataclass(frozen=True)
class Skipped:
    """One entry of `skip`."""

    text: str
    number: bool = False
    """YAML read it as a number, which has no trailing zeros: 2.1 may have been 2.10."""

    def __str__(self) -> str:
        return self.text


def parse(value: Any) -> Rules:
    """Ratios in any of the notations; ValueError with what is wrong."""
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
            return parse([item.strip() for item in inner.split(",")])
        if ":" in text:
            return parse([item.strip() for item in text.split(",")])
    return Rules(everywhere=_ratio(value, "the ratio"))


def parse_skip(value: Any) -> tuple[Skipped, ...]:
    """Layers to leave alone, from a list or a text with commas."""
    if isinstance(value, str):
        value = [
            item.strip() for item in value.strip().removeprefix("[").removesuffix("]").split(",")
        ]
        value = [item for item in value if item]
    if not isinstance(value, list | tuple):
        raise ValueError("a list of names, stages or blocks is needed, such as ['1.0', 'fc']")
    return tuple(item if isinstance(item, Skipped) else _skipped(item) for item in value)


Ratios = Annotated[Rules, BeforeValidator(parse)]
"""How large a share of each layer's groups goes; see the top of this file."""

Skip = Annotated[tuple[Skipped, ...], BeforeValidator(parse_skip)]
"""Layers that keep everything: names as fnmatch matches them, `stage`, `stage.block` or
`stage.block.conv` of a residual network (blocks and their convolutions counted from 0), places of
other ones."""


def by_layer(
    model: nn.Module,
    rules: Rules,
    granularity: Granularity,
    skip: tuple[Skipped, ...],
    where: str,
    refused: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Ratio of every convolution and linear layer, by name; 0 where nothing goes.

    `where` is the key of params.yaml that holds `ratios` and `skip`. `refused` says why layers may
    not be pruned, by name; without it their names and places tell. Raises SettingsError for what
    matches no layer, for a ratio above 0 on a layer that may not be pruned in such groups (a single
    number passes these over), and if nothing at all would go.
    """
    spots = survey(model)
    names = list(spots)
    left_alone = {name for entry in skip for name in _matched(entry, spots, where)}
    if refused is None:
        refused = {name: spot.refusal(granularity) for name, spot in spots.items()}
    refused = {name: refused.get(name, "") for name in names}
    given = _given(rules, spots, f"params.yaml: {where}.ratios")
    result: dict[str, float] = {}
    for name in names:
        ratio, origin = given[name]
        if ratio > 0 and name not in left_alone and (why := refused[name]):
            if origin:
                raise SettingsError(
                    f"params.yaml: {where}.ratios: {origin} = {ratio:g} is for layer {name}, whose "
                    f"{granularity}s may not be pruned: {why}"
                )
            ratio = 0.0
        result[name] = 0.0 if name in left_alone else ratio
    if not any(result.values()):
        free = _some(name for name in names if not refused[name])
        raise SettingsError(
            f"params.yaml: {where}.ratios = {rules}: nothing would be pruned; at least one layer "
            f"that may be needs a ratio above 0 (they are: {free})"
        )
    return result


def scaled(ratios: Mapping[str, float], highest: float) -> dict[str, float]:
    """The ratios in the same proportions, with the highest of them as given."""
    most = max(ratios.values())
    return {name: ratio / most * highest for name, ratio in ratios.items()}


@dataclass(frozen=True)
class Spot:
    """Where a layer stands in its network."""

    place: int
    """Among convolutions and linear layers, from 0."""
    last: bool
    grouped: bool
    residual: bool
    """Whether the network has shortcuts."""
    stage: int | None = None
    """0: stem; then the number in `layer<n>`; one more for what comes after them."""
    block: int | None = None
    conv: int | None = None
    """Within its block, from 0; None for a shortcut."""
    block_end: bool = False

    def refusal(self, granularity: Granularity) -> str:
        """Why such groups of this layer may not be pruned; empty if they may."""
        if granularity == "weight":
            return ""
        if self.grouped:
            return "a grouped convolution"
        if granularity == "filter":
            if self.last:
                return "its outputs are the classes"
            if self.residual and (self.stage == 0 or (self.block is not None and self._at_sum)):
                return "its outputs are part of a residual sum"
        else:
            if self.place == 0:
                return "its inputs are the pixels"
            if self.residual and (self.last or (self.block is not None and not self.conv)):
                return "its inputs are a residual sum"
        return ""

    @property
    def _at_sum(self) -> bool:
        return self.conv is None or self.block_end


def survey(model: nn.Module) -> dict[str, Spot]:
    """Where every convolution and linear layer stands, by name and in order."""
    layers = masks.layers(model)
    parts = {name: BLOCK.fullmatch(name) for name in layers}
    residual = any(SHORTCUTS & set(name.split(".")) for name, _ in model.named_modules())
    residual = residual and any(parts.values())
    blocks: dict[tuple[int, int], list[str]] = {}
    for name, found in parts.items():
        if found and not SHORTCUTS & set(found[3].split(".")):
            blocks.setdefault((int(found[1]), int(found[2])), []).append(name)
    stages = max((int(found[1]) for found in parts.values() if found), default=0)
    spots: dict[str, Spot] = {}
    begun = False
    for place, (name, layer) in enumerate(layers.items()):
        last = place == len(layers) - 1
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if found := parts[name]:
            begun = True
            key = int(found[1]), int(found[2])
            members = blocks.get(key, [])
            conv = members.index(name) if name in members else None
            end = bool(members) and name == members[-1]
            spots[name] = Spot(place, last, grouped, residual, *key, conv, end)
        else:
            stage = None if not stages else stages + 1 if begun else 0
            spots[name] = Spot(place, last, grouped, residual, stage)
    return spots


def _given(rules: Rules, spots: Mapping[str, Spot], where: str) -> dict[str, tuple[float, str]]:
    """Ratio of each layer, and which entry it has it from; "" for one that was meant for all."""
    if rules.everywhere is not None:
        return dict.fromkeys(spots, (rules.everywhere, ""))
    if rules.stages:
        return _by_stage(rules.stages, spots, where)
    claims: dict[str, list[tuple[int, str, float]]] = {name: [] for name in spots}
    for pattern, ratio in rules.named:
        for name in _named(pattern, spots, where):
            claims[name].append((_exactness(pattern), pattern, ratio))
    given: dict[str, tuple[float, str]] = {}
    for name, claim in claims.items():
        most = max((exact for exact, _, _ in claim), default=0)
        best = [(ratio, pattern) for exact, pattern, ratio in claim if exact == most]
        if len({ratio for ratio, _ in best}) > 1:
            raise SettingsError(
                f"{where}: {' and '.join(f'{p} = {r:g}' for r, p in best[:2])} are both for layer "
                f"{name}, and neither is more exact; make one of them so"
            )
        given[name] = best[0] if best else (0.0, "")
    return given


def _by_stage(
    ratios: tuple[float, ...], spots: Mapping[str, Spot], where: str
) -> dict[str, tuple[float, str]]:
    """One ratio a stage; for the blocks' layers it is meant for those that may be pruned."""
    stages = {spot.stage for spot in spots.values()}
    if None in stages:
        raise SettingsError(
            f"{where}: one ratio a stage needs layers named layer1.0..., layer2.0..., which this "
            "network has not; give places ('0-4: 0.5') or names"
        )
    wanted = max(stage for stage in stages if stage is not None) + 1
    if len(ratios) != wanted:
        raise SettingsError(
            f"{where}: {len(ratios)} ratios for {wanted} stages: the stem, layer1 to "
            f"layer{wanted - 2}, and what comes after them"
        )
    given: dict[str, tuple[float, str]] = {}
    for name, spot in spots.items():
        assert spot.stage is not None
        outside = spot.block is None or not spot.residual
        given[name] = ratios[spot.stage], f"stage {spot.stage}" if outside else ""
    return given


def _named(pattern: str, spots: Mapping[str, Spot], where: str) -> list[str]:
    """The layers at a place or with a matching name; SettingsError if there is none."""
    if found := PLACE.fullmatch(pattern):
        first, last = int(found[1]), int(found[2] or found[1])
        if last >= len(spots):
            raise SettingsError(
                f"{where}: {pattern}: there are {len(spots)} convolutions and linear layers, "
                f"counted from 0 to {len(spots) - 1}"
            )
        return list(spots)[first : last + 1]
    names = [name for name in spots if fnmatchcase(name, pattern)]
    if not names:
        raise SettingsError(f"{where}: {pattern} matches no layer; there are: {_some(spots)}")
    return names


def _matched(entry: Skipped, spots: Mapping[str, Spot], where: str) -> list[str]:
    """The layers that an entry of `skip` is about; SettingsError if there is none."""
    where = f"params.yaml: {where}.skip"
    blocks = any(spot.block is not None for spot in spots.values())
    if not blocks or not re.fullmatch(r"\d+(\.\d+){0,2}", entry.text):
        return _named(entry.text, spots, where)
    wanted = [int(part) for part in entry.text.split(".")]

    def meant(spot: Spot, numbers: list[int]) -> bool:
        return [spot.stage, spot.block, spot.conv][: len(numbers)] == numbers

    names = [name for name, spot in spots.items() if meant(spot, wanted)]
    if not names:
        raise SettingsError(f"{where}: there is no stage or block {entry}; layers: {_some(spots)}")
    if entry.number and len(wanted) == 2 and wanted[1]:
        longer = [wanted[0], wanted[1] * 10]
        if any(meant(spot, longer) for spot in spots.values()):
            raise SettingsError(
                f"{where}: the number {entry} may mean block {wanted[1]} or {longer[1]} of stage "
                f"{wanted[0]}; write it in quotes"
            )
    return names


def _exactness(pattern: str) -> int:
    """Characters that are no wildcards; a place is as exact as can be."""
    if PLACE.fullmatch(pattern):
        return 10**9
    return len(re.sub(r"\[[^]]*\]|[*?]", "", pattern))


def _pair(text: str) -> tuple[str, Any]:
    """Pattern and ratio of `pattern: ratio`."""
    pattern, colon, ratio = text.rpartition(":")
    if not colon or not pattern.strip():
        raise ValueError(f"'{text}': a name or a place, a colon and a ratio are needed")
    return pattern.strip(), ratio.strip()


def _distinct(pairs: Iterable[tuple[str, Any]]) -> tuple[tuple[str, float], ...]:
    """The pairs with their ratios checked; ValueError for none, or for one pattern twice."""
    found: dict[str, float] = {}
    for pattern, ratio in pairs:
        if not pattern or pattern in found:
            raise ValueError(f"'{pattern}' is named twice" if pattern else "a name is empty")
        if (place := PLACE.fullmatch(pattern)) and int(place[2] or place[1]) < int(place[1]):
            raise ValueError(f"'{pattern}': the second place is before the first")
        found[pattern] = _ratio(ratio, f"'{pattern}'")
    if not found:
        raise ValueError("an empty table has no ratios")
    return tuple(sorted(found.items()))


def _ratio(value: Any, what: str) -> float:
    """A ratio; ValueError unless it is a number of at least 0 and less than 1."""
    try:
        ratio = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} = {value!r}: a number is needed") from None
    if not 0 <= ratio < 1:
        raise ValueError(f"{what} = {value!r}: must be at least 0 and less than 1")
    return ratio


def _skipped(item: Any) -> Skipped:
    if isinstance(item, bool) or not isinstance(item, str | int | float) or not str(item).strip():
        raise ValueError(f"{item!r}: a name, a stage or a block is needed")
    return Skipped(str(item).strip(), isinstance(item, float))


def _some(names: Iterable[str]) -> str:
    """The first of many names."""
    listed = list(names)
    return ", ".join(listed[:8]) + (f", ... ({len(listed)} in all)" if len(listed) > 8 else "")
