"""Proof that a compact network computes what the masked network computes."""

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.pruning.removal import Compact

FLOAT64_TOLERANCE = 1e-9
"""Difference over the largest output that rounding in float64 may make."""
FLOAT32_TOLERANCE = 1e-4
"""Difference over the largest output that rounding in float32 may make."""


@torch.no_grad()
def verify(masked: nn.Module, compact: Compact, images: Tensor, tolerance: float) -> float:
    """Run both networks on `images`; returns the largest difference over the largest output.

    Raises PruningError naming the first layer that differs by more than `tolerance`.
    """
    expected, actual = masked.eval()(images), compact.model.eval()(images)
    worst = _difference(expected, actual)
    if worst <= tolerance:
        return worst
    where, by = _first_difference(masked, compact, images[:8], tolerance) or ("the output", worst)
    raise PruningError(
        f"the compact network is not the masked one: {where} differs by {by:.2g} of its largest "
        f"value (allowed: {tolerance:g}). Nothing was written; this is a bug of the removal"
    )


def _first_difference(
    masked: nn.Module, compact: Compact, images: Tensor, tolerance: float
) -> tuple[str, float] | None:
    """The first layer whose outputs differ by more than `tolerance`, and by how much."""
    actual = _layer_outputs(compact.model, images)
    for name, expected in _layer_outputs(masked, images).items():
        linear = isinstance(masked.get_submodule(name), nn.Linear)
        axis = expected.dim() - 1 if linear else 1
        if (kept := compact.kept.get(name)) is not None:
            expected = expected.index_select(axis, kept.to(expected.device))
        found = actual[name]
        if (shift := compact.shift.get(name)) is not None:
            found = found + shift.reshape([-1 if k == axis else 1 for k in range(found.dim())])
        if not (difference := _difference(expected, found)) <= tolerance:  # true for NaN
            return f"layer {name}", difference
    return None


def _difference(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max()) / max(float(expected.abs().max()), 1e-30)


def _layer_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs of convolutions and linear layers by name, in the order in which they run."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, n=name: outputs.update({n: out}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
