"""Code that networks of users hold: the compact network computes the same as the masked one."""

import math
import operator
from functools import partial

import pytest
import torch
from cutting import at_random, build, check, difference, free, images, rebuilt
from torch import nn
from torch.nn import functional

import secateur
from secateur.base.errors import PruningError
from secateur.channels.graph import build_channel_graph
from secateur.pruning import removal

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


# ---- a single channel that is left -------------------------------------------------------------


def token_joined():
    def run(net, x):
        x = tokens(net.patches(x))
        x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1)
        return net.head(net.fc(x).relu().mean(1))

    return Code(run, patches=patches(4), token=nn.Parameter(torch.randn(1, 1, 4)),
                fc=nn.Linear(4, 6), head=nn.Linear(6, CLASSES))  # fmt: skip


def joined_maps():
    def run(net, x):
        x = net.a(x)
        return net.head(net.b(torch.cat([x, x], 2)).mean((2, 3)))

    return Code(run, a=conv(3, 4), b=conv(4, 6), head=nn.Linear(6, CLASSES))


def padded_last():
    def run(net, x):
        return net.head(functional.pad(net.a(x).permute(0, 2, 3, 1), (0, 3, 1, 0)).mean((1, 2)))

    return Code(run, a=conv(3, 4), head=nn.Linear(7, CLASSES))


def padded_rows():
    def run(net, x):
        x = functional.pad(net.a(x).permute(0, 2, 3, 1), (0, 0, 1, 0, 2, 1))
        return net.head(net.fc(x).relu().mean((1, 2)))

    return Code(run, a=conv(3, 4), fc=nn.Linear(4, 6), head=nn.Linear(6, CLASSES))


@pytest.mark.parametrize("make", [token_joined, joined_maps, padded_last, padded_rows])
def test_channels_go_down_to_one_and_the_rest_can_be_followed(make):
    graph, batch = equal_at_random(make), images()
    every = {group.name: torch.arange(group.size) for group in free(graph)}
    assert every
    _, compact = check(graph.model, graph, graph.removable(every), batch)
    again = build_channel_graph(compact.model, batch)
    assert all(group.size == 1 for group in free(again))
    dead = removal.remove_dead(compact.model, {}, batch)
    assert difference(compact.model, dead.model, batch) < 1e-9


def test_an_axis_that_is_dropped_once_it_has_one_channel_is_told():
    def run(net, x):
        return net.head(functional.adaptive_avg_pool2d(net.a(x), 1).squeeze())

    model, batch = build(lambda: Code(run, a=conv(3, 4), head=nn.Linear(4, CLASSES))), images()
    graph = build_channel_graph(model, batch)
    check(model, graph, {"a": torch.arange(2)}, batch)
    with pytest.raises(
        PruningError, match=r"'squeeze'.*one channel is left.*name the axes to drop"
    ):
        graph.plan({"a": torch.arange(3)})


# ---- buffers with indices ----------------------------------------------------------------------

ORDER = torch.tensor([2, 0, 3, 5])


def counted_from_the_end():
    index = torch.tensor([-2, 0, 3, -1, -5])
    return Code(lambda n, x: n.head(n.a(x)[:, n.index].mean((2, 3))), a=conv(3, 8), index=index,
                head=nn.Linear(5, CLASSES))  # fmt: skip


def same_for_rows():
    return Code(lambda n, x: n.head(n.a(x)[:, n.index][:, :, n.index].flatten(2).amax(2)),
                a=conv(3, 8), index=ORDER.clone(), head=nn.Linear(4, CLASSES))  # fmt: skip


def same_for_a_table():
    def run(net, x):
        return net.head(net.a(x)[:, net.index].mean((2, 3)) * net.table[net.index].mean())

    return Code(run, a=conv(3, 8), index=ORDER.clone(), table=nn.Parameter(torch.randn(8, 2)),
                head=nn.Linear(4, CLASSES))  # fmt: skip


def rows_only():
    return Code(lambda n, x: n.head(n.a(x)[:, :, n.index].flatten(2).amax(2)),
                a=conv(3, 8), index=ORDER.clone(), head=nn.Linear(8, CLASSES))  # fmt: skip


