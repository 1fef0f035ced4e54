"""Tensors that networks hold outside of layers' weights: what removal leaves, with its type."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions; `run` is a function of the network and its input that applies them."""

    def __init__(self, run, **tensors):
        super().__init__()
        self.a, self.b = (nn.Conv2d(size, 8, 3, padding=1) for size in (3, 8))
        self.fc = nn.Linear(8, 5)
        self.run = run
        for name, value in tensors.items():
            if type(value) is torch.Tensor:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.fc(self.run(self, x).mean((2, 3)))


CASTS = {
    "float": lambda net, x: net.b(net.a(x.float()).relu().float()),
    "to": lambda net, x: net.b(net.a(x.to(torch.float32)).relu().to(dtype=torch.float32)),
}


@pytest.mark.parametrize("kind", CASTS)
def test_casts_to_float32_in_the_code_are_no_hindrance(kind, tmp_path):
    pruned(Net(CASTS[kind]), tmp_path)


def pruned(net, tmp_path):
    """Remove half of the channels; saved and loaded, the network computes the same."""
    net.eval()
    pruner = secateur.pruners.magnitude(granularity="group", ratios=0.5)
    result = secateur.prune(net, IMAGES, pruner)
    secateur.save(result, tmp_path / "model.safetensors")
    loaded = secateur.load(tmp_path / "model.safetensors", into=copy.deepcopy(net))
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    return result.model, loaded


@pytest.mark.parametrize("groups", [lambda _: 8, lambda y: y.shape[1]])
def test_a_buffer_is_the_kernel_of_a_grouped_convolution(groups, tmp_path):
    def run(net, x):
        y = net.a(x)
        return net.b(functional.conv2d(y, net.kernel, groups=groups(y)))

    net, _ = pruned(Net(run, kernel=torch.rand(8, 1, 3, 3)), tmp_path)
    assert net.b.out_channels == 4


@pytest.mark.parametrize(
    ("scales", "get"),
    [
        (nn.ParameterList([torch.rand(1, 8, 1, 1)]), lambda scales: scales[0]),
        (nn.ParameterDict({"gamma": torch.rand(1, 8, 1, 1)}), lambda scales: scales["gamma"]),
    ],
)
def test_parameters_in_lists_and_dictionaries_become_smaller(scales, get, tmp_path):
    net, _ = pruned(Net(lambda n, x: n.b(n.a(x) * get(n.scales)), scales=scales), tmp_path)
    assert get(net.scales).shape == (1, 4, 1, 1)


def test_buffers_of_other_types_keep_type_and_values(tmp_path):
    """The comparison runs in float64, but tensors keep their own types."""
    odd = {
        "scale": torch.rand(1, 8, 1, 1).half(),
        "factor": torch.tensor([0.1], dtype=torch.float64),
        "complex": torch.tensor([1 + 2j]),
        "count": torch.tensor(3),
        "flag": torch.tensor(True),
    }

    def run(net, x):
        return net.b(net.a(x) * net.scale) * net.factor.float()

    net, loaded = pruned(Net(run, **odd), tmp_path)
    assert net.scale.shape == (1, 4, 1, 1)
    for model in (net, loaded):
        buffers = dict(model.named_buffers())
        assert {name: b.dtype for name, b in buffers.items()} == {
            n: b.dtype for n, b in odd.items()
        }
        assert all(torch.equal(buffers[name], odd[name]) for name in ("factor", "complex", "count"))
        assert torch.isin(model.scale, odd["scale"]).all()
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def joint(net, x):
    """The product of the outputs of both convolutions."""
    y = net.a(x)
    return torch.mul(input=y, other=net.b(y))


