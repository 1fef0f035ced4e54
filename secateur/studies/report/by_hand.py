"""Methods and operating points of experiments that no study has made, by their settings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from secateur.studies import compare
from secateur.studies.report import rounds
from secateur.studies.results import Cell, Result


def cells_of(found: Sequence[Result]) -> list[Cell]:
    """Cells of experiments that were made by hand, by the settings that are not the same in all.

    The operating point is the strength of the penalty and the numbers and patterns of its settings
    and the pruner's, those of the last round if there are several; the method is penalty, pruner,
    and every other setting that differs. Rounds belong to the method where each says how much of
    the dense network is to be left, and to the operating point otherwise.

    A seed counts once for a method and point: of experiments that have all of it in common and
    have reached the same, as two studies share a cell, the first is kept; where they have reached
    something else, each is a method of its own by its name.
    """
    found = rounds.by_round(found)
    keys = [key for key in _different(found) if key not in ("penalty", "pruner")]
    absolute = all(_target_of_dense(result) for result in found)
    amounts = [key for key in keys if _is_amount(key, found, absolute)]
    others = [key for key in keys if key not in amounts]
    cells = []
    for result in found:
        words = [str(result.params.get("penalty")), str(result.params.get("pruner"))]
        words += filter(None, [compare.differences(result, others)])
        point = compare.differences(result, amounts) or "as set"
        cells.append(Cell(result.name, ", ".join(words), point, result.seed))
    return _once(cells, found)


def left_out(found: Sequence[Result], cells: Sequence[Cell]) -> list[str]:
    """A sentence about the experiments that are no cells, if there are any."""
    kept = {cell.experiment for cell in cells}
    names = [result.name for result in found if result.name not in kept]
    if not names:
        return []
    return [f"left out, for others have their settings, seed and results: {', '.join(names)}"]


def _once(cells: Sequence[Cell], found: Sequence[Result]) -> list[Cell]:
    """The cells with one result for each method, point and seed."""
    places: dict[tuple[str, str, int], dict[tuple[float, ...], Cell]] = {}
    for cell, result in zip(cells, found, strict=True):
        reached = (result.dense, result.final, result.compression, result.macs)
        place = places.setdefault((cell.method, cell.point, cell.seed), {})
        place.setdefault(reached, cell)
    return [
        cell if len(members) == 1 else replace(cell, method=f"{cell.method} ({cell.experiment})")
        for members in places.values()
        for cell in members.values()
    ]


def _different(found: Sequence[Result]) -> list[str]:
    """Keys whose values are not the same in all results; of a round, in those that have it."""
    keys = {key: None for result in found for key in result.params if key != "seed"}
    return [key for key in keys if len({str(v) for v in _values(key, found)}) > 1]


def _values(key: str, found: Sequence[Result]) -> list[Any]:
    tables = [result.params for result in found]
    if key.startswith("rounds."):
        tables = [table for table in tables if key in table]
    return [table.get(key) for table in tables]


def _target_of_dense(result: Result) -> bool:
    """Whether the pruner is told which share of the dense network to leave."""
    return result.params.get(f"pruners.{result.params.get('pruner')}.target.of") == "dense"


def _is_amount(key: str, found: Sequence[Result], absolute: bool) -> bool:
    """Whether it says how much is pruned, not how: no choice among words, and no seed.

    `absolute`: the last round says it alone.
    """
    if key == "decay":
        return True
    if key.partition(".")[0] == "rounds":
        _, _, rest = key.removeprefix("rounds.").partition(".")
        return not absolute and (key == "rounds" or _is_amount(rest, found, absolute))
    kind, _, name = key.partition(".")
    if kind not in ("pruners", "penalties") or name.endswith(".seed"):
        return False
    if ".ratio" in name or ".target" in name:
        return True
    values = [result.params[key] for result in found if result.params.get(key) is not None]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
