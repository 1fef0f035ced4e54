"""Latency of exported networks by runtime, number of threads and images per pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.base import machine, timing
from secateur.deploy import runtimes


@dataclass(frozen=True)
class Latency:
    """Latency of one network in one runtime."""

    model: str
    runtime: str
    threads: int
    batch: int
    """Images per pass."""
    latency_ms: float
    """Median over the passes."""
    latency_iqr_ms: float
    """Distance between the quartiles."""


def thread_counts() -> list[int]:
    """One thread, and as many threads as processors if there are several."""
    return sorted({1, machine.processors()})


def measure(
    exported: Mapping[str, Sequence[Path]],
    images: NDArray[np.float32],
    *,
    runtime_names: Sequence[str],
    threads: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    on_group: Callable[[str], object] = lambda _what: None,
) -> list[Latency]:
    """Time every file of every network in each of these runtimes (keys of RUNTIMES) that opens it.

    For each number of threads and of images per pass, all networks and runtimes take turns;
    `on_group` is called with a description before each of these combinations. An untimed pass
    precedes each timed one, as if the network were the only one in use. `images` has the shape
    (count, channels, height, width) and is repeated if a pass needs more. Raises SecateurError for
    a runtime that is not installed or cannot open a file.
    """
    rows: list[Latency] = []
    for count in threads:
        with runtimes.torch_threads(count):
            opened = {
                (model, runtime): runtimes.open_model(path, runtime, count)
                for model, paths in exported.items()
                for runtime in runtime_names
                for path in paths
                if runtime in runtimes.for_file(path)
            }
            for batch in batches:
                on_group(f"{count} thread{'s'[: count != 1]}, batch {batch}")
                some = images_of(images, batch)
                passes = {key: partial(run, some) for key, run in opened.items()}
                for (model, runtime), taken in timing.take_turns(passes, repeats, 1).items():
                    median, iqr = timing.median_and_iqr(taken)
                    rows.append(Latency(model, runtime, count, batch, median, iqr))
    return rows


def images_of(images: NDArray[Any], count: int) -> NDArray[Any]:
    """The first `count` images, repeated from the beginning if there are fewer; contiguous."""
    return np.ascontiguousarray(images[np.arange(count) % len(images)])
