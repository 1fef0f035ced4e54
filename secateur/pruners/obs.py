"""Layer-wise optimal brain surgeon: prune single weights and adjust the kept ones to compensate.

For each output of a layer, with inputs x over some images and all positions, the kept weights w'
minimise the mean of (w' x - w x)^2. With H the mean of x x', removing weight p costs
w_p^2 / (H^-1)_pp, and changes the others by -w_p / (H^-1)_pp times column p of H^-1. Weights are
removed one by one, the cheapest first; the outputs of a layer compete for its ratio by the cost of
their next removal. Finally, the kept weights are computed anew by least squares.

Sources: B. Hassibi, D. Stork, Second order derivatives for network pruning: optimal brain surgeon,
NeurIPS 1992; layer-wise, E. Frantar, D. Alistarh, Optimal brain compression, NeurIPS 2022. Removing
a zero costs nothing, so the weights that earlier rounds have pruned are removed first. The time
grows with the cube of the number of inputs of a layer and linearly with its outputs: minutes for
784 inputs and 300 outputs.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.base.errors import ArgumentError
from secateur.base.sections import Strict
from secateur.nn.hooks import watched_weights
from secateur.nn.modes import in_eval_mode
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks
from secateur.sparsity.choices import number_pruned
from secateur.sparsity.layer_ratios import ratios_by_parameter
from secateur.sparsity.ratios import Ratios, Rules, Skip

ENTRIES = 2**24
"""Entries of all inverses that are in memory at once, 8 bytes each."""


class Settings(Strict):
    """How many weights are pruned."""

    ratios: Ratios = Rules(0.5)
    """Share of each layer's weights that is pruned, see sparsity/ratios.py."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the mean of H's diagonal that is added to it, so that H can be inverted."""
    skip: Skip = ()
    """Layers that are not pruned: names, or stage.block."""


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """Masks, and new values of the kept weights.

    Raises ArgumentError for a convolution with groups, and if H cannot be inverted.
    """
    ratios = ratios_by_parameter(context.model, settings.ratios, "weights", settings.skip)
    layers = {f"{name}.weight": layer for name, layer in masks.layers(context.model).items()}
    layers = {name: layers[name] for name, ratio in ratios.items() if ratio > 0}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise ArgumentError("skip", f"{name} belongs to a convolution with groups; skip it", [])
    found, values = {}, {}
    for name, second in _second_moments(context, layers).items():
        weight = layers[name].weight.detach()
        second = _damped(second, settings.damping, len(context.images))
        rows = weight.flatten(1).cpu().double()
        try:
            kept = choose(rows, second, number_pruned(ratios[name], rows.numel()))
            left = reconstruct(rows, second, kept).masked_fill(rows == 0, 0)  # exactly, not nearly
        except RuntimeError:  # of torch.linalg
            why = f"inputs of {name} are linearly dependent; a higher value is needed"
            raise ArgumentError("damping", why, settings.damping) from None
        found[name] = kept.view(weight.shape)
        values[name] = left.view(weight.shape).to(weight.dtype)
    total = sum(mask.numel() for mask in found.values())
    asked = sum(ratios[name] * mask.numel() for name, mask in found.items()) / total
    reached = sum(int((~mask).sum()) for mask in found.values()) / total
    notes = {"ratio_asked": asked, "ratio_reached": reached}
    return PruningDecision(found, notes=notes, weights=values)


def _damped(second: Tensor, damping: float, images: int) -> Tensor:
    """H with the damping added to its diagonal. Of a single image only the diagonal of H is used;
    if all inputs are zero, the result is the identity."""
    if images == 1:
        second = second.diagonal().diag()
    added = damping * float(second.diagonal().mean())
    identity = torch.eye(len(second), dtype=second.dtype)
    return second + added * identity if second.any() else identity


def _second_moments(
    context: PruningContext, layers: Mapping[str, nn.Conv2d | nn.Linear]
) -> dict[str, Tensor]:
    """H of each layer, float64 on the CPU, (inputs, inputs); a convolution's inputs are a patch."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, inputs: Tensor, layer: nn.Module | None) -> None:
        if isinstance(layers[name], nn.Conv2d):
            if not isinstance(layer, nn.Conv2d):
                raise ArgumentError("skip", f"{name} is used outside of its layer; skip it", [])
            inputs = _patches(layer, inputs)
        flat = inputs.flatten(0, -2).cpu().double()
        sums[name] = sums.get(name, torch.zeros(())) + flat.T @ flat
        counts[name] = counts.get(name, 0) + len(flat)

    weights = {name: layer.weight for name, layer in layers.items()}
    with watched_weights(context.model, weights, add), torch.no_grad():
        in_eval_mode(context.model)(context.images.to(next(context.model.parameters()).device))
    return {name: total / counts[name] for name, total in sums.items()}


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The patches that a convolution reads: (N, positions, inputs of a patch)."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ArgumentError("skip", f"padding {layer.padding_mode} {layer.padding}: skip it", [])
    size = (layer.kernel_size[0], layer.kernel_size[1])
    return F.unfold(inputs, size, layer.dilation, layer.padding, layer.stride).mT


def choose(rows: Tensor, second: Tensor, count: int) -> Tensor:
    """True at the weights that are kept when `count` are removed; as `rows`, (outputs, inputs)."""
    diagonal = second.diagonal()
    if torch.equal(second, diagonal.diag()):  # no removal changes other weights
        cost, order = (rows.square() * diagonal).sort(dim=1, stable=True)
    else:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
        step = max(1, ENTRIES // second.numel())
        orders, costs = zip(*(removal(part, inverse) for part in rows.split(step)), strict=True)
        order, cost = torch.cat(orders), torch.cat(costs).cummax(1).values  # none out of order
    first = cost.T.flatten().argsort(stable=True)[:count]  # equal costs: in order of removal
    removed = torch.bincount(first % len(rows), minlength=len(rows))
    kept = torch.ones_like(rows, dtype=torch.bool)
    turn = torch.arange(rows.shape[1])
    return kept.scatter(1, order, turn >= removed[:, None])


def removal(rows: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which the weights of each row are removed, and the cost of each removal: what it
    adds to the mean square.

    `inverse` is H^-1, (inputs, inputs); both results have the shape of `rows`, (outputs, inputs).
    """
    weights, each = rows.clone(), torch.arange(len(rows))
    inverses = inverse.repeat(len(rows), 1, 1)
    gone = torch.zeros_like(rows, dtype=torch.bool)
    order, costs = [], []
    for _ in range(rows.shape[1]):
        scales = inverses.diagonal(dim1=1, dim2=2)
        loss = (weights.square() / scales).masked_fill(gone, torch.inf)
        cost, chosen = loss.min(1)
        column = inverses[each, :, chosen]
        scale = column.gather(1, chosen[:, None])
        weights -= weights.gather(1, chosen[:, None]) / scale * column
        inverses.baddbmm_((column / scale).unsqueeze(2), column.unsqueeze(1), alpha=-1)
        gone[each, chosen] = True
        order.append(chosen)
        costs.append(cost)
    return torch.stack(order, 1), torch.stack(costs, 1)


def reconstruct(rows: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """The kept weights of each row that change its output least, by least squares; others are 0."""
    found = torch.zeros_like(rows)
    for row, (weights, stay) in enumerate(zip(rows, kept, strict=True)):
        if stay.any():
            right = second[stay] @ weights
            found[row, stay] = torch.linalg.solve(second[stay][:, stay], right)
    return found
