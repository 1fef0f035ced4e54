"""Which parameters can be pruned; applying, holding and counting masks."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError

Scope = Literal["weights", "weights_and_biases"]
Masks = dict[str, Tensor]
"""Parameter name -> boolean tensor of its shape, True where the entry stays."""

LAYERS = (nn.Conv2d, nn.Linear)


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}


def prunable(model: nn.Module, scope: Scope) -> dict[str, nn.Parameter]:
    """Parameters of convolutions and linear layers, by name: weights, and biases if in scope."""
    kinds = ("weight",) if scope == "weights" else ("weight", "bias")
    return {
        f"{name}.{kind}": parameter
        for name, layer in layers(model).items()
        for kind, parameter in layer.named_parameters(recurse=False)
        if kind in kinds
    }


def refuse_empty(model: nn.Module, masks: Mapping[str, Tensor], asked: str) -> None:
    """Raise PruningError if a layer's weights would all go; `asked` is what the user wanted."""
    for name, mask in masks.items():
        if name.endswith("weight") and not bool(mask.any()):
            largest = float(model.get_parameter(name).detach().abs().max())
            raise PruningError(
                f"layer {name.removesuffix('.weight')} would be left empty by {asked}: none of its "
                f"{mask.numel()} weights stays (the largest is {largest:.3g}); ask for less"
            )


@torch.no_grad()
def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks take away to zero, in place."""
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0.0)


def hold(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Keep what is pruned at zero after every step of any optimizer.

    Momentum or weight decay may move a pruned entry within a step; it is back at zero before
    anyone reads it.
    """
    if not masks:
        return
    held: list[Tensor] = [model.get_parameter(name) for name in masks]
    keep = [
        mask.to(p.device, p.dtype).to(memory_format=_format(p))
        for p, mask in zip(held, masks.values(), strict=True)
    ]

    def to_zero(*_: object) -> None:
        with torch.no_grad():
            torch._foreach_mul_(held, keep)

    optimizer.register_step_post_hook(to_zero)
    to_zero()


def nonzero(model: nn.Module) -> int:
    """Entries of all parameters that are not zero."""
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def _format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
