"""Proof that a compact network computes what the masked network computes."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.base.errors import PruningError, cut
from secateur.nn.modes import in_eval_mode
from secateur.nn.outputs import tensors_of
from secateur.pruning.removal import Compact

FLOAT64_TOLERANCE = 1e-9
"""Difference over the largest output that rounding in float64 may cause."""
FLOAT32_TOLERANCE = 1e-4
"""Difference over the largest output that rounding in float32 may cause."""


@torch.no_grad()
def verify(masked: nn.Module, compact: Compact, images: Tensor, tolerance: float) -> float:
    """Run both networks on `images`; returns the largest difference over the largest output.

    If a network returns several tensors, each is compared with its counterpart. Raises PruningError
    naming the first layer that differs by more than `tolerance`, and for a network whose outputs
    are random, or not finite when the pruned weights are zero.
    """
    expected = _outputs(masked, images, "network with its pruned weights at zero")
    actual = _outputs(compact.model, images, "compact network")
    if len(expected) != len(actual):
        raise PruningError(
            f"the network returns {len(expected)} tensors, the compact network {len(actual)}: a "
            "MultiheadAttention without some of its channels returns no attention weights; return "
            "only its output, or skip the layers whose channels it shares"
        )
    differences = [_difference(*pair) for pair in zip(expected, actual, strict=True)]
    worst = math.nan if any(map(math.isnan, differences)) else max(differences)
    if worst <= tolerance:
        return worst
    _refuse_random(expected, _outputs(masked, images, "network"))
    if not all(bool(t.isfinite().all()) for t in expected):
        raise PruningError(
            "with the pruned channels at zero, outputs of the network are not finite, so that "
            "nothing can be proved; its code may divide by such a channel, or take its logarithm: "
            "skip the layers that produce the channel, or add a small number to it there"
        )
    where, by = _first_difference(masked, compact, images[:8], tolerance) or ("the output", worst)
    if _calculates_with_sizes(masked, compact.model, images, expected, tolerance):
        raise PruningError(
            f"the compact network is not the masked one: {where} differs by {by:.2g} of its "
            "largest value, since the network's code calculates with the size of a layer, such as "
            "`self.conv.out_channels`, which pruning changes: write it as a number"
        )
    raise PruningError(
        f"the compact network is not the masked one: {where} differs by {by:.2g} of its largest "
        f"value (allowed: {tolerance:g}). Nothing was written; this is a bug of the removal"
    )


SIZES = ("in_channels", "out_channels", "in_features", "out_features", "num_features")
"""Attributes of layers that follow their weights, with which torch itself does not compute."""

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _calculates_with_sizes(
    masked: nn.Module,
    compact: nn.Module,
    images: Tensor,
    expected: Sequence[Tensor],
    tolerance: float,
) -> bool:
    """Whether the networks agree if the compact layers give the sizes that they had before."""
    try:
        with _sizes_of(masked, compact):
            found = _outputs(compact, images, "compact network")
    except PruningError:  # the code has another use for them, such as the shape of a view
        return False
    return all(_difference(*pair) <= tolerance for pair in zip(expected, found, strict=True))


@contextlib.contextmanager
def _sizes_of(masked: nn.Module, compact: nn.Module) -> Iterator[None]:
    """Meanwhile, the layers of the compact network give the sizes of those of the masked one."""
    before = dict(masked.named_modules())
    changed = [
        (module, key, getattr(module, key), getattr(before[name], key))
        for name, module in compact.named_modules()
        for key in SIZES
        if name in before
        and key in vars(module)
        and key in vars(before[name])
        and not isinstance(module, INSTANCE_NORMS)  # they check their inputs
    ]
    try:
        for module, key, _, size in changed:
            setattr(module, key, size)
        yield
    finally:
        for module, key, size, _ in changed:
            setattr(module, key, size)


class InDouble(TorchFunctionMode):
    """Run networks in float64 even where their code asks for float32: `x.float()` gives float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        elif func is Tensor.to:
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()}
        return func(*args, **kwargs)


def _first_difference(
    masked: nn.Module, compact: Compact, images: Tensor, tolerance: float
) -> tuple[str, float] | None:
    """The first layer whose outputs differ by more than `tolerance`, and by how much."""
    actual = _layer_outputs(compact.model, images)
    for name, expected in _layer_outputs(masked, images).items():
        if name not in actual:  # of a removed branch
            continue
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


def _outputs(model: nn.Module, images: Tensor, which: str) -> list[Tensor]:
    """All float tensors that a network returns, in eval mode; PruningError if there are none.

    Other tensors, such as predicted classes, may change by rounding. The PruningError for a network
    that fails names it by `which`.
    """
    try:
        found = tensors_of(in_eval_mode(model)(images))
    except Exception as error:  # of any type: it is the network's code that fails
        reason = cut(str(error) or type(error).__name__, 200)
        raise PruningError(
            f"{type(model).__name__}: the {which} does not run ({reason}); a hook, or a forward "
            "that is set on the instance, may use tensors that pruning does not change"
        ) from error
    if not (found := [t for t in found if t.is_floating_point() or t.is_complex()]):
        raise PruningError(f"{type(model).__name__} returns no tensor of floats to compare")
    return found


def _refuse_random(first: list[Tensor], second: list[Tensor]) -> None:
    """Raise PruningError if a network returned two results for the same images."""
    if any(_difference(*pair) > 0 for pair in zip(first, second, strict=True)):
        raise PruningError(
            "the network returns another result each time it is given the same images, so that "
            "nothing can be proved: something in it is random in eval mode too, such as "
            "F.dropout without training=self.training"
        )


def _difference(expected: Tensor, actual: Tensor) -> float:
    """Largest difference over the largest value; NaN if one of the tensors has a NaN.

    It is 0 for empty tensors, and infinite for tensors of different shapes.
    """
    if expected.shape != actual.shape:
        return math.inf
    if not expected.numel():
        return 0.0
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
        in_eval_mode(model)(images)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
