"""Groups of the channels of one convolution that keep as much importance as possible.

Given the importance of every kernel, that is, of every (output, input) pair, find groups of outputs
and groups of inputs, all of equal size, so that the sum over the pairs within matching groups is
large. When the kernels outside the groups are pruned, the result is a group convolution between two
permutations.

Source: R. Zhao, W. Luk, Efficient structured pruning and architecture searching for group
convolution, ICCV workshops 2019: the importance, the heuristic by sorting (`grps`, with
`sort_iters` rounds for each group), and the matching of output groups with input groups. Restarts
and refinements are not from the paper.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from secateur.base.errors import PruningError
from secateur.base.sections import Strict

Importance = Literal["magnitude", "taylor"]
"""How the importance of a kernel is measured."""
Permutation = Literal["grps", "sort", "same"]
Refine = Literal["none", "swap", "assignment"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_GAIN = 1e-9  # smallest improvement worth a move, relative to the mean entry


class PermutationSettings(Strict):
    """How the groups of one layer are found."""

    permutation: Permutation = "grps"
    """grps: the paper's heuristic | sort: order channels by their sums | same: keep their order."""
    sort_iters: Annotated[int, Field(ge=0, le=1000)] = 10
    """Rounds of grps for each group, N_S in the paper; fewer if the order no longer changes."""
    refine: Refine = "none"
    """How the result is improved. swap: repeatedly exchange the best pair of channels | assignment:
    assign all outputs optimally for fixed inputs, then vice versa."""
    restarts: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of further searches from random orders of the channels; the best result is taken."""


@dataclass(frozen=True)
class Grouping:
    """Groups of outputs and of inputs; groups with the same number belong together."""

    outputs: Tensor
    """int64, (groups, outputs of each), ascending."""
    inputs: Tensor
    """int64, (groups, inputs of each), ascending; groups are numbered by their smallest input."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.outputs)

    def mask(self) -> Tensor:
        """bool, (outputs, inputs): True within the groups."""
        mask = torch.zeros(self.outputs.numel(), self.inputs.numel(), dtype=torch.bool)
        mask[self.outputs.unsqueeze(2), self.inputs.unsqueeze(1)] = True
        return mask

    def kept(self, importance: Tensor) -> float:
        """Sum of the importance, (outputs, inputs), within the groups."""
        return float(importance.double()[self.outputs.unsqueeze(2), self.inputs.unsqueeze(1)].sum())


def kernel_magnitudes(weight: Tensor) -> Tensor:
    """Frobenius norm of each kernel: (outputs, inputs, ...) -> (outputs, inputs)."""
    return weight.detach().flatten(2).double().norm(dim=2)


