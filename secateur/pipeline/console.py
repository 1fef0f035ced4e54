"""Output of the stages for the user: help, progress, one-line errors, the closing table.

An observer, like `tracking`: no result depends on it, and dvc.yaml does not name it.
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from secateur.base import allocator
from secateur.base.errors import ArgumentError, SecateurError, cut
from secateur.pipeline.record import MODELS
from secateur.training.callbacks import Callback, Row

COLLAPSED, FALL = 1 / 3, 0.3
"""Accuracy on the training images, relative to the best epoch: a fraction, and a difference.

A warning is printed if it is below this fraction and has fallen by more than this difference."""


def main(
    work: Callable[..., None],
    stage: str,
    about: str | None,
    rounds: bool = False,
    choices: Sequence[str] = (),
) -> NoReturn:
    """Run a stage as a command, with --help, one-line errors, and exit status 0, 1, 130 or 143.

    With `rounds`, the command has an option --round NAME, which is passed to `work` (default None).
    With `choices`, it has an argument that must be one of them.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Settings come from params.yaml; the device from the machine (SECATEUR_DEVICE "
        "overrides).\nSECATEUR_TRACKING=off keeps MLflow out of it.",
    )
    if rounds:
        parser.add_argument("--round", metavar="NAME", help="a further round (docs/rounds.md)")
    if choices:
        parser.add_argument("of", choices=choices)
    options = parser.parse_args()
    allocator.resume_collection()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        work(*([options.round] if rounds else []), *([options.of] if choices else []))
    except ArgumentError as error:
        fail(f"params.yaml: {error}")
    except SecateurError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to resume", 130)
    except OSError as error:
        fail(f"{error.filename or stage}: {cut(str(error.strerror or error), 300)}")
    allocator.succeeded()
    sys.exit(0)


def fail(message: str, status: int = 1) -> NoReturn:
    """Print the message as one line on stderr and exit with this status."""
    with contextlib.suppress(OSError):  # the message may be about this very error
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def say(message: str) -> None:
    """Print one line."""
    print(message, flush=True)


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


