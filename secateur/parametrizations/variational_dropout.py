"""Sparse variational dropout: Gaussian noise of learnt variance on every weight.

Source: D. Molchanov, A. Ashukha, D. Vetrov, Variational dropout sparsifies deep neural networks,
ICML 2017. A weight is Gaussian with mean w and variance sigma^2 (additive noise, section 4.2);
log alpha = log sigma^2 - log w^2. The loss is the cross-entropy plus the divergence of the weights
from the log-uniform prior, summed and divided by the number of training images. The divergence of
one weight is approximated by equation 14:

    k1 - k1 * sigmoid(k2 + k3 * log alpha) + 0.5 * log(1 + 1 / alpha)

with k1 = 0.63576, k2 = 1.87320, k3 = 1.48695, and log alpha clamped to [-8, 8] as in the authors'
code. Noise is drawn for the outputs of a layer in place of its weights (local reparameterisation,
equations 6 and 7): Gaussian, with the output of the plain layer as mean and a variance computed
from sigma^2 and the squared inputs. The factor of the divergence rises linearly over the warm-up.
Weights with log alpha above 3 are pruned; evaluation uses the means of the others.

At learning rate 1, the divergence moves log sigma^2 by little more than 1 / images per step, so
that training needs an optimizer that divides by the size of the gradient, such as Adam in the
source.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.base.errors import ArgumentError
from secateur.base.sections import NonNegative, StepsOrShare, Strict
from secateur.sparsity import masks
from secateur.sparsity.choices import Choices
from secateur.sparsity.layer_ratios import layers_left
from secateur.sparsity.ratios import Skip
from secateur.training.parametrization import Parametrization, holders, zeros
from secateur.training.penalty import TrainingPlan

K1, K2, K3 = 0.63576, 1.87320, 1.48695
LIMIT = 8.0
"""Bound of |log alpha| in the divergence."""
SMALL = 1e-8
"""Added to squares before their logarithm or root is taken."""
NO_NOISE = -50.0
"""log sigma^2 of weights that the training holds at zero."""


class Settings(Strict):
    """How noisy the weights are at the beginning, and when one is pruned."""

    initial: float = -10.0
    """log sigma^2 of every weight at the beginning."""
    threshold: float = 3.0
    """Weights whose log alpha is larger are pruned."""
    strength: NonNegative = 1.0
    """Factor of the divergence; 1 is the variational lower bound."""
    warmup: StepsOrShare = 0.2
    """Steps until the factor reaches its full value or, below 1, a share of the training."""
    skip: Skip = ()
    """Layers that keep plain weights: names, or stage.block."""


def build(settings: Settings, model: nn.Module) -> Parametrization:
    """Noise on the weights of convolutions and linear layers.

    Layers of derived classes keep plain weights, and so do those that share theirs. Raises
    ArgumentError if no layer is left, or if a name under `skip` matches no layer.
    """
    return VariationalDropout(settings, model)


class _Noisy:
    """Base of both noisy layers: variances, and means without the pruned weights."""

    weight: Tensor
    training: bool
    log_variance: nn.Parameter
    threshold: float

    def log_alpha(self) -> Tensor:
        """log sigma^2 - log w^2 of every weight."""
        return self.log_variance - torch.log(self.weight.square() + SMALL)

    def mean(self) -> Tensor:
        """The weights, zero where log alpha exceeds the threshold."""
        return torch.where(self.log_alpha() > self.threshold, 0.0, self.weight)

    def noisy(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Random outputs with this mean and variance."""
        return mean + torch.sqrt(variance + SMALL) * torch.randn_like(mean)


class NoisyLinear(_Noisy, nn.Linear):
    """A linear layer with noise while it trains."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if not self.training:
            return F.linear(inputs, self.mean(), self.bias)
        variance = F.linear(inputs.square(), self.log_variance.exp())
        return self.noisy(super().forward(inputs), variance)


class NoisyConv2d(_Noisy, nn.Conv2d):
    """A convolution with noise while it trains."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, filters, height, width)."""
        if not self.training:
            return self._conv_forward(inputs, self.mean(), self.bias)
        variance = self._conv_forward(inputs.square(), self.log_variance.exp(), None)
        return self.noisy(super().forward(inputs), variance)


NOISY: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NoisyLinear, nn.Conv2d: NoisyConv2d}