SPELLINGS = {
    "module": lambda n, x: n.b(input=n.a(input=x)),
    "function": lambda n, x: functional.relu(input=n.b(torch.flatten(input=n.a(x), start_dim=3))),
    "conv2d": lambda n, x: functional.conv2d(
        input=n.a(x), weight=n.b.weight, bias=n.b.bias, padding=1
    ),
    "add": lambda n, x: torch.add(n.a(x), other=n.b(n.a(x))),
    "mul": joint,
    "cat": lambda n, x: n.b(torch.cat(tensors=[n.a(x), n.a(x)], axis=2)),
    "permute": lambda n, x: n.b(n.a(x).permute(dims=(0, 1, 3, 2))),
    "reshape": lambda n, x: n.b(torch.reshape(n.a(x), shape=(x.shape[0], -1, 8, 8))),
    "expand": lambda n, x: n.b(n.a(x).expand(size=(-1, -1, 8, 8))),
    "squeeze": lambda n, x: n.b(n.a(x).unsqueeze(dim=2).squeeze(dim=2)),
    "mean": lambda n, x: n.b(n.a(x)) * n.a(x).mean(axis=(2, 3), keepdims=True),
    "softmax": lambda n, x: n.b(torch.softmax(n.a(x), axis=2)),
}


@pytest.mark.parametrize("run", SPELLINGS.values(), ids=SPELLINGS)
def test_arguments_may_be_given_by_keyword(run, tmp_path):
    net, _ = pruned(Net(run), tmp_path)
    assert net.a.out_channels == 4


def locks(net):
    graph = secateur.channel_graph(net, IMAGES)
    return {group.locked for group in graph.groups}


def unsaved(run, value):
    net = Net(run)
    net.register_buffer("own", value, persistent=False)
    return net


@pytest.mark.parametrize(
    ("run", "value"),
    [
        (lambda n, x: n.b(n.a(x) * n.own), torch.rand(1, 8, 1, 1)),
        (lambda n, x: n.b(n.a(x)[:, n.own]), torch.arange(8).flip(0)),
        (lambda n, x: n.b(functional.batch_norm(n.a(x), n.own, n.own)), torch.rand(8)),
        (lambda n, x: n.b(functional.conv2d(n.a(x), n.own)), torch.rand(8, 8, 1, 1)),
    ],
)
def test_a_buffer_that_checkpoints_do_not_hold_locks_its_channels(run, value, tmp_path):
    net = unsaved(run, value)
    assert any("a buffer that checkpoints do not hold" in str(reason) for reason in locks(net))
    small, _ = pruned(net, tmp_path)
    assert (small.a.out_channels, small.b.out_channels) == (8, 4)
    assert torch.equal(small.own, value)


@pytest.mark.parametrize("mask", [torch.arange(8) > 3, [True] * 4 + [False] * 4])
def test_channels_that_a_mask_marks_are_locked(mask, tmp_path):
    net = Net(lambda n, x: n.b(n.a(x)[:, n.mask]), mask=mask, b=nn.Conv2d(4, 8, 3))
    assert any("by a boolean mask" in str(reason) for reason in locks(net))
    small, _ = pruned(net, tmp_path)
    assert (small.a.out_channels, small.b.out_channels) == (8, 4)


@pytest.mark.parametrize(
    "pruner",
    [secateur.pruners.magnitude(granularity="2:4"), secateur.pruners.gconv(groups=2)],
    ids=["2:4", "gconv"],
)
def test_weights_computed_from_other_tensors_get_no_masks(pruner):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(1))
    nn.utils.parametrizations.weight_norm(model[0])
    images = torch.randn(2, 4, 6, 6)
    pruned = secateur.prune(model, images, pruner, remove_dead=False)
    assert set(pruned.masks) == {"2.weight"}
    with pytest.raises(secateur.SecateurError, match=r"its weight is computed from other"):
        secateur.prune(model, images, pruner)


def test_a_search_for_groups_counts_a_weight_of_two_convolutions_once():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2)))
    model[1].weight = model[0].weight
    pruner = secateur.pruners.gconv(groups=None, search={"max_params": 288})
    pruned = secateur.prune(model, torch.randn(2, 8, 6, 6), pruner, remove_dead=False)
    assert pruned.parameters == (576, 288) == (576, pruned.notes["search_params"])
    assert pruned.notes["search_macs"] == 2 * 288 * 36
