"""Importance criteria: a score for each unit of pruning, in the shape of a choice.

A unit is a filter, an input channel or a single weight of one layer. Scores are means over a unit's
weights, not sums, so that units of different layers are comparable. In a layer that never runs in
eval mode, inputs and gradients are zero. With w the weights of a unit:

    l1                 mean of |w|.
    l2                 square root of the mean of w^2.
    geometric_median   mean Euclidean distance to the other units of the layer, over the square
                       root of the unit's size: a unit that is close to others can be replaced by
                       them. Y. He et al., Filter pruning via geometric median for deep
                       convolutional neural networks acceleration, CVPR 2019.
    taylor             (sum of w * dL/dw)^2, with the cross-entropy L of some images: to first
                       order, the squared change of the loss without the unit. P. Molchanov et
                       al., Importance estimation for neural network pruning, CVPR 2019, equation 8.
    fisher             mean of h * w^2 / 2, with the mean of (dL/dw)^2 over some images in place of
                       the curvature h: to second order, the increase of the loss when the weights
                       are removed one by one. Y. LeCun et al., Optimal brain damage, NeurIPS 1989;
                       with Fisher information for h, L. Theis et al., Faster gaze prediction with
                       dense networks and Fisher pruning, 2018. L is computed with the true labels.
    wanda              mean of |w| * ||x||, with ||x|| the Euclidean norm over some images and all
                       positions of the input channel that w is multiplied by. M. Sun et al., A
                       simple and effective pruning approach for large language models, ICLR 2024,
                       for single weights compared within an output; here within a layer.
    lamp               squared norm over the sum of all squared norms in the layer that are not
                       smaller. J. Lee et al., Layer-adaptive sparsity for the magnitude-based
                       pruning, ICLR 2021, equation 3, for single weights; here for all units.
    bn_scale           |gamma| of the batch normalisation of this output or input; the largest if
                       there are several. Z. Liu et al., Learning efficient convolutional networks
                       through network slimming, ICCV 2017.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.base.errors import ArgumentError, PruningError
from secateur.channels import scales
from secateur.nn.hooks import watched_weights
from secateur.nn.outputs import class_scores, tensors_of
from secateur.pruning.decision import PruningContext
from secateur.sparsity.choices import Granularity, magnitude_scores
from secateur.sparsity.scores import choice_shape, scores_of_weight

Criterion = Literal["l1", "l2", "geometric_median", "taylor", "fisher", "wanda", "lamp", "bn_scale"]
NOT_FOR_WEIGHTS = ("geometric_median", "bn_scale")
"""Criteria that are not defined for single weights."""


def scores(
    context: PruningContext,
    layers: Sequence[str],
    granularity: Granularity,
    criterion: Criterion,
) -> dict[str, Tensor]:
    """Score of every unit of these layers, by the weight's parameter name.

    Raises ArgumentError for a criterion that is not defined at this granularity, and, with
    bn_scale, for a layer without scales; PruningError for images that do not fit the criterion.
    """
    names = [f"{name}.weight" for name in layers]
    return parameter_scores(context, names, granularity, criterion)


def parameter_scores(
    context: PruningContext,
    names: Sequence[str],
    granularity: Granularity,
    criterion: Criterion,
) -> dict[str, Tensor]:
    """As `scores`, for parameters by name; with granularity weight also biases and scales.

    Raises ArgumentError and PruningError as `scores`, and ArgumentError for a criterion that is not
    defined for biases and scales.
    """
    if criterion in NOT_FOR_WEIGHTS and granularity == "weight":
        raise ArgumentError(
            "criterion",
            "is not defined for single weights; granularity must be filter or channel",
            criterion,
        )
    weights = {name: context.model.get_parameter(name) for name in names}
    if criterion == "wanda" and any(weight.dim() < 2 for weight in weights.values()):
        raise ArgumentError("criterion", "needs weights only; scope must be weights", criterion)
    if criterion == "bn_scale":
        return _bn_scale(context, weights, granularity)
    if criterion == "taylor":
        return _taylor(context, weights, granularity)
    if criterion == "fisher":
        return _means(loss_increases(context, weights), granularity)
    if criterion == "wanda":
        return _means(input_products(context, weights), granularity)
    return {
        name: scores_of_weight(weight.detach(), granularity, criterion)
        for name, weight in weights.items()
    }


def _means(entries: Mapping[str, Tensor], granularity: Granularity) -> dict[str, Tensor]:
    """Mean over every unit of scores of single entries, which are not negative."""
    return {name: magnitude_scores(entry, granularity) for name, entry in entries.items()}


def gradients(context: PruningContext, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of the cross-entropy over the context's images with respect to these parameters.

    Raises PruningError if the images have no labels, for a network that is not a classifier, and
    naming a parameter that the network uses without a gradient (detach, no_grad).
    """
    context.need_labels("criterion taylor")
    with _evaluated(context.model), _differentiable(weights):
        return _gradients(context, weights, slice(None), "taylor")


