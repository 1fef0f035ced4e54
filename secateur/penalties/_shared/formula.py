"""Penalties in closed form: a formula for one tensor, summed over all covered tensors.

A penalty is called once per training step and returns a scalar that is added to the loss, already
multiplied by its strength `decay`. It covers the weights of convolutions and linear layers (and
optionally their biases). The values of the tensors are summed, without averaging and without a
factor for the group size.

`ClosedFormPenalty` has a function for the value and one for the gradient. `NormPenalty` is for
formulas of only L1 and L2 norms, and computes all tensors at once. Formulas of the norms of
channels and filters use `channel_norms`, `filter_norms` and `scale_groups`; formulas of channels
with everything that is coupled to them are in `coupled`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from secateur.base.sections import Strict
from secateur.sparsity import masks

Value = Callable[[Tensor], Tensor]
"""A tensor -> its penalty, a scalar."""

Gradient = Callable[[Tensor], Tensor]
"""A tensor -> the gradient of its penalty, of the same shape, zero where the tensor is zero."""


class GroupSettings(Strict):
    """Settings of a penalty on channels and filters."""

    biases: bool = False
    """Cover biases too, each entry a group of its own."""
    grouping: Literal["layer", "position", "group"] = "layer"
    """layer: filters and input channels of each layer; each group of a convolution has its own
    input channels. position: as layer, but separately at each position of the kernel, as in the
    source's scripts for ImageNet. group: channels that can be removed, each with its filters, its
    inputs and its scales in all layers."""

    @model_validator(mode="after")
    def _channel_groups_without_biases(self) -> Self:
        if self.biases and self.grouping == "group":
            raise ValueError("biases: are not covered with grouping: group")
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
        count = len(self.covered)
        values, gradients = [self.value] * count, [self.gradient] * count
        total: Tensor = _Closed.apply(values, gradients, *self.covered)
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


class GroupPenalty(ClosedFormPenalty):
    """A formula of channels and filters; each group of a convolution has its own channels."""

    def __init__(
        self,
        model: nn.Module,
        value: Callable[[Tensor, int], Tensor],
        gradient: Callable[[Tensor, int], Tensor],
        biases: bool,
        decay: float,
    ) -> None:
        """Both functions take a tensor and its number of groups."""
        super().__init__(model, lambda w: value(w, 1), None, biases, decay)
        layers = [m for m in masks.layers(model).values() if isinstance(m, nn.Conv2d)]
        groups = {id(layer.weight): layer.groups for layer in layers}
        counts = [groups.get(id(tensor), 1) for tensor in self.covered]
        self.values = [_with_groups(value, count) for count in counts]
        self.gradients = [_with_groups(gradient, count) for count in counts]

    def total(self) -> Tensor:
        """Sum of the formula over all tensors."""
        total: Tensor = _Closed.apply(self.values, self.gradients, *self.covered)
        return total


def _with_groups(
    function: Callable[[Tensor, int], Tensor], groups: int
) -> Callable[[Tensor], Tensor]:
    return lambda w: function(w, groups)


class _Closed(torch.autograd.Function):
    """Sum of one formula per tensor, with gradients in closed form: a third of autograd's work."""

    @staticmethod
    def forward(
        ctx: Any, values: Sequence[Value], gradients: Sequence[Gradient], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradients = gradients
        return torch.stack([value(t) for value, t in zip(values, tensors, strict=True)]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pairs = zip(ctx.gradients, ctx.saved_tensors, strict=True)
        return None, None, *(gradient(t).mul_(upstream) for gradient, t in pairs)


ByNorms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""L1 and L2 norms -> the penalty, and the factors a and b of its gradient a * sign(w) + b * w.

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


def channel_norms(weight: Tensor, by_position: bool = False, groups: int = 1) -> Tensor:
    """L2 norm of each input channel: (filters, channels, ...) or (outputs, inputs) -> (channels,).

    With `by_position`, of each channel at each position of the kernel, (channels * positions,).
    Each of the `groups` of a convolution has its own channels, group by group in the result. The
    derivative at zero is finite. Each entry of a bias vector is a channel.
    """
    if weight.dim() == 1:
        return weight.abs()
    squares = weight.square()
    if groups > 1:
        squares = squares.unflatten(0, (groups, -1)).sum(1)  # (groups, channels of a group, ...)
        squares = squares.flatten(0, 1).unsqueeze(0)
    axes = [0] if by_position else [0, *range(2, weight.dim())]
    return root(squares.sum(axes)).flatten()


def filter_norms(weight: Tensor, by_position: bool = False) -> Tensor:
    """L2 norm of each filter: (filters, channels, ...) or (outputs, inputs) -> (filters,).

    With `by_position`, of each filter at each position of the kernel, (filters * positions,). The
    derivative at zero is finite. A bias vector has no filters: the result is empty.
    """
    if weight.dim() == 1:
        return weight[:0]
    axes = [1] if by_position else [*range(1, weight.dim())]
    return root(weight.square().sum(axes)).flatten()


def scale_groups(
    weight: Tensor,
    channels: Tensor,
    filters: Tensor,
    by_position: bool = False,
    groups: int = 1,
) -> Tensor:
    """`weight` times a factor for each channel plus `weight` times one for each filter.

    The factors have the shapes of `channel_norms` and `filter_norms`.
    """
    if weight.dim() == 1:
        return weight * channels
    kernel = weight.shape[2:] if by_position else [1] * (weight.dim() - 2)
    channels = channels.view(groups, -1, *kernel)
    if groups > 1:
        channels = channels.repeat_interleave(len(weight) // groups, 0)
    scaled = weight * channels
    return scaled.addcmul_(weight, filters.view(-1, 1, *kernel))


def root(squares: Tensor) -> Tensor:
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
    """A norm below this counts as zero: its square underflows, its squared inverse overflows."""
    return float(torch.finfo(values.dtype).tiny ** 0.4)  # 7e-16 in float32
