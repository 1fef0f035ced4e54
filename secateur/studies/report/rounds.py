"""Experiments with several rounds: results of each round, and settings by round."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.pipeline import record
from secateur.studies.report import statistics
from secateur.studies.report.statistics import Interval
from secateur.studies.report.tables import Row
from secateur.studies.results import Result
from secateur.studies.rounds import of_first_round

FIGURES = ("accuracy", "compression", "macs")


def steps(row: Row) -> dict[str, dict[str, Interval]]:
    """Round -> results of its finetuned network; empty for a single round.

    Accuracy and share of the MACs are fractions; means are over the seeds that have the round.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    for result in row.results:
        for name, figures in result.rounds.items():
            found.setdefault(name, []).append(figures)
    return {
        name: {key: statistics.interval([one[key] for one in each]) for key in FIGURES}
        for name, each in found.items()
    }


def lines(rows: Sequence[Row]) -> list[tuple[Row, str, dict[str, Interval]]]:
    """Row, round and its results, for all rows with several rounds."""
    return [(row, name, figures) for row in rows for name, figures in steps(row).items()]


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each round of each row: means and half-widths, as fractions."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    both = [f"{name}{end}" for name in FIGURES for end in ("", "_half_width")]
    writer.writerow(["method", "point", "round", *both])
    for row, name, figures in lines(rows):
        values = [figures[key] for key in FIGURES]
        numbers = [number for value in values for number in (value.mean, value.half_width)]
        writer.writerow([row.label, row.point, name, *numbers])
    return stream.getvalue()


def chain(result: Result) -> tuple[str, ...]:
    """The further rounds of an experiment, in order."""
    return record.chain_of(result.report).rounds


def epochs(result: Result, section: str) -> Any:
    """Epochs of a section over all rounds; None if they are not in the params."""
    key = f"{section}.epochs"
    first = result.params.get(key)
    more = [result.params.get(f"rounds.{name}.{key}", first) for name in chain(result)]
    counts = [first, *more]
    return sum(counts) if all(isinstance(n, int | float) for n in counts) else first


def numbered(result: Result) -> dict[str, Any]:
    """The params with rounds by number, `rounds.round2.finetune.lr`, whatever their names."""
    found = {key: value for key, value in result.params.items() if not key.startswith("rounds.")}
    for number, name in enumerate(chain(result), 2):
        for key, value in result.params.items():
            if key.startswith(f"rounds.{name}."):
                found[f"rounds.round{number}.{key.removeprefix(f'rounds.{name}.')}"] = value
    return found


def by_round(results: Sequence[Result]) -> list[Result]:
    """The results, with the settings of their last round in place of the first, and `rounds`.

    Networks that were pruned to the same size thus have the same operating point, no matter how
    many rounds it took. Settings in which earlier rounds differ become
    `rounds.round<number>.<key>`.
    """
    if not any(map(chain, results)):
        return list(results)
    tables = [numbered(result) for result in results]
    keys = {
        of_first_round(key) for table in tables for key in table if key.startswith("rounds.")
    } - {""}
    return [
        replace(result, params=_last_first(table, 1 + len(chain(result)), sorted(keys)))
        for result, table in zip(results, tables, strict=True)
    ]


def _last_first(table: Mapping[str, Any], count: int, keys: Sequence[str]) -> dict[str, Any]:
    """The params of one experiment, as `by_round` has them."""
    found = {key: value for key, value in table.items() if not key.startswith("rounds.")}
    own = {
        (key.split(".")[1], of_first_round(key)): v
        for key, v in table.items()
        if key.startswith("rounds.")
    }
    for number in range(1, count + 1):
        place = "" if number == count else f"rounds.round{number}."
        for key in keys:
            found[place + key] = own.get((f"round{number}", key), table.get(key))
        if number > 1:
            after = str(table.get(f"rounds.round{number}.after"))
            found[f"rounds.round{number}.after"] = after.rpartition("/")[2]
    return found | {"rounds": count}
