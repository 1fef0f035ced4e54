"""The trials of a search as a table beside the page, and as a figure."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.base import files
from secateur.studies.marks import TRIALS
from secateur.studies.report import plots
from secateur.studies.space import MAXIMISED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trial:
    """One choice of the sampler."""

    number: int
    chosen: Mapping[str, str | int | float]
    """Axis -> label or number."""
    values: Mapping[str, float]
    """Objective -> mean over seeds; empty if the trial has failed."""
    best: bool
    """Whether no other trial is better in every objective."""


def write(folder: Path, trials: Sequence[Trial]) -> None:
    """Write the table: a line for each trial."""
    axes = list(dict.fromkeys(axis for trial in trials for axis in trial.chosen))
    objectives = list(dict.fromkeys(name for trial in trials for name in trial.values))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", *axes, *objectives, "best"])
    for trial in trials:
        own = [trial.chosen.get(axis, "") for axis in axes]
        reached = [trial.values.get(name, "") for name in objectives]
        writer.writerow([trial.number, *own, *reached, int(trial.best)])
    files.write_text(folder / TRIALS, stream.getvalue())


def figure(folder: Path, objectives: Sequence[str]) -> "Figure | None":
    """The trials in the folder of a page; None if they are missing or cannot be read.

    With two objectives, these are the axes, the second one as x; a single objective is drawn by
    trial, with the best value so far.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    try:
        table = pd.read_csv(folder / TRIALS)
        if "params" not in table:  # its name in earlier versions
            table = table.rename(columns={"parameters": "params"})
        table = table.dropna(subset=list(objectives))
        best = table[table.best == 1]
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if table.empty:
        return None
    drawn = Figure(figsize=(7, 4.6), layout="constrained")
    axes = drawn.add_subplot()
    x, y = (objectives[1], objectives[0]) if len(objectives) > 1 else ("trial", objectives[0])
    axes.plot(table[x], table[y], "o", color="0.65", markersize=4, label="trials")
    if len(objectives) > 1:
        best = best.sort_values(x)
        axes.plot(best[x], best[y], "o-", color="C0", markersize=6, label="best")
        plots.scale_x(axes, list(table[x]))
    else:
        ordered = table.sort_values("trial")
        so_far = ordered[y].cummax() if y in MAXIMISED else ordered[y].cummin()
        axes.step(ordered.trial, so_far, where="post", color="C0", label="best so far")
    axes.set_xlabel(_words(x))
    axes.set_ylabel(_words(y))
    axes.grid(alpha=0.25)
    drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    return drawn


def _words(name: str) -> str:
    """Label of an axis of the figure."""
    return {
        "accuracy": "accuracy on the validation images",
        "params": "share of the parameters that is left",
        "macs": "share of the MACs that is left",
    }.get(name, name)
