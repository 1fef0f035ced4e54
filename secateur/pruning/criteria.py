"""Importance criteria: a score for each group of weights, in the shape of a choice.

A group is a filter, an input channel or a single weight of one layer. Scores are means over a
group's weights, not sums, so that groups of different layers compare. With w a group's weights:

    l1                 mean of |w|.
    l2                 square root of the mean of w^2.
    geometric_median   mean Euclidean distance to the other groups of the layer, over the square
                       root of the group's size: a group that is close to others can be replaced
                       by them. Y. He et al., Filter pruning via geometric median for deep
                       convolutional neural networks acceleration, CVPR 2019.
    taylor             (sum of w * dL/dw)^2, with the cross-entropy L of some images: to first
                       order, the squared change of the loss without the group. P. Molchanov et
                       al., Importance estimation for neural network pruning, CVPR 2019, equation 8.
    lamp               squared norm over the sum of the squared norms in the layer that are not
                       smaller. J. Lee et al., Layer-adaptive sparsity for the magnitude-based
                       pruning, ICLR 2021, equation 3, for single weights; here for groups too.
    bn_scale           |gamma| of the batch normalisation of the output or input that the group
                       is; the largest if there are several. Z. Liu et al., Learning efficient
                       convolutional networks through network slimming, ICCV 2017.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.base.errors import ArgumentError, PruningError
from secateur.channels import scales
from secateur.pruning.decision import PruningContext
from secateur.sparsity.choices import Granularity, magnitude_scores

Criterion = Literal["l1", "l2", "geometric_median", "taylor", "lamp", "bn_scale"]
NOT_FOR_WEIGHTS = ("geometric_median", "bn_scale")
"""Criteria that are not defined for single weights."""


def scores(
    context: PruningContext,
    layers: Sequence[str],
    granularity: Granularity,
    criterion: Criterion,
) -> dict[str, Tensor]:
    """Score of every group of these layers, by the weight's parameter name.

    Raises ArgumentError for a criterion that is not defined at this granularity, PruningError
    naming the layer if it lacks what the criterion is computed from.
    """
    if criterion in NOT_FOR_WEIGHTS and granularity == "weight":
        raise ArgumentError(
            "criterion", "has no single weights; granularity must be filter or channel", criterion
        )
    weights = {f"{name}.weight": context.model.get_parameter(f"{name}.weight") for name in layers}
    if criterion == "bn_scale":
        return _bn_scale(context, weights, granularity)
    if criterion == "taylor":
        return _taylor(context, weights, granularity)
    of_weight = {"l1": _l1, "l2": _l2, "geometric_median": _distance, "lamp": _lamp}[criterion]
    return {name: of_weight(weight.detach(), granularity) for name, weight in weights.items()}


def _l1(weight: Tensor, granularity: Granularity) -> Tensor:
    return magnitude_scores(weight, granularity)


def _l2(weight: Tensor, granularity: Granularity) -> Tensor:
    return magnitude_scores(weight.square(), granularity).sqrt()


def _distance(weight: Tensor, granularity: Granularity) -> Tensor:
    """Mean Euclidean distance of each group to all others, over the square root of its size."""
    rows = weight if granularity == "filter" else weight.transpose(0, 1)
    rows = rows.flatten(1).double()  # exact enough for distances from a matrix product
    mean = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist").mean(dim=1)
    return (mean / rows.shape[1] ** 0.5).view(_choice_shape(weight, granularity))


def _lamp(weight: Tensor, granularity: Granularity) -> Tensor:
    size = magnitude_scores(weight.double().square(), granularity)
    flat, order = size.flatten().sort(descending=True, stable=True)
    score = torch.empty_like(flat)
    score[order] = flat / flat.cumsum(0).clamp_min(1e-300)
    return score.view(size.shape)


def gradients(context: PruningContext, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of the cross-entropy over the context's images with respect to these parameters.

    Raises PruningError if the images have no labels.
    """
    if not len(context.labels):
        raise PruningError("criterion taylor needs images with labels")
    training = context.model.training
    device = next(context.model.parameters()).device
    try:
        with torch.enable_grad():
            logits = context.model.eval()(context.images.to(device))
            loss = F.cross_entropy(logits, context.labels.to(device))
            return torch.autograd.grad(loss, list(weights))
    finally:
        context.model.train(training)


def _taylor(
    context: PruningContext, weights: Mapping[str, Tensor], granularity: Granularity
) -> dict[str, Tensor]:
    by_weight = gradients(context, list(weights.values()))
    axis = {"filter": 0, "channel": 1, "weight": -1}[granularity]
    found = {}
    for (name, weight), gradient in zip(weights.items(), by_weight, strict=True):
        change = (weight * gradient).detach()
        if axis >= 0:
            change = change.sum([a for a in range(change.dim()) if a != axis], keepdim=True)
        found[name] = change.square()
    return found


def _bn_scale(
    context: PruningContext, weights: Mapping[str, Tensor], granularity: Granularity
) -> dict[str, Tensor]:
    graph = context.graph
    every = scales.norm_scales(context.model, graph.fx_graph)
    flat = scales.flat_scales(context.model, graph, every)
    largest = flat.largest_by_channel(len(graph.canonical))
    found = {}
    for name, weight in weights.items():
        layer_name = name.removesuffix(".weight")
        layer = graph.layers[layer_name]
        ids = layer.outputs if granularity == "filter" else layer.inputs
        score = torch.where(ids >= 0, largest[graph.canonical[ids.clamp_min(0)]], torch.nan)
        if bool(score.isnan().any()):
            raise PruningError(
                f"criterion bn_scale: {granularity}s of layer {layer_name} have no batch "
                "normalisation with scales"
            )
        found[name] = score.view(_choice_shape(weight, granularity))
    return found


def _choice_shape(weight: Tensor, granularity: Granularity) -> list[int]:
    """Shape of a choice of filters or channels, -1 for their number."""
    shape = [1] * weight.dim()
    shape[0 if granularity == "filter" else 1] = -1
    return shape
