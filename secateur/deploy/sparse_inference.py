"""Speed-up by single zeros among the weights: linear layers in PyTorch's CSR format, if faster.

No runtime for CPUs skips the zeros of a dense matrix, and none has a sparse kernel for
convolutions. A linear layer whose weights are stored as compressed sparse rows (CSR) skips zeros,
at a higher cost for each remaining weight. The sparsity from which on this pays off depends on the
layer's size, the number of images and the processor, so every layer is measured in both forms.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from secateur.base import timing
from secateur.deploy.runtimes import torch_threads
from secateur.nn.hooks import watched_inputs
from secateur.nn.modes import in_eval_mode
from secateur.sparsity import masks

LEAST_ZEROS = 0.5
"""Layers with fewer zeros are not tried: each entry of CSR stores a column beside its value."""
LEAST_GAIN = 1.05
"""Speed-up from which on a layer, or a network, counts as faster; less is noise."""


class SparseLinear(nn.Module):
    """A linear layer that stores its weights as CSR, for inference on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that CSR is in beta
            self.weight = weight.to_sparse_csr()
        self.bias = weight.new_zeros(len(weight), 1) if bias is None else bias.detach()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        rows = x.reshape(-1, x.shape[-1])
        result: Tensor = torch.addmm(self.bias, self.weight, rows.t()).t()
        return result.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Gain:
    """A network with sparse layers compared with the same network with dense layers, in torch."""

    threads: int
    batch: int
    """Images per pass."""
    layers: Sequence[str]
    """Names of the layers that are faster as CSR."""
    dense_ms: float
    dense_iqr_ms: float
    sparse_ms: float
    """Equal to `dense_ms` without such layers."""
    sparse_iqr_ms: float
    speedup: float
    """Median over the turns of the ratio of both times; 1 without such layers."""


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, threads: int, repeats: int) -> Gain:
    """Find the linear layers that are faster as CSR for this batch, and time the network with them.

    `images` has the shape (batch, channels, height, width). Layers are timed one by one on their
    inputs for these images, dense and sparse taking turns; then the whole network is timed with and
    without the chosen layers, and if it is not faster, none is chosen. The model, on the CPU, is
    set to eval mode and otherwise not changed.
    """
    with torch_threads(threads):
        model.eval()
        names = [n for n, x in layer_inputs(model, images).items() if _faster(model, n, x, repeats)]
        variants = {"dense": model, "sparse": with_sparse_layers(model, names) if names else model}
        passes = {name: partial(variant, images) for name, variant in variants.items()}
        taken = timing.take_turns(passes, repeats, 1)
    dense, sparse = (timing.median_and_iqr(taken[name]) for name in variants)
    gain = timing.speedup(taken["dense"], taken["sparse"])
    if not names or gain < LEAST_GAIN:
        names, sparse, gain = [], dense, 1.0
    return Gain(threads, len(images), names, *dense, *sparse, gain)


def with_sparse_layers(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of the network with these linear layers as CSR."""
    changed = copy.deepcopy(model)
    for name in names:
        changed.set_submodule(name, SparseLinear(cast(nn.Linear, changed.get_submodule(name))))
    return in_eval_mode(changed)


def layer_inputs(model: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
    """Input of each linear layer with many zeros for these images, by its name."""
    found: dict[str, Tensor] = {}
    layers = {
        name: layer
        for name, layer in masks.layers(model).items()
        if isinstance(layer, nn.Linear) and _zeros(layer.weight) >= LEAST_ZEROS
    }
    with watched_inputs(layers, found.__setitem__):
        model(images)
    return found


def _faster(model: nn.Module, name: str, inputs: Tensor, repeats: int) -> bool:
    """Whether one linear layer takes less time as CSR."""
    linear = cast(nn.Linear, model.get_submodule(name))
    variants: dict[str, nn.Module] = {"dense": linear, "sparse": SparseLinear(linear)}
    passes = {form: partial(layer, inputs) for form, layer in variants.items()}
    taken = timing.take_turns(passes, repeats, 1)
    return timing.speedup(taken["dense"], taken["sparse"]) >= LEAST_GAIN


def _zeros(weight: Tensor) -> float:
    """Share of the entries that are zero."""
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()
