"""Importance scores of the units of one weight, computed from the weight and its gradient only.

`pruning/criteria.py` defines all criteria, with their sources, and computes those that need images
or the channel graph.
"""

from typing import Literal

import torch
from torch import Tensor

from secateur.sparsity.choices import Granularity, magnitude_scores

WeightCriterion = Literal["l1", "l2", "geometric_median", "taylor", "lamp"]


def scores_of_weight(
    weight: Tensor,
    granularity: Granularity,
    criterion: WeightCriterion,
    gradient: Tensor | None = None,
) -> Tensor:
    """Score of every unit, in the shape of a choice; taylor needs the weight's `gradient`."""
    if criterion == "taylor":
        assert gradient is not None
        return _taylor(weight, gradient, granularity)
    if criterion == "l1":
        return magnitude_scores(weight, granularity)
    if criterion == "l2":
        return magnitude_scores(weight.square(), granularity).sqrt()
    return (_distance if criterion == "geometric_median" else _lamp)(weight, granularity)


def choice_shape(weight: Tensor, granularity: Granularity) -> list[int]:
    """Shape of a choice of filters or channels, with -1 for their number."""
    shape = [1] * weight.dim()
    shape[0 if granularity == "filter" else 1] = -1
    return shape


def _distance(weight: Tensor, granularity: Granularity) -> Tensor:
    """Mean Euclidean distance of each unit to all others, over the square root of its size."""
    rows = weight if granularity == "filter" else weight.transpose(0, 1)
    rows = rows.flatten(1).double()  # exact enough for distances from a matrix product
    return (mean_distances(rows) / rows.shape[1] ** 0.5).view(choice_shape(weight, granularity))


def mean_distances(rows: Tensor) -> Tensor:
    """Mean Euclidean distance of each row to all others, (rows,); 0 for a row without others."""
    distances = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist")
    return distances.sum(dim=1) / max(1, len(rows) - 1)


def share_of_not_smaller(values: Tensor) -> Tensor:
    """Each value over the sum of all that are not smaller (LAMP), in the same shape.

    The sum of one of several equal values includes those of them that come before it.
    """
    flat, order = values.flatten().sort(descending=True, stable=True)
    shares = torch.empty_like(flat)
    shares[order] = flat / flat.cumsum(0).clamp_min(1e-300)
    return shares.view(values.shape)


def _lamp(weight: Tensor, granularity: Granularity) -> Tensor:
    return share_of_not_smaller(magnitude_scores(weight.double().square(), granularity))


def _taylor(weight: Tensor, gradient: Tensor, granularity: Granularity) -> Tensor:
    axis = {"filter": 0, "channel": 1, "weight": -1}[granularity]
    change = (weight * gradient).detach()
    if axis >= 0:
        change = change.sum([a for a in range(change.dim()) if a != axis], keepdim=True)
    return change.square()
