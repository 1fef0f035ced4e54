"""Cost of a network: parameters, non-zero parameters, compression, MACs, bytes, latency."""

import contextlib
import gzip
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.base import timing
from secateur.nn.modes import in_eval_mode
from secateur.sparsity.masks import LAYERS, prunable


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer; counts of parameters include the bias."""

    layer: str
    kind: str
    shape: str
    """Shape of the weight: filters x channels x height x width, or outputs x inputs."""
    params: int
    nonzero: int
    """Parameters that are not pruned; see `nonzero`."""
    sparsity: float
    """Fraction of the parameters that are pruned."""
    filters: int
    filters_alive: int
    """Outputs with at least one non-zero weight."""
    channels: int
    channels_alive: int
    """Inputs with at least one non-zero weight."""
    macs_dense: int
    """Multiply-accumulates for one image, zero weights included."""
    macs: int
    """Multiply-accumulates for one image, zero weights not included."""


@torch.no_grad()
def layer_costs(
    model: nn.Module, example: Tensor, masks: Mapping[str, Tensor] = MappingProxyType({})
) -> list[LayerCost]:
    """Costs of all convolutions and linear layers, in order.

    They include the projections inside a MultiheadAttention; a layer that never runs in eval mode
    has no MACs. `example` is a batch of one image; `masks` are the model's masks by parameter name.
    """
    positions = output_positions(model, example)
    biases = prunable(model, "weights_and_biases")
    modules = dict(model.named_modules())
    costs = []
    for name, weight in prunable(model, "weights").items():
        owner = name.rpartition(".")[0]
        bias = f"{name.removesuffix('weight')}bias"
        own = {name: weight} | ({bias: biases[bias]} if bias in biases else {})
        layer = name.removesuffix(".weight")
        kind = type(modules[owner]).__name__.lower()
        costs.append(_layer_cost(layer, kind, own, positions.get(layer, 0), masks))
    return costs


@torch.no_grad()
def output_positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Number of output positions of each convolution and linear layer for one image.

    Every weight is multiplied once per position. If a layer runs more than once, the positions of
    all calls are summed; a layer that never runs is left out. `example` is a batch of one image;
    the model is left in eval mode.
    """
    return {name: sum(calls) for name, calls in positions_by_call(model, example).items()}


@torch.no_grad()
def positions_by_call(model: nn.Module, example: Tensor) -> dict[str, list[int]]:
    """Like `output_positions`, but for each use of the layer's weight, in order of execution."""
    weights = prunable(model, "weights")
    counter = _PositionCounter(
        {id(weight): name.removesuffix(".weight") for name, weight in reversed(weights.items())}
    )
    with counter, _running(model, counter.running):
        in_eval_mode(model)(example)
    return {
        name.removesuffix(".weight"): counter.found[counter.names[id(weight)]]
        for name, weight in weights.items()
        if counter.names[id(weight)] in counter.found
    }


