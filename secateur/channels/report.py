"""A channel graph as a table: its groups, their members, and why some are locked."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from secateur.channels.groups import ChannelGroup

COLUMNS = {"group": 16, "channels": 8, "producers": 16, "consumers": 16, "norms and scales": 16}
"""Titles and widths in characters, exceeded only by longer names; lists of names are wrapped."""


def describe(
    groups: Sequence[ChannelGroup],
    network: str,
    shape: Iterable[int],
    couplings: Mapping[str, Sequence[str]],
) -> str:
    """A summary, then a table with a row for each group, in the order of execution.

    `shape` is the shape of one input. Below the row of a group follow how the outputs of its
    producers are coupled (`couplings`), and why it is locked, if it is.
    """
    free = sum(group.size for group in groups if group.locked is None)
    total = sum(group.size for group in groups)
    size = "x".join(map(str, shape))
    head = f"{network}, input {size}: {len(groups)} groups, {free} of {total} channels removable"
    cells = [_cells(group) for group in groups]
    widths = [
        max([least, *(len(word) for cell in column for word in cell.split())])
        for least, column in zip(COLUMNS.values(), zip(*cells, strict=True), strict=True)
    ]
    rules = ["-" * width for width in widths]
    lines = [head, "", *_row(tuple(COLUMNS), widths), *_row(rules, widths)]
    for group, row in zip(groups, cells, strict=True):
        lines += _row(row, widths)
        if group.name in couplings:
            lines.append(f"  coupled by: {', '.join(couplings[group.name])}")
        if group.locked is not None:
            lines.append(f"  locked: {group.locked}")
    return "\n".join(lines)


def _cells(group: ChannelGroup) -> list[str]:
    kinds = ("norm", "statistic", "scale")
    tensors = [member.tensor for member in group.members if member.kind in kinds]
    norms = [tensor.rpartition(".")[0] or tensor for tensor in tensors]
    names = (group.producers, group.consumers, norms)
    return [group.name, str(group.size), *(", ".join(dict.fromkeys(n)) for n in names)]


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Lines of one row, as many as its longest cell needs; numbers are aligned to the right."""
    wrapped = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
        for cell, width in zip(cells, widths, strict=True)
    ]
    lines = []
    for number in range(max(map(len, wrapped))):
        parts = [lines_of[number] if number < len(lines_of) else "" for lines_of in wrapped]
        aligned = [
            f"{part:>{width}}" if part.isdigit() and column == 1 else f"{part:{width}}"
            for column, (part, width) in enumerate(zip(parts, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return lines
