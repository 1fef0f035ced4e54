"""A channel graph as a table: its groups, their members, and why some are locked."""

import textwrap
from collections.abc import Iterable, Sequence

from secateur.channels.groups import ChannelGroup

COLUMNS = {"group": 16, "channels": 8, "producers": 16, "consumers": 16, "norms and scales": 16}
"""Titles, and characters of each, 80 with the space between; longer cells are wrapped."""


def describe(groups: Sequence[ChannelGroup], network: str, shape: Iterable[int]) -> str:
    """A summary, then a table with a row for each group, in the order of execution.

    `shape` is that of one input. The reason of a locked group stands below its row.
    """
    free = sum(group.size for group in groups if group.locked is None)
    total = sum(group.size for group in groups)
    size = "x".join(map(str, shape))
    head = f"{network}, input {size}: {len(groups)} groups, {free} of {total} channels removable"
    lines = [head, "", *_row(list(COLUMNS)), *_row(["-" * width for width in COLUMNS.values()])]
    for group in groups:
        lines += _row(_cells(group))
        if group.locked is not None:
            lines.append(f"  locked: {group.locked}")
    return "\n".join(lines)


def _cells(group: ChannelGroup) -> list[str]:
    kinds = ("norm", "statistic", "scale")
    tensors = [member.tensor for member in group.members if member.kind in kinds]
    norms = dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor in tensors)
    layers = (group.producers, group.consumers, norms)
    return [group.name, f"{group.size:>8}", *(", ".join(dict.fromkeys(n)) for n in layers)]


def _row(cells: Sequence[str]) -> list[str]:
    """Lines of one row, as many as its longest cell needs."""
    widths = list(COLUMNS.values())
    wrapped = [
        textwrap.wrap(cell, width, break_on_hyphens=False, drop_whitespace=cell != cells[1])
        for cell, width in zip(cells, widths, strict=True)
    ]
    height = max(map(len, wrapped))
    columns = [cell + [""] * (height - len(cell)) for cell in wrapped]
    rows = zip(*columns, strict=True)
    return [
        "  ".join(f"{t:{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
