"""Cost of a network: parameters, non-zeros, MACs, bytes, latency."""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.base import timing
from secateur.sparsity.masks import layers


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer, biases included in the counts of parameters."""

    layer: str
    kind: str
    shape: str
    """Shape of the weight: filters x channels x height x width, or outputs x inputs."""
    params: int
    nonzero: int
    sparsity: float
    """Fraction of the parameters that are zero."""
    filters: int
    filters_alive: int
    """Outputs that have a non-zero weight."""
    channels: int
    channels_alive: int
    """Inputs that a non-zero weight reads."""
    macs_dense: int
    """Multiply-accumulates for one image, zeros included."""
    macs: int
    """Multiply-accumulates for one image without those of zero weights."""


@torch.no_grad()
def layer_costs(model: nn.Module, example: Tensor) -> list[LayerCost]:
    """All convolutions and linear layers in order; `example` is a batch of one image."""
    positions = output_positions(model, example)
    return [_layer_cost(name, layer, positions[name]) for name, layer in layers(model).items()]


@torch.no_grad()
def output_positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Number of output positions of each convolution and linear layer for one image.

    Every weight is multiplied once per position. `example` is a batch of one image; the model is
    left in eval mode.
    """
    found: dict[str, int] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _m, _i, out, n=name: found.update({n: out[0].numel() // out.shape[1]})
        )
        for name, layer in layers(model).items()
    ]
    try:
        model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _layer_cost(name: str, layer: nn.Conv2d | nn.Linear, positions: int) -> LayerCost:
    weight = layer.weight.detach()
    alive = weight.flatten(2).any(dim=2) if weight.dim() == 4 else weight != 0
    params = sum(p.numel() for p in layer.parameters())
    nonzero = sum(int(torch.count_nonzero(p)) for p in layer.parameters())
    return LayerCost(
        layer=name,
        kind=type(layer).__name__.lower(),
        shape="x".join(map(str, weight.shape)),
        params=params,
        nonzero=nonzero,
        sparsity=1 - nonzero / params,
        filters=weight.shape[0],
        filters_alive=int(alive.any(dim=1).sum()),
        channels=weight.shape[1],
        channels_alive=int(alive.any(dim=0).sum()),
        macs_dense=weight.numel() * positions,
        macs=int(torch.count_nonzero(weight)) * positions,
    )


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates for one image in kernels that do not skip zeros; see `layer_costs`."""
    return sum(layer.macs_dense for layer in layer_costs(model, example))


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters and buffers: uncompressed, and compressed by gzip."""
    raw = b"".join(t.detach().cpu().numpy().tobytes() for t in model.state_dict().values())
    return len(raw), len(gzip.compress(raw, compresslevel=6, mtime=0))


@torch.inference_mode()
def latency(models: Mapping[str, nn.Module], batch: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of `repeats` forward passes of `batch`, by model; see `timing.take_turns`."""

    def forward(model: nn.Module) -> None:
        model(batch)
        _synchronize(batch.device)

    _synchronize(batch.device)
    passes = {name: partial(forward, model.eval()) for name, model in models.items()}
    return timing.take_turns(passes, repeats)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
