"""Fold constant inputs of layers into biases or running means; then channels can be removed.

An input that is the same for every image contributes a constant to each output, provided that the
contribution is the same at every position; at a border padded with zeros it is not. Such a constant
is added to the bias of the layer, or subtracted from the running mean of the batch normalisation
that is the only reader of the layer.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.channels.graph import ChannelGraph
from secateur.channels.groups import by_channel
from secateur.pruning.constants import LayerInput
from secateur.sparsity.masks import BatchNorm, Masks


@dataclass(frozen=True)
class ConstantInputs:
    """Inputs of one layer that are to be folded."""

    layer: str
    values: Tensor
    """Input of the layer for one image, NaN where it depends on the image."""
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

    def foldable(self, name: str, calls: list[LayerInput], constant: Tensor) -> Tensor:
        """The constant inputs of a layer that can be folded, bool, (inputs,).

        `calls` has its input at each call.
        """
        if len(calls) > 1 or (self.layers[name].bias is None and name not in self.running_means):
            return torch.zeros_like(constant)
        foldable = constant.clone()
        if (values := calls[0].values) is not None:
            for channel in foldable.nonzero().flatten().tolist():
                foldable[channel] = self._adds_evenly(name, values, channel)
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

    def _adds_evenly(self, name: str, values: Tensor, channel: int) -> bool:
        """Whether a constant input adds the same to an output at every position."""
        module = self.modules.get(name)
        x = by_channel(values, -1 if isinstance(module, nn.Linear) else 1)[channel]
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
        shape[-1 if isinstance(module, nn.Linear) else 1] = -1
        only = torch.where(inputs.channels.to(values.device).reshape(shape), values, 0.0)
        if isinstance(module, nn.Linear):
            return nn.functional.linear(only, module.weight).reshape(-1, module.weight.shape[0])[0]
        added = module._conv_forward(only, module.weight, None)[0]
        return added[:, added.shape[1] // 2, added.shape[2] // 2]


def _contribution_of_one(conv: nn.Conv2d, only: Tensor, channel: int) -> Tensor:
    """Contribution of one input of a convolution to all outputs that read it, by position."""
    group, column = divmod(channel, conv.weight.shape[1])
    outputs = conv.weight.shape[0] // conv.groups
    weight = conv.weight[group * outputs : (group + 1) * outputs, column : column + 1]
    single = copy.copy(conv)
    single.groups = 1
    return single._conv_forward(only[:, channel : channel + 1], weight, None)


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