def loss_increases(context: PruningContext, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """h * w^2 / 2 of every entry of these parameters, with h the mean over images of the squared
    gradient of the cross-entropy of one image.

    Raises PruningError if the images have no labels, for a network that is not a classifier, and
    naming a parameter that the network uses without a gradient (detach, no_grad).
    """
    context.need_labels("criterion fisher")
    squares = [torch.zeros_like(weight, requires_grad=False) for weight in weights.values()]
    ranked = list(weights.values())
    with _evaluated(context.model), _differentiable(ranked):
        for number in range(len(context.labels)):
            one = _gradients(context, ranked, slice(number, number + 1), "fisher")
            for square, gradient in zip(squares, one, strict=True):
                square.addcmul_(gradient, gradient)
    scale = 0.5 / len(context.labels)
    return {
        name: scale * square * weight.detach().square()
        for (name, weight), square in zip(weights.items(), squares, strict=True)
    }


def input_products(context: PruningContext, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| * ||x|| of every entry of these weights of convolutions and linear maps, with ||x|| the
    norm of the input channel over all images and positions; zero if the layer never runs.

    Raises PruningError naming a weight whose input is not known.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor, _layer: nn.Module | None) -> None:
        channels = inputs.dim() - (1 if weights[name].dim() == 2 else 3)
        square = inputs.square().sum([a for a in range(inputs.dim()) if a != channels])
        squares[name] = squares[name] + square if name in squares else square

    with watched_weights(context.model, weights, add), _evaluated(context.model), torch.no_grad():
        context.model(context.images.to(next(context.model.parameters()).device))
    nothing = torch.zeros(())
    return {
        name: weight.detach().abs()
        * (_by_column(squares[name].sqrt(), weight) if name in squares else nothing)
        for name, weight in weights.items()
    }


def _by_column(norms: Tensor, weight: Tensor) -> Tensor:
    """Norms of a layer's input channels, broadcastable to its weight."""
    if weight.dim() == 2:
        return norms
    filters, groups = len(weight), len(norms) // weight.shape[1]
    rows = norms.view(groups, 1, -1).expand(groups, filters // groups, -1)
    return rows.reshape(filters, -1, 1, 1)


def _gradients(
    context: PruningContext, weights: Sequence[Tensor], images: slice, criterion: str
) -> tuple[Tensor, ...]:
    device = next(context.model.parameters()).device
    labels = context.labels[images].to(device)
    with _Uses() as uses:
        result = context.model(context.images[images].to(device))
    loss = F.cross_entropy(class_scores(result, labels, f"criterion {criterion}"), labels)
    found: Sequence[Tensor | None] = [None] * len(weights)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(weights), allow_unused=True)
    names = {id(parameter): name for name, parameter in context.model.named_parameters()}
    for weight, gradient in zip(weights, found, strict=True):
        if gradient is None and id(weight) in uses.tensors:
            raise PruningError(
                f"criterion {criterion}: no gradient of the loss reaches {names[id(weight)]}; the "
                "network's code may use detach or no_grad. Skip this layer, or use a criterion "
                "without gradients"
            )
    return tuple(
        torch.zeros_like(weight, requires_grad=False) if gradient is None else gradient
        for weight, gradient in zip(weights, found, strict=True)
    )


class _Uses(TorchFunctionMode):
    """Collects the tensors from which others are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()
        """Their id()."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if tensors_of(out):
            self.tensors.update(id(tensor) for tensor in tensors_of((args, kwargs)))
        return out


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Enable gradients, for these parameters even if they are frozen."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    with torch.enable_grad():
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Set the model to eval mode, and back to its previous mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _taylor(
    context: PruningContext, weights: Mapping[str, Tensor], granularity: Granularity
) -> dict[str, Tensor]:
    by_weight = gradients(context, list(weights.values()))
    return {
        name: scores_of_weight(weight.detach(), granularity, "taylor", gradient)
        for (name, weight), gradient in zip(weights.items(), by_weight, strict=True)
    }


def _bn_scale(
    context: PruningContext, weights: Mapping[str, Tensor], granularity: Granularity
) -> dict[str, Tensor]:
    layers = [name.removesuffix(".weight") for name in weights]
    found = _largest_scales(context, layers, granularity)
    for layer, score in found.items():
        if bool(score.isnan().any()):
            raise ArgumentError(
                "criterion",
                f"{granularity}s of layer {layer} have no batch normalisation with scales",
                "bn_scale",
            )
    pairs = zip(weights.items(), found.values(), strict=True)
    return {name: own.view(choice_shape(weight, granularity)) for (name, weight), own in pairs}


def layers_without_scales(
    context: PruningContext, layers: Sequence[str], granularity: Granularity
) -> list[str]:
    """Names in `layers` for which the criterion bn_scale is not defined."""
    found = _largest_scales(context, layers, granularity)
    return [name for name, score in found.items() if bool(score.isnan().any())]


def _largest_scales(
    context: PruningContext, layers: Sequence[str], granularity: Granularity
) -> dict[str, Tensor]:
    """Largest scale of every filter or channel of these layers, (units,); NaN if it has none."""
    graph = context.graph
    every = scales.norm_scales(context.model, graph.fx_graph)
    flat = scales.flat_scales(context.model, graph, every)
    largest = flat.largest_by_channel(len(graph.canonical))
    found = {}
    for name in layers:
        layer = graph.layers[name]
        ids = layer.outputs if granularity == "filter" else layer.inputs
        found[name] = torch.where(ids >= 0, largest[graph.canonical[ids.clamp_min(0)]], torch.nan)
    return found
