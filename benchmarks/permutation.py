"""Time of the permutation search, compared with a direct implementation of the heuristic.

Secateur's implementation is secateur/gconv/permutation.py. The direct implementation follows the
paper step by step: every round permutes the matrix, sums it and sorts by the sums. Both search for
groups in one set of matrices, alternately, in one process and on one thread.

    python -m benchmarks.permutation
    python -m benchmarks.permutation --size 256 --groups 32 --iters 10
"""

import argparse
import statistics
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secateur.gconv.permutation import Floats, Ints, PermutationSettings, find_grouping


def direct(criterion: Floats, groups: int, iters: int) -> tuple[Ints, Ints, float]:
    """Permutations of outputs and inputs by the published heuristic, and the kept criterion."""
    outputs, inputs = criterion.shape
    high, wide = outputs // groups, inputs // groups
    rows, columns = np.arange(outputs), np.arange(inputs)
    for last in range(groups, 0, -1):
        bottom, right = high * last, wide * last
        for _ in range(iters):
            now = criterion[rows, :][:, columns][:bottom, :right]
            by_column = np.argsort(now[-high:, :].sum(axis=0), kind="stable")
            columns[:right] = columns[:right][by_column]
            now = now[:, by_column]
            by_row = np.argsort(now[:, -wide:].sum(axis=1), kind="stable")
            rows[:bottom] = rows[:bottom][by_row]
    now = criterion[rows, :][:, columns]
    blocks = np.zeros((groups, groups))
    for i in range(groups):
        for j in range(groups):
            blocks[i, j] = now[i * high : (i + 1) * high, j * wide : (j + 1) * wide].sum()
    first, second = linear_sum_assignment(blocks, maximize=True)
    columns = columns.reshape(groups, wide)[second].flatten()
    return rows, columns, float(blocks[first, second].sum())


def measure(
    matrix: Tensor, groups: int, iters: int, turns: int
) -> tuple[list[float], list[float], float]:
    """Seconds of the direct implementation and of Secateur's, by repetition, and the ratio of the
    criterion that their groupings keep, the larger divided by the smaller."""
    values, search = matrix.numpy(), PermutationSettings(sort_iters=iters)
    theirs, ours = [], []
    for _ in range(turns):
        start = time.perf_counter()
        *_, direct_kept = direct(values, groups, iters)
        theirs.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = find_grouping(matrix, groups, search)
        ours.append(time.perf_counter() - start)
    kept = found.kept(matrix)
    return theirs, ours, max(kept, direct_kept) / min(kept, direct_kept)


def main() -> None:
    """Print one row for each number of groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kernels = torch.randn(chosen.size, chosen.size, 9, dtype=torch.float64)
    matrix = kernels.norm(dim=2)
    print(f"{chosen.size} x {chosen.size}, {chosen.iters} rounds, median of {chosen.turns} runs")
    print("| groups | direct, ms | Secateur, ms | speed-up | kept criterion, larger / smaller |")
    print("|---:|---:|---:|---:|---:|")
    for groups in chosen.groups:
        theirs, ours, same = measure(matrix, groups, chosen.iters, chosen.turns)
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        print(
            f"| {groups} | {statistics.median(theirs) * 1e3:.1f} | "
            f"{statistics.median(ours) * 1e3:.1f} | {ratio:.1f}x | {same:.9f} |"
        )


if __name__ == "__main__":
    main()
