"""Intervals and tests over seeds, and over the test images of two models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

ROUNDING = 1e-12
"""Relative to the largest value: differences that are closer than this are equal."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; the half-width is None for a single value."""

    mean: float
    half_width: float | None
    count: int


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t-interval: half-width t(level, n - 1) * s / sqrt(n), s the sample deviation.

    The mean of no values is NaN.
    """
    from scipy import stats

    if not values:
        return Interval(math.nan, None, 0)
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, None, count)
    deviation = float(np.std(values, ddof=1))
    return Interval(
        mean, float(stats.t.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count), count
    )


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[Interval, float | None]:
    """Mean of first - second with its interval, and the two-sided p of the paired t-test.

    p is None for fewer than two pairs, and if all differences are equal, where t is undefined.
    Differences of accuracies, which are quotients, count as equal if they differ only by rounding.
    """
    from scipy import stats

    differences = np.subtract(first, second)
    found = interval(differences.tolist())
    size = max(np.abs(first).max(), np.abs(second).max())
    if len(differences) < 2 or np.ptp(differences) <= ROUNDING * size:
        return found, None
    return found, float(stats.ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for all tests of a table (Holm, Scand. J. Stat. 1979), in the given order.

    The k-th smallest of m, from k = 0, is multiplied by m - k; the results are made monotonic.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p that two models err equally often (McNemar, Psychometrika 1947).

    The counts are the images that only the first, and only the second model classifies correctly.
    """
    from scipy import stats

    if first_only + second_only == 0:
        return 1.0
    return float(stats.binomtest(first_only, first_only + second_only, 0.5).pvalue)


def bootstrap(
    first: ArrayLike, second: ArrayLike, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Interval of the difference of two accuracies, over images drawn with replacement.

    The same images are drawn for both models. The limits are percentiles of `draws` differences
    (Efron and Tibshirani, An introduction to the bootstrap, 1993), drawn with seed 0. An image
    contributes 1, 0 or -1, so only the number of images of each kind is drawn.
    """
    differences = np.subtract(first, second, dtype=np.int64)
    counts = [int((differences == value).sum()) for value in (1, 0, -1)]
    drawn = np.random.default_rng(0).multinomial(
        len(differences), np.array(counts) / len(differences), size=draws
    )
    found = (drawn[:, 0] - drawn[:, 2]) / len(differences)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy that was measured on `images` images (binomial)."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def wilson(accuracy: float, images: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an accuracy measured on `images` images (Wilson, JASA 1927).

    Unlike the standard error, it is not zero at an accuracy of 0 or 1.
    """
    from scipy import stats

    z = float(stats.norm.ppf((1 + level) / 2))
    shrunk = 1 + z**2 / images
    middle = (accuracy + z**2 / (2 * images)) / shrunk
    half_width = (
        z * math.sqrt(standard_error(accuracy, images) ** 2 + (z / (2 * images)) ** 2) / shrunk
    )
    return middle - half_width, middle + half_width


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, value) on the Pareto front: no other point dominates them."""
    order = sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1]))
    best, kept = -math.inf, []
    for place in order:
        if points[place][1] > best:
            best = points[place][1]
            kept.append(place)
    return kept


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area between the reference (highest cost, lowest value) and the front of the points."""
    cost, value = reference
    inside = [point for point in points if point[0] < cost and point[1] > value]
    area, height = 0.0, value
    for place in front(inside):
        area += (cost - inside[place][0]) * (inside[place][1] - height)
        height = inside[place][1]
    return area
