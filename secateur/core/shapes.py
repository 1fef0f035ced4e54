"""Make the layers of a network as small as given tensors: how compact networks are rebuilt."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.core.errors import SettingsError


def resize(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give every parameter and buffer named in `shapes` that shape, in place.

    Values of resized tensors are lost. Raises ValueError if a tensor's number of axes differs,
    or if a parameter of the model is not named.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        changed = False
        for own, tensor in [*module.named_parameters(recurse=False), *_buffers(module)]:
            if prefix + own not in shapes:
                raise ValueError(f"{prefix + own} is missing")
            shape = tuple(shapes[prefix + own])
            if shape == tuple(tensor.shape):
                continue
            if len(shape) != tensor.dim():
                raise ValueError(f"{prefix + own} has {len(shape)} axes, needs {tensor.dim()}")
            fresh = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                setattr(module, own, nn.Parameter(fresh, requires_grad=tensor.requires_grad))
            else:
                setattr(module, own, fresh)
            changed = True
        if changed:
            _describe(module)


def reset(model: nn.Module) -> None:
    """New random weights for every layer, in the shape it has now, in place.

    Layers draw first, then the modules that hold them, so that a network with a
    `reset_parameters()` of its own has the last word. Raises SettingsError naming a module that
    holds parameters and cannot draw them, before anything is changed.
    """
    for name, module in model.named_modules():
        if not _can_draw(module) and next(module.parameters(recurse=False), None) is not None:
            raise SettingsError(
                f"cannot draw new weights for {name or 'the network'} "
                f"({type(module).__name__} has no reset_parameters); finetune.init = scratch "
                "needs an architecture that can"
            )
    _draw(model)


def _can_draw(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _draw(module: nn.Module) -> None:
    for child in module.children():
        _draw(child)
    if _can_draw(module):
        module.reset_parameters()  # type: ignore[operator]


def _buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, b) for name, b in module.named_buffers(recurse=False) if b is not None]


def _describe(module: nn.Module) -> None:
    """Bring a layer's own account of its sizes in line with its weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
        module.in_channels *= module.groups
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        module.num_features = module.weight.numel()
    else:
        raise ValueError(f"do not know how to resize a {type(module).__name__}")
