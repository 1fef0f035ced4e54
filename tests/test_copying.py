"""Copies of networks: what `copy.deepcopy` gives, of every kind of module and attribute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from secateur.nn.copying import copied
from secateur.nn.layers import ChannelSelect


class Own(nn.Module):
    """Attributes of many kinds; some of them are the same object."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.select = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            ChannelSelect([0]),
        )
        self.same = self.conv
        self.tied = nn.Linear(2, 2)
        self.tied.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.other = nn.Linear(2, 2)
        self.other.weight = self.tied.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.sizes, self.names, self.table = [1, [2, 3]], {"a", "b"}, {("a", 1): {"b": [2]}}
        self.pair, self.kind, self.empty = (1, [2]), torch.float32, set()
        self.again, self.me, self.inner = self.sizes, [self], [nn.ReLU()]

    def forward(self, x):
        return self.norm(self.conv(x))


class Counted(nn.Module):
    """Says itself how it is copied."""

    copies = 0

    def __deepcopy__(self, memo):
        made = Counted()
        made.copies = self.copies + 1
        return made


class Stated(nn.Linear):
    """Gives and takes a state of its own."""

    def __getstate__(self):
        return super().__getstate__() | {"given": [1]}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.taken = state["given"]


def places(model):
    return {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


def test_a_copy_has_everything_and_shares_nothing_that_changes():
    model = Own().train()
    model.norm.eval()
    model.conv.register_forward_hook(lambda *_: None)
    made, expected = copied(model), copy.deepcopy(model)
    assert type(made) is Own and made is not model
    assert not places(made) & places(model)
    for (path, one), (other, two) in zip(
        made.named_modules(), expected.named_modules(), strict=True
    ):
        assert (path, type(one), one.training) == (other, type(two), two.training)
        assert list(vars(one)) == list(vars(two))
        for key, value in vars(one).items():
            assert type(value) is type(vars(two)[key]), key
            if not isinstance(value, torch.Tensor | nn.Module | dict | list):
                assert value == vars(two)[key], key
    for one, two in zip(made.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two) and one.requires_grad == two.requires_grad
    for one, two in zip(made.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, two)
    assert list(made.state_dict()) == list(model.state_dict())
    assert len(made.conv._forward_hooks) == 1
    assert made.conv._forward_hooks is not model.conv._forward_hooks
    assert made.norm._forward_hooks is not model.norm._forward_hooks
    assert (made.sizes, made.names, made.table) == ([1, [2, 3]], {"a", "b"}, {("a", 1): {"b": [2]}})
    assert made.sizes is not model.sizes and made.sizes[1] is not model.sizes[1]
    assert made.names is not model.names and made.empty is not model.empty
    assert made.table["a", 1]["b"] is not model.table["a", 1]["b"]
    assert made.pair == (1, [2]) and made.pair[1] is not model.pair[1]


def test_what_was_one_object_stays_one():
    made = copied(Own())
    assert made.same is made.conv and made.me[0] is made and made.again is made.sizes
    assert made.other.weight is made.tied.weight and not made.tied.weight.requires_grad
    assert type(made.inner[0]) is nn.ReLU


def test_modules_that_say_how_they_are_copied_are_asked():
    model = nn.Sequential(Counted(), Stated(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    made = copied(model)
    assert made[0].copies == 1
    assert made[1].taken == [1] and torch.equal(made[1].weight, model[1].weight)
    assert torch.equal(made[2].weight, model[2].weight)
    assert not places(made) & places(model)


def test_known_objects_take_the_place_of_their_copies():
    model = Own()
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    made = copied(model, tensors)
    assert made.conv.weight is model.conv.weight and made.norm.running_var is model.norm.running_var
    assert made.conv is not model.conv
    assert made.scratch is not model.scratch


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_containers_are_copied(kind):
    model = kind([nn.ReLU(), nn.Linear(2, 2)]) if kind is nn.ModuleList else kind(nn.ReLU())
    made = copied(model)
    assert list(made._modules) == list(model._modules)
    assert all(a is not b for a, b in zip(made, model, strict=True))
