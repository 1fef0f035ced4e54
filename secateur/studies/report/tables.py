"""The tables of a comparison: a row for each method and operating point, and differences."""

import csv
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from secateur.studies import compare, results
from secateur.studies.report import statistics
from secateur.studies.report.latencies import Column, ExperimentLatency
from secateur.studies.report.statistics import Interval
from secateur.studies.results import Cell, Result

FIXED = ("method", "point", "dense %", "final %", "compression", "MACs left %", "latency ms")
"""Headings of the columns that every table has; the latency is the one measured by evaluate."""


@dataclass(frozen=True)
class Row:
    """One method, or control of a method, at one operating point, over its seeds."""

    label: str
    point: str
    control: bool
    results: tuple[Result, ...]
    times: Mapping[str, Column] = field(default_factory=dict)
    """Title of a runtime -> times by experiment, including other rows'; empty if not measured."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the results."""
        return tuple(result.seed for result in self.results)

    @property
    def dense(self) -> Interval:
        """Test accuracy of the dense networks, a fraction."""
        return statistics.interval([result.dense for result in self.results])

    @property
    def final(self) -> Interval:
        """Test accuracy of the finetuned networks, a fraction."""
        return statistics.interval([result.final for result in self.results])

    @property
    def compression(self) -> Interval:
        """Dense parameters / non-zeros that are left."""
        return statistics.interval([result.compression for result in self.results])

    @property
    def macs(self) -> Interval:
        """Share of remaining multiply-accumulates."""
        return statistics.interval([result.macs for result in self.results])

    @property
    def speedup(self) -> Interval:
        """Latency of the dense network / latency of the finetuned one."""
        return statistics.interval([result.speedup for result in self.results])

    @property
    def latency(self) -> Interval:
        """Milliseconds of a forward pass of the finetuned network."""
        times = [float(r.report["finetuned"].get("latency_ms", "nan")) for r in self.results]
        return statistics.interval(times)

    def latency_in(self, runtime: str) -> Interval:
        """Milliseconds of a forward pass of the finetuned network in this runtime."""
        return statistics.interval([line.latency_ms for line in self._lines(runtime)])

    def speedup_in(self, runtime: str) -> Interval:
        """Latency of the dense network / latency of the finetuned one in this runtime."""
        return statistics.interval([line.speedup for line in self._lines(runtime)])

    def _lines(self, runtime: str) -> list[ExperimentLatency]:
        column = self.times[runtime]
        return [column[result.name] for result in self.results if result.name in column]


def rows(
    pairs: Sequence[tuple[Cell, Result]], times: Mapping[str, Column] | None = None
) -> list[Row]:
    """The cells by method and point, in the order of their first cells."""
    found: dict[tuple[str, str, bool], list[Result]] = {}
    for cell, result in pairs:
        label = cell.method if cell.control is None else f"{cell.control}: {cell.method}"
        found.setdefault((label, cell.point, cell.control is not None), []).append(result)
    return [Row(*key, tuple(members), times or {}) for key, members in found.items()]


def headings(found: Sequence[Row]) -> list[str]:
    """The names of the columns, with two more for each runtime measured for the page."""
    more = [[f"{runtime} ms", f"{runtime} speed-up"] for runtime in found[0].times]
    return [*FIXED, *itertools.chain.from_iterable(more)]


def cells(row: Row) -> list[str]:
    """The row as text, in the order of the headings."""
    measured = [(row.latency_in(runtime), row.speedup_in(runtime)) for runtime in row.times]
    return [
        row.label,
        row.point,
        text(row.dense, 100),
        text(row.final, 100),
        text(row.compression),
        text(row.macs, 100),
        text(row.latency, digits=3),
        *(cell for ms, gain in measured for cell in (text(ms, digits=3), text(gain))),
    ]


def text(value: Interval, factor: float = 1, digits: int = 2) -> str:
    """Mean ± half-width; empty if there are no values."""
    if math.isnan(value.mean):
        return ""
    mean = f"{factor * value.mean:.{digits}f}"
    if value.half_width is None:
        return mean
    return f"{mean} ± {factor * value.half_width:.{digits}f}"


def as_csv(found: Sequence[Row]) -> str:
    """A line for each row: means and half-widths, as fractions and milliseconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ("dense", "final", "compression", "macs", "latency")
    both = [f"{name}{end}" for name in names for end in ("", "_half_width")]
    runtimes = [f"{name} {runtime}{end}" for runtime in found[0].times
                for name in ("latency", "speedup") for end in ("", "_half_width")]  # fmt: skip
    writer.writerow(["method", "point", "seeds", *both, *runtimes])
    for row in found:
        values = [getattr(row, name) for name in names]
        for runtime in row.times:
            values += [row.latency_in(runtime), row.speedup_in(runtime)]
        numbers = [number for value in values for number in (value.mean, value.half_width)]
        writer.writerow([row.label, row.point, len(row.results), *numbers])
    return stream.getvalue()


def as_markdown(found: Sequence[Row]) -> str:
    """The table as Markdown, for a README."""
    names = headings(found)
    lines = [names, ["---", "---", *["---:"] * (len(names) - 2)], *map(cells, found)]
    return "".join(f"| {' | '.join(map(_markdown, line))} |\n" for line in lines)


def _markdown(text: str) -> str:
    """The text in one line, with what Markdown, HTML and GitHub's formulas would change escaped."""
    return re.sub(r"[\\`*_<>\[\]|~$]|&(?=#?\w+;)", r"\\\g<0>", " ".join(text.split()))


