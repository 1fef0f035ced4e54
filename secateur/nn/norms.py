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
    """Calls of `layer_norm` take mean and variance over the channels that remain."""

    def __init__(self, remaining: Tensor) -> None:
        super().__init__()
        self.remaining = remaining

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`layer_norm` of the remaining channels; all other functions as they are."""
        if func is functional.layer_norm:
            return _masked_layer_norm(self.remaining, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _masked_layer_norm(
    remaining: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Layer normalisation with sums over some channels, bool, (channels,); zero in all others."""
    own = remaining.to(x.device, x.dtype)
    mean = (x * own).sum(-1, keepdim=True) / own.sum()
    apart = (x - mean) * own
    scale = (apart.square().sum(-1, keepdim=True) / own.sum() + eps).rsqrt()
    return apart * scale * weight + (0.0 if bias is None else bias * own)


class _MaskedForward:
    """A module's own forward, with `layer_norm` over the channels that remain."""

    def __init__(self, module: nn.LayerNorm, remaining: Tensor) -> None:
        self.module, self.remaining = module, remaining

    def __call__(self, *args: Any) -> Any:
        """The module's output."""
        with _OverRemaining(self.remaining):
            return type(self.module).forward(self.module, *args)


def mask_layer_norm(norm: nn.LayerNorm, removed: Tensor) -> None:
    """Leave channels, int64, out of mean and variance of a LayerNorm from now on, in place.

    Their outputs are zero. Its parameters and their names stay as they are.
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

    The bins start at 0 in every network and end at its largest scale; without scales there are
    none.
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
