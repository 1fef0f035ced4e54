"""Penalties in closed form: a formula for one tensor, summed over all covered tensors.

A penalty is called once a training step and returns a scalar that is added to the loss, its
strength `decay` included. It covers the weights of convolutions and linear layers (and optionally
their biases). Values of tensors are summed: no average, no square root of the group size.

`ClosedFormPenalty` has a function for the value and one for the gradient. `NormPenalty` is for
formulas of L1 and L2 norms only, and computes all tensors at once. Formulas of the norms of
channels and filters use `channel_norms`, `filter_norms` and `scale_groups`; `CoupledPenalty` has
them for channels with all that is coupled to them.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.base.settings import Strict
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.channels.groups import by_channel
from secateur.sparsity import masks

Value = Callable[[Tensor], Tensor]
"""A tensor -> its penalty, a scalar."""

Gradient = Callable[[Tensor], Tensor]
"""A tensor -> the gradient of its penalty, of the tensor's shape, zero where the tensor is zero."""


class GroupSettings(Strict):
    """Settings of a penalty on channels and filters."""

    biases: bool = False
    """Cover biases too, each entry a group of its own."""
    grouping: Literal["layer", "position", "coupled"] = "layer"
    """layer: filters and input channels of each layer. position: the same at each position of the
    kernel by itself, as in the source's scripts for ImageNet. coupled: channels that can be
    removed, each with its filters, its inputs and its scales in all layers."""

    @model_validator(mode="after")
    def _coupled_without_biases(self) -> Self:
        if self.biases and self.grouping == "coupled":
            raise ValueError("biases: are not covered with grouping: coupled")
        return self


class ClosedFormPenalty:
    """A penalty without state: `decay` times the sum of one formula over the covered tensors."""

    finished = False

    def __init__(
        self,
        model: nn.Module,
        value: Value,
        gradient: Gradient | None,
        biases: bool,
        decay: float,
        covered: Sequence[Tensor] | None = None,
    ) -> None:
        """Without `gradient`, autograd differentiates `value`, which is slower.

        `covered` are the tensors; by default the weights of all layers, and with `biases` their
        biases.
        """
        scope: masks.Scope = "weights_and_biases" if biases else "weights"
        self.covered = list(covered or masks.prunable(model, scope).values())
        self.value, self.gradient, self.decay = value, gradient, decay

    def __call__(self, step: int) -> Tensor:
        """`decay` times the sum of the formula over all tensors."""
        return self.decay * self.total()

    def total(self) -> Tensor:
        """Sum of the formula over all tensors."""
        if self.gradient is None:
            return torch.stack([self.value(tensor) for tensor in self.covered]).sum()
        total: Tensor = _Closed.apply(self.value, self.gradient, *self.covered)
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


