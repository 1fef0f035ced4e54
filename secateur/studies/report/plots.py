"""The figures of a comparison: accuracy against cost, accuracy by epoch, sparsity by layer."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


LABEL_WIDTH = 34
"""Characters of a line of the legend."""
LEGEND_HEIGHT = 7.0
"""Inches of a column of the legend from which there is another one."""

COLUMN_WIDTH = 0.12
"""Inches of the name of a layer below its column."""

MOST_DENSE = 5
"""Largest number of dense networks that are drawn as lines; more cannot be told apart."""

Entry = tuple[str, "Artist"]
"""A label of the legend as it is written, and what it names."""


@dataclass(frozen=True)
class Point:
    """One operating point: mean over seeds, and half-width of its interval (None for one seed).

    Accuracies are fractions.
    """

    cost: float
    accuracy: float
    half_width: float | None

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the interval as far as accuracies go, from 0 to 1."""
        half_width = self.half_width or 0.0
        return max(0.0, self.accuracy - half_width), min(1.0, self.accuracy + half_width)


def trade_off(
    lines: Mapping[str, Sequence[Point]],
    dense: Mapping[str, float],
    best: Sequence[tuple[float, float]],
    x: str,
    published: Sequence[tuple[str, float, float]] = (),
) -> "Figure":
    """Accuracy in percent against a cost, with a line for each dense network; log axes if needed.

    `dense` is label -> accuracy; more than `MOST_DENSE` are not drawn. `best` are the points
    (cost, accuracy) of the Pareto front, which no other point beats in both; `published` are
    results of others: label, cost, accuracy.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10" if len(lines) <= 10 else "turbo"]
    markers = "osD^vP*X<>"
    entries: list[Entry] = []
    for place, (label, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.cost)
        accuracies = 100 * np.array([point.accuracy for point in ordered])
        line, _, _ = axes.errorbar(
            [point.cost for point in ordered],
            accuracies,
            yerr=abs(100 * np.array([point.ends for point in ordered]).T - accuracies),
            color=colours(place if len(lines) <= 10 else place / (len(lines) - 1)),
            marker=markers[place % len(markers)],
            markersize=5,
            linewidth=1.2,
            capsize=2,
        )
        entries.append((label, line))
    dense = dense if len(dense) <= MOST_DENSE else {}
    for number, (label, accuracy) in enumerate(dense.items()):
        dashes = (0, (4, 2, *((1, 2) * number)))
        line = axes.axhline(100 * accuracy, color="0.4", linestyle=dashes, linewidth=1)
        entries.append((label, line))
    entries += _draw_front(axes, best)
    entries += _draw_published(axes, published)
    drawn = [point for points in lines.values() for point in points]
    scale_x(axes, [point.cost for point in drawn])
    reached = [point.accuracy for point in drawn]
    reached += [*dense.values(), *(accuracy for _, _, accuracy in published)]
    ends = [100 * end for point in drawn for end in point.ends]
    scale_accuracy(axes, [100 * accuracy for accuracy in reached], ends)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel("test accuracy %")
    axes.grid(alpha=0.25)
    _draw_legend(figure, entries)
    return figure


def _draw_legend(figure: "Figure", entries: Sequence[Entry]) -> None:
    """Draw the legend beside the axes, and give the figure the size that all its lines need.

    The artists have no labels of their own: matplotlib omits those that begin with `_`, and would
    read a formula between two `$`.
    """
    labels = [_wrapped(label) for label, _ in entries]
    columns = 1 + int(_inches(labels) / LEGEND_HEIGHT)
    needed = max(_inches(part.tolist()) for part in np.array_split(labels, columns))
    figure.set_size_inches(6 + 2.5 * columns, max(figure.get_figheight(), 0.3 + needed))
    made = figure.legend(
        [artist for _, artist in entries], [""] * len(entries), loc="outside right upper",
        fontsize=8, frameon=False, ncols=columns,
    )  # fmt: skip
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _wrapped(label: str) -> str:
    """A label in lines that leave room for the axes beside it."""
    return textwrap.fill(label, LABEL_WIDTH, break_on_hyphens=False)


def _inches(labels: Sequence[str]) -> float:
    """Height of wrapped labels in small print, one below the other."""
    return sum(0.08 + 0.14 * (1 + label.count("\n")) for label in labels)


def scale_x(axes: "Axes", values: Sequence[float]) -> None:
    """Use a log axis with plain numbers if the values have a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(values) > 3 * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


ACCURACIES = (20, 50, 70, 80, 90, 95, 97, 98, 99, 99.5, 99.7, 99.8, 99.9, 100)
"""Ticks of a log axis, in percent, as far as they are apart."""
TICKS_APART = 0.04
"""Least distance of two of them, as a share of the axis."""
LEAST_ERROR, LARGEST_ERROR = 0.01, 1.0
"""Bounds of the error, in percent, below which a log axis is linear."""


