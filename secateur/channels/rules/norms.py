"""Operations that normalise or scale: they have an entry for each channel, or mix channels."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.channels.ids import ChannelIds, NamedTensor
from secateur.channels.rules.call import Call


def batch_norm(
    call: Call,
    x: ChannelIds,
    running_mean: NamedTensor | None = None,
    running_var: NamedTensor | None = None,
    weight: NamedTensor | None = None,
    bias: NamedTensor | None = None,
    *_: Any,
    **__: Any,
) -> ChannelIds:
    """Unchanged; every tensor of the normalisation has one entry for each channel."""
    ids = x.axis_ids(1)
    call.visitor.norm([t for t in (weight, bias) if t], "norm", ids)
    call.visitor.norm([t for t in (running_mean, running_var) if t], "statistic", ids)
    return x


def batch_norm_module(call: Call, module: nn.Module, x: ChannelIds) -> ChannelIds:
    """See batch_norm; instance normalisation as well."""
    keys = ("running_mean", "running_var", "weight", "bias")
    tensors = [call.tensor(module, key) for key in keys]
    if not any(tensors):
        call.counted(module, x, "num_features")
    return batch_norm(call, x, *tensors)


def layer_norm(
    call: Call,
    x: ChannelIds,
    normalized_shape: Sequence[int],
    weight: NamedTensor | None = None,
    bias: NamedTensor | None = None,
    eps: Any = None,
) -> ChannelIds:
    """Unchanged; channels that are averaged over are normalised together.

    They are locked unless a module has an entry for each, so that its size can follow.
    """
    shape = normalized_shape
    module = call.modules.get(weight.name.removesuffix(".weight")) if weight else None
    if any(x.varies(len(x.shape) - 1 - k) for k in range(len(shape))):
        if len(shape) == 1 and isinstance(module, nn.LayerNorm) and call.inside(nn.LayerNorm):
            call.visitor.normalise(x.axis_ids(-1))
        else:
            call.lock(x, "normalised together by a LayerNorm whose size is hard-coded")
    tensors = [t for t in (weight, bias) if t]
    if len(shape) == 1:
        call.visitor.norm(tensors, "norm", x.axis_ids(-1))
    for named in tensors if len(shape) > 1 else ():
        call.visitor.parameter(named)  # reports its use; locks are handled above
    return x


def layer_norm_module(call: Call, module: nn.LayerNorm, x: ChannelIds) -> ChannelIds:
    """See layer_norm."""
    tensors = (call.tensor(module, key) for key in ("weight", "bias"))
    return layer_norm(call, x, module.normalized_shape, *tensors)


def rms_norm(
    call: Call,
    x: ChannelIds,
    normalized_shape: Sequence[int],
    weight: NamedTensor | None = None,
    eps: Any = None,
) -> ChannelIds:
    """Unchanged; channels that are averaged over are locked."""
    if any(x.varies(len(x.shape) - 1 - k) for k in range(len(normalized_shape))):
        call.lock(x, "normalised together by an RMSNorm")
    if weight and len(normalized_shape) == 1:
        call.visitor.norm([weight], "norm", x.axis_ids(-1))
    elif weight:
        call.visitor.parameter(weight)  # reports its use
    return x


def rms_norm_module(call: Call, module: nn.RMSNorm, x: ChannelIds) -> ChannelIds:
    """See rms_norm."""
    return rms_norm(call, x, module.normalized_shape, call.tensor(module, "weight"))


def local_response_norm(call: Call, x: ChannelIds, *_: Any, **__: Any) -> ChannelIds:
    """Unchanged; channels are locked."""
    call.lock(x, "normalised together with the channels beside them")
    return x


def local_response_norm_module(
    call: Call, module: nn.LocalResponseNorm, x: ChannelIds
) -> ChannelIds:
    """See local_response_norm."""
    return local_response_norm(call, x)


def normalize(
    call: Call, x: ChannelIds, p: float = 2.0, dim: Any = 1, *_: Any, **__: Any
) -> ChannelIds:
    """Unchanged; channels are locked if the norm is that over them."""
    if any(x.varies(axis) for axis in ([dim] if isinstance(dim, int) else dim)):
        call.lock(x, "divided by their norm over all channels")
    return x


def group_norm(
    call: Call,
    x: ChannelIds,
    num_groups: int,
    weight: NamedTensor | None = None,
    bias: NamedTensor | None = None,
    eps: Any = None,
) -> ChannelIds:
    """Unchanged; channels are locked unless a module normalises each channel separately."""
    name = weight.name.removesuffix(".weight") if weight else ""
    if num_groups != x.shape[1]:
        call.lock(x, f"normalised together with other channels by {name or 'GroupNorm'}")
    elif not (isinstance(call.modules.get(name), nn.GroupNorm) and call.inside(nn.GroupNorm)):
        call.lock(x, "normalised in a hard-coded number of groups")
    call.visitor.norm([t for t in (weight, bias) if t], "norm", x.axis_ids(1))
    return x


def group_norm_module(call: Call, module: nn.GroupNorm, x: ChannelIds) -> ChannelIds:
    """See group_norm."""
    if module.weight is None and module.num_groups == module.num_channels:
        call.counted(module, x, "num_groups", "num_channels")
        return x
    tensors = (call.tensor(module, key) for key in ("weight", "bias"))
    return group_norm(call, x, module.num_groups, *tensors)


def prelu(call: Call, x: ChannelIds, weight: NamedTensor) -> ChannelIds:
    """Unchanged; a weight with several entries has one for each channel."""
    if weight.tensor.numel() > 1:
        call.visitor.norm([weight], "scale", x.axis_ids(1))
    return x


def prelu_module(call: Call, module: nn.PReLU, x: ChannelIds) -> ChannelIds:
    """See prelu."""
    return prelu(call, x, call.weight(module))


def softmax(call: Call, x: ChannelIds, dim: int | None = None, *_: Any, **__: Any) -> ChannelIds:
    """Unchanged; channels are locked if the sum is over them."""
    if dim is None or x.varies(dim):
        call.lock(x, "weighed against other channels (softmax)")
    return x


def softmax_module(call: Call, module: nn.Softmax, x: ChannelIds) -> ChannelIds:
    """See softmax."""
    return softmax(call, x, module.dim)
