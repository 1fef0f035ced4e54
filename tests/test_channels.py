"""Channel groups and their removal: the compact network computes the same as the masked one.

Covered are small networks, one for each way in which channels can depend on each other, and
networks of torchvision; groups are also compared with derivations that use no graph.
"""

import copy
import functools
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from cutting import (
    SIDE,
    at_random,
    build,
    check,
    difference,
    free,
    images,
    randomise,
    rebuilt,
    weights_at_random,
)
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from secateur.base.errors import PruningError
from secateur.base.sections import Prune
from secateur.base.torchvision_import import import_torchvision
from secateur.channels import graph as channels
from secateur.channels import operators
from secateur.channels.rules import elementwise
from secateur.data.dataset import InMemoryImages
from secateur.nn import checkpoint
from secateur.nn.layers import ChannelSelect
from secateur.pruning import proof, removal
from secateur.pruning.decision import PruningDecision
from secateur.sparsity import masks
from stages import prune


class Net(nn.Module):
    """Layers by name; `run` is a function of the network and its input that applies them."""

    def __init__(self, run, head=None, **layers):
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            elif isinstance(layer, torch.Tensor):
                self.register_buffer(name, layer)
            else:
                self.add_module(name, layer)
        self.head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
        self.run = run
        self(torch.zeros(2, 3, SIDE, SIDE))

    def forward(self, x):
        return self.head(self.run(self, x))


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def cbr(inputs, outputs, kernel=3, **options):
    return nn.Sequential(conv(inputs, outputs, kernel, bias=False, **options),
                         nn.BatchNorm2d(outputs), nn.ReLU())  # fmt: skip


def chain():
    return Net(lambda n, x: n.b(n.a(x)), a=cbr(3, 6), b=cbr(6, 5))


def flat():
    head = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(7), nn.ReLU(), nn.Linear(7, 3)
    )
    return Net(lambda n, x: n.a(x), head, a=cbr(3, 4))


def viewed():
    def run(n, x):
        x = n.a(x)
        return n.fc(x.view(x.size(0), -1))

    return Net(run, nn.Linear(5, 3), a=cbr(3, 4, stride=4), fc=nn.Linear(4 * 4, 5))


def residual():
    def run(n, x):
        x = n.stem(x)
        x = functional.relu(x + n.a2(n.a1(x)))
        return functional.relu(n.short(x) + n.b2(n.b1(x)))

    return Net(run, stem=cbr(3, 6), a1=cbr(6, 4), a2=cbr(4, 6), b1=cbr(6, 5), b2=cbr(5, 8, 1),
               short=conv(6, 8, 1))  # fmt: skip


def widened(shortcut):
    def run(n, x):
        x = n.stem(x)
        x = torch.add(x, n.a(x))
        return functional.relu(shortcut(n, x[:, :, ::2, ::2]) + n.b(x))

    return Net(run, stem=cbr(3, 4), a=cbr(4, 4), b=cbr(4, 9, stride=2),
               take=ChannelSelect([-1, -1, 0, 1, 2, 3, -1, -1, -1]),
               pad3=nn.ZeroPad3d((0, 0, 0, 0, 2, 3)))  # fmt: skip


def padded():
    return widened(lambda n, x: functional.pad(x, (0, 0, 0, 0, 2, 3)))


def pad_module():
    return widened(lambda n, x: n.pad3(x))


def joined_zeros():
    zeros = lambda x, count: x.new_zeros(x.size(0), count, x.size(2), x.size(3))  # noqa: E731
    return widened(lambda n, x: torch.cat((zeros(x, 2), x, zeros(x, 3)), 1))


def taken():
    return widened(lambda n, x: n.take(x))


def doubled():
    def run(n, x):
        x = n.stem(x)
        return torch.cat((x, x.mul(0)), 1) + n.b(x)

    return Net(run, stem=cbr(3, 4), b=cbr(4, 8))


def dense():
    def run(n, x):
        x = n.stem(x)
        for layer in (n.a, n.b, n.c):
            x = torch.cat((x, layer(x)), 1)
        return n.end(functional.relu(n.norm(x)))

    pre = lambda i: nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), conv(i, 3, bias=False))  # noqa: E731
    return Net(run, stem=conv(3, 4), a=pre(4), b=pre(7), c=pre(10), norm=nn.BatchNorm2d(13),
               end=conv(13, 6, 1))  # fmt: skip


def preact():
    def run(n, x):
        x = n.stem(x)
        x = x + n.a(x)
        y = n.take(n.norm(x)).relu()
        return n.last(x + n.b(y)).relu()

    block = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4), nn.ReLU(),
                          conv(4, 6))  # fmt: skip
    return Net(run, stem=conv(3, 6), a=block, norm=nn.BatchNorm2d(6), take=ChannelSelect([0, 2, 5]),
               b=conv(3, 6), last=nn.BatchNorm2d(6))  # fmt: skip


def depthwise():
    return Net(lambda n, x: n.c(n.b(n.a(x))), a=cbr(3, 6, 1), b=cbr(6, 6, groups=6), c=cbr(6, 5, 1))


def multiplier():
    return Net(lambda n, x: n.c(n.b(n.a(x))), a=cbr(3, 4, 1), b=cbr(4, 12, groups=4), c=cbr(12, 5))


def grouped():
    def run(n, x):
        x = n.stem(x)
        return functional.relu(x + n.c(n.b(n.a(x))))

    return Net(run, stem=cbr(3, 5), a=cbr(5, 12, 1), b=cbr(12, 8, groups=4), c=cbr(8, 5, 1))


