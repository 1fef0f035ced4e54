"""Pictures of a chain for its run in MLflow: the course of its trainings, and what is left."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.training.callbacks import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(histories: Mapping[str, Sequence[Row]]) -> "Figure":
    """Training loss and validation accuracy over the epochs of all trainings, each in its colour.

    `histories` has the epochs by stage, in the order in which the stages ran.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
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
        figure.legend(loc="outside right upper", frameon=False)
    loss.set_ylabel("training loss")
    accuracy.set_ylabel("validation accuracy %")
    accuracy.set_xlabel("epoch of the chain")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
    return figure


def layers(table: Path) -> "Figure":
    """Share of every layer's dense weights that the final network lacks, from layers.csv."""
    from matplotlib.figure import Figure

    with table.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] == "finetuned"]
    figure = Figure(figsize=(8, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    gone = [100 * float(row["sparsity_of_dense"]) for row in rows]
    axes.barh(range(len(rows)), gone)
    axes.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the dense layer's weights that are gone")
    axes.grid(axis="x", alpha=0.25)
    return figure
