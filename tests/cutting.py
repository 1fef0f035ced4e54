"""Helpers for tests of channels: random networks, random selections, and the proof of equality."""

import copy
import functools

import torch

from secateur.nn import resizing
from secateur.pruning import removal

SIDE = 8
NORMAL = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""Normally distributed numbers to copy: drawing new ones takes twenty times as long."""


def randomise(model, seed):
    """Random weights, shifts and statistics, so that none has its default value of zero or one."""
    place = seed * 7_919 % len(NORMAL)

    def normal(tensor):
        nonlocal place
        parts, missing = [], tensor.numel()
        while missing:
            parts.append(NORMAL[place : place + missing])
            missing -= len(parts[-1])
            place = (place + len(parts[-1])) % len(NORMAL)
        whole = parts[0] if len(parts) == 1 else torch.cat([NORMAL[:0], *parts])
        return whole.reshape(tensor.shape).to(tensor.dtype)

    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
            tensor.data = normal(tensor) * max(spread, 0.2)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean = normal(module.running_mean) * 0.5
            module.running_var = normal(module.running_var).abs() + 0.5
    return model.eval()


def build(make, seed=0):
    torch.default_generator.manual_seed(seed)  # manual_seed also seeds GPUs and records call stacks
    torch.set_default_dtype(torch.float64)
    try:
        return randomise(make().double(), seed)
    finally:
        torch.set_default_dtype(torch.float32)


def images(count=4, side=SIDE, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=chance).double()


def free(graph):
    return [group for group in graph.groups if group.locked is None]


def at_random(graph, seed, only=None):
    chance = torch.Generator().manual_seed(seed)
    chosen = {}
    for group in free(graph):
        count = int(torch.randint(0 if only is None else 1, group.size + 1, (1,), generator=chance))
        numbers = torch.randperm(group.size, generator=chance)[:count]
        if only is None or group.name in only:
            chosen[group.name] = numbers
    return graph.removable(chosen)


def difference(one, other, batch):
    with torch.no_grad():
        before, after = one(batch), other(batch)
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-30))


def check(model, graph, selection, batch):
    """Masked and compact network are equal in float64, and the sizes are the expected ones."""
    masked = removal.mask(model, selection, batch, graph)
    compact = removal.remove(model, selection, batch, {}, graph)
    assert difference(masked, compact.model, batch) < 1e-9
    removed = {name: len(chosen) for name, chosen in selection.items()}
    for group in graph.groups:
        for member in group.members:
            if member.groups == 1 and member.kind != "index":
                lost = member.index[selection.get(group.name, torch.empty(0).long())].numel()
                assert lost == removed.get(group.name, 0) * member.index.shape[1]
    expected = {}
    for group in graph.groups:
        for member in group.members:
            if member.kind == "out":
                lost = removed.get(group.name, 0) * member.index.shape[1]
                expected[member.tensor] = expected.get(member.tensor, 0) + lost
    before, state = model.state_dict(), compact.model.state_dict()
    for name, lost in expected.items():
        assert len(state[name]) == len(before[name]) - lost
    return masked, compact


@functools.lru_cache(maxsize=1)
def dense(make):
    return build(make, seed=5)


def rebuilt(make, compact):
    fresh, state = copy.deepcopy(dense(make)), compact.model.state_dict()
    resizing.resize(
        fresh, {n: t.shape for n, t in state.items()}, resizing.describe_layers(compact.model)
    )
    resizing.load_state(fresh, state)
    return fresh.eval()


def weights_at_random(model, graph, seed):
    """Random masks of weights, with whole outputs and inputs at zero; one path is spared."""
    chance = torch.Generator().manual_seed(seed)
    chosen = {}
    for group in free(graph):
        for member in group.members:
            if member.kind not in ("out", "in", "bias", "norm") or "kernel" in member.tensor:
                continue
            tensor = model.get_parameter(member.tensor)
            mask = chosen.setdefault(member.tensor, torch.ones(tensor.shape, dtype=torch.bool))
            gone = (torch.rand(group.size, generator=chance) > 0.6).nonzero().flatten()
            if member.groups == 1:
                mask.index_fill_(member.axis, member.index[gone].flatten(), False)
    return chosen
