"""Networks as users write them: several outputs, several arguments, frozen weights."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import secateur
from secateur.base.errors import CheckpointError, PruningError, SecateurError, SettingsError
from secateur.pruning import proof, removal

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
HALF = secateur.pruners.magnitude(granularity="group", ratios=0.5)


class Net(nn.Module):
    """Two convolutions and a linear layer; `tail` computes the output from the features."""

    def __init__(self, tail=None, **more):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.tail = tail
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.tail(self, x) if self.tail else self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


RESULTS = {
    "tuple": lambda model, x: (model.fc(x.mean((2, 3))), model.other(x.mean((2, 3)))),
    "dict": lambda model, x: {"a": model.fc(x.mean((2, 3))), "b": model.other(x.mean((2, 3)))},
}


@pytest.mark.parametrize("kind", RESULTS)
def test_several_outputs_are_compared_one_by_one(kind):
    net = Net(RESULTS[kind], other=nn.Linear(8, 2))
    found = secateur.prune(net, IMAGES, HALF)
    assert found.model.a.out_channels == found.model.b.out_channels == 4
    assert 0 < found.max_difference < 1e-4


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize(
    "pruner",
    [
        secateur.pruners.magnitude(criterion="taylor"),
        secateur.pruners.magnitude(criterion="fisher", granularity="group"),
        secateur.pruners.oracle(ratios={"a": 0.1}),
    ],
    ids=str,
)
def test_what_needs_the_loss_needs_a_classifier(kind, pruner):
    net = Net(RESULTS[kind], other=nn.Linear(8, 2))
    with pytest.raises(PruningError, match=rf"needs the loss of .* one tensor .* a {kind}"):
        secateur.prune(net, IMAGES, pruner, labels=LABELS)
    by_pixel = Net(lambda model, x: model.fc(x.permute(0, 2, 3, 1)))
    with pytest.raises(PruningError, match=r"a tensor \([14], 8, 8, 5\)"):
        secateur.prune(by_pixel, IMAGES, pruner, labels=LABELS)


def test_a_random_network_is_told_as_such():
    net = Net(lambda model, x: model.fc(F.dropout(x).mean((2, 3))))
    with pytest.raises(PruningError, match="random in eval mode"):
        secateur.prune(net, IMAGES, HALF)


def test_an_output_without_entries_is_equal_to_itself():
    net = Net(lambda model, x: (model.fc(x.mean((2, 3))), x.new_zeros(0)))
    found = secateur.prune(net, IMAGES, HALF)
    assert found.model.b.out_channels == 4 and 0 <= found.max_difference < 1e-4


def test_an_output_of_another_shape_is_not_equal_though_all_its_entries_are():
    other = removal.Compact(nn.AdaptiveAvgPool2d(1), {}, {})
    with pytest.raises(PruningError, match="the output differs by inf"):
        proof.verify(nn.Identity(), other, torch.ones(2, 3, 8, 8), 1e-4)


def test_code_that_calculates_with_the_size_of_a_layer_is_told():
    """And the layers of the user's network keep their sizes."""
    net = Net(lambda model, x: model.fc(x.mean((2, 3)) / model.b.out_channels))
    with pytest.raises(PruningError, match=r"layer fc differs by .* write it as a number$"):
        secateur.prune(net, IMAGES, HALF)
    assert (net.b.in_channels, net.b.out_channels) == (8, 8)


class Sized(Net):
    """It gives the size of a layer as its own, and its instance norm compares sizes."""

    def __init__(self):
        super().__init__(lambda model, x: model.fc(model.norm(x).mean((2, 3)) / model.out_channels))
        self.norm = nn.InstanceNorm2d(8, affine=True)
        nn.init.normal_(self.norm.bias)

    @property
    def out_channels(self):
        return self.b.out_channels


def test_a_size_may_be_that_of_a_module_which_computes_it():
    with pytest.raises(PruningError, match=r"layer fc differs by .* write it as a number$"):
        secateur.prune(Sized(), IMAGES, HALF)


