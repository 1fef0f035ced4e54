"""Optimizers and learning rates."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from secateur.base.sections import Train

WEIGHTED = (_ConvNd, nn.Linear, nn.MultiheadAttention)
"""Layers whose weights have weight decay if `weight_decay_on` is weights."""


def optimizer(
    model: nn.Module, settings: Train, more: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer that the settings name, in its fused implementation.

    `more` are further parameters, besides those of the model, trained without weight decay.
    """
    lr = settings.lr
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in [*_groups_by_decay(model, settings), ([*more], 0.0)]
        if parameters
    ]
    if settings.optimizer == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return SGD(groups, lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    kind = AdamW if settings.optimizer == "adamw" else Adam
    return kind(groups, lr, fused=True)


def _uncompiled(kind: type[torch.optim.Optimizer]) -> Any:
    """The optimizer without torch's decorators that import the compiler, which takes over a second.

    They only tell the compiler what not to trace, and optimizer steps are never compiled here.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)


SGD, Adam, AdamW = map(_uncompiled, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))


def _groups_by_decay(model: nn.Module, settings: Train) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters and their weight decay: one group of all parameters, or a group of the weights of
    convolutions, linear layers and attention projections, and one of the rest without decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.weight_decay_on == "all":
        return [(parameters, settings.weight_decay)]
    decayed = {id(weight) for module in model.modules() for weight in _weights(module)}
    return [
        ([p for p in parameters if id(p) in decayed], settings.weight_decay),
        ([p for p in parameters if id(p) not in decayed], 0.0),
    ]


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """A layer's own weights, and the parameters of parametrized weights; without biases."""
    if not isinstance(module, WEIGHTED):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1 and not name.startswith("bias"):
            yield parameter
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, computed in module.parametrizations.items():
            if not name.endswith("bias"):
                yield from computed.parameters()


def rate(settings: Train, step: int, steps_per_epoch: int) -> float:
    """Learning rate at `step`, counted from 0 over all epochs of `steps_per_epoch` steps.

    constant; multistep: multiplied by gamma at each milestone; cosine: half a cosine down to 0
    after the warm-up (I. Loshchilov, F. Hutter, SGDR, ICLR 2017); one_cycle: half a cosine up from
    lr / 25 over the first 30 % and down to lr / 10,000 (L. Smith, N. Topin, Super-convergence,
    2019). The warm-up is linear. The rate is above zero at the last step. With `schedule_after`,
    the schedule is that of a training longer by as many epochs, which are skipped.
    """
    if settings.schedule_by == "epoch":
        step -= step % steps_per_epoch
    now = settings.schedule_after + step / steps_per_epoch
    end = settings.schedule_after + settings.epochs
    warm = settings.warmup
    if now < warm:
        rise = 1.0 if settings.schedule_by == "epoch" else 1.0 / steps_per_epoch
        return settings.lr * min(1.0, (now + rise) / warm)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "multistep":
        passed = sum(now >= milestone for milestone in settings.milestones)
        return settings.lr * settings.gamma**passed
    if settings.schedule == "cosine":
        return settings.lr * _half_cosine((now - warm) / (end - warm))
    low, last, peak = settings.lr / 25, settings.lr / 10_000, 0.3 * end
    if now < peak:
        return settings.lr + (low - settings.lr) * _half_cosine(now / peak)
    return last + (settings.lr - last) * _half_cosine((now - peak) / (end - peak))


def _half_cosine(progress: float) -> float:
    """Falls from 1 at `progress` 0 to 0 at `progress` 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
