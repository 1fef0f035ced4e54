"""Channels of a convolution divided into groups, so that the groups keep as much as possible.

Given how much every (output, input) pair of a convolution matters, find groups of outputs and
groups of inputs, all of one size, so that the pairs within matching groups add up to much. What
lies outside of them can then be pruned; what is left is a group convolution between two
permutations.

Source: R. Zhao, W. Luk, Efficient structured pruning and architecture searching for group
convolution, ICCV workshops 2019: the criterion, the heuristic by sorting (`grps`, with `sort_iters`
rounds for each group), and the assignment of groups to each other. Restarts and refinements are not
part of it.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.base.settings import Strict

Criterion = Literal["magnitude", "taylor"]
Permutation = Literal["grps", "sort", "same"]
Refine = Literal["none", "swap", "assignment"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_GAIN = 1e-9  # smallest improvement worth a move, of the mean entry


class Search(Strict):
    """How the groups of one layer are looked for."""

    permutation: Permutation = "grps"
    """grps: the paper's heuristic | sort: channels by their sums | same: in the order they have."""
    sort_iters: Annotated[int, Field(ge=0, le=1000)] = 10
    """Rounds for each group of grps, the N_S of the paper; it ends earlier where nothing moves."""
    refine: Refine = "none"
    """Afterwards, never for the worse. swap: exchange the best pair of channels, again and again |
    assignment: all outputs at once, exactly, for the inputs as they are, then the reverse."""
    restarts: Annotated[int, Field(ge=0, le=1000)] = 0
    """Further searches from random orders of the channels; the best one counts."""


@dataclass(frozen=True)
class Grouping:
    """Groups of outputs and of inputs; those of one number belong together."""

    outputs: Tensor
    """int64, (groups, outputs of each), rising."""
    inputs: Tensor
    """int64, (groups, inputs of each), rising; groups are numbered by their smallest input."""

    @property
    def groups(self) -> int:
        """How many."""
        return len(self.outputs)

    def mask(self) -> Tensor:
        """bool, (outputs, inputs): True within the groups."""
        mask = torch.zeros(self.outputs.numel(), self.inputs.numel(), dtype=torch.bool)
        mask[self.outputs.unsqueeze(2), self.inputs.unsqueeze(1)] = True
        return mask

    def kept(self, criterion: Tensor) -> float:
        """Sum of a criterion (outputs, inputs) within the groups."""
        return float(criterion.double()[self.outputs.unsqueeze(2), self.inputs.unsqueeze(1)].sum())


