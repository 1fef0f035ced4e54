"""Make the layers of a network as small as given tensors: how compact networks are rebuilt."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


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
    """New random weights for every layer, in the shape it has now."""
    for module in model.modules():
        if callable(again := getattr(module, "reset_parameters", None)):
            again()


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
