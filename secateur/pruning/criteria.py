"""How much a group of weights matters: scores by criterion, with the shape of a choice.

Means over a group's weights, not sums, so that groups of different layers compare.

    l1                 mean |w|
    l2                 root of the mean w^2
    geometric_median   mean distance to the layer's other groups: what others can stand in for
                       matters least. Y. He et al., Filter pruning via geometric median for deep
                       convolutional neural networks acceleration, CVPR 2019.
    taylor             (sum of w * dL/dw)^2 over the group, with the cross-entropy L of some images:
                       how much the loss would change, squared. P. Molchanov et al., Importance
                       estimation for neural network pruning, CVPR 2019, equation 8.
    lamp               squared norm over the sum of the squared norms that are not smaller in its
                       layer. J. Lee et al., Layer-adaptive sparsity for the magnitude-based
                       pruning, ICLR 2021, equation 3, for single weights; here for groups too.
    bn_scale           |gamma| of the batch normalisation of the output or input that the group is;
                       where there are several, the largest. Z. Liu et al., ICCV 2017.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.base.errors import PruningError, SettingsError
from secateur.channels import scales
from secateur.pruning.decision import PruningContext
from secateur.sparsity.choices import Granularity
from secateur.sparsity.choices import scores as mean_size

Criterion = Literal["l1", "l2", "geometric_median", "taylor", "lamp", "bn_scale"]
WHOLE = ("geometric_median", "bn_scale")
"""Criteria that know no single weights."""


def scores(
    subject: PruningContext,
    layers: Sequence[str],
    granularity: Granularity,
    criterion: Criterion,
    where: str,
) -> dict[str, Tensor]:
    """Score of every group of these layers, by the weight's parameter name; float32 or as it is.

    `where` is the key of the criterion. Raises SettingsError for a criterion that has no such
    groups, PruningError naming the layer if it lacks what the criterion looks at.
    """
    if criterion in WHOLE and granularity == "weight":
        raise SettingsError(
            f"params.yaml: {where} = {criterion!r}: has no single weights; groups must be filter "
            "or channel"
        )
    weights = {f"{name}.weight": subject.model.get_parameter(f"{name}.weight") for name in layers}
    if criterion == "bn_scale":
        return _bn_scale(subject, weights, granularity)
    if criterion == "taylor":
        return _taylor(subject, weights, granularity)
    single = {"l1": _l1, "l2": _l2, "geometric_median": _distance, "lamp": _lamp}[criterion]
    return {name: single(weight.detach(), granularity) for name, weight in weights.items()}


def _l1(weight: Tensor, granularity: Granularity) -> Tensor:
    return mean_size(weight, granularity)


def _l2(weight: Tensor, granularity: Granularity) -> Tensor:
    return mean_size(weight.square(), granularity).sqrt()


def _distance(weight: Tensor, granularity: Granularity) -> Tensor:
    """Mean Euclidean distance of each group to all others, per root of its size."""
    rows = weight if granularity == "filter" else weight.transpose(0, 1)
    rows = rows.flatten(1).double()  # so that a product may stand for differences
    mean = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist").mean(dim=1)
    shape = [1] * weight.dim()
    shape[0 if granularity == "filter" else 1] = -1
    return (mean / rows.shape[1] ** 0.5).view(shape)


def _lamp(weight: Tensor, granularity: Granularity) -> Tensor:
    size = mean_size(weight.double().square(), granularity)
    flat, order = size.flatten().sort(descending=True, stable=True)
    score = torch.empty_like(flat)
    score[order] = flat / flat.cumsum(0).clamp_min(1e-300)
    return score.view(size.shape)


def gradients(subject: PruningContext, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Derivative of the cross-entropy over the subject's images by each of these parameters.

    Raises PruningError if the images have no labels.
    """
    if not len(subject.labels):
        raise PruningError("criterion taylor needs images with labels")
    training = subject.model.training
    place = next(subject.model.parameters()).device
    try:
        with torch.enable_grad():
            logits = subject.model.eval()(subject.images.to(place))
            loss = F.cross_entropy(logits, subject.labels.to(place))
            return torch.autograd.grad(loss, list(weights))
    finally:
        subject.model.train(training)


def _taylor(
    subject: PruningContext, weights: Mapping[str, Tensor], granularity: Granularity
) -> dict[str, Tensor]:
    by_weight = gradients(subject, list(weights.values()))
    axis = {"filter": 0, "channel": 1, "weight": -1}[granularity]
    found = {}
    for (name, weight), gradient in zip(weights.items(), by_weight, strict=True):
        change = (weight * gradient).detach()
        if axis >= 0:
            change = change.sum([a for a in range(change.dim()) if a != axis], keepdim=True)
        found[name] = change.square()
    return found


def _bn_scale(
    subject: PruningContext, weights: Mapping[str, Tensor], granularity: Granularity
) -> dict[str, Tensor]:
    graph = subject.graph
    every = scales.norm_scales(subject.model, graph.fx_graph)
    largest = scales.flat_scales(subject.model, graph, every).largest_by_channel(
        len(graph.canonical)
    )
    found = {}
    for name, weight in weights.items():
        layer = graph.layers[name.removesuffix(".weight")]
        ids = layer.outputs if granularity == "filter" else layer.inputs
        score = torch.where(ids >= 0, largest[graph.canonical[ids.clamp_min(0)]], torch.nan)
        if bool(score.isnan().any()):
            raise PruningError(
                f"criterion bn_scale: {granularity}s of layer {name.removesuffix('.weight')} have no "
                "batch normalisation with scales"
            )
        shape = [1] * weight.dim()
        shape[0 if granularity == "filter" else 1] = -1
        found[name] = score.view(shape)
    return found