@pytest.mark.parametrize("make", [counted_from_the_end, rows_only])
def test_channels_by_index_and_rows_by_index_become_fewer(make):
    assert free(equal_at_random(make))


@pytest.mark.parametrize("make", [same_for_rows, same_for_a_table])
def test_an_index_of_channels_that_has_another_use_locks_them(make):
    graph = equal_at_random(make, seeds=1)
    reasons = {group.locked for group in graph.groups if "a" in group.producers}
    assert reasons == {"index is not only an index of channels"}


def test_a_buffer_that_files_do_not_hold_does_not_disturb_what_follows():
    def run(net, x):
        y = net.a(x) + net.own
        return net.head(net.b(y.mean(1, keepdim=True)).mean((2, 3)) + net.c(x).mean((2, 3)))

    def make():
        net = Code(run, a=conv(3, 8), b=conv(1, 6), c=conv(3, 6), head=nn.Linear(6, CLASSES))
        net.register_buffer("own", torch.ones(1, 8, 1, 1), persistent=False)
        return net

    assert free(equal_at_random(make))


# ---- code that works with two images or more ---------------------------------------------------


def pooled(x):
    return functional.adaptive_avg_pool2d(x, 1)


def squeezed():
    return Code(lambda n, x: n.head(n.norm(pooled(n.a(x)).squeeze())), a=conv(3, 8),
                norm=nn.BatchNorm1d(8), head=nn.Linear(8, CLASSES))  # fmt: skip


def squeezed_and_joined():
    def run(net, x):
        x = net.a(x)
        return net.head(torch.cat([pooled(x).squeeze(), pooled(x.abs()).squeeze()], 1))

    return Code(run, a=conv(3, 8), head=nn.Linear(16, CLASSES))


def statistics_of_the_batch():
    return Code(lambda n, x: n.head(n.norm(pooled(n.a(x)).flatten(1))), a=conv(3, 8),
                norm=nn.BatchNorm1d(8, track_running_stats=False),
                head=nn.Linear(8, CLASSES))  # fmt: skip


@pytest.mark.parametrize("make", [squeezed, squeezed_and_joined, statistics_of_the_batch])
def test_code_that_fails_on_one_image_is_pruned_saved_and_loaded(make, tmp_path):
    net, batch = make().eval(), torch.randn(4, 3, 8, 8)
    pruner = secateur.pruners.magnitude(granularity="group", ratios=0.5)
    result = secateur.prune(net, batch, pruner)
    assert result.model.a.out_channels == 4
    secateur.save(result, tmp_path / "model.safetensors")
    loaded = secateur.load(tmp_path / "model.safetensors", into=make())
    assert torch.equal(loaded(batch), result.model(batch))


# ---- functions with the tensors of modules, and tensors of two modules -------------------------


def normalised_by_function():
    def run(net, x):
        norm = net.norm
        x = functional.layer_norm(tokens(net.a(x)), (8,), norm.weight, norm.bias)
        return net.head(x.amax(1))

    return Code(run, a=conv(3, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, CLASSES))


def normalised_by_channel():
    def run(net, x):
        x = functional.group_norm(net.a(x), 8, net.norm.weight, net.norm.bias)
        return net.head(x.amax((2, 3)))

    return Code(run, a=conv(3, 8), norm=nn.GroupNorm(8, 8), head=nn.Linear(8, CLASSES))


def convolved_in_groups():
    return Code(lambda n, x: n.head(functional.conv2d(n.a(x), n.b.weight, groups=2).mean((2, 3))),
                a=conv(3, 8), b=conv(8, 6, groups=2, bias=False),
                head=nn.Linear(6, CLASSES))  # fmt: skip


def tied_by_channel():
    net = Code(lambda n, x: n.head((n.b(n.a(x)) + n.c(n.a(x).relu())).mean((2, 3))),
               a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 8, groups=8),
               head=nn.Linear(8, CLASSES))  # fmt: skip
    net.c.weight = net.b.weight
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (normalised_by_function, "LayerNorm whose size is hard-coded"),
        (normalised_by_channel, "hard-coded number of groups"),
        (convolved_in_groups, "number of groups is hard-coded"),
        (tied_by_channel, "number of groups is hard-coded"),
    ],
)
def test_sizes_that_cannot_follow_lock_channels(make, reason):
    graph = equal_at_random(make)
    (group,) = (group for group in graph.groups if "a" in group.producers)
    assert reason in group.locked