class _Closed(torch.autograd.Function):
    """Sum of a formula over tensors, with its gradient in closed form: a third of the work."""

    @staticmethod
    def forward(ctx: Any, value: Value, gradient: Gradient, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient = gradient
        return torch.stack([value(tensor) for tensor in tensors]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(ctx.gradient(t).mul_(upstream) for t in ctx.saved_tensors)


ByNorms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""L1 and L2 norms -> the penalty, and a and b of its gradient a * sign(w) + b * w.

Works on scalars and, elementwise, on vectors with one norm for each tensor."""


def lasso(l1: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum |w|; gradient sign(w), and 0 at 0."""
    return l1, torch.ones_like(l1), torch.zeros_like(l1)


class NormPenalty(ClosedFormPenalty):
    """A formula of the L1 and L2 norms of a tensor, computed for all tensors at once."""

    def __init__(
        self,
        model: nn.Module,
        by_norms: ByNorms,
        biases: bool,
        decay: float,
        covered: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(model, lambda w: by_norms(*l1_l2(w))[0], None, biases, decay, covered)
        self.by_norms = by_norms

    def total(self) -> Tensor:
        """Sum of the formula over all tensors."""
        return _ByNorms.apply(self.by_norms, *self.covered)


class _ByNorms(torch.autograd.Function):
    """Sum of a norm formula over tensors, with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, by_norms: ByNorms, *tensors: Tensor) -> Tensor:
        norms = [l1_l2(tensor) for tensor in tensors]
        values, a, b = by_norms(
            torch.stack([l1 for l1, _ in norms]), torch.stack([l2 for _, l2 in norms])
        )
        ctx.save_for_backward(a, b, *tensors)
        return values.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        a, b, *tensors = ctx.saved_tensors
        pairs = zip(tensors, (a * upstream).unbind(), (b * upstream).unbind(), strict=True)
        return None, *(t.sign().mul_(x).addcmul_(t, y) for t, x, y in pairs)


def norm_gradient(by_norms: ByNorms, tensor: Tensor) -> Tensor:
    """Gradient of a norm formula of one tensor."""
    _, a, b = by_norms(*l1_l2(tensor))
    return tensor.sign().mul_(a).addcmul_(tensor, b)


def l1_l2(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of absolute values and Euclidean norm, both scalars."""
    return tensor.abs().sum(), torch.linalg.vector_norm(tensor)  # vector_norm(., 1) is slower


def channel_norms(weight: Tensor, by_position: bool = False) -> Tensor:
    """L2 norm of each input channel: (filters, channels, ...) or (outputs, inputs) -> (channels,).

    With `by_position` of each channel at each position of the kernel, (channels * positions,). Its
    derivative at zero is finite. Each entry of a bias vector is a channel.
    """
    if weight.dim() == 1:
        return weight.abs()
    axes = [0] if by_position else [0, *range(2, weight.dim())]
    return _root(weight.square().sum(axes)).flatten()


def filter_norms(weight: Tensor, by_position: bool = False) -> Tensor:
    """L2 norm of each filter: (filters, channels, ...) or (outputs, inputs) -> (filters,).

    With `by_position` of each filter at each position of the kernel, (filters * positions,). Its
    derivative at zero is finite. A bias vector has no filters: the result is empty.
    """
    if weight.dim() == 1:
        return weight[:0]
    axes = [1] if by_position else [*range(1, weight.dim())]
    return _root(weight.square().sum(axes)).flatten()


def scale_groups(
    weight: Tensor, channels: Tensor, filters: Tensor, by_position: bool = False
) -> Tensor:
    """`weight` times a factor for each channel plus `weight` times one for each filter.

    The factors have the shapes of `channel_norms` and `filter_norms`.
    """
    if weight.dim() == 1:
        return weight * channels
    kernel = weight.shape[2:] if by_position else [1] * (weight.dim() - 2)
    scaled = weight * channels.view(1, -1, *kernel)
    return scaled.addcmul_(weight, filters.view(-1, 1, *kernel))


class CoupledWeights:
    """The channels of a network that can be removed, and all weights that are coupled to each.

    Channels are numbered from 0 over all channel groups, in their order.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int] | None) -> None:
        """`shape` is that of one image. Raises PruningError if the network cannot be traced."""
        if shape is None:
            raise ArgumentError("coupled groups", "the shape of an image is needed to find them")
        device = next(model.parameters()).device
        example = torch.zeros(1, *shape, device=device)
        self.graph: ChannelGraph = build_channel_graph(copy.deepcopy(model).eval(), example)
        free = [group for group in self.graph.groups if group.locked is None]
        sizes = torch.tensor([group.size for group in free])
        self.owner = torch.arange(len(free)).repeat_interleave(sizes)
        """int64, (channels,): number of the group that a channel is of."""
        self.number = torch.full((len(self.graph.canonical),), -1)
        """By canonical id: number of the channel, -1 if it cannot be removed."""
        if free:
            self.number[torch.cat([group.ids for group in free])] = torch.arange(int(sizes.sum()))
        axes: dict[tuple[str, int, int], Tensor] = {}
        for group in free:
            for member in group.weights:
                size = model.get_parameter(member.tensor).shape[member.axis] * member.groups
                key = (member.tensor, member.axis, member.groups)
                own = axes.setdefault(key, torch.full((size,), len(self.owner)))
                own[member.index] = self.number[group.ids].unsqueeze(1).expand(member.index.shape)
        self.axes = [(key, own.to(device)) for key, own in axes.items()]
        """Weight, axis and groups of a convolution, and the channel of each entry along the axis;
        the number of channels where it is none of them."""
        self.weights: dict[str, Tensor] = {
            name: model.get_parameter(name) for name in dict.fromkeys(key[0] for key in axes)
        }

    def sums(self, entries: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over all weights of a channel of a function of every weight: (channels,)."""
        values = {name: entries(weight) for name, weight in self.weights.items()}
        first = next(iter(values.values()))
        total = first.new_zeros(len(self.owner) + 1)
        for place, ((name, axis, groups), own) in enumerate(self.axes):
            if own.device != total.device:  # the network was moved
                own = own.to(total.device)
                self.axes[place] = (name, axis, groups), own
            total = total.index_add(0, own, by_channel(values[name], axis, groups).sum(1))
        return total[:-1]

    def spread(self, factors: Tensor) -> dict[str, Tensor]:
        """Factors of the channels, (channels,) -> for each weight the sum of those of the channels
        that it is of, broadcastable to it."""
        padded = torch.cat((factors, factors.new_zeros(1)))
        found: dict[str, Tensor] = {}
        for (name, axis, groups), own in self.axes:
            weight = self.weights[name]
            along = padded[own.to(padded.device)]
            if groups > 1:
                rows = along.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
                along = rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            else:
                along = along.view([-1 if k == axis else 1 for k in range(weight.dim())])
            found[name] = found[name] + along if name in found else along
        return found


class CoupledPenalty:
    """A penalty without state on channels with all that is coupled to them, summed over groups."""

    finished = False

    def __init__(
        self, weights: CoupledWeights, formula: Callable[[Tensor, Tensor], Tensor], decay: float
    ) -> None:
        """`formula` gives the penalty of each group, (groups,), from the sum of the norms of its
        channels and the norm of all of them together, both (groups,)."""
        self.coupled, self.formula, self.decay = weights, formula, decay
        if not len(weights.owner):
            raise ArgumentError("grouping", "no channel of this network can be removed", "coupled")

    def __call__(self, step: int) -> Tensor:
        """`decay` times the sum over all groups."""
        squares = self.coupled.sums(torch.square)
        owner = self.coupled.owner = self.coupled.owner.to(squares.device)
        zeros = squares.new_zeros(int(owner[-1]) + 1)
        norms = zeros.index_add(0, owner, _root(squares))
        return self.decay * self.formula(norms, _root(zeros.index_add(0, owner, squares))).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


def group_penalty(
    settings: GroupSettings,
    model: nn.Module,
    decay: float,
    shape: Sequence[int] | None,
    value: Callable[[Tensor, bool], Tensor],
    gradient: Callable[[Tensor, bool], Tensor],
    coupled: Callable[[Tensor, Tensor], Tensor],
) -> ClosedFormPenalty | CoupledPenalty:
    """The penalty with the grouping of the settings.

    `value` and `gradient` are of one tensor and take `by_position`; `coupled` is the formula of a
    CoupledPenalty. `shape` is that of one image, which grouping coupled needs.
    """
    if settings.grouping == "coupled":
        return CoupledPenalty(CoupledWeights(model, shape), coupled, decay)
    by_position = settings.grouping == "position"
    return ClosedFormPenalty(
        model,
        lambda w: value(w, by_position),
        lambda w: gradient(w, by_position),
        settings.biases,
        decay,
    )


def _root(squares: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero instead of infinite."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 where the value counts as zero."""
    return torch.where(values > _floor(values), 1 / values, 0.0)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where `below` counts as zero."""
    floor = _floor(below)
    return torch.where(below > floor, above / below.clamp_min(floor), 0.0)


def _floor(values: Tensor) -> float:
    """A norm below this counts as zero: its square is lost, its inverse squared overflows."""
    return float(torch.finfo(values.dtype).tiny ** 0.4)  # 7e-16 in float32