def shuffled():
    def run(n, x):
        x = n.b(n.a(x))
        count, size, height, width = x.size()
        x = x.view(count, 2, size // 2, height, width).transpose(1, 2).contiguous()
        return n.d(n.c(x.view(count, -1, height, width)))

    return Net(run, a=cbr(3, 8), b=cbr(8, 12, groups=2), c=cbr(12, 8, groups=2), d=conv(8, 4))


def shuffle_module():
    return Net(lambda n, x: n.d(n.s(n.a(x))), a=cbr(3, 12), s=nn.ChannelShuffle(3), d=conv(12, 4))


def halves():
    def run(n, x):
        a, b = n.a(x).chunk(2, dim=1)
        return torch.cat((a, n.b(b)), dim=1)

    return Net(run, a=cbr(3, 8), b=cbr(4, 4))


def unequal():
    def run(n, x):
        a, b = n.a(x).split([3, 5], dim=1)
        return torch.cat((n.b(a), b), dim=1)

    return Net(run, a=cbr(3, 8), b=cbr(3, 4))


def picked():
    index = torch.tensor([4, 0, 2, 5])
    return Net(
        lambda n, x: n.b(n.a(x).index_select(1, n.index)), a=cbr(3, 6), b=cbr(4, 5), index=index
    )


def subscripted():
    index = torch.tensor([4, 0, 2, 5])
    return Net(lambda n, x: n.b(n.a(x)[:, n.index]), a=cbr(3, 6), b=cbr(4, 5), index=index)


def selected():
    return Net(
        lambda n, x: n.b(n.t(n.a(x))), a=cbr(3, 6), t=ChannelSelect([5, -1, 0, 1, 1]), b=cbr(5, 4)
    )


def excited():
    def run(n, x):
        x = n.a(x)
        scale = functional.hardsigmoid(n.up(functional.silu(n.down(n.pool(x)))))
        return n.b(scale * x)

    return Net(run, a=cbr(3, 6), pool=nn.AdaptiveAvgPool2d(1), down=conv(6, 4, 1), up=conv(4, 6, 1),
               b=cbr(6, 4))  # fmt: skip


def convnext():
    def run(n, x):
        x = n.stem(x)
        y = n.norm(n.dw(x).permute(0, 2, 3, 1))
        y = n.shrink(functional.gelu(n.grow(y))).permute(0, 3, 1, 2)
        return n.end(x + n.scale * y)

    return Net(run, stem=conv(3, 6), dw=conv(6, 6, groups=6), norm=nn.LayerNorm(6),
               grow=nn.Linear(6, 12), shrink=nn.Linear(12, 6), end=conv(6, 5),
               scale=nn.Parameter(torch.ones(6, 1, 1)))  # fmt: skip


def scaled():
    def run(n, x):
        x = n.a(x) * n.scale
        y = n.b(x) + n.shift.view(1, -1, 1, 1)
        return n.c(functional.prelu(y, n.slope))

    return Net(run, a=cbr(3, 5), b=conv(5, 6), c=conv(6, 4), scale=torch.randn(5, 1, 1),
               shift=nn.Parameter(torch.randn(6)), slope=nn.Parameter(torch.rand(6)))  # fmt: skip


def normed():
    layers = (conv(3, 5), nn.InstanceNorm2d(5, affine=True), nn.PReLU(5), conv(5, 6),
              nn.GroupNorm(6, 6), nn.ReLU6(), conv(6, 7), nn.BatchNorm2d(7, affine=False),
              nn.Hardswish(), conv(7, 4), nn.GroupNorm(2, 4))  # fmt: skip
    return Net(lambda n, x: n.all(x), all=nn.Sequential(*layers))


def plain_norms():
    """Norms without parameters per channel."""
    layers = (conv(3, 5), nn.InstanceNorm2d(5), conv(5, 6), nn.GroupNorm(6, 6, affine=False),
              nn.ReLU(), conv(6, 7), nn.LayerNorm([SIDE, SIDE]), conv(7, 4))  # fmt: skip
    return Net(lambda n, x: n.all(x), all=nn.Sequential(*layers))


def shared():
    def run(n, x):
        x = n.a(x)
        return n.b(n.twice(n.twice(x)))

    return Net(run, a=cbr(3, 5), twice=cbr(5, 5), b=cbr(5, 4))


def deep():
    stochastic = import_torchvision().ops.StochasticDepth(0.3, "row")

    def run(n, x):
        x = n.a(x)
        return n.c(x + n.depth(n.b(x)))

    return Net(run, a=cbr(3, 5), b=cbr(5, 5), c=cbr(5, 4), depth=stochastic)


def attended():
    """One attention map for all channels, computed from their mean."""

    def run(n, x):
        x = n.a(x)
        return n.b(x * torch.sigmoid(n.map(x)))

    return Net(run, a=cbr(3, 5), map=conv(5, 1), b=cbr(5, 4))


def permuted():
    index = torch.tensor([7, 0, 3, 2, 1, 6, 5, 4])
    a, b = cbr(3, 8), cbr(8, 8, groups=2)
    return Net(lambda n, x: n.b(n.a(x)[:, n.index]), a=a, b=b, index=index)


def permuted_take():
    take = ChannelSelect([7, 0, 3, 2, 1, 6, 5, 4])
    a, b = cbr(3, 8), cbr(8, 8, groups=2)
    return Net(lambda n, x: n.c(n.b(n.t(n.a(x)))), a=a, t=take, b=b, c=conv(8, 3))


def swapped():
    def run(n, x):
        a, b = n.a(x), n.b(x)
        return n.c(torch.cat([a, b], 1) + torch.cat([b, a], 1))

    return Net(run, a=cbr(3, 4), b=cbr(3, 4), c=conv(8, 4))


def norm_twice():
    def run(n, x):
        a = n.a(x)
        return n.c(n.norm(a) + n.norm(n.b(x))) + n.c(a)

    return Net(run, a=conv(3, 5), b=conv(3, 5), norm=nn.BatchNorm2d(5), c=conv(5, 4))


def tied():
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 5), b=conv(5, 5), c=conv(5, 5))
    net.c.weight = net.b.weight
    return net


def aliased():
    same = conv(5, 5)
    layers = {"stem": cbr(3, 5), "one": same, "other": same, "last": conv(5, 4)}
    return Net(lambda n, x: n.last(n.other(n.stem(x))), **layers)


def deep_then_grouped():
    a, b, c = cbr(3, 8), cbr(8, 8, groups=8), cbr(8, 8, groups=4)
    return Net(lambda n, x: n.c(n.b(n.a(x))), a=a, b=b, c=c)


def mirrored():
    a = nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect")
    b = nn.Conv2d(5, 4, 3, padding="same", padding_mode="circular")
    return Net(lambda n, x: n.b(n.a(x)), a=a, b=b)


def up_again():
    def run(n, x):
        a = n.a(x)
        b = n.b(functional.max_pool2d(a, 2))
        return n.c(torch.cat([a, functional.interpolate(b, scale_factor=2)], 1))

    return Net(run, a=cbr(3, 5), b=cbr(5, 6), c=cbr(11, 4))


