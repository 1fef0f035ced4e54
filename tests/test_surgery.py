"""Surgery: the compact network computes the same as the masked one, without idle outputs."""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from secateur.base import plugin
from secateur.base.errors import PruningError
from secateur.channels.graph import build_channel_graph
from secateur.pruning import proof, removal
from secateur.sparsity import masks

SMALL = {"lenet300": {"hidden": [9, 7]}, "lenet5": {"filters": [5, 6], "hidden": 8}}
ARCHS = list(SMALL)
SHAPES = [(1, 28, 28), (1, 8, 8)]


def network(arch, shape, **chosen):
    module = plugin.load("archs", arch)
    return module.build(module.Settings(**chosen), 10, shape)


def layer_masks(layer, chance, protect):
    """Random mask of a layer: whole rows and columns, single weights, and biases.

    With `protect`, one path through every layer is kept, so that the network cannot be emptied.
    """
    out, into = layer.weight.shape[:2]
    weight = torch.rand(layer.weight.shape, generator=chance) > 0.3
    weight &= (torch.rand(out, generator=chance) > 0.4).view(-1, *[1] * (weight.dim() - 1))
    weight &= (torch.rand(into, generator=chance) > 0.3).view(1, -1, *[1] * (weight.dim() - 2))
    bias = torch.rand(out, generator=chance) > 0.3
    if protect:
        weight[0, 0], bias[0] = True, True
    return {"weight": weight, "bias": bias}


def prune_at_random(model, seed, protect=True):
    chance = torch.Generator().manual_seed(seed)
    for layer in masks.layers(model).values():
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype)
    chosen = {
        f"{name}.{kind}": mask
        for name, layer in masks.layers(model).items()
        for kind, mask in layer_masks(layer, chance, protect).items()
        if dict(layer.named_parameters()).get(kind) is not None
    }
    masks.apply(model, chosen)
    return chosen


def difference(masked, compact, batch):
    """Largest difference divided by the largest output, without the code under test."""
    with torch.no_grad():
        before, after = masked.eval()(batch), compact.eval()(batch)
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-30))


def check_bookkeeping(model, chosen, compact):
    """Shapes, masks and indices of the compact network are consistent with the masked one."""
    parameters, old = dict(compact.model.named_parameters()), dict(model.named_parameters())
    assert set(compact.masks) == set(chosen)
    for name, mask in compact.masks.items():
        assert mask.shape == parameters[name].shape
        assert not parameters[name][~mask].any(), f"{name}: masked but not zero"
        layer, kind = name.rsplit(".", 1)
        rows = compact.kept.get(layer, torch.arange(len(old[name])))
        assert len(rows) == len(mask)
        if kind == "bias":  # mask entries change only where a constant was folded into the bias
            moved = parameters[name] != old[name][rows]
            assert torch.equal(mask, chosen[name][rows] | moved)
    for name, layer in masks.layers(compact.model).items():
        sizes = (layer.weight.shape[0], layer.weight.shape[1])
        named = ("out_channels", "in_channels", "out_features", "in_features")
        assert tuple(getattr(layer, n) for n in named if hasattr(layer, n)) == sizes, name


@functools.cache
def graph_of(arch, shape):
    """The channel graph of a network, which does not depend on the weights."""
    model = network(arch, shape, **SMALL.get(arch, {})).double()
    return build_channel_graph(model, torch.zeros(1, *shape))