def of_eight_channels(net):
    """A hook with a constant for eight channels, of which pruning leaves four."""
    factors = torch.ones(8, 1, 1)
    net.a.register_forward_hook(lambda _module, _args, out: out * factors)
    return net


def of_the_original(net):
    """A forward that runs the original network, also in a copy."""
    net.forward = lambda x: Net.forward(net, x) * 1
    return net


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_eight_channels, r"the compact network does not run \(The size .*\); a hook"),
        (of_the_original, r"with its pruned weights at zero does not run \(.*\); a hook, or a for"),
    ],
)
def test_a_network_that_cannot_run_with_fewer_channels_is_told_why(change, words):
    with pytest.raises(PruningError, match=words):
        secateur.prune(change(Net()), IMAGES, HALF)


def with_nan(tensor):
    tensor.data.flatten()[3] = torch.nan
    return tensor


def lazy():
    return Net(lambda model, x: model.other(x.mean((2, 3))), other=nn.LazyLinear(5))


def hooked(hook):
    net = Net()
    hook(net.a)
    return net


def with_result():
    net = Net()
    net.last = net(IMAGES)
    return net


def with_lock():
    net = Net()
    net.b.lock = threading.Lock()
    return net


def with_activations():
    """A hook has stored what a layer returned, with its gradients."""
    net = Net()
    net.features = {}
    net.b.register_forward_hook(lambda _module, _args, out: net.features.update(b=out))
    net(IMAGES)
    return net


def with_hook():
    """The gradients of the criterion are those of the copy that is pruned."""
    net = Net()
    net.b.register_forward_hook(lambda module, _args, out: setattr(module, "seen", [out]))
    return net


def with_count():
    net = Net().half()
    net.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
    return net


class OptimizedModule(nn.Module):
    """Stands for what torch.compile returns, which takes seconds to import."""

    def __init__(self):
        super().__init__()
        self._orig_mod = Net()


