"""Callbacks of the training loop, which observe its progress and cannot influence it."""

from collections.abc import Sequence

Row = dict[str, float]
"""One epoch of a training's history: column -> value."""

HISTORY_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "val_accuracy", "val_loss", "penalty",
)  # fmt: skip
"""Columns of a history; the last three only if they apply. Accuracies are fractions."""


class Callback:
    """Base class whose methods do nothing; override those that are needed."""

    def on_train_start(self, epochs: int, steps_per_epoch: int, history: Sequence[Row]) -> None:
        """Training starts, or resumes after the epochs in `history`."""

    def on_step_end(self, epoch: int, step: int) -> None:
        """An optimizer step is done; both numbers count from 1."""

    def on_epoch_end(self, row: Row) -> None:
        """An epoch is done and evaluated."""

    def on_state_saved(self) -> None:
        """The state up to the last epoch is on disk and survives the process."""
