"""Fairness of a comparison of two methods, by the setups of Wang et al. (arXiv 2301.05219, 2023).

From S1 to S4.2, the methods have more and more in common: network, data and ratio (S1), base model
(S2), epochs (S3.1) and learning-rate schedule (S3.2) of the finetuning, epochs (S4.1) and schedule
(S4.2) of the pruning, which is `sparse_train` here. The authors ask for S3.2 at least. Epochs are
summed over all rounds; schedules are the same only with the same number of rounds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.studies.report import rounds, tables
from secateur.studies.report.tables import Row
from secateur.studies.results import Result, are_different
from secateur.studies.rounds import of_first_round

SETUPS = ("S1", "S2", "S3.1", "S3.2", "S4.1", "S4.2")
ENOUGH = "S3.2"
CLOSE = 0.05
"""Relative difference in compression up to which two ratios count as the same."""


def setup(first: Row, second: Row) -> tuple[str, str]:
    """The strictest setup that two rows fulfil (`none` below S1), and what the next one needs."""
    reached = "none"
    for name, lacks in zip(SETUPS, _lacking(first, second), strict=True):
        if lacks:
            return reached, lacks
        reached = name
    return reached, ""


def differences(found: Sequence[Row]) -> list[list[str]]:
    """The table of differences with the setup of each pair."""
    both = zip(tables.differences(found), tables.pairs(found), strict=True)
    return [[*line, setup(*pair)[0]] for line, pair in both]


def notes(found: Sequence[Row]) -> list[str]:
    """The weakest setup of any two methods, and what the next one needs; empty for one method."""
    pairs = [pair for pair in tables.pairs(found) if not (pair[0].control or pair[1].control)]
    if not pairs:
        return []
    order = ("none", *SETUPS)
    (name, lacks), (first, second) = min(
        ((setup(*pair), pair) for pair in pairs), key=lambda each: order.index(each[0][0])
    )
    line = f"setup of Wang et al. (arXiv 2301.05219) of all pairs of methods: at least {name}"
    if lacks:
        where = f" at {first.point}" if first.point else ""
        line += f"; {first.label} and {second.label}{where} differ in {lacks}"
    return [line]


def _lacking(first: Row, second: Row) -> list[str]:
    """For each setup the differences that prevent it, beyond those of earlier setups."""
    results = first.results[0], second.results[0]
    one, other = map(rounds.numbered, results)
    dataset, arch = one.get("dataset"), one.get("arch")
    network = ("dataset", "arch", "data.", f"datasets.{dataset}.", f"archs.{arch}.")
    counts = [1 + len(rounds.chain(result)) for result in results]
    several = f"rounds {counts[0]} and {counts[1]}" if counts[0] != counts[1] else ""
    how = ("finetune.budget", "finetune.init")
    return [
        _differing(one, other, network) or _ratio(first, second),
        _differing(one, other, ("baseline.",)),
        _epochs(results, "finetune") or _differing(one, other, how),
        several or _differing(one, other, ("finetune.",)),
        _epochs(results, "sparse_train"),
        several or _differing(one, other, ("sparse_train.",)),
    ]


def _epochs(results: tuple[Result, Result], section: str) -> str:
    """The epochs over all rounds, if they differ."""
    one, other = (rounds.epochs(result, section) for result in results)
    in_all = ", over all rounds" if any(map(rounds.chain, results)) else ""
    return f"{section}.epochs {one} and {other}{in_all}" if one != other else ""


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], parts: tuple[str, ...]) -> str:
    """The settings with these names, or below names that end in a dot, that differ."""
    below = tuple(part for part in parts if part.endswith("."))
    keys = [
        key
        for key in one.keys() | other.keys()
        if (own := of_first_round(key)) in parts or own.startswith(below)
    ]
    both = [Result("", _inherited(params, keys), {}) for params in (one, other)]
    found = [key for key in sorted(keys) if are_different(key, both) and key != tables.KEPT_COPY]
    return ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in found[:2])


def _inherited(params: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The settings at these keys; a round has those of the first one that it does not change."""
    return {key: params[at] for key in keys for at in (of_first_round(key), key) if at in params}


def _ratio(first: Row, second: Row) -> str:
    """The compressions, if they differ by more than `CLOSE`."""
    one, other = first.compression.mean, second.compression.mean
    if abs(one - other) <= CLOSE * min(one, other):
        return ""
    return f"compression {one:.1f} and {other:.1f}"
