"""Wall-clock times of short pieces of work that are compared with each other."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key")


def take_turns(
    passes: Mapping[Key, Callable[[], object]], repeats: int, untimed: int = 0
) -> dict[Key, list[float]]:
    """Milliseconds of `repeats` passes of each piece of work, by key.

    The pieces take turns, so that a machine that slows down affects all of them. A fifth as many
    turns as `repeats`, but at least three, are a warm-up and not counted. `untimed` passes precede
    each timed pass, so that the caches are as warm as if the piece ran alone.
    """
    taken: dict[Key, list[float]] = {key: [] for key in passes}
    for turn in range(repeats + max(3, repeats // 5)):
        for key, work in passes.items():
            for _ in range(untimed):
                work()
            start = time.perf_counter()
            work()
            taken[key].append((time.perf_counter() - start) * 1e3)
        if turn == max(3, repeats // 5) - 1:
            taken = {key: [] for key in passes}
    return taken


def median_and_iqr(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range; the range of a single value is 0."""
    if len(values) == 1:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, high - low


def speedup(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times as fast `after` is: the median of the ratios of all turns."""
    return statistics.median(b / a for b, a in zip(before, after, strict=True))