class Last(nn.LayerNorm):
    """Normalises channels of images, with its own code."""

    def forward(self, x):
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight)
        return x.permute(0, 3, 1, 2)


def normalised_by_own_code():
    return Code(lambda n, x: n.head(n.norm(n.a(x)).amax((2, 3))), a=conv(3, 8),
                norm=Last(8, bias=False), head=nn.Linear(8, CLASSES))  # fmt: skip


def normalised_by_tied():
    net = Code(lambda n, x: n.head((n.norm(tokens(n.a(x))) + n.too(tokens(n.a(x).abs()))).amax(1)),
               a=conv(3, 8), norm=nn.LayerNorm(8), too=nn.LayerNorm(8),
               head=nn.Linear(8, CLASSES))  # fmt: skip
    net.too.weight = net.norm.weight
    return net


@pytest.mark.parametrize("make", [normalised_by_own_code, normalised_by_tied])
def test_sizes_of_modules_follow_their_channels(make):
    assert free(equal_at_random(make))


def test_a_kernel_that_is_a_plain_attribute_is_told():
    model = build(lambda: Code(lambda n, x: functional.conv2d(n.a(x), n.kernel), a=conv(3, 8)))
    model.kernel = torch.ones(6, 8, 3, 3, dtype=torch.float64)
    with pytest.raises(PruningError, match=r"kernel is no parameter.*make it a buffer"):
        build_channel_graph(model, images())


def test_the_average_of_constant_values_may_be_changed_in_place():
    def run(net, x):
        x = functional.scaled_dot_product_attention(*(tokens(f(x)) for f in (net.q, net.k, net.v)))
        return net.head(net.fc(x.mul_(2)).relu().mean(1))

    layers = {name: conv(3, 8) for name in "qkv"}
    model = build(lambda: Code(run, **layers, fc=nn.Linear(8, 6), head=nn.Linear(6, CLASSES)))
    model.v.weight.data[:, :] = 0
    model.v.bias.data[:] = torch.arange(8)
    with pytest.raises(PruningError, match="no living output left"):
        removal.remove_dead(model, {}, images())


# ---- numbers that the code calculates from sizes -----------------------------------------------