def as_latex(found: Sequence[Row]) -> str:
    """The table as LaTeX, for a paper."""
    names = headings(found)
    lines = [" & ".join(map(_latex, line)) + r" \\" for line in [names, *map(cells, found)]]
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    columns = "ll" + "r" * (len(names) - 2)
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
               ">": r"\textgreater{}", "|": r"\textbar{}", "^": r"\textasciicircum{}",
               "±": r"$\pm$", "[": "{[}",
               **{letter: f"\\{letter}" for letter in "&%$#_{}"}}  # fmt: skip
    return "".join(special.get(letter, letter) for letter in text)


def gain(row: Row, cost: str) -> float:
    """The factor by which pruning has reduced parameters, MACs or latency.

    `cost` is compression, macs, latency, or the title of a runtime that was measured.
    """
    if cost in row.times:
        return row.speedup_in(cost).mean
    if cost == "latency":
        return row.speedup.mean
    return row.compression.mean if cost == "compression" else 1 / row.macs.mean


def best(found: Sequence[Row], cost: str) -> list[tuple[float, float]]:
    """Pareto front of (gain, accuracy), both as high as possible, by means over seeds."""
    gains = [gain(row, cost) for row in found]
    values = [row.final.mean for row in found]
    places = statistics.front([(-gain, value) for gain, value in zip(gains, values, strict=True)])
    return sorted((gains[place], values[place]) for place in places)


def dense(found: Sequence[Row]) -> dict[str, float]:
    """Label -> mean test accuracy over seeds, for dense networks of each architecture, data set and
    training.

    Controls do not count: their dense networks may have been trained for longer.
    """
    members = [result for row in found if not row.control for result in row.results]
    members = members or [result for row in found for result in row.results]
    keys = [key for key in results.different(members) if _of_dense(key)]
    accuracies: dict[str, dict[int, list[float]]] = {}
    for result in members:
        own = compare.differences(result, keys)
        by_seed = accuracies.setdefault(f"dense: {own}" if own else "dense", {})
        by_seed.setdefault(result.seed, []).append(result.dense)
    return {label: fmean(map(fmean, own.values())) for label, own in accuracies.items()}


KEPT_COPY = "baseline.keep_epoch"
"""A setting of `baseline` that does not change the dense network: a copy kept for rewinding."""


def _of_dense(key: str) -> bool:
    """Whether the dense network depends on a setting."""
    sections = ("dataset", "data", "datasets", "arch", "archs", "baseline")
    return key.partition(".")[0] in sections and key != KEPT_COPY


def volumes(found: Sequence[Row]) -> dict[str, float]:
    """Hypervolume of each method over (MACs left, accuracy); reference: all MACs, accuracy 0."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        points.setdefault(row.label, []).append((row.macs.mean, row.final.mean))
    return {label: statistics.hypervolume(own, (1.0, 0.0)) for label, own in points.items()}


def pairs(found: Sequence[Row]) -> list[tuple[Row, Row]]:
    """All pairs of methods at the same point that have seeds in common."""
    return [
        (first, second)
        for first, second in itertools.combinations(found, 2)
        if first.point == second.point and set(first.seeds) & set(second.seeds)
    ]


def differences(found: Sequence[Row]) -> list[list[str]]:
    """A line of text for each of the `pairs`."""
    lines: list[list[str]] = []
    p_values: list[tuple[int, float]] = []
    for first, second in pairs(found):
        own = {result.seed: result.final for result in first.results}
        other = {result.seed: result.final for result in second.results}
        shared = sorted(own.keys() & other.keys())
        change, p = statistics.paired([own[s] for s in shared], [other[s] for s in shared])
        enough = len(shared) >= 3 and p is not None
        if p is not None and enough:
            p_values.append((len(lines), p))
        said = text(change, 100)
        words = "fewer than 3 seeds: no test" if len(shared) < 3 else "equal differences: no test"
        lines.append([first.label, second.label, first.point, str(len(shared)), said,
                      f"{p:.3g}" if enough else "", "", "" if enough else words])  # fmt: skip
    adjusted = statistics.holm([p for _, p in p_values])
    for (place, _), value in zip(p_values, adjusted, strict=True):
        lines[place][6] = f"{value:.3g}"
        lines[place][7] = "differ" if value < 0.05 else "cannot be told apart"
    return lines


def notes(found: Sequence[Row]) -> list[str]:
    """What is compared, and what the comparison lacks, in words."""
    members = [result.report for row in found for result in row.results]
    said = []
    for key, word in (("arch", "network"), ("dataset", "data set"), ("hardware", "hardware")):
        values = sorted({str(report.get(key, "not recorded")) for report in members})
        said.append(f"{word}: {', '.join(values)}")
    seeds = sorted({result.seed for row in found for result in row.results})
    said.append(f"seeds: {', '.join(map(str, seeds))}")
    few = [f"{row.label} ({row.point})" for row in found if len(row.results) < 3]
    if few:
        said.append(f"fewer than three seeds, so no test of differences: {_some(few)}")
    points: dict[str, set[str]] = {}
    for row in found:
        if not row.control:
            points.setdefault(row.label, set()).add(row.point)
    scarce = [label for label, own in points.items() if len(own) < 5]
    if scarce:
        said.append(
            "fewer than the five operating points that ShrinkBench (Blalock et al., MLSys 2020) "
            f"asks for: {_some(scarce)}"
        )
    return said


def _some(names: Sequence[str], most: int = 6) -> str:
    """The names, or the first of them and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