@contextlib.contextmanager
def _running(model: nn.Module, stack: list[Tensor | None]) -> Iterator[None]:
    """Keep in `stack` the weights of the convolutions and linear layers that are running."""

    def enter(layer: nn.Module, _inputs: Any) -> None:
        stack.append(layer._parameters["weight"])

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for layer in model.modules():
        if isinstance(layer, LAYERS) and layer._parameters.get("weight") is not None:
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _PositionCounter(TorchFunctionMode):
    """Records the positions of all convolutions and linear maps, also of functional calls.

    If a layer computes with another tensor of its weight's shape, such as a standardised weight,
    that counts as its weight.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        """Names by id() of the weight."""
        self.running: list[Tensor | None] = []
        """Weights of the layers that are running, the innermost last."""
        self.found: dict[str, list[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            for key, source in _PROJECTIONS.items():  # (positions, batch, embedding)
                if given.get(key) is not None:
                    self._note(given[key], given[source].numel() // given[source].shape[-1])
        elif func in (functional.linear, functional.conv2d):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._note(weight, out.numel() // len(weight))
        return out

    def _note(self, weight: Tensor, positions: int) -> None:
        if id(weight) not in self.names and self.running:
            own = self.running[-1]
            weight = own if own is not None and own.shape == weight.shape else weight
        if id(weight) in self.names:
            self.found.setdefault(self.names[id(weight)], []).append(positions)


_PROJECTIONS = {
    **{"in_proj_weight": "query", "q_proj_weight": "query", "k_proj_weight": "key"},
    **{"v_proj_weight": "value", "out_proj_weight": "query"},
}
"""Weight of a MultiheadAttention -> the input that has as many positions as its output."""


def _layer_cost(
    name: str,
    kind: str,
    own: Mapping[str, Tensor],
    positions: int,
    masks: Mapping[str, Tensor],
) -> LayerCost:
    """`own` are the weight and, if there is one, the bias, by parameter name."""
    weight, *biases = (tensor.detach() for tensor in own.values())
    alive = weight.flatten(2).any(dim=2) if weight.dim() == 4 else weight != 0
    params = sum(tensor.numel() for tensor in own.values())
    left = int(torch.count_nonzero(weight))
    for bias, shift in zip(list(own)[1:], biases, strict=True):
        left += int(masks[bias].sum()) if bias in masks else shift.numel()
    return LayerCost(
        layer=name,
        kind=kind,
        shape="x".join(map(str, weight.shape)),
        params=params,
        nonzero=left,
        sparsity=1 - left / params,
        filters=weight.shape[0],
        filters_alive=int(alive.any(dim=1).sum()),
        channels=weight.shape[1],
        channels_alive=int(alive.any(dim=0).sum()),
        macs_dense=weight.numel() * positions,
        macs=int(torch.count_nonzero(weight)) * positions,
    )


def removed(dense: LayerCost) -> LayerCost:
    """The cost of a layer that has been removed with its residual branch: nothing is left of it."""
    return LayerCost(
        layer=dense.layer,
        kind=dense.kind,
        shape="removed",
        params=0,
        nonzero=0,
        sparsity=0.0,
        filters=0,
        filters_alive=0,
        channels=0,
        channels_alive=0,
        macs_dense=0,
        macs=0,
    )


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates for one image in kernels that do not skip zeros; see `layer_costs`."""
    return sum(layer.macs_dense for layer in layer_costs(model, example))


def parameters(model: nn.Module) -> int:
    """Number of parameters, including scales and shifts of norms; buffers are not counted."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def nonzero(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Number of parameters that are not pruned, including scales and shifts of norms.

    A weight of a convolution or linear layer is pruned if it is zero. Any other parameter is pruned
    only if `masks` (by parameter name, True where the entry is kept) hold it at zero: biases and
    shifts of norms are initialised to zero, so for them zero is an ordinary value.
    """
    weights = set(map(id, prunable(model, "weights").values()))
    count = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in weights:
            count += int(torch.count_nonzero(parameter))
        else:
            count += int(masks[name].sum()) if name in masks else parameter.numel()
    return count


def compression(dense: nn.Module, model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Parameters of the dense network, divided by the parameters of `model` that are not pruned.

    See `nonzero`. The dense network itself has a compression of 1.
    """
    return parameters(dense) / nonzero(model, masks)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters and buffers: uncompressed, and compressed by gzip.

    A tensor that several modules share counts once.
    """
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    raw = b"".join(t.detach().cpu().numpy().tobytes() for t in tensors.values())
    return len(raw), len(gzip.compress(raw, compresslevel=6, mtime=0))


@torch.inference_mode()
def latency(models: Mapping[str, nn.Module], batch: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each of `repeats` forward passes of `batch`, by model name.

    The models take turns; see `timing.take_turns`.
    """

    def forward(model: nn.Module) -> None:
        model(batch)
        _synchronize(batch.device)

    _synchronize(batch.device)
    passes = {name: partial(forward, in_eval_mode(model)) for name, model in models.items()}
    return timing.take_turns(passes, repeats)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
