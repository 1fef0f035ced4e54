"""The picture of a comparison: accuracy against compression, a line a method."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One operating point: mean over seeds, and the half-width of its interval, None for one seed.

    Accuracies are fractions.
    """

    cost: float
    accuracy: float
    half_width: float | None


def trade_off(
    lines: Mapping[str, Sequence[Point]], dense: float, best: Sequence[tuple[float, float]], x: str
) -> "Figure":
    """Accuracy in percent against a cost on a log axis, the dense network as a line.

    `best` are the points (cost, accuracy) of the front, which no other point beats in both.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 5 + 0.12 * max(0, len(lines) - 12)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10" if len(lines) <= 10 else "turbo"]
    markers = "osD^vP*X<>"
    for place, (label, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.cost)
        spread = [100 * (point.half_width or 0.0) for point in ordered]
        axes.errorbar(
            [point.cost for point in ordered],
            [100 * point.accuracy for point in ordered],
            yerr=spread,
            color=colours(place if len(lines) <= 10 else place / (len(lines) - 1)),
            marker=markers[place % len(markers)],
            markersize=5,
            linewidth=1.2,
            capsize=2,
            label=label,
        )
    axes.axhline(100 * dense, color="0.4", linestyle="--", linewidth=1, label="dense")
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
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel("test accuracy %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False,
                  ncols=1 + len(lines) // 30)  # fmt: skip
    return figure


def svg(figure: "Figure") -> bytes:
    """The picture as SVG, equal bytes for equal pictures."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "secateur"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def png(figure: "Figure") -> bytes:
    """The picture as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
