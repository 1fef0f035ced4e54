"""Masks: which parameters can have a mask; applying and holding masks."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.base.errors import PruningError

Scope = Literal["weights", "weights_and_biases", "weights_and_scales"]
"""Which parameters are pruned: weights of convolutions and linear layers, their biases too, or the
scales of batch normalisations too."""
Masks = dict[str, Tensor]
"""Parameter name -> boolean tensor of its shape, True where the entry is kept."""

LAYERS = (nn.Conv2d, nn.Linear)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""Batch normalisations; on several GPUs SyncBatchNorm replaces the others."""


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers by name, in order; of those with one weight, the first."""
    found: dict[str, nn.Conv2d | nn.Linear] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            weight = module._parameters.get("weight")  # None if it is computed from others
            if weight is None or id(weight) not in seen:
                found[name] = module
            seen |= set() if weight is None else {id(weight)}
    return found


def prunable(model: nn.Module, scope: Scope) -> dict[str, nn.Parameter]:
    """Parameters in scope, by name, in the order of the modules.

    The projections that a MultiheadAttention holds itself (`in_proj_weight`) count as weights of
    linear layers. Other parameters without a layer, such as position embeddings, are not in scope;
    see `passed_over`. A parameter that several layers share has its name in the first of them.
    """
    types: tuple[type[nn.Module], ...] = (*LAYERS, nn.MultiheadAttention)
    if scope == "weights_and_scales":
        types = (*types, *get_args(BatchNorm))
    kinds = ("weight", "bias") if scope == "weights_and_biases" else ("weight",)
    found = {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if isinstance(module, types)
        for key, parameter in module.named_parameters(recurse=False)
        if key in kinds or (isinstance(module, nn.MultiheadAttention) and key.endswith(kinds))
    }
    first = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: found[name] for name in found if first[id(found[name])] == name}


def passed_over(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of entries of each parameter that cannot have a mask, or that no pruner has covered.

    These are parameters with several axes that belong to no convolution or linear layer, such as
    embeddings, and that have no mask.
    """
    own = {f"{name}.weight" if name else "weight" for name in layers(model)}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in own and name not in masks
    }


def joined(masks: Masks, held: Masks) -> Masks:
    """Masks that keep what both keep; a parameter named in only one of them has that mask."""
    together = {name: mask & held[name] for name, mask in masks.items() if name in held}
    return {**held, **masks, **together}


def prune_more(masks: Masks, held: Masks) -> bool:
    """Whether masks remove an entry that the held ones keep."""
    kept = {name: held.get(name, torch.ones_like(mask)) for name, mask in masks.items()}
    return any(bool((kept[name] & ~mask).any()) for name, mask in masks.items())


def refuse_empty(
    model: nn.Module, masks: Mapping[str, Tensor], requested: str, held: Mapping[str, Tensor]
) -> None:
    """Raise PruningError if a mask keeps none of a layer's weights.

    Layers that the earlier masks `held` leave empty are passed over: of a residual branch that is
    dead as a whole, one channel without weights remains. `requested` describes in the message what
    the user asked for.
    """
    empty = {name for name, mask in held.items() if not bool(mask.any())}
    for name, mask in masks.items():
        if name.endswith("weight") and name not in empty and not bool(mask.any()):
            largest = float(model.get_parameter(name).detach().abs().max())
            raise PruningError(
                f"layer {name.removesuffix('.weight')} would be left empty by {requested}: none of "
                f"its {mask.numel()} weights stays (the largest is {largest:.3g}); ask for less"
            )


@torch.no_grad()
def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set all masked entries to zero, in place."""
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0.0)


def hold(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Set all masked entries to zero now and after every step of the optimizer.

    Momentum or weight decay may move a masked entry within a step; it is zero again before the
    next forward pass.
    """
    if not masks:
        return
    held: list[Tensor] = [_trained(model, name) for name in masks]
    keep = [
        mask.to(p.device, p.dtype).to(memory_format=_format(p))
        for p, mask in zip(held, masks.values(), strict=True)
    ]

    def to_zero(*_: object) -> None:
        with torch.no_grad():
            torch._foreach_mul_(held, keep)

    optimizer.register_step_post_hook(to_zero)
    to_zero()


def _trained(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of this name or, if it is computed by a parametrization, its original.

    A parametrization must leave zeros zero.
    """
    layer, _, key = name.rpartition(".")
    module = model.get_submodule(layer)
    if parametrize.is_parametrized(module, key):
        return model.get_parameter(f"{layer}.parametrizations.{key}.original".lstrip("."))
    return model.get_parameter(name)


def _format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
