"""Penalties by formula: a formula by tensor, and one over groups of weights.

A penalty is called once a training step and gives a scalar that is added to the loss, its strength
`decay` included. It covers the weights of convolutions and linear layers (and their biases as an
option) and sums one value by tensor: no average, no square root of the group size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.sparsity import masks

Value = Callable[[Tensor], Tensor]
"""A tensor -> its penalty, a scalar."""

Gradient = Callable[[Tensor], Tensor]
"""A tensor -> the derivative of its penalty, of the tensor's shape, zero where the tensor is."""


class ClosedFormPenalty:
    """A penalty without memory: `decay` times the sum of one formula over what it covers."""

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
        """Without a `gradient`, autograd differentiates `value`; giving one is faster.

        `covered` are the tensors, if not weights and `biases` of all layers.
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
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to remember."""


class _Closed(torch.autograd.Function):
    """Sum of a formula over tensors, with its derivative in closed form: a third of the work."""

    @staticmethod
    def forward(ctx: Any, value: Value, gradient: Gradient, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient = gradient
        return torch.stack([value(tensor) for tensor in tensors]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(ctx.gradient(t).mul_(upstream) for t in ctx.saved_tensors)


ByNorms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""L1 and L2 norms -> the penalty, and a and b of its derivative a * sign(w) + b * w.

Works on scalars and, entry by entry, on vectors with one norm for each tensor."""


def lasso(l1: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum |w|; derivative sign(w), and 0 at 0."""
    return l1, torch.ones_like(l1), torch.zeros_like(l1)


class NormPenalty(ClosedFormPenalty):
    """A formula that knows a tensor only by its L1 and L2 norms: all tensors at once."""

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
    """Sum of a norm formula over tensors, with its derivative in closed form."""

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
    """Derivative of a norm formula on one tensor."""
    _, a, b = by_norms(*l1_l2(tensor))
    return tensor.sign().mul_(a).addcmul_(tensor, b)


def l1_l2(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of absolute values and Euclidean norm, both scalars."""
    return tensor.abs().sum(), torch.linalg.vector_norm(tensor)  # vector_norm(., 1) is slower


def channel_norms(weight: Tensor) -> Tensor:
    """Euclidean norm of each input channel (a layer's column), finite derivative at zero.

    `weight` is (filters, channels, height, width) or (outputs, inputs); gives (channels,). A bias
    vector is one channel for each entry.
    """
    if weight.dim() == 1:
        return weight.abs()
    return _root(weight.square().sum([0, *range(2, weight.dim())]))


def filter_norms(weight: Tensor) -> Tensor:
    """Euclidean norm of each filter (a layer's row), finite derivative at zero.

    `weight` is (filters, channels, height, width) or (outputs, inputs); gives (filters,). A bias
    vector has no second grouping: gives an empty tensor.
    """
    if weight.dim() == 1:
        return weight[:0]
    return _root(weight.square().sum([*range(1, weight.dim())]))


def by_groups(weight: Tensor, channels: Tensor, filters: Tensor) -> Tensor:
    """`weight` times the factor of its channel, (channels,), plus times that of its filter."""
    if weight.dim() == 1:
        return weight * channels
    kernel = [1] * (weight.dim() - 2)
    scaled = weight * channels.view(1, -1, *kernel)
    return scaled.addcmul_(weight, filters.view(-1, 1, *kernel))


def _root(squares: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero instead of infinite."""
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)


def inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 where the value is too small for that."""
    return torch.where(values > _floor(values), 1 / values, 0.0)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where `below` is too small for that."""
    floor = _floor(below)
    return torch.where(below > floor, above / below.clamp_min(floor), 0.0)


def _floor(values: Tensor) -> float:
    """A norm below this counts as zero: its square is lost, its inverse squared overflows."""
    return float(torch.finfo(values.dtype).tiny ** 0.4)  # 7e-16 in float32