def magnitude(weight: Tensor) -> Tensor:
    """Frobenius norm of each kernel: (outputs, inputs, ...) -> (outputs, inputs)."""
    return weight.detach().flatten(2).double().norm(dim=2)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Sum over each kernel of |gradient of the loss x weight|: (outputs, inputs).

    That is, to first order, a bound of what the loss changes by without the kernel.
    """
    return (weight.detach() * gradient).abs().flatten(2).double().sum(dim=2)


def divides(outputs: int, inputs: int, groups: int) -> bool:
    """Whether both channel counts can be divided by so many groups."""
    return groups >= 1 and outputs % groups == 0 and inputs % groups == 0


def group(criterion: Tensor, groups: int, search: Search) -> Grouping:
    """The best grouping found of a criterion (outputs, inputs), not negative.

    Raises PruningError if the channels do not divide or the criterion is no matrix of numbers.
    """
    if criterion.dim() != 2:
        raise PruningError(f"a criterion is a matrix, not of {criterion.dim()} axes")
    if not divides(criterion.shape[0], criterion.shape[1], groups):
        raise PruningError(f"{' x '.join(map(str, criterion.shape))} channels in {groups} groups")
    values: Floats = criterion.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise PruningError("a criterion that is not finite: the weights or gradients are damaged")
    best = _from(values, groups, search, None)
    chance = np.random.default_rng(0)
    for _ in range(search.restarts):
        start = chance.permutation(values.shape[0]), chance.permutation(values.shape[1])
        found = _from(values, groups, search, start)
        if found[0] > best[0]:
            best = found
    return _named(*best[1:])


def _from(
    values: Floats, groups: int, search: Search, start: tuple[Ints, Ints] | None
) -> tuple[float, Ints, Ints]:
    """What is kept, the group of every output and that of every input, from one order."""
    rows, columns = start or (np.arange(values.shape[0]), np.arange(values.shape[1]))
    if search.permutation == "sort":
        rows, columns = _sorted(values, rows, columns)
    elif search.permutation == "grps" and groups > 1:
        rows, columns = sort_groups(values, groups, search.sort_iters, rows, columns)
    row_group, column_group = _matched(values, groups, rows, columns)
    if search.refine == "swap":
        _swap(values, groups, row_group, column_group)
    elif search.refine == "assignment":
        row_group, column_group = _assign(values, groups, row_group, column_group)
    kept = float(values[row_group[:, None] == column_group[None, :]].sum())
    return kept, row_group, column_group


def _sorted(values: Floats, rows: Ints, columns: Ints) -> tuple[Ints, Ints]:
    """Both by their sums, rising."""
    by_row = np.argsort(values.sum(axis=1)[rows], kind="stable")
    by_column = np.argsort(values.sum(axis=0)[columns], kind="stable")
    return rows[by_row], columns[by_column]


def sort_groups(
    values: Floats, groups: int, rounds: int, rows: Ints, columns: Ints
) -> tuple[Ints, Ints]:
    """The paper's heuristic: new orders of rows and columns, the last group found first.

    For the last group, in turns: columns by their sums over its rows, then rows by their sums over
    its columns, both rising, so that it has the largest; then the same for what is left. Only the
    sums are computed, nothing is moved, and a group that has come to rest is left.
    """
    rows, columns = rows.copy(), columns.copy()
    high, wide = len(rows) // groups, len(columns) // groups
    turned = np.ascontiguousarray(values.T)
    for left in range(groups, 0, -1):
        active_rows, active_columns = rows[: high * left], columns[: wide * left]
        before = None
        for _ in range(rounds):
            key = values[active_rows[-high:]].sum(axis=0)[active_columns]
            active_columns = active_columns[np.argsort(key, kind="stable")]
            chosen = active_columns[-wide:]
            if before is not None and np.array_equal(chosen, before):
                break
            before = chosen
            key = turned[chosen].sum(axis=0)[active_rows]
            active_rows = active_rows[np.argsort(key, kind="stable")]
        rows[: high * left], columns[: wide * left] = active_rows, active_columns
    return rows, columns


def _matched(values: Floats, groups: int, rows: Ints, columns: Ints) -> tuple[Ints, Ints]:
    """Cut both orders into groups and match them so that most is kept (Hungarian method)."""
    blocks = values[rows][:, columns].reshape(groups, -1, groups, len(columns) // groups)
    first, second = linear_sum_assignment(blocks.sum(axis=(1, 3)), maximize=True)
    row_group, column_group = np.empty(len(rows), np.int64), np.empty(len(columns), np.int64)
    row_group[rows.reshape(groups, -1)[first]] = np.arange(groups)[:, None]
    column_group[columns.reshape(groups, -1)[second]] = np.arange(groups)[:, None]
    return row_group, column_group


def _sums(values: Floats, groups: int, column_group: Ints) -> Floats:
    """What every row keeps in each group: (rows, groups)."""
    order = np.argsort(column_group, kind="stable")
    shaped: Floats = values[:, order].reshape(len(values), groups, -1).sum(axis=2)
    return shaped


def _swap(values: Floats, groups: int, row_group: Ints, column_group: Ints) -> None:
    """Exchange the best pair of rows until none is left, then columns, until nothing moves."""
    turned, least = np.ascontiguousarray(values.T), _GAIN * max(float(values.mean()), 1e-300)
    while True:
        moved = _swap_side(_sums(values, groups, column_group), row_group, least)
        moved += _swap_side(_sums(turned, groups, row_group), column_group, least)
        if not moved:
            return


def _swap_side(sums: Floats, group: Ints, least: float) -> int:
    """Best swaps of one side, in place; `sums` is what each channel keeps in each group."""
    lines = np.arange(len(group))
    there = sums[:, group]  # what the row would keep in the place of each other row
    own = sums[lines, group]
    for moved in range(len(group) ** 2):
        gain = there + there.T - own[:, None] - own[None, :]
        a, b = divmod(int(gain.argmax()), len(group))
        if gain[a, b] <= least:
            return moved
        group[a], group[b] = group[b], group[a]
        there[:, [a, b]] = there[:, [b, a]]
        own[[a, b]] = sums[[a, b], group[[a, b]]]
    return len(group) ** 2


def _assign(values: Floats, groups: int, row_group: Ints, column_group: Ints) -> tuple[Ints, Ints]:
    """Best rows for the columns, best columns for the rows, until nothing is gained.

    And once more with the columns first: the two ways end in different places.
    """
    turned = np.ascontiguousarray(values.T)
    by_row, rows, columns = _alternate(values, turned, groups, column_group)
    by_column, *other = _alternate(turned, values, groups, row_group)
    return (rows, columns) if by_row >= by_column else (other[1], other[0])


def _alternate(
    values: Floats, turned: Floats, groups: int, second: Ints
) -> tuple[float, Ints, Ints]:
    least, kept = _GAIN * max(float(values.mean()), 1e-300), -np.inf
    while True:
        first = _balanced(_sums(values, groups, second))
        sums = _sums(turned, groups, first)
        second = _balanced(sums)
        now = float(sums[np.arange(len(second)), second].sum())
        if now <= kept + least:
            return now, first, second
        kept = now


def _balanced(sums: Floats) -> Ints:
    """Groups of one size for all rows, so that most is kept: every group has a seat for each."""
    count, groups = sums.shape
    size = count // groups
    rows, seats = linear_sum_assignment(np.repeat(sums, size, axis=1), maximize=True)
    group = np.empty(count, np.int64)
    group[rows] = seats // size
    return group


def _named(row_group: Ints, column_group: Ints) -> Grouping:
    """Groups in the order of their smallest inputs, channels rising."""
    groups = int(row_group.max()) + 1
    out = np.argsort(row_group, kind="stable").reshape(groups, -1)
    into = np.argsort(column_group, kind="stable").reshape(groups, -1)
    order = np.argsort(into[:, 0])
    return Grouping(_tensor(out[order]), _tensor(into[order]))


def _tensor(index: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).long()


def expand_groups(matrix: Tensor, parts: int) -> Tensor:
    """What a convolution with groups has for each of its pairs, among all pairs.

    (outputs, inputs of each part) -> (outputs, inputs), zeros or False where there is no weight.
    """
    blocks = matrix.reshape(parts, -1, matrix.shape[1])
    whole = blocks.new_zeros(parts, blocks.shape[1], parts, matrix.shape[1])
    index = torch.arange(parts)
    whole[index, :, index] = blocks
    return whole.reshape(len(matrix), -1)


def extract_groups(matrix: Tensor, parts: int) -> Tensor:
    """The reverse of `expand_groups`: (outputs, inputs) -> (outputs, inputs of each part)."""
    index = torch.arange(parts)
    blocks = matrix.reshape(parts, len(matrix) // parts, parts, -1)
    return blocks[index, :, index].reshape(len(matrix), -1)


def group_parts(criterion: Tensor, parts: int, groups: int, search: Search) -> Grouping:
    """The same for a convolution that has groups already: each of its parts is divided further.

    `criterion` is (outputs, inputs of each part). Raises PruningError as `group` does.
    """
    if groups % parts:
        raise PruningError(f"{groups} groups cannot be made of {parts}")
    high, wide = len(criterion) // parts, criterion.shape[1]
    found = [group(block, groups // parts, search) for block in criterion.split(high)]
    out = torch.cat([g.outputs + k * high for k, g in enumerate(found)])
    return Grouping(out, torch.cat([g.inputs + k * wide for k, g in enumerate(found)]))


def from_mask(mask: Tensor) -> Grouping | None:
    """The groups of a mask (outputs, inputs, ...), or None if it is not made of groups alone.

    Every kernel must be there as a whole or not at all, outputs that share an input must share all
    of them, and the groups must be of one size. A single group of everything is none.
    """
    flat = mask.detach().cpu().reshape(*mask.shape[:2], -1)
    if not bool((flat == flat[:, :, :1]).all()):
        return None
    patterns, row_group = flat[:, :, 0].unique(dim=0, return_inverse=True)
    groups = len(patterns)
    if groups == 1 or not bool((patterns.sum(dim=0) == 1).all()):
        return None
    column_group = patterns.long().argmax(dim=0)
    sizes: list[Any] = [row_group.bincount(), column_group.bincount(minlength=groups)]
    if any(bool((size != size[0]).any()) for size in sizes):
        return None
    return _named(row_group.numpy(), column_group.numpy())