def kernel_taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Sum over each kernel of |gradient of the loss x weight|: (outputs, inputs).

    To first order, an upper bound on the change of the loss when the kernel is removed.
    """
    return (weight.detach() * gradient).abs().flatten(2).double().sum(dim=2)


def divides(outputs: int, inputs: int, groups: int) -> bool:
    """Whether both numbers of channels are multiples of the number of groups."""
    return groups >= 1 and outputs % groups == 0 and inputs % groups == 0


def find_grouping(importance: Tensor, groups: int, settings: PermutationSettings) -> Grouping:
    """The best grouping found for a non-negative importance, (outputs, inputs).

    Raises PruningError if the numbers of channels are not multiples of `groups`, or if the
    importance is not a matrix of finite numbers.
    """
    if importance.dim() != 2:
        raise PruningError(f"importance must be a matrix, not of {importance.dim()} axes")
    if not divides(importance.shape[0], importance.shape[1], groups):
        raise PruningError(f"{' x '.join(map(str, importance.shape))} channels in {groups} groups")
    values: Floats = importance.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise PruningError("importance is not finite: the weights or gradients are damaged")
    best = _search_from(values, groups, settings, None)
    generator = np.random.default_rng(0)
    for _ in range(settings.restarts):
        start = generator.permutation(values.shape[0]), generator.permutation(values.shape[1])
        found = _search_from(values, groups, settings, start)
        if found[0] > best[0]:
            best = found
    return _numbered(*best[1:])


def _search_from(
    values: Floats, groups: int, settings: PermutationSettings, start: tuple[Ints, Ints] | None
) -> tuple[float, Ints, Ints]:
    """Importance kept, group of every output and of every input, starting from one order."""
    rows, columns = start or (np.arange(values.shape[0]), np.arange(values.shape[1]))
    if settings.permutation == "sort":
        rows, columns = _sorted(values, rows, columns)
    elif settings.permutation == "grps" and groups > 1:
        rows, columns = sort_groups(values, groups, settings.sort_iters, rows, columns)
    row_group, column_group = _match_groups(values, groups, rows, columns)
    if settings.refine == "swap":
        _swap(values, groups, row_group, column_group)
    elif settings.refine == "assignment":
        row_group, column_group = _assign(values, groups, row_group, column_group)
    kept = float(values[row_group[:, None] == column_group[None, :]].sum())
    return kept, row_group, column_group


def _sorted(values: Floats, rows: Ints, columns: Ints) -> tuple[Ints, Ints]:
    """Rows and columns by their sums, ascending."""
    by_row = np.argsort(values.sum(axis=1)[rows], kind="stable")
    by_column = np.argsort(values.sum(axis=0)[columns], kind="stable")
    return rows[by_row], columns[by_column]


def sort_groups(
    values: Floats, groups: int, rounds: int, rows: Ints, columns: Ints
) -> tuple[Ints, Ints]:
    """The paper's heuristic: new orders of rows and columns; the last group is found first.

    For the last group, alternately sort columns by their sums over its rows, and rows by their sums
    over its columns, both ascending, so that it gets the largest; then repeat without this group.
    Only sums are computed, no matrix is permuted, and a group that no longer changes is final.
    """
    rows, columns = rows.copy(), columns.copy()
    high, wide = len(rows) // groups, len(columns) // groups
    transposed = np.ascontiguousarray(values.T)
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
            key = transposed[chosen].sum(axis=0)[active_rows]
            active_rows = active_rows[np.argsort(key, kind="stable")]
        rows[: high * left], columns[: wide * left] = active_rows, active_columns
    return rows, columns


def _match_groups(values: Floats, groups: int, rows: Ints, columns: Ints) -> tuple[Ints, Ints]:
    """Divide both orders into groups and match them by the Hungarian method."""
    blocks = values[rows][:, columns].reshape(groups, -1, groups, len(columns) // groups)
    first, second = _assignment(blocks.sum(axis=(1, 3)))
    row_group, column_group = np.empty(len(rows), np.int64), np.empty(len(columns), np.int64)
    row_group[rows.reshape(groups, -1)[first]] = np.arange(groups)[:, None]
    column_group[columns.reshape(groups, -1)[second]] = np.arange(groups)[:, None]
    return row_group, column_group


def _sums_by_group(values: Floats, groups: int, column_group: Ints) -> Floats:
    """Sum of every row over the columns of each group: (rows, groups)."""
    order = np.argsort(column_group, kind="stable")
    shaped: Floats = values[:, order].reshape(len(values), groups, -1).sum(axis=2)
    return shaped


def _swap(values: Floats, groups: int, row_group: Ints, column_group: Ints) -> None:
    """Exchange the best pair of rows while that gains, then of columns, until nothing changes."""
    transposed, least = np.ascontiguousarray(values.T), _GAIN * max(float(values.mean()), 1e-300)
    while True:
        moved = _swap_side(_sums_by_group(values, groups, column_group), row_group, least)
        moved += _swap_side(_sums_by_group(transposed, groups, row_group), column_group, least)
        if not moved:
            return


def _swap_side(sums: Floats, group: Ints, least: float) -> int:
    """Best swaps of one side, in place; returns their number. `sums` is (channels, groups)."""
    lines = np.arange(len(group))
    swapped = sums[:, group]  # sum of the row in the group of each other row
    own = sums[lines, group]
    for moved in range(len(group) ** 2):
        gain = swapped + swapped.T - own[:, None] - own[None, :]
        a, b = divmod(int(gain.argmax()), len(group))
        if gain[a, b] <= least:
            return moved
        group[a], group[b] = group[b], group[a]
        swapped[:, [a, b]] = swapped[:, [b, a]]
        own[[a, b]] = sums[[a, b], group[[a, b]]]
    return len(group) ** 2


def _assign(values: Floats, groups: int, row_group: Ints, column_group: Ints) -> tuple[Ints, Ints]:
    """Best rows for the columns, best columns for the rows, until nothing is gained.

    Then the same starting with the columns; the better of the two results is taken.
    """
    transposed = np.ascontiguousarray(values.T)
    by_row, rows, columns = _alternate(values, transposed, groups, column_group)
    by_column, *other = _alternate(transposed, values, groups, row_group)
    return (rows, columns) if by_row >= by_column else (other[1], other[0])


def _alternate(
    values: Floats, transposed: Floats, groups: int, second: Ints
) -> tuple[float, Ints, Ints]:
    least, kept = _GAIN * max(float(values.mean()), 1e-300), -np.inf
    while True:
        first = _balanced(_sums_by_group(values, groups, second))
        sums = _sums_by_group(transposed, groups, first)
        second = _balanced(sums)
        now = float(sums[np.arange(len(second)), second].sum())
        if now <= kept + least:
            return now, first, second
        kept = now


def _balanced(sums: Floats) -> Ints:
    """Groups of equal size for all rows with the largest sum, as a linear assignment problem."""
    count, groups = sums.shape
    size = count // groups
    rows, places = _assignment(np.repeat(sums, size, axis=1))
    group = np.empty(count, np.int64)
    group[rows] = places // size
    return group


def _assignment(gains: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and their columns, one each, with the largest sum of gains (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # 0.4 s, which `prune` seldom needs

    rows, columns = linear_sum_assignment(gains, maximize=True)
    return rows, columns


def _numbered(row_group: Ints, column_group: Ints) -> Grouping:
    """Groups in the order of their smallest inputs, channels ascending."""
    groups = int(row_group.max()) + 1
    out = np.argsort(row_group, kind="stable").reshape(groups, -1)
    into = np.argsort(column_group, kind="stable").reshape(groups, -1)
    order = np.argsort(into[:, 0])
    return Grouping(_tensor(out[order]), _tensor(into[order]))


def _tensor(index: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).long()


def expand_groups(matrix: Tensor, parts: int) -> Tensor:
    """A matrix of the kernels of a convolution with groups (`parts`) -> a matrix of all pairs.

    (outputs, inputs of each part) -> (outputs, inputs), zeros or False where there is no kernel.
    """
    blocks = matrix.reshape(parts, -1, matrix.shape[1])
    whole = blocks.new_zeros(parts, blocks.shape[1], parts, matrix.shape[1])
    index = torch.arange(parts)
    whole[index, :, index] = blocks
    return whole.reshape(len(matrix), -1)


def extract_groups(matrix: Tensor, parts: int) -> Tensor:
    """The inverse of `expand_groups`: (outputs, inputs) -> (outputs, inputs of each part)."""
    index = torch.arange(parts)
    blocks = matrix.reshape(parts, len(matrix) // parts, parts, -1)
    return blocks[index, :, index].reshape(len(matrix), -1)


def find_grouping_within(
    importance: Tensor, parts: int, groups: int, settings: PermutationSettings
) -> Grouping:
    """The best grouping found for a convolution with groups (`parts`), each of which is divided.

    `importance` is (outputs, inputs of each part). Raises PruningError as `find_grouping` does.
    """
    if groups % parts:
        raise PruningError(f"{groups} groups cannot be made of {parts}")
    high, wide = len(importance) // parts, importance.shape[1]
    found = [find_grouping(block, groups // parts, settings) for block in importance.split(high)]
    out = torch.cat([g.outputs + k * high for k, g in enumerate(found)])
    return Grouping(out, torch.cat([g.inputs + k * wide for k, g in enumerate(found)]))


def grouping_from_mask(mask: Tensor) -> Grouping | None:
    """The groups of a mask (outputs, inputs, ...), or None if it does not consist of groups.

    A mask consists of groups if every kernel is masked as a whole or not at all, if outputs that
    share an input share all their inputs, and if there are at least two groups, of equal size.
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
    return _numbered(row_group.numpy(), column_group.numpy())
