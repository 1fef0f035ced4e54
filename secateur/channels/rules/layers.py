"""Layers with weights, and ChannelSelect: they produce channels."""

from typing import Any

from torch import nn

from secateur.base.errors import PruningError
from secateur.channels.ids import ChannelIds, NamedTensor
from secateur.channels.rules.call import Call
from secateur.nn.layers import ChannelSelect


def conv2d(
    call: Call, x: ChannelIds, weight: NamedTensor, bias: NamedTensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> ChannelIds:  # fmt: skip
    """New ids along axis 1, one for each filter."""
    if len(x.shape) != 4:
        raise PruningError(
            f"a convolution of a tensor with {len(x.shape)} axes; images (N, C, H, W) are needed: "
            "is the batch axis missing?"
        )
    name = weight.name.removesuffix(".weight")
    if groups > 1 and not (name in call.within and isinstance(call.modules[name], nn.Conv2d)):
        call.lock(x, f"read by {name}, whose number of groups is hard-coded")
    outputs = call.visitor.layer(name, weight, bias, x.axis_ids(1), groups)
    kernel = weight.tensor.shape[2:]
    sides = [
        _side(size, kernel[k], _each(stride, k), _each(padding, k), _each(dilation, k))
        for k, size in enumerate(x.shape[2:])
    ]
    return ChannelIds.along(1, outputs, (x.shape[0], len(outputs), *sides))


def conv2d_module(call: Call, module: nn.Conv2d, x: ChannelIds) -> ChannelIds:
    """See conv2d."""
    sizes = (module.stride, module.padding, module.dilation, module.groups)
    return conv2d(call, x, call.weight(module), call.tensor(module, "bias"), *sizes)


def linear(
    call: Call, x: ChannelIds, weight: NamedTensor, bias: NamedTensor | None = None
) -> ChannelIds:
    """New ids along the last axis, one for each output."""
    name = weight.name.removesuffix(".weight")
    outputs = call.visitor.layer(name, weight, bias, x.axis_ids(-1), 1)
    return ChannelIds.along(len(x.shape) - 1, outputs, (*x.shape[:-1], len(outputs)))


def linear_module(call: Call, module: nn.Linear, x: ChannelIds) -> ChannelIds:
    """See linear."""
    return linear(call, x, call.weight(module), call.tensor(module, "bias"))


def channel_select(call: Call, module: ChannelSelect, x: ChannelIds) -> ChannelIds:
    """New ids along axis 1, one for each position of the index."""
    index = call.tensor(module, "index")
    assert index is not None
    ids = call.visitor.select(index, x.axis_ids(1), owns_channels=True)
    return ChannelIds.along(1, ids, (x.shape[0], len(ids), *x.shape[2:]))


def _each(value: Any, axis: int) -> Any:
    """The value for one axis of an option that is given once, or for every axis."""
    return value[axis] if isinstance(value, tuple | list) else value


def _side(size: int, kernel: int, stride: int, padding: Any, dilation: int) -> int:
    """Outputs of a convolution along one axis."""
    reach = dilation * (kernel - 1)
    border = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * padding
    if size + border <= reach:
        raise PruningError(f"{size} pixels are too few for a kernel of {kernel}")
    return (size + border - reach - 1) // stride + 1