TAYLOR = secateur.pruners.magnitude(criterion="taylor")
WRONG = {
    "no network": (lambda: {"model": "resnet18"}, "model: a str; an instance of torch.nn.Module"),
    "float64": (lambda: {"images": IMAGES.double()}, r"images: torch.float64; float32 .*float\(\)"),
    "float16": (lambda: {"images": IMAGES.half()}, "images: torch.float16; float32"),
    "NaN": (lambda: {"images": with_nan(IMAGES.clone())}, "images: some values are NaN"),
    "list": (lambda: {"labels": [0, 1, 2, 3]}, "labels: a list; an int64 tensor"),
    "class": (lambda: {"labels": LABELS + 2, "pruner": TAYLOR}, "labels: 5, but .* 5 outputs"),
    "minus": (lambda: {"labels": LABELS - 1, "pruner": TAYLOR}, "labels: -1, but .* 5 outputs"),
    "lazy": (lambda: {"model": lazy()}, r"model: other.weight has no shape yet; call model"),
    "weights": (lambda: {"model": hooked(lambda a: with_nan(a.weight))}, "model: a.weight .*NaN"),
    "pruned": (
        lambda: {"model": hooked(lambda a: torch_prune.l1_unstructured(a, "weight", 0.5))},
        r"model: a.weight is computed by a hook .*prune\.remove",
    ),
    "spectral": (
        lambda: {"model": hooked(nn.utils.spectral_norm)},
        "model: a.weight is computed by a hook .*remove_spectral_norm",
    ),
    "mixed": (
        lambda: {"model": hooked(nn.Module.half)},
        r"model: a\.weight is torch\.float16; call",
    ),
    "whole": (lambda: {"model": with_count()}, r"model: count is torch\.int64; make it a buffer"),
    "compiled": (lambda: {"model": OptimizedModule()}, r"OptimizedModule .* model\._orig_mod"),
    "parallel": (lambda: {"model": nn.DataParallel(Net())}, r"DataParallel .* pass model\.module"),
    "result": (lambda: {"model": with_result()}, "model: last is a result .* detach"),
    "activations": (
        lambda: {"model": with_activations()},
        r"model: features cannot be copied \(Only Tensors created explicitly",
    ),
    "lock": (lambda: {"model": with_lock()}, r"model: b\.lock cannot be copied \(cannot pickle"),
    "hook": (
        lambda: {"model": with_hook(), "pruner": TAYLOR, "labels": LABELS},
        r"model: b\.seen cannot be copied .* remove the hook",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arguments_that_cannot_be_are_told_in_one_line(kind):
    make, words = WRONG[kind]
    given = {"model": Net(), "images": IMAGES, "pruner": HALF, "labels": None} | make()
    with pytest.raises(SecateurError, match=words) as told:
        secateur.prune(given.pop("model"), given.pop("images"), given.pop("pruner"), **given)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("make", [with_lock, with_activations])
def test_a_network_that_cannot_be_copied_is_told_by_every_function(make, tmp_path):
    net, words = make(), "(b.lock|features) cannot be copied"
    secateur.save(secateur.prune(Net(), IMAGES, HALF), tmp_path / "own")
    with pytest.raises(PruningError, match=f"model: {words}"):
        secateur.channel_graph(net, IMAGES)
    with pytest.raises(PruningError, match=f"model: {words}"):
        secateur.measure_latency(net, IMAGES)
    with pytest.raises(SettingsError, match=f"into: {words}"):
        secateur.load(tmp_path / "own", into=net)


@pytest.mark.parametrize("granularity", ["group", "filter", "weight"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_frozen_layers_are_ranked_as_others(criterion, granularity):
    pruner = secateur.pruners.magnitude(criterion=criterion, granularity=granularity, ratios=0.5)
    net = Net()
    wanted = secateur.prune(net, IMAGES, pruner, labels=LABELS).model.state_dict()
    net.a.requires_grad_(False)
    found = secateur.prune(net, IMAGES, pruner, labels=LABELS).model
    assert [n for n, p in found.named_parameters() if not p.requires_grad] == ["a.weight", "a.bias"]
    torch.testing.assert_close(found.state_dict(), wanted, rtol=0, atol=0)
    with torch.inference_mode():
        inside = secateur.prune(copy.deepcopy(net), IMAGES * 1, pruner, labels=LABELS * 1).model
    torch.testing.assert_close(inside.state_dict(), wanted, rtol=0, atol=0)


class Optional(Net):
    def forward(self, x, mask=None, scale=1.0, *, features=False, **more):
        x = self.b(self.a(x).relu()).relu()
        if mask is not None:
            x = x * mask
        if scale > 1:
            x = x * scale
        return x if features else self.fc(x.mean((2, 3)))


class AllOptional(Net):
    def forward(self, x=None, mask=None):
        return super().forward(x if mask is None else x * mask)


@pytest.mark.parametrize("kind", [Optional, AllOptional])
def test_optional_arguments_have_their_defaults(kind):
    net = kind()
    found = secateur.prune(net, IMAGES, HALF)
    assert found.model.a.out_channels == found.model.b.out_channels == 4
    plain = Net()
    plain.load_state_dict(net.state_dict())
    wanted = secateur.prune(plain, IMAGES, HALF).model(IMAGES)
    torch.testing.assert_close(found.model(IMAGES), wanted, rtol=0, atol=0)


def test_a_second_input_that_is_needed_is_told():
    class Two(Net):
        def forward(self, x, y, mask=None):
            return super().forward(x + y)

    with pytest.raises(PruningError, match="more than one input"):
        secateur.prune(Two(), IMAGES, HALF)


class Bounded(nn.Module):
    """Outputs of layers, a parameter and a buffer as exponents and bounds of other tensors."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.own = nn.Parameter(torch.rand(1, 8, 1, 1) - 0.5)
        self.register_buffer("kept", torch.rand(8, 1, 1) - 0.5)
        self.one = nn.Parameter(torch.rand(1))
        self.between, self.fc = between, nn.Linear(8, 5)

    def forward(self, x):
        x = self.between(self, self.a(x), self.b(x), self.c(x)) + self.own
        return self.fc(x.mean((2, 3)))


BOUNDED = {
    "pow": lambda m, a, b, c: torch.pow(a.abs() + 1, b.sigmoid()) + c,
    "operator": lambda m, a, b, c: (a.abs() + 1) ** b.sigmoid() + 2**c,
    "clamp by results": lambda m, a, b, c: a.clamp(b - 1, c + 1),
    "clamp by one of them": lambda m, a, b, c: torch.clamp(a + c, max=b),
    "clamp by parameter and buffer": lambda m, a, b, c: (a + b + c).clamp(min=m.own, max=m.kept),
    "powers of a parameter": lambda m, a, b, c: (a + b + c) * m.own.clamp(min=0.1).pow(m.one),
    "clamp_min": lambda m, a, b, c: torch.clamp_min(a + c, b),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_tensors_that_are_powers_or_bounds_are_combined(kind):
    net = Bounded(BOUNDED[kind])
    found = secateur.prune(net, IMAGES, HALF).model
    assert {layer.out_channels for layer in (found.a, found.b, found.c)} == {4}
    assert found.fc.in_features == 4
    if "parameter" in kind:
        assert found.own.shape == (1, 4, 1, 1)
    if "buffer" in kind:
        assert found.kept.shape == (4, 1, 1)


def test_two_bounds_may_meet_channels_in_different_ways():
    net = Bounded(lambda m, a, b, c: a.clamp(b.mean(1, keepdim=True), c) + b)
    found = secateur.prune(net, IMAGES, secateur.pruners.magnitude(granularity="weight"))
    assert found.model.a.out_channels == 8


UNDEFINED_AT_ZERO = {
    "quotient": lambda m, a, b, c: a / b.abs() + c,
    "logarithm": lambda m, a, b, c: a + b.abs().log() + c,
}


@pytest.mark.parametrize("kind", UNDEFINED_AT_ZERO)
def test_code_that_zeros_do_not_suit_is_told_as_such(kind):
    net = Bounded(UNDEFINED_AT_ZERO[kind])
    with pytest.raises(PruningError, match="may divide by such a channel, or take its logarithm"):
        secateur.prune(net, IMAGES, HALF)


class Frozen(Net):
    """Like many backbones, it keeps some layers in eval mode, and `train` returns nothing."""

    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(8))
        self.b = nn.Sequential(self.norm, self.b)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()


@pytest.mark.parametrize(
    "pruner",
    [
        HALF,
        secateur.pruners.magnitude(criterion="taylor"),
        secateur.pruners.std(),
        secateur.pruners.network_slimming(),
        secateur.pruners.obs(),
        secateur.pruners.oracle(ratios={"a": 0.1}),
    ],
    ids=str,
)
def test_a_network_whose_train_returns_nothing_is_pruned_and_loaded(pruner, tmp_path):
    net = Frozen()
    secateur.channel_graph(net, IMAGES)
    found = secateur.prune(net, IMAGES, pruner, labels=LABELS)
    secateur.save(found, tmp_path / "own")
    torch.save(found.model.state_dict(), tmp_path / "pth")
    loaded = secateur.load(tmp_path / "own", into=Frozen())
    assert not loaded.training and torch.equal(loaded(IMAGES), found.model(IMAGES))
    again = secateur.load(tmp_path / "pth", into=copy.deepcopy(loaded))
    assert torch.equal(again(IMAGES), found.model(IMAGES))


def test_the_latency_of_a_network_whose_train_returns_nothing_is_measured():
    assert set(secateur.measure_latency(Frozen(), IMAGES, repeats=3).layers) == {"a", "b.1", "fc"}


class Extra(Net):
    """Its state dict has a value that is not a parameter or buffer."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_an_extra_state_that_is_a_tensor_is_kept_and_stored(tmp_path):
    extra = torch.tensor([1.0, 2.0])
    found = secateur.prune(Extra(extra), IMAGES, HALF)
    assert found.model.a.out_channels == 4 and torch.equal(found.model.extra, extra)
    secateur.save(found, tmp_path / "own")
    torch.save(found.model.state_dict(), tmp_path / "pth")
    loaded = secateur.load(tmp_path / "own", into=Extra(torch.zeros(2)))
    again = secateur.load(tmp_path / "pth", into=copy.deepcopy(loaded))
    for other in (loaded, again):
        assert torch.equal(other.extra, extra) and torch.equal(other(IMAGES), found.model(IMAGES))
    secateur.save(secateur.prune(Net(), IMAGES, HALF), tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"_extra_state is missing"):
        secateur.load(tmp_path / "own", into=Extra(extra))


def test_an_extra_state_that_is_no_tensor_is_kept_but_not_stored(tmp_path):
    found = secateur.prune(Extra({"step": 3}), IMAGES, HALF)
    assert found.model.a.out_channels == 4 and found.model.extra == {"step": 3}
    with pytest.raises(SecateurError, match=r"_extra_state: get_extra_state returns a dict, which"):
        secateur.save(found, tmp_path / "own")
    plain = secateur.prune(Net(), IMAGES, HALF)
    secateur.save(plain, tmp_path / "own")
    torch.save(Net().state_dict(), tmp_path / "pth")
    torch.save(Extra({"step": 5}).state_dict(), tmp_path / "pth with it")
    for name in "own", "pth", "pth with it":
        assert secateur.load(tmp_path / name, into=Extra({"step": 4})).extra == {"step": 4}


class InPlace(nn.Module):
    """A layer reads a tensor that is changed in place afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.a.weight[0], self.a.bias[0] = 0.0, -1.0  # b reads -1, c reads 0

    def forward(self, x):
        x = self.a(x)
        return self.fc(F.relu(self.b(x) + self.c(F.relu_(x))).mean((2, 3)))


def test_constants_are_those_from_before_an_operation_in_place():
    net = InPlace()
    pruner = secateur.pruners.magnitude(granularity="group", ratios={"c": 0.5})
    found = secateur.prune(net, IMAGES, pruner)
    kept = torch.isin(net.fc.weight, found.model.fc.weight).all(0)
    with torch.no_grad():
        net.fc.weight[:, ~kept] = 0.0
        torch.testing.assert_close(found.model(IMAGES), net(IMAGES))
    assert found.model.c.out_channels == int(kept.sum()) == 4
    assert found.model.a.out_channels == 7


class Sequences(nn.Module):
    """Linear layers applied to each step of a sequence; `first` brings inputs to (N, steps, 6)."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.place, self.fc = nn.Parameter(torch.randn(1, 7, 6)), nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x) + self.place
        return self.fc((x + self.b(self.norm(self.a(x)).relu())).mean(1))


@pytest.mark.parametrize(
    ("first", "shape"),
    [
        (lambda x: x, (7, 6)),
        (lambda x: x.transpose(1, 2), (6, 7)),
        (lambda x: x.unsqueeze(1).flatten(1, 2), (7, 6)),
    ],
)
def test_inputs_may_be_sequences(first, shape):
    """Compared with a copy of the layers that has only the kept neurons of `a`, with their norm."""
    net, x = Sequences(first).eval(), torch.randn(4, *shape)
    graph = secateur.channel_graph(net, x)
    assert [group.name for group in graph.groups if group.locked is None] == ["a"]
    assert "an input of the network" in {group.locked for group in graph.groups}
    found = secateur.prune(net, x, HALF).model
    assert found.a.out_features == found.b.in_features == 4
    rows = [int((net.a.weight == row).all(1).nonzero()) for row in found.a.weight]
    with torch.no_grad():
        y = first(x) + net.place
        hidden = F.layer_norm(F.linear(y, net.a.weight[rows], net.a.bias[rows]), [4],
                              net.norm.weight[rows], net.norm.bias[rows]).relu()  # fmt: skip
        wanted = net.fc((y + F.linear(hidden, net.b.weight[:, rows], net.b.bias)).mean(1))
        torch.testing.assert_close(found(x), wanted)


@pytest.mark.parametrize("shape", [(1, 3), (3, 8, 8)])
def test_a_convolution_of_an_input_without_a_batch_axis_is_told(shape):
    with pytest.raises(PruningError, match=r"images \(N, C, H, W\) .*is the batch axis missing"):
        secateur.channel_graph(Net(), torch.randn(shape))