class VariationalDropout:
    """The noise of all layers of a model."""

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        self.model, self.settings = model, settings
        layers = masks.layers(model)
        wanted = layers_left(model, settings.skip)
        own = {name: [m for m, _ in holders(model, layers[name].weight)] for name in wanted}
        self.sharing: dict[str, list[Any]] = {
            name: found for name, found in own.items() if all(type(m) in NOISY for m in found)
        }
        """Name of the first layer that has a weight -> all layers that have it; they share its
        variances too."""
        self.layers: dict[str, Any] = {name: layers[name] for name in self.sharing}
        if not self.layers:
            raise ArgumentError("skip", "no plain convolution or linear layer is left")
        for name, layer in self.layers.items():
            log_variance = nn.Parameter(torch.full_like(layer.weight, settings.initial))
            for same in self.sharing[name]:
                same.__class__ = NOISY[type(same)]
                same.threshold = settings.threshold
                same.log_variance = log_variance

    def start(self, plan: TrainingPlan) -> None:
        """Store the length of the training. ArgumentError for an optimizer that would be too slow,
        for weight decay, and for a warm-up longer than the training."""
        if plan.settings.optimizer == "sgd" and plan.steps:
            raise ArgumentError(
                "optimizer",
                "variational dropout needs one that divides by the size of the gradient; allowed: "
                "adam, adamw",
                plan.settings.optimizer,
            )
        if plan.settings.weight_decay > 0:
            raise ArgumentError(
                "weight_decay",
                "would draw log sigma^2, a parameter of variational dropout, to 0; it must be 0",
                plan.settings.weight_decay,
            )
        self.images = plan.images
        self.warmup = plan.in_steps(self.settings.warmup)
        if self.warmup > plan.steps:
            raise ArgumentError(
                "parametrizations.variational_dropout.warmup",
                f"the training has {plan.steps:,} steps, so that the factor would never be "
                "whole; allowed: at most as many, or below 1 a share of them",
                self.settings.warmup,
            )
        with torch.no_grad():
            for name, layer in self.layers.items():
                if (mask := plan.masks.get(f"{name}.weight")) is not None:
                    layer.log_variance.masked_fill_(~mask.to(layer.weight.device), NO_NOISE)

    def __call__(self, step: int) -> Tensor:
        """The divergence over the number of images, times the factor of this step."""
        factor = min(1.0, step / self.warmup) if self.warmup else 1.0
        layers = self.layers.values()
        total = torch.stack([divergence(lay.weight, lay.log_variance) for lay in layers]).sum()
        return self.settings.strength * factor / self.images * total

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Share of the weights that are pruned."""
        gone = sum(int((layer.mean() == 0).sum()) for layer in self.layers.values())
        return {"pruned": gone / sum(layer.weight.numel() for layer in self.layers.values())}

    @torch.no_grad()
    def collapse(self) -> Choices:
        """Turn the noisy layers into plain ones, with the means as weights."""
        for name, layer in self.layers.items():
            layer.weight.copy_(layer.mean())
            for same in self.sharing[name]:
                del same.log_variance, same.threshold
                same.__class__ = {own: plain for plain, own in NOISY.items()}[type(same)]
        return zeros(self.model, (f"{name}.weight" for name in self.layers))


def divergence(weight: Tensor, log_variance: Tensor) -> Tensor:
    """Sum of the approximate divergences of weights with these means and log variances."""
    total: Tensor = _Divergence.apply(weight, log_variance)
    return total


class _Divergence(torch.autograd.Function):
    """The divergence with its gradient in closed form, in a third of autograd's time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_variance: Tensor) -> Tensor:
        squares = weight.square().add_(SMALL)
        log_alpha = log_variance - squares.log()
        inside = log_alpha.abs() <= LIMIT
        log_alpha.clamp_(-LIMIT, LIMIT)
        reached = torch.sigmoid(K2 + K3 * log_alpha)
        noisy = torch.sigmoid(log_alpha)  # 1 / (1 + 1 / alpha)
        value = K1 * (weight.numel() - reached.sum()) - 0.5 * noisy.log().sum()
        slope = (reached - reached.square()).mul_(-K1 * K3).sub_(noisy.neg_().add_(1), alpha=0.5)
        slope.mul_(inside)
        ctx.save_for_backward(slope, weight, squares)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        slope, weight, squares = ctx.saved_tensors
        slope = slope * upstream
        return (slope * weight).div_(squares).mul_(-2), slope