class Heads(nn.Module):
    """Attention with three heads, whose scores a function of the network changes."""

    def __init__(self, change, by_torch=False):
        super().__init__()
        self.heads, self.change, self.by_torch = 3, change, by_torch
        self.patches = patches(8)
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.o, self.head = nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = tokens(self.patches(x))
        n, count, _ = x.shape
        q, k, v = (f(x).view(n, count, self.heads, -1).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        if self.by_torch:
            scale = self.change(self, q, 1)
            y = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            y = self.change(self, q, q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head((x + self.o(y.transpose(1, 2).flatten(2))).mean(1))


BY_NUMBER = {
    "decision": lambda net, q, a: a * 0.5 if net.heads > 1 else a,
    "int": lambda net, q, a: a * int(net.heads),
    "divmod": lambda net, q, a: a * divmod(7, net.heads)[0],
    "exponent": lambda net, q, a: a.abs() ** net.heads,
    "bound": lambda net, q, a: a.clamp(max=net.heads),
    "size": lambda net, q, a: a * q.shape[1] ** -0.5,
    "quotient": lambda net, q, a: a / q.shape[1],
    "root": lambda net, q, a: a / math.sqrt(q.shape[1]),
}


@pytest.mark.parametrize("change", BY_NUMBER.values(), ids=BY_NUMBER)
def test_numbers_of_heads_that_the_code_calculates_with_lock_them(change):
    graph = equal_at_random(lambda: Heads(change), seeds=2)
    assert "calculate" in next(g for g in graph.groups if "q" in g.producers).locked


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_scale_from_the_number_of_heads_locks_them_and_one_from_their_width_does_not(by_torch):
    def heads(axis):
        make = partial(Heads, lambda net, q, a: a * q.shape[axis] ** -0.5, by_torch)
        graph = equal_at_random(make, seeds=3)
        return next(group for group in graph.groups if "q" in group.producers)

    assert heads(1).locked
    assert heads(-1).locked is None


def widened_by(zeros):
    def run(net, x):
        x = net.a(x)
        return net.head(net.b(torch.cat([x, zeros(x)], 1)).mean((2, 3)))

    return Code(run, a=conv(3, 8), b=conv(16, 6), head=nn.Linear(6, CLASSES))


@pytest.mark.parametrize(
    "calculate",
    [
        lambda x: x * x.shape[1] ** -0.5,
        lambda x: x / x.shape[1],
        lambda x: x / math.sqrt(x.shape[1]),
    ],
)
def test_numbers_of_channels_that_the_code_calculates_with_lock_them(calculate):
    def make():
        return Code(lambda n, x: n.head(calculate(n.a(x)).mean((2, 3))), a=conv(3, 8),
                    head=nn.Linear(8, CLASSES))  # fmt: skip

    graph = equal_at_random(make, seeds=2)
    assert "calculates with their number" in next(
        group.locked for group in graph.groups if "a" in group.producers
    )


@pytest.mark.parametrize(
    "zeros",
    [
        lambda x: x.new_zeros(x.shape[0], x.shape[1], 8, 8),
        lambda x: x.new_zeros((x.shape[0], 16 - x.shape[1], 8, 8)),
        lambda x: torch.full((x.shape[0], 16 - x.shape[1], 8, 8), 0.0),
    ],
)
def test_zeros_whose_number_follows_from_channels_lock_them(zeros):
    graph = equal_at_random(partial(widened_by, zeros), seeds=2)
    assert next(group.locked for group in graph.groups if "a" in group.producers)


def test_a_size_that_is_rounded_remains_a_size():
    def run(net, x):
        x = net.a(x)
        x = x.view(x.shape[0], math.floor(x.shape[1] / 2), 2, 8, 8)
        return net.head(x.flatten(1, 2).mean((2, 3)))

    graph = equal_at_random(lambda: Code(run, a=conv(3, 8), head=nn.Linear(8, CLASSES)))
    assert graph.balances


@pytest.mark.parametrize(
    "normalise",
    [
        lambda x, count: functional.group_norm(x, count),
        lambda x, count: functional.layer_norm(x.transpose(1, 3), (count,)).transpose(1, 3),
    ],
)
def test_channels_whose_number_another_tensor_is_normalised_by_are_locked(normalise):
    def run(net, x):
        x = net.a(x)
        return net.head((normalise(net.b(x), x.shape[1]) * net.scale).mean((2, 3)))

    def make():
        return Code(run, a=conv(3, 8), b=conv(8, 8), scale=torch.rand(1, 8, 1, 1),
                    head=nn.Linear(8, CLASSES))  # fmt: skip

    graph = equal_at_random(make, seeds=2)
    assert "calculates with their number" in graph.group("a").locked


@pytest.mark.parametrize("known", [True, False])
def test_a_shortcut_that_is_padded_up_to_a_number_is_locked_unless_it_follows_the_sum(known):
    def run(net, x):
        x, short = net.a(x), net.b(x)
        more = (8 if known else x.shape[1]) - short.shape[1]
        return net.head((x + functional.pad(short, (0, 0, 0, 0, 0, more))).mean((2, 3)))

    graph = equal_at_random(
        lambda: Code(run, a=conv(3, 8), b=conv(3, 6), head=nn.Linear(8, CLASSES))
    )
    (group,) = (group for group in graph.groups if "b" in group.producers)
    assert (group.locked is not None) == known


def test_channels_that_give_a_view_of_others_its_size_are_locked():
    def run(net, x):
        x = net.a(x)
        parts = net.b(x).reshape(x.shape[0], 2, x.shape[1] // 2, 2, 64)
        return net.head(parts.transpose(3, 2).flatten(1, 3).mean(-1))

    graph = equal_at_random(
        lambda: Code(run, a=conv(3, 8), b=conv(8, 16), head=nn.Linear(16, CLASSES))
    )
    assert "counts other channels" in graph.group("a").locked


# ---- spellings of common operations ------------------------------------------------------------


def selective_kernels(net, x):
    """Branches weighted by a softmax over the branches."""
    both = torch.stack([net.a(x), net.b(x)], dim=1)
    squeezed = both.sum(1).mean((2, 3)).relu()
    weights = torch.stack([net.fc(squeezed), net.fc(squeezed.tanh())], 1).softmax(dim=1)
    return (both * weights[:, :, :, None, None]).sum(dim=1)


SPELLINGS = {
    "stack": selective_kernels,
    "stack last": lambda net, x: torch.stack((net.a(x), net.b(x)), dim=-1).mean(-1),
    "erf": lambda net, x: net.a(x) * (1 + torch.erf(net.a(x) / 2**0.5)) / 2 + net.b(x),
    "logsigmoid": lambda net, x: functional.logsigmoid(net.a(x)) + net.b(x),
    "clamp_": lambda net, x: net.a(x).clamp_(min=0) + net.b(x).clamp_(-1, 1),
    "subtract": lambda net, x: torch.subtract(net.a(x), net.b(x)),
    "true_divide": lambda net, x: torch.true_divide(net.a(x), 1 + net.b(x).square()),
    "reciprocal": lambda net, x: net.a(x) * (1 + net.b(x).absolute()).reciprocal(),
    "logarithm": lambda net, x: torch.log1p(net.a(x).abs()) + torch.expm1(net.b(x).clamp(max=1)),
    "addcmul": lambda net, x: torch.addcmul(net.shift, net.scale, net.a(x)) + net.b(x),
    "lerp": lambda net, x: torch.lerp(net.a(x), net.b(x), 0.3),
    "threshold": lambda net, x: functional.threshold(net.a(x), 0.1, 0.5) + net.bent(net.b(x)),
    "view_as": lambda net, x: net.a(x).flatten(2).view_as(net.a(x)) + net.b(x),
    "reshape_as": lambda net, x: net.a(x).flatten(1).reshape_as(net.a(x)) + net.b(x),
    "constant": lambda net, x: net.edges(net.a(x)) + net.circle(net.b(x)),
}


def spelt(name):
    return Code(lambda n, x: n.head(SPELLINGS[name](n, x).amax((2, 3))), a=conv(3, 8), b=conv(3, 8),
                fc=nn.Linear(8, 8), shift=nn.Parameter(torch.randn(1, 8, 1, 1)),
                scale=nn.Parameter(torch.randn(8, 1, 1)), bent=nn.Threshold(0.1, 0.5),
                edges=nn.ConstantPad2d(1, 0.5), circle=nn.CircularPad2d(1),
                head=nn.Linear(8, CLASSES))  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_common_operations_are_followed_in_every_spelling(name):
    def make():
        net = spelt(name)
        used = {
            str(node.target).partition(".")[0] for node in torch.fx.symbolic_trace(net).graph.nodes
        }
        for own in {"fc", "shift", "scale"} - used:
            delattr(net, own)
        return net

    graph = equal_at_random(make)
    assert graph.group("a").locked is None
    model = make().double().eval()
    with torch.no_grad():
        model.a.weight[:3] = 0  # constants of which some are zero
        model.b.weight[:3] = 0
        model.b.bias[:2] = 0
    compact = removal.remove_dead(model, {}, images()).model
    assert difference(model, compact, images(side=12)) < 1e-9


# ---- tensors of layers that other code reads too ------------------------------------------------


@pytest.mark.parametrize(
    ("scaled", "free_ones"),
    [
        (lambda net, x: x / net.a.weight.shape[0], False),
        (lambda net, x: x * net.a.weight.abs().mean(), False),
        (lambda net, x: x * net.a.bias.mean(), False),
        (lambda net, x: x / net.a.bias.shape[0], False),
        (lambda net, x: x * net.a.bias.reshape(1, net.a.bias.shape[0], 1, 1), True),
        (lambda net, x: (net.norm(x.transpose(1, 3)) * net.norm.weight).transpose(1, 3), True),
    ],
)
def test_tensors_of_layers_that_other_code_reads_stay_with_their_channels(scaled, free_ones):
    graph = equal_at_random(
        lambda: Code(lambda n, x: n.head(scaled(n, n.norm(n.a(x).transpose(1, 3)).transpose(1, 3))
                                         .amax((2, 3))),
                     a=conv(3, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, CLASSES))
    )  # fmt: skip
    assert (graph.group("a").locked is None) == free_ones


# ---- results in place, which change every tensor with the same entries -------------------------


def sum_in_place(first):
    """`h` is read after `y += ...`, where `y` is another name for its entries."""

    def run(net, x):
        h = net.norm(net.a(x))
        y = first(net, h)
        y += net.e(x)
        y *= 2
        y -= net.e(x)
        y /= 4
        return net.head(net.b(h).mean((2, 3)))

    return Code(run, a=conv(3, 8), norm=nn.BatchNorm2d(8), e=conv(3, 8), b=conv(8, 6),
                head=nn.Linear(6, CLASSES), relu=nn.ReLU(inplace=True),
                hardswish=nn.Hardswish(inplace=True), same=nn.Identity(),
                off=nn.AlphaDropout(0.5))  # fmt: skip


SAME_ENTRIES = {
    "relu": lambda net, h: net.relu(h),
    "function": lambda net, h: functional.relu(h, inplace=True),
    "hardswish": lambda net, h: net.hardswish(h),
    "identity": lambda net, h: net.same(h),
    "dropout": lambda net, h: net.off(h),
    "contiguous": lambda net, h: h.contiguous(),
    "detach": lambda net, h: h.detach(),
    "to": lambda net, h: h.to(h.dtype),
    "mul_": lambda net, h: h.mul_(2.0),
}


@pytest.mark.parametrize("first", SAME_ENTRIES.values(), ids=SAME_ENTRIES)
def test_a_constant_that_a_result_in_place_changes_is_none(first):
    model, batch = build(partial(sum_in_place, first)), images()
    with torch.no_grad():
        model.norm.weight[:4] = 0
        model.norm.bias[:4] = torch.tensor([1, -2, 0.5, 0])
    compact = removal.remove_dead(model, {}, batch)
    assert difference(model, compact.model, batch) < 1e-9


@pytest.mark.parametrize("first", [SAME_ENTRIES["relu"], SAME_ENTRIES["mul_"]])
def test_sums_and_products_in_place_couple_channels(first):
    graph = equal_at_random(partial(sum_in_place, first))
    (group,) = (group for group in graph.groups if "a" in group.producers)
    assert group.locked is None
    assert "e" in group.producers
    assert {node.target for node in graph.fx_graph.nodes} >= {
        operator.iadd, operator.isub, operator.imul, operator.itruediv
    }  # fmt: skip


# ---- constants that are folded into layers whose weights a function gets -----------------------


def constant_first(run, **named):
    """Three channels of `a` are the same for every image; returns the network without dead ones."""
    model = build(lambda: Code(run, a=conv(3, 8), norm=nn.BatchNorm2d(8), **named))
    with torch.no_grad():
        model.norm.weight[:3] = 0
        model.norm.bias[:3] = torch.tensor([1, 2, 0])
    compact = removal.remove_dead(model, {}, images()).model
    for side in (8, 12):
        assert difference(model, compact, images(side=side)) < 1e-9
    return compact


@pytest.mark.parametrize(
    ("options", "left"),
    [({"padding": 1}, 7), ({"padding": "same"}, 7), ({"stride": 2}, 7), ({}, 5)],
)
def test_constants_are_folded_only_where_a_function_gets_the_options_of_the_module(options, left):
    def run(net, x):
        x = functional.conv2d(net.norm(net.a(x)).relu(), net.b.weight, net.b.bias, **options)
        return net.head(x.relu().mean((2, 3)))

    compact = constant_first(run, b=nn.Conv2d(8, 6, 3), head=nn.Linear(6, CLASSES))
    assert len(compact.a.weight) == left


def test_constants_that_attention_reads_are_kept():
    def run(net, x):
        x = tokens(net.norm(net.a(x)).relu())
        return net.head(net.attention(x, x, x)[0].mean(1))

    compact = constant_first(run, attention=nn.MultiheadAttention(8, 2, batch_first=True),
                             head=nn.Linear(8, CLASSES))  # fmt: skip
    assert len(compact.a.weight) == 7
