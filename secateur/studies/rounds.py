"""The further rounds of a cell: how a study merges them into its settings."""

from collections.abc import Mapping
from typing import Any

from secateur.base import settings
from secateur.base.errors import SettingsError, shorten
from secateur.base.settings import Params, chain
from secateur.pipeline import recipe
from secateur.pipeline.record import FIRST, Chain

KEY = "rounds"
SECTIONS = {"sparse_train": ("decay", "penalties"), "prune": ("pruners",), "finetune": ()}
"""Section of a round -> its keys that are at the top level of params.yaml."""


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two tables as everywhere, except that `rounds: {}` above removes the rounds below."""
    both = settings.merged(below, above)
    if above.get(KEY) == {}:
        del both[KEY]
        both |= {KEY: {}} if KEY in below else {}
    return both


def start(params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a cell starts with, so that they contain all its rounds."""
    return {KEY: params[KEY]} if params.get(KEY) else {}


def whole(params: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of params.yaml with the settings of a cell."""
    return settings.merged(params, own) | ({KEY: own[KEY]} if KEY in own else {})


def changes(own: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a cell by dotted keys of params.yaml; its rounds as one table."""
    found = recipe.changes({key: value for key, value in own.items() if key != KEY}, params)
    return found | ({KEY: own[KEY]} if own.get(KEY, params.get(KEY)) != params.get(KEY) else {})


def names(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The further rounds in order; SettingsError unless they are a chain."""
    if not params.get(KEY):
        return ()
    return chain(Params.declared({KEY: params[KEY]}).rounds)


def last(params: Mapping[str, Any], stage: str) -> str:
    """This stage in the last round, if rounds have it; otherwise the stage itself."""
    return Chain(names(params)).last.get(stage, stage)


def epochs(params: Mapping[str, Any], section: str) -> list[int]:
    """Epochs of `sparse_train` or `finetune` in every round; SettingsError unless whole numbers."""
    names(params)  # checks their form
    tables = {"": params, **{f"{KEY}.{k}.": v for k, v in (params.get(KEY) or {}).items()}}
    own = [(table.get(section) or {}).get("epochs") for table in tables.values()]
    for place, count in zip(tables, own, strict=True):
        if not isinstance(count, int | None):
            key = f"{place}{section}.epochs"
            raise SettingsError(f"{key} = {shorten(count)}: a whole number is needed")
    return [own[0] or 0 if count is None else count for count in own]


def check_pruners(name: str, prune: Mapping[str, Any]) -> None:
    """Raise SettingsError unless the `pruners` of a round are a table, or missing."""
    given = prune.get("pruners", {})
    if not isinstance(given, Mapping):
        key = f"{KEY}.{name}.prune.pruners"
        raise SettingsError(f"{key} = {shorten(given)}: a table of settings is needed")


def in_round(name: str, above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of params.yaml moved to one round; those that a round cannot have stay outside."""
    if name == FIRST:
        return dict(above)
    found: dict[str, Any] = {}
    for key, value in above.items():
        place = next((section for section, keys in SECTIONS.items() if key in keys), None)
        if place:
            value = {key: value}
        if place or key in SECTIONS:
            found = settings.merged(found, {KEY: {name: {place or key: value}}})
        else:
            found[key] = value
    return found


def of_first_round(key: str) -> str:
    """The key of the first round that `rounds.<number>.<section>.<rest>` replaces, empty for
    `after`; any other key unchanged."""
    if not key.startswith("rounds."):
        return key
    _, _, section, *rest = key.split(".")
    if not rest:
        return ""
    return ".".join(rest if rest[0] in SECTIONS.get(section, ()) else [section, *rest])
