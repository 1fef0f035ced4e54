"""A channel graph as text: its groups, what belongs to each, and why some are locked."""

import textwrap
from collections.abc import Iterable, Sequence

from secateur.channels.groups import ChannelGroup

WIDTH = 80
"""Characters of a line."""


def describe(groups: Sequence[ChannelGroup], network: str, shape: Iterable[int]) -> str:
    """A summary, then for each group its layers and members, as `parameter[axis]`."""
    free = sum(group.size for group in groups if group.locked is None)
    total = sum(group.size for group in groups)
    size = "x".join(map(str, shape))
    head = f"{network}, input {size}: {len(groups)} groups, {free} of {total} channels removable"
    return "\n".join([head, *(_group(group) for group in groups)])


def _group(group: ChannelGroup) -> str:
    state = "removable" if group.locked is None else f"locked: {group.locked}"
    members = dict.fromkeys(f"{member.tensor}[{member.axis}]" for member in group.members)
    rows = {"producers": group.producers, "consumers": group.consumers, "members": members}
    lines = [f"\n{group.name}: {group.size} channels, {state}"]
    for title, names in rows.items():
        lines += textwrap.wrap(
            ", ".join(names),
            WIDTH,
            initial_indent=f"  {title:9}  ",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)