class Training(Callback):
    """Progress of one training: a live bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, stage: str, cost: Callable[[int], float]) -> None:
        """`cost` returns the cost of an epoch, counted from 0, in a unit that all epochs share."""
        self.stage, self.cost = stage, cost
        self.console = Console()
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.last = self.began = time.monotonic()
        self.already = 0
        self.epochs = self.steps = 0
        self.words = ""
        self.best_fit = 0.0
        self.collapsed = False

    def on_train_start(self, epochs: int, steps_per_epoch: int, history: Sequence[Row]) -> None:
        """Training begins, or is resumed after `history`."""
        self.epochs, self.steps, self.already = epochs, steps_per_epoch, len(history)
        self.began = self.last = time.monotonic()
        self.best_fit = max((row.get("train_accuracy", 0.0) for row in history), default=0.0)
        if history:
            say(f"{self.stage}: resuming after epoch {len(history)} of {epochs}")
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[words]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(self.stage, total=self._cost(epochs), words="starting")
            self.bar.update(self.task, completed=self._cost(self.already))
            self.bar.start()

    def on_step_end(self, epoch: int, step: int) -> None:
        """A step is done."""
        now = time.monotonic()
        if now - self.last < (0.2 if self.bar else 10):
            return
        self.last = now
        took = max(now - self.began, 1e-9)
        rate = ((epoch - 1 - self.already) * self.steps + step) / took
        done = self._cost(epoch - 1) + self.cost(epoch - 1) * step / self.steps
        if self.bar is not None and self.task is not None:
            words = f"epoch {epoch}/{self.epochs}  {rate:.0f} steps/s  {self.words}"
            self.bar.update(self.task, completed=done, words=words)
        else:
            left = (self._cost(self.epochs) - done) / (done - self._cost(self.already)) * took
            say(
                f"{self.stage}: epoch {epoch}/{self.epochs}, {rate:.0f} steps/s, "
                f"{self.words or 'first epoch'}, {left:.0f} s left"
            )

    def on_epoch_end(self, row: Row) -> None:
        """An epoch is done."""
        self._warn_if_collapsed(row)
        self.words = f"loss {row['train_loss']:.4f}"
        if "val_accuracy" in row:
            self.words += f"  val {row['val_accuracy']:.2%}"
        if "phase" in row:
            ratios = [value for key, value in row.items() if key.startswith("magnitude_ratio/")]
            self.words += f"  {_PHASES[int(row['phase'])]}, factor {row['factor']:.3g}"
            self.words += f", {row['layers_chosen']:.0f} of {len(ratios)} layers chosen"
            self.words += f", kept over chosen {min(ratios):.3g} to {max(ratios):.3g}"

    def _warn_if_collapsed(self, row: Row) -> None:
        """Warn once if the network fits the training images far worse than before.

        The loss stays finite when all outputs of a network become constant, so nothing stops it.
        """
        fit, best = row.get("train_accuracy", self.best_fit), self.best_fit
        if fit < COLLAPSED * best and fit < best - FALL and not self.collapsed:
            self.collapsed = True
            self.console.print(
                f"warning: {self.stage}: accuracy on the training images fell from {best:.1%} to "
                f"{fit:.1%} in epoch {row['epoch']:.0f}; if it does not rise again, the learning "
                "rate (or the strength of the penalty) is too high",
                soft_wrap=True,
                highlight=False,
            )
        self.best_fit = max(best, fit)

    def _cost(self, epochs: int) -> float:
        """Cost of the first `epochs` epochs together."""
        return sum(map(self.cost, range(epochs)))

    def close(self) -> None:
        """Stop the bar, whether the training succeeded or not."""
        if self.bar is not None and self.task is not None:
            self.bar.stop()

    def finish(self, rows: Sequence[Row], kept_epoch: int) -> None:
        """Print the summary of the training in one line."""
        if self.bar is not None and self.task is not None:
            done = self._cost(len(rows))
            self.bar.update(self.task, completed=done, total=done, words=self.words)
        self.close()
        if not rows:
            say(f"{self.stage}: no epochs; the network is unchanged")
            return
        row = rows[kept_epoch - 1]
        took = time.monotonic() - self.began
        val = f", val accuracy {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
        say(
            f"{self.stage}: epoch {kept_epoch} of {len(rows)} kept, loss {row['train_loss']:.4f}"
            f"{val}; {took:.1f} s"
        )


class StepProgress:
    """Progress of work other than training: a live bar on a terminal, else a line every 10 s."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self.console = Console()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(stage, total=total)
        self.began = self.last = time.monotonic()

    def __enter__(self) -> "StepProgress":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.done)
            self.bar.stop()

    def tick(self) -> None:
        """One step is done."""
        self.done += 1
        now = time.monotonic()
        if now - self.last < (0.2 if self.console.is_terminal else 10):
            return
        self.last = now
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.done)
            return
        left = (now - self.began) / self.done * (self.total - self.done)
        say(f"{self.stage}: {self.done:,} of {self.total:,} trials, {left:.0f} s left")


def waiting(stage: str) -> None:
    """Print that another process is doing the same work."""
    say(f"{stage}: another process is making the same model; waiting for it")


def taken(stage: str) -> None:
    """Print that the result of earlier work is reused."""
    say(f"{stage}: already made with the same settings and inputs; result reused")


def reached(notes: Mapping[str, float], unit: str = "channels") -> None:
    """Print the values asked of a pruner, and the values that it reaches with whole `unit`."""
    for key, asked in notes.items():
        name = key.removesuffix("_asked")
        if name == key or (got := notes.get(f"{name}_reached")) is None:
            continue
        line = f"prune: {name.replace('_', ' ')}: asked {asked:.4f}, reached {got:.4f}"
        say(line + ("" if abs(got - asked) < 5e-5 else f", the nearest that whole {unit} allow"))


def outputs(rows: Sequence[tuple[str, int, int]]) -> None:
    """Print a table of the outputs of each layer, before and after pruning."""
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "outputs", "remaining", ""):
        table.add_column(heading, justify="left" if heading in ("layer", "") else "right")
    for name, count, left in rows:
        share = "" if left == count else f"{left / count:.0%}"
        table.add_row(Text(name), str(count), str(left), share)
    Console(width=max(88, Console().width)).print(table)


