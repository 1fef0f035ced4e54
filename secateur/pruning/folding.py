"""Fold constant inputs of layers into biases or running means; then channels can be removed.

An input that is the same for every image contributes a constant to each output, provided that the
contribution is the same at every position; at a border padded with zeros it is not. Such a constant
is added to the bias of the layer, or subtracted from the running mean of the batch normalisation
that is the only reader of the layer. If the network takes images of several sizes, the contribution
must also be the same for all of them; a mean over a padded border, for example, is not.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.channels import operators
from secateur.channels.graph import ChannelGraph
from secateur.channels.groups import by_channel
from secateur.pruning.constants import LayerInput
from secateur.sparsity.masks import BatchNorm, Masks


@dataclass(frozen=True)
class ConstantInputs:
    """Inputs of one layer that are to be folded."""

    layer: str
    values: Tensor
    """Input of the layer for two images, NaN where it depends on the image."""
    channels: Tensor
    """bool, (inputs,): the inputs to be folded."""


@dataclass(frozen=True)
class Folded:
    """Tensors that include the contributions of constant inputs."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Bias or running mean, by name -> its new value."""
    shift: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> contribution that its outputs lack because it was folded after it, (outputs,)."""


class Folding:
    """Finds the constant inputs that can be folded, and folds them."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        """`graph` is the model's."""
        self.layers = graph.layers
        self.modules = dict(model.named_modules())
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.running_means = _running_means(graph)
        self._as_modules = _run_as_modules(graph, self.modules)

    def foldable(self, name: str, sizes: list[list[LayerInput]], constant: Tensor) -> Tensor:
        """The constant inputs of a layer that can be folded, bool, (inputs,).

        `sizes` has its input at each call, for images of one or two sizes.
        """
        values = [call.values for calls in sizes for call in calls]
        reader = self.layers[name].bias is not None or name in self.running_means
        reader &= name in self._as_modules
        here, elsewhere = values[0], values[-1]
        if len(values) > len(sizes) or not reader or here is None or elsewhere is None:
            return torch.zeros_like(constant)
        foldable = constant.clone()
        if len(sizes) > 1:
            axis = self._axis(name)
            foldable &= _equal(by_channel(here, axis), by_channel(elsewhere, axis))
            if isinstance(module := self.modules.get(name), nn.Conv2d):
                here = _with_every_border(module, here)
        for channel in foldable.nonzero().flatten().tolist():
            foldable[channel] = self._adds_evenly(name, here, channel)
        return foldable

    @torch.no_grad()
    def fold(self, constants: Iterable[ConstantInputs], masks: Masks) -> Folded:
        """New biases and running means; the model's tensors are only read.

        A masked bias that is no longer zero is removed from its mask, in place.
        """
        folded = Folded()
        for inputs in constants:
            added = self._contribution(inputs)
            bias = self.layers[inputs.layer].bias
            if bias is None:
                mean = self.running_means[inputs.layer]
                folded.tensors[mean] = folded.tensors.get(mean, self.tensors[mean]) - added
                folded.shift[inputs.layer] = added
                continue
            folded.tensors[bias] = folded.tensors.get(bias, self.tensors[bias]) + added
            if (mask := masks.get(bias)) is not None:
                mask |= (added != 0).to(mask.device)
        return folded

    def _axis(self, name: str) -> int:
        """The axis of the channels in the input of a layer."""
        return -1 if isinstance(self.modules.get(name), nn.Linear) else 1

    def _adds_evenly(self, name: str, values: Tensor, channel: int) -> bool:
        """Whether a constant input adds the same to an output at every position."""
        module = self.modules.get(name)
        x = by_channel(values, self._axis(name))[channel]
        uniform = bool((x == x[0]).all())
        if not isinstance(module, nn.Conv2d):
            return uniform and isinstance(module, nn.Linear)
        if uniform and (_unpadded(module) or module.padding_mode != "zeros"):
            return True
        only = torch.zeros_like(values)
        only[:, channel] = values[:, channel]
        added = _contribution_of_one(module, only, channel).flatten(2)[0]
        tolerance = 64 * torch.finfo(added.dtype).eps * added.abs().max()
        return bool((added - added[:, :1]).abs().max() <= tolerance)

    def _contribution(self, inputs: ConstantInputs) -> Tensor:
        """The contribution of constant inputs to each output of their layer, (outputs,)."""
        module, values = self.modules[inputs.layer], inputs.values
        assert isinstance(module, nn.Conv2d | nn.Linear)
        shape = [1] * values.dim()
        shape[self._axis(inputs.layer)] = -1
        only = torch.where(inputs.channels.to(values.device).reshape(shape), values, 0.0)
        if isinstance(module, nn.Linear):
            return nn.functional.linear(only, module.weight).reshape(-1, module.weight.shape[0])[0]
        added = module._conv_forward(only, module.weight, None)[0]
        return added[:, added.shape[1] // 2, added.shape[2] // 2]


def _equal(here: Tensor, elsewhere: Tensor) -> Tensor:
    """Channels with one value at all positions of two inputs, (channels, positions); bool."""
    x, y = here[:, :1], elsewhere[:, :1]
    tolerance = 64 * torch.finfo(here.dtype).eps * here.nan_to_num().abs().max()
    uniform = (here == x).all(dim=1) & (elsewhere == y).all(dim=1)
    return uniform & ((x - y).abs() <= tolerance).flatten()


def _with_every_border(conv: nn.Conv2d, values: Tensor) -> Tensor:
    """An input with the first value of each channel, whose padding is read at all four borders.

    At a stride, the padding at the end of an axis is not read at all sizes.
    """
    pads = conv._reversed_padding_repeated_twice[::-1]
    sides = []
    for axis, stride in enumerate(conv.stride):
        extent = 1 + conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        pad = sum(pads[2 * axis : 2 * axis + 2])
        sides.append(extent + stride * (extent + pad) - pad)  # a stride from border to border
    return values[:1, :, :1, :1].expand(-1, -1, *sides)


def _contribution_of_one(conv: nn.Conv2d, only: Tensor, channel: int) -> Tensor:
    """Contribution of one input of a convolution to all outputs that read it, by position."""
    group, column = divmod(channel, conv.weight.shape[1])
    outputs = conv.weight.shape[0] // conv.groups
    weight = conv.weight[group * outputs : (group + 1) * outputs, column : column + 1]
    single = copy.copy(conv)
    single.groups = 1
    return single._conv_forward(only[:, channel : channel + 1], weight, None)


_OPTIONS = ("stride", "padding", "dilation", "groups")


def _run_as_modules(graph: ChannelGraph, modules: Mapping[str, nn.Module]) -> set[str]:
    """Convolutions and linear layers that compute what their modules do.

    Code that passes the weight of a module to a function may pass other options than the module's.
    """
    found = {n for n, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    for node in graph.fx_graph.nodes:
        if node.op != "call_function" or not operators.of_node(node, {}).weighted:
            continue
        weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        name = str(weight.target).removesuffix(".weight")
        if isinstance(module := modules.get(name), nn.Conv2d):
            given = {**dict(zip(_OPTIONS, node.args[3:], strict=False)), **node.kwargs}
            same = all(
                _pair(given.get(k, k != "padding")) == _pair(getattr(module, k)) for k in _OPTIONS
            )
            if not same or module.padding_mode != "zeros":
                found.discard(name)
    return found


def _pair(option: Any) -> Any:
    """An option of a convolution for both axes; `groups`, and padding that is a name, too."""
    return tuple(option) if isinstance(option, list | tuple) else (option, option)


def _running_means(graph: ChannelGraph) -> dict[str, str]:
    """Layer -> running mean of the batch normalisation that is its only reader; both run once."""
    modules = dict(graph.model.named_modules())
    found: dict[str, str] = {}
    nodes = [n for n in graph.fx_graph.nodes if n.op == "call_module"]
    calls = [str(n.target) for n in nodes]
    for node in nodes:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module":
            continue
        name, norm = str(node.target), str(users[0].target)
        module = modules[norm]
        tracked = isinstance(module, BatchNorm) and module.track_running_stats
        if tracked and calls.count(name) == calls.count(norm) == 1:
            found[name] = f"{norm}.running_mean"
    return found


def _unpadded(conv: nn.Conv2d) -> bool:
    padding = (1,) if isinstance(conv.padding, str) else tuple(conv.padding)
    return conv.padding == "valid" or not any(padding)