@pytest.mark.parametrize("shape", SHAPES, ids=["28x28", "8x8"])
@pytest.mark.parametrize("arch", ARCHS)
@given(seed=st.integers(0, 10**6))
@examples(max_examples=40, deadline=None, derandomize=True)
def test_the_compact_network_computes_what_the_masked_one_does(arch, shape, seed):
    masked = network(arch, shape, **SMALL.get(arch, {})).double()
    chosen = prune_at_random(masked, seed)
    before = copy.deepcopy(masked.state_dict())
    example = torch.rand(1, *shape).double()
    compact = removal.remove_dead(masked, chosen, example, graph_of(arch, shape))
    batch = torch.randn(6, *shape, generator=torch.Generator().manual_seed(seed)).double()
    assert difference(masked, compact.model, batch) < 1e-9
    assert all(torch.equal(t, before[n]) for n, t in masked.state_dict().items())
    check_bookkeeping(masked, chosen, compact)
    assert difference(masked.float(), compact.model.float(), batch.float()) < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=["28x28", "8x8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_networks_of_full_size_shrink_and_compute_the_same(arch, shape):
    masked = network(arch, shape).double()
    chosen = prune_at_random(masked, 1)
    compact = removal.remove_dead(masked, chosen, torch.rand(1, *shape).double())
    batch = torch.randn(4, *shape).double()
    assert difference(masked, compact.model, batch) < 1e-9
    assert proof.verify(masked, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    assert sum(p.numel() for p in compact.model.parameters()) < 0.6 * sum(
        p.numel() for p in masked.parameters()
    )
    check_bookkeeping(masked, chosen, compact)


def places(model):
    return {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


@pytest.mark.parametrize("cut", ["nothing", "something", "dead"])
def test_a_compact_network_shares_no_memory_with_the_one_it_was_made_of(cut):
    model = network("resnet_cifar", (3, 8, 8), depth=8).double().train()
    batch = torch.rand(2, 3, 8, 8).double()
    chosen = prune_at_random(model, 3) if cut == "dead" else {}
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(chosen)
    if cut == "dead":
        compact = removal.remove_dead(model, chosen, batch)
    else:
        selection = {"layer1.0.conv1": torch.tensor([1, 2])} if cut == "something" else {}
        compact = removal.remove(model, selection, batch)
    assert not places(model) & places(compact.model)
    assert not {m.data_ptr() for m in chosen.values()} & {
        m.data_ptr() for m in compact.masks.values()
    }
    assert not compact.model.training and all(m.training for m in model.modules())
    assert [p.requires_grad for p in compact.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    for tensor in [*compact.model.parameters(), *compact.model.buffers(), *compact.masks.values()]:
        tensor.detach().fill_(1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(mask, kept[name]) for name, mask in chosen.items())


class Remembers(nn.Module):
    """Computes with an attribute that is updated whenever its weight is loaded."""

    def __init__(self, hook):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, 1, 1, dtype=torch.float64))
        self.hook = hook
        if hook:
            self.register_load_state_dict_post_hook(lambda module, _: module.note())
        self.note()

    def note(self):
        self.outputs = len(self.weight)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if not self.hook:
            self.note()

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight) * self.outputs


@pytest.mark.parametrize("hook", [True, False], ids=["hook", "override"])
def test_modules_that_listen_when_tensors_are_loaded_hear_of_smaller_ones(hook):
    model = nn.Sequential(Remembers(hook), nn.ReLU(), nn.Conv2d(5, 2, 1).double())
    compact = removal.remove(model, {"0": torch.tensor([1, 4])}, torch.rand(1, 4, 3, 3).double())
    assert (model[0].outputs, compact.model[0].outputs) == (5, 3)


def test_buffers_that_checkpoints_do_not_hold_stay_as_the_code_makes_them(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 2)
            self.register_buffer("scale", torch.tensor(3.0), persistent=False)

        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3))) * self.scale

    model, batch = Scaled().double(), torch.rand(2, 1, 5, 5).double()
    gone = {"conv": torch.tensor([0, 4])}
    compact = removal.remove(model, gone, batch).model
    assert compact.conv.weight.shape[0] == 4 and float(compact.scale) == 3
    assert difference(removal.mask(model, gone, batch), compact, batch) < 1e-12
    assert compact.scale.data_ptr() != model.scale.data_ptr()


