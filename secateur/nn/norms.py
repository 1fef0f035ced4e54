"""Batch normalisations with scales, and the distribution of their scales; masked LayerNorms."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.base.files import Table
from secateur.sparsity.masks import BatchNorm

BIN_WIDTH = 0.02


class _OverRemaining(TorchFunctionMode):
    """Context in which `layer_norm` takes mean and variance over the remaining channels."""

    def __init__(self, remaining: Tensor) -> None:
        super().__init__()
        self.remaining = remaining

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`layer_norm` over the remaining channels; other functions are not changed."""
        if func is functional.layer_norm:
            return _masked_layer_norm(self.remaining, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _masked_layer_norm(
    remaining: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Layer normalisation over the channels in `remaining`, bool (channels,); others become 0."""
    own = remaining.to(x.device, x.dtype)
    mean = (x * own).sum(-1, keepdim=True) / own.sum()
    apart = (x - mean) * own
    scale = (apart.square().sum(-1, keepdim=True) / own.sum() + eps).rsqrt()
    return apart * scale * weight + (0.0 if bias is None else bias * own)


class _MaskedForward:
    """A module's own forward, with `layer_norm` over the remaining channels."""

    def __init__(self, module: nn.LayerNorm, remaining: Tensor) -> None:
        self.module, self.remaining = module, remaining

    def __call__(self, *args: Any) -> Any:
        """The module's output."""
        with _OverRemaining(self.remaining):
            return type(self.module).forward(self.module, *args)


def mask_layer_norm(norm: nn.LayerNorm, removed: Tensor) -> None:
    """Exclude channels (int64 indices) from mean and variance of a LayerNorm, in place.

    The outputs of these channels are zero. Parameters and their names do not change.
    """
    remaining = torch.ones(norm.weight.shape[0], dtype=torch.bool)
    before = vars(norm).get("forward")
    if isinstance(before, _MaskedForward):
        remaining = before.remaining.clone()
    remaining[removed.cpu()] = False
    vars(norm)["forward"] = _MaskedForward(norm, remaining)


def unmask_layer_norm(norm: nn.LayerNorm) -> None:
    """Take mean and variance over all channels again."""
    vars(norm).pop("forward", None)


def scaled_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Batch normalisations that have scales (gamma), by module name, in order."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.affine}


def distribution(model: nn.Module) -> Table:
    """Histogram of |gamma|: `scale`, the lower edge of a bin, and `count`, the scales in it.

    The bins start at 0 and end at the network's largest scale; without scales there are no bins.
    """
    scales = [norm.weight.detach().abs().flatten().cpu() for norm in scaled_norms(model).values()]
    if not scales:
        return Table(("scale", "count"), ())
    counts = torch.cat(scales).double().div(BIN_WIDTH).floor().long().bincount()
    return Table.of(
        [
            {"scale": round(place * BIN_WIDTH, 2), "count": count}
            for place, count in enumerate(counts.tolist())
        ]
    )