def scale_accuracy(axes: "Axes", values: Sequence[float], ends: Sequence[float] = ()) -> None:
    """Scale the accuracy axis by the logarithm of the error if errors have a wide range: 98 to 99
    then takes as much room as 96 to 98.

    `ends` are those of intervals, which are within the axis too; all are in percent. Below half of
    the smallest error, the axis is linear, so that it has a place for 100 %.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    errors = [100 - value for value in values]
    if max(errors) <= 3 * max(min(errors), LEAST_ERROR):
        return
    smallest = min(error for error in errors if error > 0)
    bound = min(max(smallest / 2, LEAST_ERROR), LARGEST_ERROR)
    slope = 1 / np.log(10)  # of log10(error / bound) at the bound, per bound

    def forward(accuracy: "NDArray[np.float64]") -> "NDArray[np.float64]":
        error = (100 - np.asarray(accuracy)) / bound
        return -np.log10(np.maximum(error, 1)) + slope * np.maximum(1 - error, 0)

    def backward(place: "NDArray[np.float64]") -> "NDArray[np.float64]":
        place = np.asarray(place)
        return 100 - bound * (10 ** -np.minimum(place, 0) - np.maximum(place, 0) / slope)

    axes.set_yscale("function", functions=(forward, backward))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    places = forward(np.array([*values, *ends]))
    room = 0.06 * np.ptp(places)
    limits = np.array([places.min() - room, places.max() + room])
    ticks, highest = [], limits[1]
    for tick, place in reversed([*zip(ACCURACIES, forward(np.array(ACCURACIES)), strict=True)]):
        if place <= highest:
            ticks.append(tick)
            highest = place - TICKS_APART * np.ptp(limits)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.set_ylim(*backward(limits))


def _draw_front(axes: "Axes", best: Sequence[tuple[float, float]]) -> list[Entry]:
    """Draw the front as a broad line behind the points, if it has several."""
    if len(best) < 2:
        return []
    (line,) = axes.plot(
        [cost for cost, _ in best],
        [100 * accuracy for _, accuracy in best],
        color="0.75",
        linewidth=6,
        alpha=0.5,
        zorder=0,
    )
    return [("Pareto front", line)]


def _draw_published(axes: "Axes", published: Sequence[tuple[str, float, float]]) -> list[Entry]:
    """Draw a grey number for each published method."""
    entries: list[Entry] = []
    labels = dict.fromkeys(label for label, _, _ in published)
    for number, label in enumerate(labels, 1):
        (line,) = axes.plot(
            [cost for name, cost, _ in published if name == label],
            [100 * accuracy for name, _, accuracy in published if name == label],
            linestyle="none",
            marker=f"${number}$",
            markersize=7,
            color="0.35",
        )
        entries.append((f"{number}: {label} (not ours)", line))
    return entries


def curves(lines: Mapping[str, Mapping[str, Sequence[float]]]) -> "Figure":
    """Validation accuracy in percent over the epochs of all stages, on one axis.

    `lines` has for each label the accuracies, fractions, by stage in the order of the stages.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    entries: list[Entry] = []
    for place, (label, stages) in enumerate(lines.items()):
        first, line = 1, None
        for stage, values in stages.items():
            (line,) = axes.plot(
                range(first, first + len(values)),
                [100 * value for value in values],
                {"baseline": ":", "sparse-train": "--"}.get(stage.partition("@")[0], "-"),
                color=colormaps["tab10"](place % 10),
                linewidth=1.3,
                marker="." if len(values) == 1 else "",
            )
            first += len(values)
        if line is not None:
            entries.append((label, line))
    axes.set_xlabel("epoch; dotted: baseline, dashed: sparse-train, solid: finetune")
    axes.set_ylabel("validation accuracy %")
    axes.grid(alpha=0.25)
    _draw_legend(figure, entries)
    return figure


def layers(rows: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Sparsity of every layer, a fraction, as a coloured cell: a row for each label."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(layer for row in rows.values() for layer in row))
    values = [[row.get(layer, float("nan")) for layer in columns] for row in rows.values()]
    labels = [_wrapped(label) for label in rows]
    width = max(8.0, 2.5 + COLUMN_WIDTH * len(columns))
    below = 0.3 + 0.06 * max(map(len, columns), default=0)
    height = max(1.1, below) + max(0.3 + _inches(labels), 2.3)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7, parse_math=False)
    figure.colorbar(image).set_label("share of the dense layer that is pruned", fontsize=8)
    return figure


def svg(figure: "Figure") -> bytes:
    """The figure as SVG; equal figures give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.BytesIO()
    _fix_layout(figure)
    with rc_context({"svg.hashsalt": "secateur"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    return stream.getvalue()


def png(figure: "Figure") -> bytes:
    """The figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    _fix_layout(figure)
    figure.dpi = 150
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _fix_layout(figure: "Figure") -> None:
    """Compute the layout once for all files; `savefig` would draw everything twice for it."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