def chain(kind):
    """Small networks without a ReLU, which could hide a living output."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 2))
    convs = nn.Conv2d(1, 3, 3), nn.AvgPool2d(2), nn.Conv2d(3, 3, 2, stride=2), nn.Flatten()
    return nn.Sequential(*convs, nn.Linear(12, 4, bias=kind == "conv"), nn.Linear(4, 2))


CHAIN_SHAPES = {"linear": (3,), "conv": (1, 12, 12)}


@functools.cache
def graph_of_chain(kind):
    return build_channel_graph(chain(kind), torch.zeros(1, *CHAIN_SHAPES[kind]))


def idle(model, batch):
    """Idle outputs of each layer, found by ablation: constant for all inputs, or without effect.

    An output is idle if giving all images the first one's activation does not change the result.
    """
    found = {}
    with torch.no_grad():
        whole = model(batch)
        for name, layer in list(masks.layers(model).items())[:-1]:
            found[name] = set()
            for j in range(layer.weight.shape[0]):

                def ablate(_layer, _input, output, j=j):
                    output = output.clone()
                    output[:, j] = output[:1, j]
                    return output

                hook = layer.register_forward_hook(ablate)
                if (model(batch) - whole).abs().max() <= 1e-12 * whole.abs().max():
                    found[name].add(j)
                hook.remove()
    return found


@pytest.mark.parametrize("kind", ["linear", "conv"])
@given(seed=st.integers(0, 10**6))
@examples(max_examples=100, deadline=None, derandomize=True)
def test_exactly_those_outputs_go_whose_ablation_changes_nothing(kind, seed):
    model = chain(kind).double()
    chosen = prune_at_random(model, seed, protect=False)
    batch = torch.randn(8, *CHAIN_SHAPES[kind]).double()
    without = idle(model, batch)
    try:
        compact = removal.remove_dead(model, chosen, batch[:1], graph_of_chain(kind))
    except PruningError as error:
        layer = str(error).split()[1]
        assert len(without[layer]) == model.get_submodule(layer).weight.shape[0]
        return
    for name, kept in compact.kept.items():
        everything = set(range(model.get_submodule(name).weight.shape[0]))
        assert set(kept.tolist()) == everything - without[name]
    assert difference(model, compact.model, batch) < 1e-9


@pytest.mark.parametrize("arch", ARCHS)
@given(seed=st.integers(0, 10**6))
@examples(max_examples=10, deadline=None, derandomize=True)
def test_no_output_goes_whose_ablation_changes_something(arch, seed):
    model = network(arch, (1, 8, 8), **SMALL.get(arch, {})).double()
    chosen = prune_at_random(model, seed)
    batch = 10 * torch.randn(16, 1, 8, 8).double()
    without = idle(model, batch)
    compact = removal.remove_dead(model, chosen, batch[:1], graph_of(arch, (1, 8, 8)))
    for name, kept in compact.kept.items():
        everything = set(range(model.get_submodule(name).weight.shape[0]))
        assert everything - set(kept.tolist()) <= without[name]


def mlp(first, bias, second, bias2):
    """Two linear layers with a ReLU in between, from plain numbers."""
    model = nn.Sequential(
        nn.Linear(len(first[0]), len(first)), nn.ReLU(), nn.Linear(len(first), len(second))
    )
    for parameter, values in zip(model.parameters(), [first, bias, second, bias2], strict=True):
        parameter.data = torch.tensor(values)
    return model.double()


def nonzero_masks(model):
    return {name: p.detach() != 0 for name, p in model.named_parameters()}


def test_by_hand_an_unheard_neuron_goes_and_a_silent_one_is_folded():
    # neuron 0 is alive, 1 is not read, 2 is always relu(3), 3 is always relu(-5) = 0
    model = mlp(
        [[1.0, 2], [3, 4], [0, 0], [0, 0]],
        [0.5, 1, 3, -5],
        [[1.0, 0, 2, 7], [-1, 0, 0, 9]],
        [0.0, 0.25],
    )
    compact = removal.remove_dead(model, nonzero_masks(model), torch.rand(1, 2).double())
    small = compact.model
    assert compact.kept["0"].tolist() == [0]
    assert small[0].weight.tolist() == [[1, 2]]
    assert small[0].bias.tolist() == [0.5]
    assert small[2].weight.tolist() == [[1], [-1]]
    assert small[2].bias.tolist() == [6, 0.25]  # 2 * relu(3) is folded into the first bias
    assert compact.masks["2.bias"].tolist() == [True, True]  # 0 was pruned; 6 must not be masked
    assert compact.masks["0.weight"].tolist() == [[True, True]]
    assert model[2].bias.tolist() == [0, 0.25]


def test_folding_nothing_leaves_a_pruned_bias_pruned():
    model = mlp([[1.0, 2], [0, 0]], [0.5, 3], [[1.0, 2], [-1, 0]], [0.0, 0.0])
    compact = removal.remove_dead(model, nonzero_masks(model), torch.rand(1, 2).double())
    assert compact.model[2].bias.tolist() == [6, 0]
    assert compact.masks["2.bias"].tolist() == [True, False]


def test_removals_go_on_until_nothing_is_idle():
    first = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)
    model = nn.Sequential(*first).double()
    with torch.no_grad():
        model[2].weight[2] = 0  # neuron 2 is relu(bias), which is folded into the last layer
        model[4].weight[:, 1] = 0  # neuron 1 is not read ...
        model[2].weight[0, 0] = 0
        model[2].weight[0, 2] = 0  # ... so neurons 0 and 2 of the first layer are not read either
    compact = removal.remove_dead(model, {}, torch.rand(1, 2).double())
    assert {name: kept.tolist() for name, kept in compact.kept.items()} == {"0": [1], "2": [0]}
    batch = torch.randn(20, 2).double()
    assert difference(model, compact.model, batch) < 1e-12


def two_convs(padding, constant, mode="zeros"):
    """Filter 0 of the first convolution always gives relu(`constant`); filter 1 is alive."""
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), conv, nn.Flatten(), nn.LazyLinear(2))
    model(torch.rand(1, 1, 9, 9))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = constant
    return model.double()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, (0, 1), "same"])
@pytest.mark.parametrize("constant", [0.7, -0.7, 0.0])
def test_a_silent_filter_before_padding_goes_only_if_it_says_zero(padding, constant, mode):
    model = two_convs(padding, constant, mode)
    compact = removal.remove_dead(model, {}, torch.rand(1, 1, 9, 9).double())
    zero = constant <= 0  # after the ReLU
    if mode == "zeros" or zero:
        assert compact.kept["0"].tolist() == ([1] if zero or padding == 0 else [0, 1])
    assert difference(model, compact.model, torch.randn(4, 1, 9, 9).double()) < 1e-12


def test_folding_at_the_padded_border_would_have_been_wrong():
    model, wrong = two_convs(1, 0.7), two_convs(1, 0.7)
    with torch.no_grad():
        wrong[2].bias += 0.7 * wrong[2].weight[:, 0].sum(dim=(1, 2))
        wrong[2].weight[:, 0] = 0
    assert difference(model, wrong, torch.randn(4, 1, 9, 9).double()) > 1e-3


def test_a_silent_filter_before_uneven_pooling_is_kept():
    convs = nn.Conv2d(1, 2, 3), nn.AvgPool2d(3, stride=2, padding=1)
    model = nn.Sequential(*convs, nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 1.0
    compact = removal.remove_dead(model, {}, torch.rand(1, 1, 7, 7).double())
    assert compact.kept["0"].tolist() == [0, 1]


def test_a_reader_without_bias_keeps_constants_but_not_zeros():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([1.0, -1.0])
    compact = removal.remove_dead(model, {}, torch.rand(1, 2).double())
    assert compact.kept["0"].tolist() == [0, 2]
    assert difference(model, compact.model, torch.randn(9, 2).double()) < 1e-12


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1", "fc2"])
def test_verify_names_the_first_layer_that_is_not_the_same(name):
    masked = network("lenet5", (1, 28, 28), **SMALL["lenet5"])
    chosen = prune_at_random(masked, 7)
    compact = removal.remove_dead(masked, chosen, torch.rand(1, 1, 28, 28))
    batch = torch.randn(8, 1, 28, 28)
    assert proof.verify(masked, compact, batch, proof.FLOAT32_TOLERANCE) <= proof.FLOAT32_TOLERANCE
    with torch.no_grad():  # the first output is protected, so it affects the result
        compact.model.get_submodule(name).bias[0] += 100.0
    with pytest.raises(PruningError, match=rf"layer {name} differs"):
        proof.verify(masked, compact, batch, proof.FLOAT32_TOLERANCE)


def test_verify_refuses_what_is_not_a_number():
    masked = network("lenet300", (1, 8, 8), **SMALL["lenet300"])
    compact = removal.remove_dead(masked, {}, torch.rand(1, 1, 8, 8))
    with torch.no_grad():
        compact.model.fc2.weight[0, 0] = torch.nan
    with pytest.raises(PruningError, match="is not the masked one"):
        proof.verify(masked, compact, torch.randn(4, 1, 8, 8), 1.0)


@pytest.mark.parametrize(("emptied", "dead"), [("fc1", "fc1"), ("fc2", "fc1"), ("fc3", "fc2")])
def test_a_layer_without_a_living_output_is_refused_by_name(emptied, dead):
    model = network("lenet300", (1, 8, 8), **SMALL["lenet300"])
    with torch.no_grad():
        model.get_submodule(emptied).weight.zero_()
    with pytest.raises(PruningError, match=rf"layer {dead} has no living output"):
        removal.remove_dead(model, {}, torch.rand(1, 1, 8, 8))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.outer(x + self.inner(x))


class Sorting(Residual):
    def forward(self, x):
        return self.outer(self.inner(x).sort(dim=1).values)


class Branching(Residual):
    def forward(self, x):
        return self.outer(self.inner(x) if x.sum() > 0 else x)


@pytest.mark.parametrize(
    ("model", "named"), [(Sorting(), "'sort'"), (Branching(), "cannot follow")], ids=str
)
def test_what_cannot_be_followed_is_named(model, named):
    with pytest.raises(PruningError, match=named):
        removal.remove_dead(model, {}, torch.rand(1, 4))


def test_what_is_added_to_the_input_stays():
    model = Residual().double()
    with torch.no_grad():
        model.inner.weight[1], model.inner.bias[1] = 0, 0
        model.outer.weight[:, 2] = 0
    compact = removal.remove_dead(model, {}, torch.rand(1, 4))
    assert compact.model.inner.weight.shape == (4, 4)