def pixelwise():
    def run(n, x):
        return n.c(functional.relu(n.b(n.a(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)

    return Net(run, a=nn.Linear(3, 6), b=nn.Linear(6, 5), c=nn.Linear(5, 4))


def positioned():
    """A bias for every channel and position, and one scale for all of them."""
    own = {"place": nn.Parameter(torch.randn(1, 5, SIDE, SIDE)), "one": nn.Parameter(torch.ones(1))}
    return Net(lambda n, x: n.b(n.a(x) + n.place) * n.one, a=conv(3, 5), b=conv(5, 4), **own)


def looked_up():
    """Positional biases looked up in a table by an index buffer, which has another shape."""

    def run(n, x):
        places = n.table[n.index.view(-1)].view(SIDE, SIDE, -1).permute(2, 0, 1)
        return n.b(n.a(x) + places.unsqueeze(0))

    own = {
        "index": torch.randint(7, (2, SIDE * SIDE // 2)),
        "table": nn.Parameter(torch.randn(7, 5)),
    }
    return Net(run, a=conv(3, 5), b=conv(5, 4), **own)


def frozen():
    norm = import_torchvision().ops.FrozenBatchNorm2d(5)
    return Net(lambda n, x: n.b(functional.relu(n.f(n.a(x)))), a=conv(3, 5), b=conv(5, 4), f=norm)


def gated():
    def run(n, x):
        a, b = torch.chunk(n.a(x), 2, 1)
        return n.b(a * b.sigmoid())

    return Net(run, a=conv(3, 8), b=conv(4, 4))


def extremes():
    def run(n, x):
        a = n.a(x)
        high, _ = a.flatten(2).max(dim=2)
        low = a.flatten(2).min(2, keepdim=True)[0].unsqueeze(3)
        return n.b(torch.max(a, other=low) + high[:, :, None, None])

    return Net(run, a=conv(3, 5), b=conv(5, 4))


def spread():
    def run(n, x):
        a = functional.normalize(n.a(x), dim=(2, 3))
        deviation = a.std((2, 3), False, True) + a.var(dim=(2, 3), keepdim=True)
        return n.b(a * deviation)

    return Net(run, a=conv(3, 5), b=conv(5, 4))


def reversed_and_repeated():
    def run(n, x):
        a = n.a(x)
        return n.b(a.flip(1, 3).repeat(1, 2, 1, 1) + torch.flip(torch.cat([a, a], 1), dims=(2,)))

    return Net(run, a=conv(3, 5), b=conv(10, 4))


def repeated():
    return Net(lambda n, x: n.b(n.a(x).repeat(1, 2, 1, 2)), a=conv(3, 5), b=conv(10, 4))


def axes_swapped():
    def run(n, x):
        return n.b(torch.swapaxes(n.a(x).swapdims(1, 3), axis0=1, axis1=3))

    return Net(run, a=conv(3, 5), b=conv(5, 4))


def gated_at_once():
    layers = {"a": conv(3, 8), "b": conv(4, 12), "c": conv(6, 4)}
    return Net(lambda n, x: n.c(n.glu(n.b(functional.glu(n.a(x), 1)))), glu=nn.GLU(1), **layers)


def pixels_shuffled():
    def run(n, x):
        return n.c(functional.pixel_shuffle(n.b(n.up(n.a(x))), 3))

    return Net(run, a=conv(3, 20), up=nn.PixelShuffle(2), b=conv(5, 18), c=conv(2, 4))


class Own(nn.Module):
    """A user's own module: parameters outside of layers, two branches, sizes read from tensors."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.offset = nn.Parameter(torch.randn(6))
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.matrix = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        x = functional.relu(functional.conv2d(x, self.kernel, self.offset, stride=2))
        x = torch.cat([self.left(x), self.right(x).clamp(min=0)], dim=1)
        x = functional.adaptive_max_pool2d(x, 1)
        return functional.linear(x.reshape(x.shape[0], x.shape[1]), self.matrix)


SMALL = [
    chain, flat, viewed, residual, padded, pad_module, joined_zeros, taken, doubled, dense, preact,
    depthwise, multiplier, grouped, shuffled, shuffle_module, halves, unequal, picked, subscripted,
    selected, excited, convnext, scaled, normed, shared, deep, attended, Own, permuted, swapped,
    permuted_take, norm_twice, tied, aliased, deep_then_grouped, mirrored, up_again, pixelwise,
    positioned, frozen, gated, plain_norms, looked_up, extremes, spread, reversed_and_repeated,
    repeated, axes_swapped, gated_at_once, pixels_shuffled,
]  # fmt: skip


@functools.cache
def graph_of(make):
    """A network and its channel graph, which does not depend on the weights."""
    model = build(make)
    return model, channels.build_channel_graph(model, images())


@pytest.mark.parametrize("make", SMALL)
@given(seed=st.integers(0, 10**6))
@examples(max_examples=5, deadline=None, derandomize=True)
def test_masked_equals_compact(make, seed):
    (model, graph), batch = graph_of(make), images(seed=seed)
    randomise(model, seed)
    before = copy.deepcopy(model.state_dict())
    masked, compact = check(model, graph, at_random(graph, seed), batch)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert difference(rebuilt(make, compact), compact.model, batch) == 0
    assert difference(masked.float(), compact.to(torch.float32).model, batch.float()) < 1e-4


LOCKED_WHOLLY = {unequal}  # only the channels inside can be removed


def parting(graph, group):
    """Selections of channels such that, of any two channels, some selection has only one.

    The bits of the channel numbers give this. All channels come first, a few random selections
    last.
    """
    yield (numbers := torch.arange(group.size))
    for bit in range((group.size - 1).bit_length()):
        yield numbers[numbers >> bit & 1 == 1]
    for seed in range(3):
        yield at_random(graph, seed, {group.name}).get(group.name, numbers[:0])


@pytest.mark.parametrize("make", SMALL)
def test_every_group_alone(make):
    (model, graph), batch = graph_of(make), images()
    randomise(model, 0)
    assert free(graph) or make in LOCKED_WHOLLY
    bound = {name for b in graph.balances for part in b.parts for name, _ in part}
    for group in free(graph):
        tried = []
        for some in parting(graph, group):
            rest = torch.tensor([k for k in range(group.size) if k not in some.tolist()]).long()
            for numbers in (some, rest):
                chosen = graph.removable({group.name: numbers})
                listed = {name: sorted(index.tolist()) for name, index in chosen.items()}
                if chosen and listed not in tried:
                    check(model, graph, chosen, batch)
                    tried.append(listed)
        assert tried or group.size == 1 or group.name in bound, group.name


@pytest.mark.parametrize("make", [grouped, shuffled, shuffle_module, halves])
def test_something_is_allowed_where_parts_must_be_balanced(make):
    graph = channels.build_channel_graph(build(make), images())
    everything = {group.name: torch.arange(group.size) for group in free(graph)}
    allowed = graph.removable(everything)
    bound = {name for b in graph.balances for part in b.parts for name, _ in part}
    assert bound & set(allowed)
    graph.plan(allowed)


def test_whole_groups_of_a_convolution_go_and_unequal_ones_are_refused():
    model, batch = build(grouped), images()
    graph = channels.build_channel_graph(model, batch)
    group_of = {source: g.name for g in graph.groups for source in g.producers}
    inner, outer = group_of["a.0"], group_of["b.0"]
    chosen = {inner: torch.tensor([3, 4, 5]), outer: torch.tensor([2, 3])}  # second of four groups
    _, compact = check(model, graph, chosen, batch)
    layer = compact.model.b[0]
    assert (layer.groups, layer.in_channels, layer.out_channels) == (3, 9, 6)
    assert graph.removable(chosen).keys() == chosen.keys()
    assert difference(rebuilt(grouped, compact), compact.model, batch) == 0
    with pytest.raises(PruningError, match=r"groups of b\.0 would no longer be of one size"):
        graph.plan({inner: torch.tensor([3])})
    assert graph.removable({inner: torch.tensor([3])}) == {}
    balances = {balance.where: balance for balance in graph.balances}
    assert [len(part) for part in balances["inputs of b.0"].parts] == [3, 3, 3, 3]


# ---- dead channels ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", SMALL)
@given(seed=st.integers(0, 10**6))
@examples(max_examples=8, deadline=None, derandomize=True)
def test_dead_channels_go_and_nothing_changes(make, seed):
    (model, graph), batch = graph_of(make), images(seed=seed)
    randomise(model, seed)
    chosen = weights_at_random(model, graph, seed)
    masks.apply(model, chosen)
    try:
        compact = removal.remove_dead(model, chosen, batch[:1], graph)
    except PruningError as error:
        assert "has no living output left" in str(error)
        with torch.no_grad():
            out = model(images(seed=1)) - model(images(seed=2))
        assert float(out.abs().max()) < 1e-9, "something still depends on the input"
        return
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    for name, mask in compact.masks.items():
        assert mask.shape == compact.model.get_parameter(name).shape
        assert not compact.model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("make", [residual, dense, depthwise, excited, grouped, convnext, taken])
def test_what_was_masked_by_channels_is_found_dead(make):
    model, batch = build(make), images()
    graph = channels.build_channel_graph(model, batch)
    # a LayerNorm reads all channels of its input, so none of them is dead
    alone = {g.name for g in graph.groups if not bool(graph.normalised[g.ids].any())}
    chosen = at_random(graph, 3, alone)
    direct = removal.remove(model, chosen, batch, {}, graph)
    found = removal.remove_dead(removal.mask(model, chosen, batch, graph), {}, batch)
    sizes = {name: tuple(t.shape) for name, t in direct.model.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in found.model.state_dict().items()} == sizes


def test_a_silent_filter_of_a_sum_goes_only_with_all_others():
    model, batch = build(residual), images()
    graph = channels.build_channel_graph(model, batch)
    stream = next(g for g in graph.groups if "stem.0" in g.producers)
    assert stream.producers == ("stem.0", "a2.0")
    with torch.no_grad():  # channel 1 of stem is zero, that of a2 is not
        for tensor in (model.stem[1].weight, model.stem[1].bias):
            tensor[1] = 0
    assert len(removal.remove_dead(model, {}, batch).kept["stem.0"]) == 6
    with torch.no_grad():
        for tensor in (model.a2[1].weight, model.a2[1].bias):
            tensor[1] = 0
    compact = removal.remove_dead(model, {}, batch)
    assert compact.kept["stem.0"].tolist() == compact.kept["a2.0"].tolist() == [0, 2, 3, 4, 5]
    assert difference(model, compact.model, batch) < 1e-9


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_norms_shift_is_folded_into_the_next_norm_unless_a_border_sees_it(kernel):
    layers = (
        *cbr(3, 4),
        *cbr(4, 5, kernel),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    model, batch = randomise(nn.Sequential(*layers).double(), 1), images()
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0, 0.7
    compact = removal.remove_dead(model, {}, batch)
    assert compact.kept["0"].tolist() == ([0, 1, 3] if kernel == 1 else [0, 1, 2, 3])
    assert set(compact.shift) == ({"3"} if kernel == 1 else set())
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    if kernel == 3:  # a kernel whose edges are zero does not read the border
        with torch.no_grad():
            edge = model[3].weight[:, 2]
            edge[:, 0], edge[:, 2], edge[:, :, 0], edge[:, :, 2] = 0, 0, 0, 0
        compact = removal.remove_dead(model, {}, batch)
        assert compact.kept["0"].tolist() == [0, 1, 3]
        assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9


class DepthwiseMean(nn.Module):
    """Filters 0 to 3 of `c` are constant; `d` gives another mean of them at each image size."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 16, 1)
        self.d = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.h = nn.Linear(16, 4)

    def forward(self, x):
        return self.h(self.d(self.c(x).relu()).relu().mean((2, 3)))


class Hourglass(nn.Module):
    """Takes images whose sides are multiples of 4; padding is visible in images larger than 4."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 5, 3, padding=1)
        self.c, self.h = nn.Conv2d(3, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        y = functional.interpolate(self.b(self.a(x).relu()), scale_factor=4)
        return self.h((y + self.c(x)).relu().mean((2, 3)))


class ThirdStride(nn.Module):
    """Only the last column of `d` is not zero: it reads padding where 2 is not a divisor.

    That is so at side 9, but neither at 4 nor at 8.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.d, self.h = nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.Linear(5, 2)

    def forward(self, x):
        y = functional.avg_pool2d(self.a(x).relu(), 2)
        return self.h(self.d(y).relu().mean((2, 3)))


class WideKernel(nn.Module):
    """`b` has weights for pixels at a distance of 3 only, which images of side 4 do not have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 6, 7, padding=3)
        self.c, self.d, self.h = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        y = self.a(x)
        return self.h((self.c(y) + self.d(self.b(y).relu())).relu().mean((2, 3)))


def with_constant(make, layer):
    """A random network in which the first four filters of a layer are constant."""
    model = build(make)
    with torch.no_grad():
        model.get_submodule(layer).weight[:4] = 0
        model.get_submodule(layer).bias[:4] = 1
        if isinstance(model, ThirdStride):
            model.d.weight[:, :, :, :2] = 0
            model.d.weight[:, :, 0] = 0
        if isinstance(model, WideKernel):
            model.b.weight[:, :, 1:6, 1:6] = 0
            model.b.weight[:, :, [0, 6], 1:6] = model.b.weight[:, :, 1:6, [0, 6]] = 0
    return model


@pytest.mark.parametrize(
    ("make", "layer", "side", "sides"),
    [
        (DepthwiseMean, "c", 8, (7, 9, 16, 33)),
        (Hourglass, "a", 4, (8, 16, 20)),
        (ThirdStride, "a", 8, (9, 10, 16, 18, 33)),
        (WideKernel, "a", 4, (8, 16, 33)),
    ],
)
def test_constants_are_folded_only_if_they_are_equal_at_every_image_size(make, layer, side, sides):
    model, batch = with_constant(make, layer), images(side=side)
    compact = removal.remove_dead(model, {}, batch)
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    for other in sides:
        assert difference(model, compact.model, images(side=other)) < 1e-9, other


def test_what_a_single_pixel_hides_is_not_dead():
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(num_classes=5)  # layer4 has 1x1 pixels at side 32
    randomise(model.double(), 3)
    chosen = {
        name: torch.rand(p.shape) < 0.0005 if name.startswith("layer4") else torch.ones_like(p) > 0
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    masks.apply(model, chosen)
    compact = removal.remove_dead(model, chosen, images(side=32))
    for side in (32, 64, 97):
        assert difference(model, compact.model, images(2, side)) < 1e-9, side


@pytest.mark.parametrize("viewed", [False, True])
def test_a_network_of_one_image_size_folds_what_is_constant_there(viewed):
    class Flat(DepthwiseMean):
        def __init__(self):
            super().__init__()
            self.width, self.h = 16 * 4, nn.Linear(16 * 4, 4)

        def forward(self, x):
            y = functional.avg_pool2d(self.d(self.c(x).relu()).relu(), 4)
            # a view makes a batch of 4 out of a larger image
            return self.h(y.view(-1, self.width) if viewed else y.flatten(1))

    model, batch = with_constant(Flat, "c"), images()
    compact = removal.remove_dead(model, {}, batch)
    assert compact.kept["c"].tolist() == list(range(4, 16))
    assert difference(model, compact.model, batch) < 1e-9


def test_a_dead_branch_keeps_one_channel_as_long_as_the_network_lives():
    model, batch = build(residual), images()
    with torch.no_grad():
        model.a2[0].weight.zero_()
    compact = removal.remove_dead(model, {}, batch)
    assert len(compact.kept["a1.0"]) == 1
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9


# ---- torchvision -----------------------------------------------------------------------------

AUX = {"aux_logits": False, "init_weights": False}
FAST = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "regnet_x_400mf"]
SLOW = ["resnet50", "resnext50_32x4d", "mobilenet_v2", "efficientnet_b0", "densenet121",
        "regnet_y_400mf", "convnext_tiny", "vgg11_bn", "googlenet", "inception_v3", "mnasnet0_5",
        "alexnet"]  # fmt: skip


def vision(name):
    options = AUX if name in ("googlenet", "inception_v3") else {}
    return lambda: getattr(import_torchvision().models, name)(num_classes=5, **options)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_torchvisions_networks(name):
    side = 80 if name == "inception_v3" else 64
    model, batch = randomise(vision(name)().double(), 0), images(2, side)
    graph = channels.build_channel_graph(model, batch)
    chosen = at_random(graph, 1)
    masked, compact = check(model, graph, chosen, batch)
    assert difference(rebuilt(vision(name), compact), compact.model, batch) == 0
    taken = sum(map(len, chosen.values()))
    assert taken > 0.05 * sum(group.size for group in free(graph))
    dead = removal.remove_dead(masked, {}, batch)
    assert proof.verify(masked, dead, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(dead.model) <= count(compact.model)
    single = compact.to(torch.float32)
    assert difference(masked.float(), single.model, batch.float()) < 1e-4


def maxvit():
    """Small, with one head of attention in the first stage, and two in the second."""
    sizes = {"block_channels": [8, 16], "block_layers": [1, 1], "head_dim": 8, "partition_size": 2}
    return import_torchvision().models.MaxVit(
        (64, 64), stem_channels=8, stochastic_depth_prob=0.0, num_classes=5, **sizes
    )


def test_maxvit():
    model, batch = randomise(maxvit().double(), 0), images(2, 64)
    graph = channels.build_channel_graph(model, batch)
    assert sum(group.size for group in free(graph)) > 250
    for seed in range(5):
        masked, _ = check(model, graph, at_random(graph, seed), batch)
    dead = removal.remove_dead(masked, {}, batch)
    assert proof.verify(masked, dead, batch, proof.FLOAT64_TOLERANCE) < 1e-9


MORE = ["resnet34", "wide_resnet50_2", "efficientnet_v2_s", "mobilenet_v3_large",
        "shufflenet_v2_x1_0", "vit_b_16", "swin_t", "deit_tiny"]  # fmt: skip


def full_size(name, side):
    """A network with its published widths, for images of this side length."""
    if name == "deit_tiny":
        timm = pytest.importorskip("timm")
        return timm.create_model("deit_tiny_patch16_224", img_size=side, num_classes=5)
    if name == "vit_b_16":
        return import_torchvision().models.vit_b_16(image_size=side, num_classes=5)
    return vision(name)()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW, *MORE])
def test_200_random_selections_of_a_full_network(name):
    side = {"inception_v3": 80, "vit_b_16": 32, "deit_tiny": 32}.get(name, 64)
    model, batch = randomise(full_size(name, side).double(), 0), images(1, side)
    graph = channels.build_channel_graph(model, batch)
    for seed in range(200):
        chosen = at_random(graph, seed)
        masked = removal.mask(model, chosen, batch, graph)
        compact = removal.remove(model, chosen, batch, {}, graph)
        assert difference(masked, compact.model, batch) < 1e-9, seed


def test_a_network_in_training_mode_is_traced_in_eval_mode_and_left_in_training_mode():
    model = vision("resnet18")().train()
    channels.build_channel_graph(model, images(1, 64).float())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "sums"),
    [
        ("resnet18", [3, 3, 3, 3]),
        ("resnet34", [4, 5, 7, 4]),
        ("resnet50", [1, 4, 5, 7, 4]),
    ],
)
def test_layers_of_the_sums_of_residual_networks(name, sums):
    """Known by hand: the stem, the last convolution of every block, and the projections."""
    graph = channels.build_channel_graph(vision(name)(), images(1, 64).float())
    last = "conv2" if name != "resnet50" else "conv3"

    def in_a_sum(source):
        return source == "conv1" or source.endswith((last, "downsample.0"))

    found = [g for g in graph.groups if g.producers and in_a_sum(g.producers[0]) and not g.locked]
    assert [len(group.producers) for group in found] == sums
    widths = [64, 128, 256, 512] if last == "conv2" else [64, 256, 512, 1024, 2048]
    assert [group.size for group in found] == widths
    inner = [g for g in graph.groups if len(g.producers) == 1 and g.producers[0] != "conv1"]
    assert all(len(g.consumers) == 1 for g in inner if not g.locked)
    assert {g.name: g.locked for g in graph.groups if g.locked} == {
        "input": "an input of the network",
        "fc": "an output of the network",
    }


# ---- the groups, derived without a graph -------------------------------------------------------


def silent_entries(model, batch):
    """Entries of parameters that affect no output: no gradient along a random direction."""
    model.zero_grad()
    out = model(batch)
    chance = torch.Generator().manual_seed(9)
    (out * torch.randn(out.shape, generator=chance, dtype=out.dtype)).sum().backward()
    return {
        (name, position)
        for name, p in model.named_parameters()
        for position in (p.grad.abs() <= 1e-14).flatten().nonzero().flatten().tolist()
    }


def entries(model, group, number, kinds):
    """Entries of parameters that belong to one channel, as (name, index into the flat tensor)."""
    parameters = dict(model.named_parameters())
    found = set()
    for member in group.members:
        if member.kind in kinds and member.tensor in parameters:
            places = torch.arange(parameters[member.tensor].numel())
            numbers = member.entries(places.reshape(parameters[member.tensor].shape))
            found |= {(member.tensor, place) for place in numbers[number].tolist()}
    return found


def without(model, places):
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in places:
            silenced.get_parameter(name).view(-1)[place] = 0
    return silenced


@pytest.mark.parametrize(
    "make",
    [
        chain,
        flat,
        residual,
        padded,
        dense,
        depthwise,
        multiplier,
        grouped,
        excited,
        deep,
        shuffled,
    ],
)
def test_what_falls_silent_with_a_channel_is_what_the_group_says(make, monkeypatch):
    """Groups agree with what gradients say, without a channel graph.

    If all weights that read a channel are zero, exactly the entries that compute it have no
    gradient. If the entries that compute it are zero, the entries that read it have no gradient,
    and no others outside of the group.
    """
    # a smooth activation, which never gives exact zeros
    monkeypatch.setattr(functional, "relu", lambda x, inplace=False: torch.tanh(x))
    model, batch = build(make, 4), images(16, seed=2)
    graph = channels.build_channel_graph(model, batch)
    already = silent_entries(model, batch)
    for group in free(graph):
        number = group.size // 2
        makes = entries(model, group, number, ("out", "bias", "norm"))
        reads = entries(model, group, number, ("in",))
        assert makes and reads
        deaf = silent_entries(without(model, reads), batch) - already
        assert deaf == makes - already, group.name
        mute = silent_entries(without(model, makes), batch) - already
        assert reads - already <= mute <= (reads | makes), group.name
        for place in sorted({name for name, _ in reads}):  # one remaining reader keeps it alive
            some = {entry for entry in reads if entry[0] != place}
            assert not makes - already <= silent_entries(without(model, some), batch), place


# ---- the groups as text ------------------------------------------------------------------------


def test_a_graph_prints_its_groups_with_members_and_reasons():
    graph = channels.build_channel_graph(build(residual), images())
    assert str(graph).split("\n") == [
        "Net, input 3x8x8: 6 groups, 23 of 29 channels removable",
        "",
        "group             channels  producers         consumers         norms and scales",
        "----------------  --------  ----------------  ----------------  ----------------",
        "stem.0                   6  stem.0, a2.0      a1.0, short,      stem.1, a2.1",
        "                                              b1.0",
        "  coupled by: a residual sum",
        "input                    3                    stem.0",
        "  locked: an input of the network",
        "a1.0                     4  a1.0              a2.0              a1.1",
        "short                    8  short, b2.0       head.2            b2.1",
        "  coupled by: a residual sum",
        "b1.0                     5  b1.0              b2.0              b1.1",
        "head.2                   3  head.2",
        "  locked: an output of the network",
    ]


def test_long_names_widen_a_column_of_the_printed_graph():
    model = nn.Sequential(
        OrderedDict(a_layer_with_a_long_name=conv(3, 4), and_one_behind_it=conv(4, 2))
    )
    lines = str(channels.build_channel_graph(model, torch.zeros(1, 3, 4, 4))).split("\n")
    assert any(
        line.split()
        == ["a_layer_with_a_long_name", "4", "a_layer_with_a_long_name", "and_one_behind_it"]
        for line in lines
    )
    assert lines[3].split() == ["-" * width for width in (24, 8, 24, 24, 16)]


# ---- order, names, members ------------------------------------------------------------------


@pytest.mark.parametrize("make", SMALL)
def test_members_of_all_groups_cover_every_tensor_once(make):
    model, graph = graph_of(make)
    seen = {}
    for group in graph.groups:
        assert len(group.ids) == group.size == len({*group.ids.tolist()})
        for member in group.members:
            assert member.index.shape[0] == group.size
            seen.setdefault((member.tensor, member.axis), []).extend(
                member.index.flatten().tolist()
            )
    inputs = {n: len(layer.inputs) for n, layer in graph.layers.items()}
    for (name, axis), found in seen.items():
        tensor = model.state_dict()[name]
        layer = name.removesuffix(".weight")
        whole = inputs[layer] if axis == 1 and layer in inputs else tensor.shape[axis]
        assert len(set(found)) == len(found)
        zeros = make in (selected, preact, taken, joined_zeros)
        assert len(found) == whole or zeros, (name, axis)
    assert len({group.name for group in graph.groups}) == len(graph.groups)


def test_the_same_network_gives_the_same_groups():
    one, other = (channels.build_channel_graph(build(dense), images()) for _ in range(2))
    for a, b in zip(one.groups, other.groups, strict=True):
        assert (a.name, a.size, a.producers, a.consumers) == (
            b.name,
            b.size,
            b.producers,
            b.consumers,
        )
        assert [s.tensor for s in a.members] == [s.tensor for s in b.members]
        assert all(torch.equal(s.index, t.index) for s, t in zip(a.members, b.members, strict=True))


def test_entries_of_a_member_by_hand():
    model = build(viewed)
    graph = channels.build_channel_graph(model, images())
    group = free(graph)[0]
    by_kind = {(member.tensor, member.kind): member for member in group.members}
    weight = model.fc.weight
    read = by_kind["fc.weight", "in"].entries(weight)
    assert torch.equal(read[1], weight[:, 4:8].T.flatten())
    made = by_kind["a.0.weight", "out"].entries(model.a[0].weight)
    assert torch.equal(made[2], model.a[0].weight[2].flatten())


# ---- index, masks, checkpoints, decisions -------------------------------------------------------


def test_channel_select_by_hand():
    x = torch.arange(12.0).reshape(1, 3, 2, 2)
    out = ChannelSelect([2, -1, 0])(x)
    assert torch.equal(out[:, 0], x[:, 2]) and torch.equal(out[:, 2], x[:, 0])
    assert not out[:, 1].any()


def test_channels_before_and_behind_a_channel_select_are_removed_independently():
    model, batch = build(taken), images()
    graph = channels.build_channel_graph(model, batch)
    name = {source: g.name for g in graph.groups for source in g.producers}
    chosen = {name["stem.0"]: torch.tensor([1]), name["b.0"]: torch.tensor([0, 2, 8])}
    _, compact = check(model, graph, chosen, batch)
    # channel 0 of the stem was selected at position 2, which is removed; channel 1 is removed:
    # zeros at 3
    assert compact.model.take.index.tolist() == [-1, -1, 1, 2, -1, -1]
    assert not [g for g in graph.groups if g.locked and g.producers and g.name != "head.2"]


@pytest.mark.parametrize("make", [grouped, dense, convnext, multiplier, taken])
def test_masks_are_carried_along(make):
    model, batch = build(make), images()
    graph = channels.build_channel_graph(model, batch)
    given_masks = {n: torch.rand(p.shape) > 0.3 for n, p in model.named_parameters()}
    masks.apply(model, given_masks)
    chosen = at_random(graph, 2)
    compact = removal.remove(model, chosen, batch, given_masks, graph)
    assert compact.masks.keys() == given_masks.keys()
    for name, mask in compact.masks.items():
        assert torch.equal(mask, compact.model.get_parameter(name) != 0)


def header():
    return checkpoint.Header("own", {}, ["a", "b", "c"], [3, SIDE, SIDE], [0.0], [1.0], "", "prune")


@pytest.mark.parametrize("make", [m for m in SMALL if m not in (tied, aliased)])
def test_a_compact_network_comes_back_from_its_file(make, tmp_path, monkeypatch):
    model, graph, batch = build(make), graph_of(make)[1], images()
    compact = removal.remove(model, at_random(graph, 6), batch, {}, graph)
    small = compact.to(torch.float32).model
    checkpoint.save(tmp_path / "m.safetensors", header(), small, {})
    monkeypatch.setattr(checkpoint, "build_architecture", lambda _: build(make, 8).float())
    again = checkpoint.load(tmp_path / "m.safetensors").model()
    assert difference(small, again, batch.float()) == 0
    second = channels.build_channel_graph(again, batch)  # the compact network can be pruned again
    more = removal.remove(again, at_random(second, 7), batch, {}, second).model
    checkpoint.save(tmp_path / "m.safetensors", header(), more, {})
    again = checkpoint.load(tmp_path / "m.safetensors").model()
    assert difference(more, again, batch.float()) == 0


def test_normalisations_without_tensors_count_the_channels_that_are_left(tmp_path, monkeypatch):
    model, graph = graph_of(plain_norms)
    chosen = {"all.0": torch.tensor([1, 2]), "all.2": torch.tensor([0]), "all.5": torch.tensor([3])}
    _, compact = check(model, graph, chosen, images())
    small = compact.to(torch.float32).model
    checkpoint.save(tmp_path / "m.safetensors", header(), small, {})
    monkeypatch.setattr(checkpoint, "build_architecture", lambda _: build(plain_norms, 8).float())
    for network in (small, checkpoint.load(tmp_path / "m.safetensors").model()):
        norms = network.all
        assert norms[1].num_features == 3
        assert norms[3].num_groups == norms[3].num_channels == 5
    assert model.all[1].num_features == 5


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("kind", ["masks", "channels", "both"])
def test_the_stage_takes_both_kinds_of_decisions(kind, dead, monkeypatch):
    model = build(residual).float()

    def pruner(settings, subject):
        weights = torch.ones(6, 3, 3, 3, dtype=torch.bool)
        weights[:, 1] = False
        first = {"stem.0": torch.tensor([0, 3])}
        return PruningDecision(
            {} if kind == "channels" else {"stem.0.weight": weights},
            {} if kind == "masks" else first,
        )

    class Params:
        pruner = "own"
        prune = Prune(remove_dead=dead)

        def chosen(self, kind):
            return {"amount": 1}.items()

    info = SimpleNamespace(mean=[0.0] * 3, std=[1.0] * 3, shape=(3, SIDE, SIDE))
    pixels = (images(9).abs() * 50).clamp(max=255).to(torch.uint8)
    train = InMemoryImages(pixels, torch.zeros(9, dtype=torch.int64))
    data = SimpleNamespace(info=info, train=train)
    job = SimpleNamespace(
        params=Params(),
        start=SimpleNamespace(
            model=lambda: copy.deepcopy(model), choices={}, masks={}, header=None
        ),
        data=data,
        header=lambda parent, **notes: notes,
    )
    module = SimpleNamespace(prune=pruner)
    monkeypatch.setattr(prune.plugin, "load", lambda *_: module)
    monkeypatch.setattr(prune.checkpoint, "build_architecture", lambda _: model)
    product = prune.prune(job)
    assert product.model.stem[0].weight.shape[0] == (6 if kind == "masks" else 4)
    if kind != "channels":
        assert product.masks["stem.0.weight"].shape == product.model.stem[0].weight.shape
        assert not product.model.stem[0].weight[:, 1].any()


# ---- what is refused ---------------------------------------------------------------------------


def sorted_channels():
    return Net(lambda n, x: n.b(n.a(x).cumsum(1)), a=cbr(3, 4), b=cbr(4, 4))


def branching():
    return Net(lambda n, x: n.b(n.a(x)) if x.sum() > 0 else n.a(x), a=cbr(3, 4), b=cbr(4, 4))


def unused():
    return Net(lambda n, x: n.a(x), a=cbr(3, 4), never=conv(4, 4))


class UnusedToken(nn.Sequential):
    """Two convolutions, and a parameter of the network itself that forward does not use."""

    def __init__(self):
        super().__init__(cbr(3, 4), cbr(4, 4))
        self.token = nn.Parameter(torch.ones(1, 4))


def transposed():
    return Net(lambda n, x: n.b(n.a(x)), a=cbr(3, 4), b=nn.ConvTranspose2d(4, 4, 2))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (sorted_channels, r"'cumsum'.*cumsum"),
        (branching, "cannot follow Net.*control flow"),
        (unused, "layer never never runs"),
        (UnusedToken, "parameter token is not used"),
        (transposed, r"'b'.*ConvTranspose2d"),
    ],
)
def test_what_is_not_understood_is_named(make, named):
    with pytest.raises(PruningError, match=named):
        channels.build_channel_graph(build(make), images())


def sine():
    return Net(lambda n, x: n.b(torch.sin(n.a(x))), a=cbr(3, 6), b=conv(6, 4))


def test_a_new_operation_is_one_entry_in_the_table(monkeypatch):
    """For the graph as well as for dead channels: the constant sin(0.5) is folded."""
    model, batch = build(sine), images()
    with pytest.raises(PruningError, match="do not know what sin does to channels"):
        channels.build_channel_graph(model, batch)
    entry = operators.Operator(elementwise.unchanged, elementwise=True)
    monkeypatch.setitem(operators.OPERATORS, "sin", entry)
    graph = channels.build_channel_graph(model, batch)
    check(model, graph, at_random(graph, 1), batch)
    model.b.padding = (0, 0)  # with padding, the border would not be constant
    with torch.no_grad():
        model.a[1].weight[2], model.a[1].bias[2] = 0, 0.5
    compact = removal.remove_dead(model, {}, batch)
    assert compact.model.a[0].weight.shape[0] == 5
    assert difference(model, compact.model, batch) < 1e-9


def test_a_module_without_an_entry_has_that_of_its_nearest_base():
    class Own(nn.ReLU6):
        pass

    table = operators.OPERATORS
    assert operators.find(Own) is table[nn.ReLU6]
    assert operators.find(nn.Bilinear) is operators.UNKNOWN is operators.find("cumsum")


def hard_coded():
    def run(n, x):
        x = n.a(x)
        return n.fc(x.view(-1, 4 * 4))

    return Net(run, nn.Linear(5, 3), a=cbr(3, 4, stride=4), fc=nn.Linear(4 * 4, 5))


def weighed():
    return Net(lambda n, x: n.b(functional.softmax(n.a(x), dim=1)), a=cbr(3, 4), b=cbr(4, 4))


def summed():
    return Net(lambda n, x: n.b(n.a(x).mean(1, keepdim=True)), a=cbr(3, 4), b=cbr(1, 4))


def layer_normed():
    return Net(lambda n, x: n.b(n.g(n.a(x))), a=conv(3, 4), g=nn.GroupNorm(2, 4), b=conv(4, 4))


def group_normed_by_number():
    return Net(lambda n, x: n.b(functional.group_norm(n.a(x), 4)), a=conv(3, 4), b=conv(4, 4))


def taken_by_view():
    order = torch.tensor([[3, 1], [0, 2]])
    return Net(lambda n, x: n.b(n.a(x)[:, n.i.flatten()]), a=conv(3, 4), i=order, b=conv(4, 4))


def all_normed():
    norm = nn.LayerNorm([4, SIDE, SIDE])
    return Net(lambda n, x: n.b(n.norm(n.a(x))), a=conv(3, 4), norm=norm, b=conv(4, 4))


def across(run, **layers):
    """A network in which an operation combines the channels of `a`."""
    return lambda: Net(lambda n, x: n.b(run(n, n.a(x))), a=conv(3, 4), b=conv(4, 4), **layers)


ACROSS = [
    (across(lambda n, x: x / x.std(1, keepdim=True)), "std sums over them"),
    (across(lambda n, x: x - x.max(dim=1, keepdim=True)[0]), "max_1 sums over them"),
    (across(lambda n, x: x - x.min()), "min_1 sums over them"),
    (across(lambda n, x: functional.normalize(x)), "divided by their norm over all channels"),
    (across(lambda n, x: n.local(x), local=nn.LocalResponseNorm(2)), "the channels beside them"),
    (across(lambda n, x: functional.local_response_norm(x, 2)), "the channels beside them"),
    (
        across(lambda n, x: n.rms(x.transpose(1, 3)).transpose(1, 3), rms=nn.RMSNorm(4)),
        "normalised together by an RMSNorm",
    ),
]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        *ACROSS,
        (group_normed_by_number, "normalised in a hard-coded number of groups"),
        (taken_by_view, "chosen by i"),
        (all_normed, "LayerNorm whose size is hard-coded"),
        (hard_coded, "views them in a hard-coded shape"),
        (weighed, "softmax"),
        (summed, "sums over them"),
        (layer_normed, "normalised together"),
        (padded, "code pads with"),
        (unequal, "splits them at hard-coded positions"),
    ],
)
def test_channels_that_cannot_go_are_locked_with_a_reason(make, reason):
    model, batch = build(make), images()
    graph = channels.build_channel_graph(model, batch)
    group = next(g for g in graph.groups if g.locked and reason in g.locked)
    with pytest.raises(PruningError, match=f"channels of {group.name} cannot.*{reason}"):
        removal.remove(model, {group.name: torch.tensor([0])}, batch)


@pytest.mark.parametrize("make", [make for make, _ in ACROSS])
def test_networks_with_locked_channels_lose_others_and_dead_ones(make):
    model, batch = build(make), images()
    graph = channels.build_channel_graph(model, batch)
    assert [group.name for group in free(graph)] == ["b"]
    masked, _ = check(model, graph, {"b": torch.tensor([0, 2])}, batch)
    compact = removal.remove_dead(masked, {}, batch)
    assert compact.kept["b"].tolist() == [1, 3]
    assert proof.verify(masked, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9


@pytest.mark.parametrize(
    ("use", "where"),
    [
        (lambda values, places: values + places, "'add'"),
        (lambda values, places: values.clamp(max=places), "'clamp'"),
        (lambda values, places: places.double(), "'double'"),
        (lambda values, places: torch.cat([values, places.to(values)], 3), "'to'"),
    ],
)
def test_places_of_the_largest_entries_are_refused(use, where):
    def run(n, x):
        found = n.a(x).max(3, keepdim=True)
        return n.b(use(found[0], found[1]))

    with pytest.raises(PruningError, match=f"through {where}"):
        channels.build_channel_graph(build(lambda: Net(run, a=conv(3, 4), b=conv(4, 4))), images())


@pytest.mark.parametrize("name", ["input", "head.2"])
def test_input_and_output_are_locked(name):
    model, batch = build(chain), images()
    with pytest.raises(PruningError, match=f"channels of {name} cannot be removed"):
        removal.remove(model, {name: torch.tensor([0])}, batch)


@pytest.mark.parametrize("make", [chain, residual, dense, depthwise, grouped])
def test_no_layer_can_be_emptied(make):
    model, batch = build(make), images()
    graph = channels.build_channel_graph(model, batch)
    for group in free(graph):
        with pytest.raises(PruningError, match="would be left without outputs"):
            graph.plan({group.name: torch.arange(group.size)})
    everything = {group.name: torch.arange(group.size) for group in free(graph)}
    check(model, graph, graph.removable(everything), batch)


@pytest.mark.parametrize("number", [-1, 6])
def test_numbers_beyond_the_group_and_unknown_groups_are_refused(number):
    graph = channels.build_channel_graph(build(chain), images())
    with pytest.raises(PruningError, match=r"a\.0 has 6 channels"):
        graph.plan({"a.0": torch.tensor([number])})
    with pytest.raises(PruningError, match="no group of channels is called 'z'"):
        graph.plan({"z": torch.tensor([0])})


def test_verify_finds_a_removal_that_is_wrong():
    model, batch = build(residual), images()
    masked = removal.mask(model, {"a1.0": torch.tensor([1])}, batch)
    compact = removal.remove(model, {"a1.0": torch.tensor([2])}, batch)
    with pytest.raises(PruningError, match="is not the masked one: layer a"):
        proof.verify(masked, compact, batch, proof.FLOAT64_TOLERANCE)