def exported(rows: Sequence[Mapping[str, Any]], finetuned: Mapping[str, Any]) -> None:
    """Print accuracy, size and latency of exported networks, and the gain by sparse layers."""
    passes = sorted({(row["threads"], row["batch"]) for row in rows})
    title = "milliseconds per pass, median ± interquartile range"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("network", "", "runtime", "test accuracy", "bytes"):
        left = heading in ("network", "", "runtime")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for threads, batch in passes:
        table.add_column(
            f"{threads} thread{'s'[: threads != 1]}\nbatch {batch}", justify="right", no_wrap=True
        )
    titles = {model.key: model.title for model in MODELS.values()}
    lines: dict[tuple[str, ...], dict[tuple[int, int], str]] = {}
    for row in rows:
        about = (titles[row["network"]], row["precision"], row["runtime"])
        cells = lines.setdefault((*about, f"{row['accuracy']:.2%}", f"{row['bytes']:,}"), {})
        cell = f"{row['latency_ms']:.3g} ± {row['latency_iqr_ms']:.2g}"
        cells[row["threads"], row["batch"]] = cell
    for line, cells in lines.items():
        table.add_row(*line, *(cells.get(which, "") for which in passes))
    Console(width=max(140, Console().width)).print(table)
    for threads, by_batch in finetuned["csr"].items():
        for batch, gain in by_batch.items():
            what = "no gain"
            if gain["layers"]:
                what = f"{gain['speedup']:.2f}x in torch with CSR for {', '.join(gain['layers'])}"
            say(f"single zeros, {threads.replace('_', ' ')}, {batch.replace('_', ' ')}: {what}")


_PHASES = ("picking", "growing", "stabilising", "finished")


def summary(report: Mapping[str, Any], asked: str, store: str | None) -> None:
    """Print the closing table: every model of the chain, what was asked, and what was reached."""
    about = f"{report['arch']} on {report['dataset']}, seed {report['seed']}"
    table = Table(title=about, title_justify="left", title_style="bold")
    table.add_column("model")
    for heading in ("test accuracy", "non-zero", "of params", "remaining MACs", "latency ms"):
        table.add_column(heading, justify="right")
    rows = {model.title: report[model.key] for model in MODELS.values()}
    dense = {"dense": rows.pop("dense")}
    before = [*report.get("rounds", {}).items()][:-1]  # the last round is in the other rows
    rounds = {f"finetuned, {name}": row for name, row in before}
    for title, row in (dense | rounds | rows).items():
        table.add_row(
            title,
            f"{row['accuracy']:.2%}",
            f"{row['nonzero']:,}",
            f"{row['params']:,}",
            f"{row['macs']:,}",
            f"{row['latency_ms']:.3f} ± {row['latency_iqr_ms']:.3f}" if "latency_ms" in row else "",
        )
    Console(width=max(100, Console().width)).print(table)
    change = (report["finetuned"]["accuracy"] - report["baseline"]["accuracy"]) * 100
    say(f"asked    {asked}")
    say(
        f"reached  compression {report['compression']:.1f}x, accuracy {change:+.2f} points, "
        f"MACs 1/{report['theoretical_speedup']:.1f}, "
        f"measured speed-up {report['measured_speedup']:.2f}x"
    )
    if report["measured_speedup"] < 0.5 * report["theoretical_speedup"]:
        final = report["finetuned"]
        if final["nonzero"] < 0.9 * final["params"]:
            say("         (single zeros among the weights save no time in dense kernels)")
        else:
            say("         (narrow layers and convolutions in groups save less time than MACs)")
    for title, row in (dense | rows).items():
        if end := row.get("val_accuracy_at_end"):
            say(
                f"at end   {title}: {end['mean']:.2%} ± {end['deviation']:.2%} on val "
                f"over the last {end['epochs']:.0f} epochs"
            )
    say("see      metrics/evaluate.json, metrics/layers.csv; `dvc plots show` for the curves")
    if store is not None:
        where = "`mlflow ui`" if store.startswith("sqlite") else store
        say(f"compare  {where}, Model training, filter the runs by tags.kind = 'pipeline'")
