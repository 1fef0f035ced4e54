"""Figures of a chain for its run in MLflow: training curves, and pruned weights by layer.

Margins are computed from the longest label: an automatic layout would draw each figure three times,
which would take most of the time of writing a run into MLflow.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.training.callbacks import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(histories: Mapping[str, Sequence[Row]]) -> "Figure":
    """Training loss and validation accuracy over the epochs, in one colour for each training.

    `histories` has the epochs by stage, in the order in which the stages ran.
    """
    from matplotlib.figure import Figure

    width, height = 9.0, 6.0
    legend = 0.7 + 0.09 * max(map(len, histories), default=0)
    right = 1 - legend / width
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.75 / width, 0.6 / height, right, 1 - 0.15 / height, hspace=0.08)
    loss, accuracy = figure.subplots(2, sharex=True)
    done = 0
    for stage, rows in histories.items():
        epochs = range(done + 1, done + 1 + len(rows))
        if rows:
            loss.plot(epochs, [row.get("train_loss", math.nan) for row in rows], label=stage)
            accuracy.plot(epochs, [100 * row.get("val_accuracy", math.nan) for row in rows])
        done += len(rows)
    if done:
        loss.set_yscale("log")
        figure.legend(loc="upper left", bbox_to_anchor=(right, 1), frameon=False)
    loss.set_ylabel("training loss")
    accuracy.set_ylabel("validation accuracy %")
    accuracy.set_xlabel("epoch of the chain")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
    return figure


def layers(table: Path) -> "Figure":
    """Share of every layer's dense weights that is pruned in the final network, from layers.csv."""
    from matplotlib.figure import Figure

    with table.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] == "finetuned"]
    labels = 0.2 + 0.075 * max((len(row["layer"]) for row in rows), default=0)
    width, height = labels + 6.5, 0.8 + 0.2 * len(rows)
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(labels / width, 0.6 / height, 1 - 0.2 / width, 1 - 0.1 / height)
    axes = figure.add_subplot()
    gone = [100 * float(row["sparsity_of_dense"]) for row in rows]
    axes.barh(range(len(rows)), gone)
    axes.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the dense layer's weights that are pruned")
    axes.grid(axis="x", alpha=0.25)
    return figure
