"""The figures of a comparison: accuracy against cost, accuracy by epoch, sparsity by layer."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


LABEL_WIDTH = 34
"""Characters of a line of the legend."""


@dataclass(frozen=True)
class Point:
    """One operating point: mean over seeds, and half-width of its interval (None for one seed).

    Accuracies are fractions.
    """

    cost: float
    accuracy: float
    half_width: float | None


def trade_off(
    lines: Mapping[str, Sequence[Point]],
    dense: float,
    best: Sequence[tuple[float, float]],
    x: str,
    published: Sequence[tuple[str, float, float]] = (),
) -> "Figure":
    """Accuracy in percent against a cost, with the dense network as a line; log axes if needed.

    `best` are the points (cost, accuracy) of the Pareto front, which no other point beats in both;
    `published` are results of others: label, cost, accuracy.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = 1 + len(lines) // 30
    height = 5 + 0.12 * max(0, len(lines) - 12)
    figure = Figure(figsize=(6 + 2.5 * columns, height), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10" if len(lines) <= 10 else "turbo"]
    markers = "osD^vP*X<>"
    for place, (label, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.cost)
        half_widths = [100 * (point.half_width or 0.0) for point in ordered]
        axes.errorbar(
            [point.cost for point in ordered],
            [100 * point.accuracy for point in ordered],
            yerr=half_widths,
            color=colours(place if len(lines) <= 10 else place / (len(lines) - 1)),
            marker=markers[place % len(markers)],
            markersize=5,
            linewidth=1.2,
            capsize=2,
            label=_wrapped(label),
        )
    axes.axhline(100 * dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    _draw_front(axes, best)
    _draw_published(axes, published)
    costs = [point.cost for points in lines.values() for point in points]
    scale_x(axes, costs)
    reached = [point.accuracy for points in lines.values() for point in points]
    reached += [dense, *(accuracy for _, _, accuracy in published)]
    scale_accuracy(axes, [100 * accuracy for accuracy in reached])
    axes.set_xlabel(x)
    axes.set_ylabel("test accuracy %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False,
                  ncols=columns)  # fmt: skip
    return figure


def _wrapped(label: str) -> str:
    """A label in lines that leave room for the axes beside it."""
    return textwrap.fill(label, LABEL_WIDTH, break_long_words=False, break_on_hyphens=False)


def scale_x(axes: "Axes", values: Sequence[float]) -> None:
    """Use a log axis with plain numbers if the values have a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(values) > 3 * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


ACCURACIES = (20, 50, 70, 80, 90, 95, 97, 98, 99, 99.5, 99.7, 99.8, 99.9)
"""Ticks of a log axis, in percent."""
LEAST_ERROR = 0.01
"""Error at which a log axis ends, in percent."""


def scale_accuracy(axes: "Axes", values: Sequence[float]) -> None:
    """Scale the accuracy axis by the logarithm of the error if errors have a wide range: 98 to 99
    then takes as much room as 96 to 98."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), min(max(values), 100 - LEAST_ERROR)
    if 100 - low <= 3 * (100 - high):
        return

    def forward(accuracy: "NDArray[np.float64]") -> "NDArray[np.float64]":
        return -np.log10(np.maximum(100 - np.asarray(accuracy), LEAST_ERROR))

    def backward(place: "NDArray[np.float64]") -> "NDArray[np.float64]":
        return 100 - 10 ** -np.asarray(place)

    axes.set_yscale("function", functions=(forward, backward))
    axes.yaxis.set_major_locator(FixedLocator(ACCURACIES))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(100 - 1.4 * (100 - low), 100 - 0.8 * (100 - high))


def _draw_front(axes: "Axes", best: Sequence[tuple[float, float]]) -> None:
    """Draw the front as a broad line behind the points, if it has several."""
    if len(best) > 1:
        axes.plot(
            [cost for cost, _ in best],
            [100 * accuracy for _, accuracy in best],
            color="0.75",
            linewidth=6,
            alpha=0.5,
            zorder=0,
            label="Pareto front",
        )


def _draw_published(axes: "Axes", published: Sequence[tuple[str, float, float]]) -> None:
    """Draw a grey number for each published method."""
    labels = dict.fromkeys(label for label, _, _ in published)
    for number, label in enumerate(labels, 1):
        axes.plot(
            [cost for name, cost, _ in published if name == label],
            [100 * accuracy for name, _, accuracy in published if name == label],
            linestyle="none",
            marker=f"${number}$",
            markersize=7,
            color="0.35",
            label=f"{number}: {label} (not ours)",
        )


def curves(lines: Mapping[str, Mapping[str, Sequence[float]]]) -> "Figure":
    """Validation accuracy in percent over the epochs of all stages, on one axis.

    `lines` has for each label the accuracies, fractions, by stage in the order of the stages.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, stages) in enumerate(lines.items()):
        first, named = 1, False
        for stage, values in stages.items():
            axes.plot(
                range(first, first + len(values)),
                [100 * value for value in values],
                {"baseline": ":", "sparse-train": "--"}.get(stage.partition("@")[0], "-"),
                color=colormaps["tab10"](place % 10),
                linewidth=1.3,
                label=None if named else _wrapped(label),
            )
            first, named = first + len(values), True
    axes.set_xlabel("epoch; dotted: baseline, dashed: sparse-train, solid: finetune")
    axes.set_ylabel("validation accuracy %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def layers(rows: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Sparsity of every layer, a fraction, as a coloured cell: a row for each label."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(layer for row in rows.values() for layer in row))
    values = [[row.get(layer, float("nan")) for layer in columns] for row in rows.values()]
    labels = [_wrapped(label) for label in rows]
    height = sum(0.09 + 0.13 * (1 + label.count("\n")) for label in labels)
    figure = Figure(figsize=(8, max(3.0, 1.4 + height)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
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
