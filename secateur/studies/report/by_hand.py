"""Methods and operating points, from their settings, of experiments not made by a study."""

from collections.abc import Sequence
from dataclasses import replace

from secateur.studies import compare
from secateur.studies.report import rounds
from secateur.studies.results import Cell, Result, are_different


def cells_of(found: Sequence[Result]) -> list[Cell]:
    """Cells of experiments that were made by hand, from the settings in which they differ.

    The operating point consists of the strength of the penalty, and of numbers and patterns in the
    settings of penalty and pruner, in the last round if there are several. The method is penalty,
    pruner, and every other setting that differs. Rounds belong to the method if each has a target
    relative to the dense network, and otherwise to the operating point.

    A seed counts once for each method and point. Of experiments that agree in all of this and in
    their results, such as a cell shared by two studies, the first is kept; if their results differ,
    each is a separate method, with its name.
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
    """A sentence about the experiments that were left out, if any."""
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
    """Keys whose values differ between results; keys of a round, between those that have it."""
    keys = {key: None for result in found for key in result.params if key != "seed"}
    return [key for key in keys if are_different(key, _with_round(key, found))]


def _with_round(key: str, found: Sequence[Result]) -> Sequence[Result]:
    """The results that have the key, if it is one of a round; else all."""
    if not key.startswith("rounds."):
        return found
    return [result for result in found if key in result.params]


def _target_of_dense(result: Result) -> bool:
    """Whether the pruner has a target relative to the dense network."""
    return result.params.get(f"pruners.{result.params.get('pruner')}.target.of") == "dense"


def _is_amount(key: str, found: Sequence[Result], absolute: bool) -> bool:
    """Whether a setting tells how much is pruned, not how: neither a choice of words nor a seed.

    `absolute`: only the last round tells it.
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
