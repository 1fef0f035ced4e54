"""Code that networks of users hold: the compact network computes the same as the masked one."""

import pytest
import torch
from cutting import at_random, build, check, difference, free, images, rebuilt
from torch import nn

from secateur.channels.graph import build_channel_graph

CLASSES = 3


class Code(nn.Module):
    """Layers and tensors by name; `run` is a function of the network and its input."""

    def __init__(self, run, **named):
        super().__init__()
        for name, value in named.items():
            if type(value) is torch.Tensor:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def patches(width):
    return nn.Conv2d(3, width, 4, 4)


def tokens(x):
    """(N, C, H, W) -> (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def equal_at_random(make, seeds=6):
    """Masked and compact network are equal for random selections; returns the graph."""
    model, batch = build(make), images()
    graph = build_channel_graph(model, batch)
    for seed in range(seeds):
        _, compact = check(model, graph, at_random(graph, seed), batch)
        assert difference(rebuilt(make, compact), compact.model, batch) == 0
    return graph


# ---- parameters that come before the layers whose channels they meet ---------------------------


def token_first():
    def run(net, x):
        token = net.token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, tokens(net.patches(x))], 1) + net.places
        return net.head(net.norm(x).mean(1))

    token, places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
    return Code(run, token=token, places=places, patches=patches(8), norm=nn.LayerNorm(8),
                head=nn.Linear(8, CLASSES))  # fmt: skip


def gate_first():
    def run(net, x):
        gate = torch.sigmoid(net.gate)
        return net.head((net.a(x) * gate).mean((2, 3)))

    return Code(run, gate=nn.Parameter(torch.randn(1, 8, 1, 1)), a=conv(3, 8),
                head=nn.Linear(8, CLASSES))  # fmt: skip


@pytest.mark.parametrize(("make", "name"), [(token_first, "token"), (gate_first, "gate")])
def test_parameters_that_are_used_before_the_layers_become_smaller(make, name):
    graph = equal_at_random(make)
    (group,) = free(graph)
    assert name in {member.tensor for member in group.members}
