"""STR: a soft threshold in every layer, learnt together with the weights.

Source: A. Kusupati, V. Ramanujan, R. Somani, M. Wortsman, P. Jain, S. Kakade, A. Farhadi, Soft
threshold weight reparameterization for learnable sparsity, ICML 2020, equations 2 to 4. The forward
pass uses the soft-thresholded weight sign(w) * max(0, |w| - sigmoid(s)) in place of a layer's
weight w, with one s for each layer. The gradient of w is the gradient of the soft-thresholded
weight, and 0 where that weight is zero; the gradient of s is -sigmoid'(s) times the sum of
gradient * sign(w) over the other entries.

Weight decay acts on s as on all parameters, and pulls the threshold upwards to sigmoid(0): the
stronger the decay, the sparser the network. `initial` is the value of s at the start.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from secateur.base.sections import NonNegative, Strict
from secateur.sparsity import masks
from secateur.sparsity.choices import Choices
from secateur.sparsity.layer_ratios import layers_left
from secateur.sparsity.ratios import Skip
from secateur.training.parametrization import Parametrization, holders, zeros
from secateur.training.penalty import TrainingPlan


class Settings(Strict):
    """Where the thresholds start, and how strongly they are pulled upwards."""

    initial: float = -5.0
    """s of every layer at the beginning; the threshold is sigmoid(s): 0.0067 for -5."""
    pull: NonNegative = 0.0
    """Factor of half the sum of s^2 in the loss, on top of the weight decay of sparse_train."""
    skip: Skip = ()
    """Layers that keep plain weights: names, or stage.block."""


def build(settings: Settings, model: nn.Module) -> Parametrization:
    """A soft threshold for the weights of convolutions and linear layers.

    Raises ArgumentError if a name under `skip` matches no layer, or if all layers are skipped.
    """
    return SoftThresholds(settings, model)


class SoftThreshold(nn.Module):
    """sign(w) * max(0, |w| - sigmoid(s)) for the weight of one layer."""

    def __init__(self, initial: float, device: torch.device) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(initial, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses, of the same shape."""
        used: Tensor = _Shrink.apply(weight, torch.sigmoid(self.s))
        return used


class SoftThresholds:
    """The thresholds of all layers of a model."""

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        self.model, self.pull = model, settings.pull
        layers = masks.layers(model)
        self.layers = {name: layers[name] for name in layers_left(model, settings.skip)}
        self.thresholds: dict[str, SoftThreshold] = {}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        """Layer -> the modules that have its weight, which share its threshold too."""
        for name, layer in self.layers.items():
            self.thresholds[name] = SoftThreshold(settings.initial, layer.weight.device)
            self.places[name] = holders(model, layer.weight)
            for module, key in self.places[name]:
                parametrize.register_parametrization(module, key, self.thresholds[name])

    def start(self, plan: TrainingPlan) -> None:
        """Nothing to prepare."""

    def __call__(self, step: int) -> Tensor:
        """`pull` times half the sum of s^2."""
        values = torch.stack([threshold.s for threshold in self.thresholds.values()])
        return 0.5 * self.pull * values.square().sum()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Share of the weights that are zero, and the threshold of each layer."""
        weights = [layer.weight for layer in self.layers.values()]
        pruned = sum(int((weight == 0).sum()) for weight in weights)
        found = {"pruned": pruned / sum(weight.numel() for weight in weights)}
        thresholds = self.thresholds.items()
        return found | {f"threshold/{n}": float(torch.sigmoid(t.s)) for n, t in thresholds}

    @torch.no_grad()
    def collapse(self) -> Choices:
        """Replace the weights of the layers by their soft-thresholded values."""
        for name, layer in self.layers.items():
            for module, key in self.places[name]:
                if module is not layer:  # gets the values of the layer, whose weight it has
                    parametrize.remove_parametrizations(module, key, leave_parametrized=False)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        return zeros(self.model, (f"{name}.weight" for name in self.layers))


class _Shrink(torch.autograd.Function):
    """Soft threshold of a tensor, with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        used = functional.softshrink(weight, float(threshold))
        ctx.save_for_backward(used)
        return used

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (used,) = ctx.saved_tensors
        sign = used.sign()
        summed = torch.dot(upstream.flatten(), sign.flatten())
        return sign.abs_().mul_(upstream), -summed
