"""Optimizer and learning rate, from settings."""

import math

import torch
from torch import nn

from secateur.base.settings import Train

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """The optimizer that the settings name, in its fused form."""
    lr = settings.lr
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in _by_decay(model, settings)
        if parameters
    ]
    if settings.optimizer == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(
            groups, lr, momentum=settings.momentum, nesterov=nesterov, fused=True
        )
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr, fused=True)


def _by_decay(model: nn.Module, settings: Train) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters with their weight decay: all with the same, or norms and biases without."""
    everything = [p for p in model.parameters() if p.requires_grad]
    if settings.weight_decay_on == "all":
        return [(everything, settings.weight_decay)]
    free = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name == "bias"
    }
    return [
        ([p for p in everything if id(p) not in free], settings.weight_decay),
        ([p for p in everything if id(p) in free], 0.0),
    ]


def rate(settings: Train, step: int, per_epoch: int) -> float:
    """Learning rate at a step (from 0) of the whole training, `per_epoch` of them an epoch.

    constant; multistep: times gamma at each milestone; cosine: half a cosine down to 0 after the
    warm-up (I. Loshchilov and F. Hutter, SGDR, ICLR 2017); one_cycle: half a cosine up from lr / 25
    over the first 30 % and down to lr / 10,000 (L. Smith and N. Topin, 2019). The warm-up rises
    in equal steps; none of them has reached zero at the last step.
    """
    if settings.schedule_by == "epoch":
        step -= step % per_epoch
    now, end = step / per_epoch, float(settings.epochs)
    warm = settings.warmup
    if now < warm:
        rise = 1.0 if settings.schedule_by == "epoch" else 1.0 / per_epoch
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


def _half_cosine(share: float) -> float:
    """1 at the beginning, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * share))
