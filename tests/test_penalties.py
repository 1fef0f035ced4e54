"""Penalties: values and gradients by hand, compared with numpy, autograd and finite differences."""

import copy
import functools
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from secateur.base import plugin
from secateur.base.errors import SettingsError
from secateur.training import penalty as penalties

NAMES = plugin.names("penalties")
FORMULAS = [name for name in NAMES if hasattr(plugin.load("penalties", name), "gradient")]
COURSES = ["greg1", "greg2", "gsm"]  # with their own tests
STEPPING = ["gradual", "rigl"]  # these prune by themselves, with or without a term in the loss
SCALES = ["network_slimming"]  # covers scales of norms, not weights
SCALE_FREE = [name for name in FORMULAS if "hoyer" in name]
SHAPES = [(5,), (4, 3), (3, 2, 3, 2)]
MATRIX = [[3.0, 0.0], [4.0, 0.0]]  # channel norms 5, 0; filter norms 3, 4; l2 norm 5
BY_HAND = [  # name, weights, value, gradient
    ("l1", [[0.0, 1, -2]], 3, [[0, 1, -1]]),
    ("hoyer", [[0.0, 1, -2]], 1.3416, [[0, 0.1789, 0.0894]]),
    ("hoyer_square", [[0.0, 1, -2]], 1.8, [[0, 0.48, 0.24]]),
    ("transformed_l1", [[0.0, 1, -2]], 2.3333, [[0, 0.5, -0.2222]]),
    ("group_lasso", MATRIX, 12, [[1.6, 0], [1.8, 0]]),
    ("group_hoyer", MATRIX, 2.4, [[0.032, 0], [-0.024, 0]]),
    ("group_hoyer_square", MATRIX, 2.96, [[0.0896, 0], [-0.0672, 0]]),
]


def variants(name):
    """Settings of a plug-in: its defaults, with all combinations of its boolean values."""
    schema = plugin.load("penalties", name).Settings
    flags = [key for key, field in schema.model_fields.items() if field.annotation is bool]
    mixes = product([False, True], repeat=len(flags))
    return [schema(**dict(zip(flags, mix, strict=True))) for mix in mixes]


def build(name, model, decay=1.0, **chosen):
    module = plugin.load("penalties", name)
    return module.build(module.Settings(**chosen), model, decay)


def linear(weights, bias=None):
    layer = nn.Linear(len(weights[0]), len(weights), bias=bias is not None)
    layer.weight.data = torch.tensor(weights)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return nn.Sequential(layer)


def groups(w):
    """Norms of channels and of filters, computed slice by slice."""
    if w.ndim == 1:
        return list(abs(w)), []
    return [np.linalg.norm(w[:, c]) for c in range(w.shape[1])], [np.linalg.norm(f) for f in w]


def in_numpy(name, w):
    """The formulas of the papers, for weights that are not all zero."""
    w = w.detach().double().numpy()
    l1, l2 = sum(abs(w).flatten()), math.sqrt(sum(w.flatten() ** 2))
    a, b = (sum(norms) for norms in groups(w))
    return {
        "l1": l1,
        "hoyer": l1 / l2,
        "hoyer_square": l1**2 / l2**2,
        "transformed_l1": sum(2 * abs(x) / (1 + abs(x)) for x in w.flatten()),
        "group_lasso": a + b,
        "group_hoyer": (a + b) / l2,
        "group_hoyer_square": (a**2 + b**2) / l2**2,
    }[name]


@pytest.mark.parametrize(("name", "weights", "value", "gradient"), BY_HAND)
def test_values_and_gradients_worked_out_by_hand(name, weights, value, gradient):
    model = linear(weights)
    total = build(name, model, decay=0.5)(0)
    total.backward()
    assert float(total.detach()) == pytest.approx(0.5 * value, abs=5e-5)
    expected = 0.5 * torch.tensor(gradient)  # the value includes the strength
    torch.testing.assert_close(model[0].weight.grad, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("layer", [nn.Linear(7, 4), nn.Conv2d(7, 4, 3)], ids=["linear", "conv"])
def test_group_hoyer_square_of_equal_weights_counts_filters_and_channels(layer):
    nn.init.ones_(layer.weight)
    penalty = build("group_hoyer_square", nn.Sequential(layer))
    assert penalty(0).item() == pytest.approx(4 + 7, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [case[0] for case in BY_HAND])
def test_the_value_is_the_papers_formula(name, shape):
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value = plugin.load("penalties", name).value(w)
    assert float(value) == pytest.approx(in_numpy(name, w), rel=1e-12)


def test_the_form_of_transformed_l1_follows_a():
    w, near_zero, near_infinity = [[0.0, 0.5, -2.0]], 1e-7, 1e7
    a3 = build("transformed_l1", linear(w), a=3)(0)
    assert a3.item() == pytest.approx(4 * 0.5 / 3.5 + 4 * 2 / 5)
    counted = build("transformed_l1", linear(w), a=near_zero)(0)
    assert counted.item() == pytest.approx(2, rel=1e-5)
    summed = build("transformed_l1", linear(w), a=near_infinity)(0)
    assert summed.item() == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_closed_gradient_is_that_of_autograd_and_of_finite_differences(name, shape):
    module = plugin.load("penalties", name)
    torch.manual_seed(2)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(module.value(w), w)
    closed = module.gradient(w.detach())
    torch.testing.assert_close(closed, by_autograd, rtol=1e-10, atol=1e-12)
    for index in np.ndindex(*shape):
        step = torch.zeros(shape, dtype=torch.float64)
        step[index] = 1e-6
        with torch.no_grad():
            slope = (module.value(w + step) - module.value(w - step)) / 2e-6
        assert float(closed[index]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gsm"}))  # gsm's value has no gradient
def test_backward_through_a_whole_network_passes_gradcheck(name):
    torch.manual_seed(3)
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4)
    model = nn.Sequential(*layers).double()
    weights = tuple(model.parameters())
    for chosen in variants(name):
        penalty = plugin.load("penalties", name).build(chosen, model, 0.3)
        if penalty is None:
            assert name == "none"
            continue
        if name in COURSES:  # between two updates, it is a plain function of the weights
            penalty(0)
            penalty = functools.partial(lambda p, _: p(1), penalty)
        assert torch.autograd.gradcheck(lambda *_, p=penalty: p(0), weights)  # moves them in place


@pytest.mark.parametrize("name", FORMULAS)
@given(scale=st.floats(1e-8, 1e8), seed=st.integers(0, 99))
@examples(max_examples=10, deadline=None, derandomize=True)
def test_scaling_keeps_the_hoyer_family_and_its_gradient_leaves_the_norm_alone(name, scale, seed):
    module = plugin.load("penalties", name)
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before, after = float(module.value(w)), float(module.value(scale * w))
    if name in SCALE_FREE:
        assert after == pytest.approx(before, rel=1e-9)
        assert float((w * module.gradient(w)).sum()) == pytest.approx(0, abs=1e-9)
    else:
        assert (after > before) == (scale > 1) or scale == 1


@pytest.mark.parametrize("name", FORMULAS)
def test_the_penalty_is_positive_and_the_same_for_both_signs(name):
    module = plugin.load("penalties", name)
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(4))
    assert float(module.value(w)) == float(module.value(-w)) > 0
    torch.testing.assert_close(module.gradient(-w), -module.gradient(w), rtol=0, atol=0)


def holes():
    torch.manual_seed(5)
    row, column, both = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.randn(5, 4)
    row[1], column[:, 2], both[0], both[:, 0] = 0, 0, 0, 0
    tiny = torch.randn(4, 3)
    tiny[:, 1] *= 1e-30
    tiny[2] *= 1e-40
    tiny[0, 0] = 0
    dead = {f"zeros {s}": torch.zeros(s) for s in SHAPES}
    return {"row": row, "column": column, "both": both, "tiny": tiny} | dead


@pytest.mark.parametrize("hole", holes())
@pytest.mark.parametrize("name", FORMULAS)
def test_groups_and_tensors_of_zeros_stay_zero_with_finite_gradients(name, hole):
    module, w = plugin.load("penalties", name), holes()[hole]
    value, gradient = module.value(w), module.gradient(w)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[w == 0].any()
    if not w.any():
        assert float(value) == 0


@pytest.mark.parametrize("shape", [*SHAPES, (50, 40)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_tiny_and_large_weights_give_sound_values_and_finite_gradients(name, shape):
    module = plugin.load("penalties", name)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    w.view(-1)[0] = 0
    for scale in (1e-10, 1e-20, 1e-23, 1e-30, 1e-38, 1e-40, 1e-45, 1e10, 1e15):
        value, gradient = module.value(w * scale), module.gradient(w * scale)
        assert value.isfinite(), scale
        assert gradient.isfinite().all(), scale
        assert not gradient[w == 0].any(), scale
        if scale < 1:  # smaller weights never have a higher penalty
            assert 0 <= float(value) <= float(module.value(w)) * 1.001, scale


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none", *COURSES, *STEPPING, *SCALES}))
def test_biases_are_covered_only_on_request(name):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    for biases in (False, True):
        model.zero_grad()
        build(name, model, biases=biases)(0).backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        weights = {"0.weight", "3.weight"}
        assert touched == (weights | {"0.bias", "3.bias"} if biases else weights)


@pytest.mark.parametrize("name", [case[0] for case in BY_HAND])
def test_the_penalty_sums_one_value_by_tensor(name):
    torch.manual_seed(8)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4))
    parts = [in_numpy(name, p) for p in model.parameters()]  # conv, its bias, linear, its bias
    weights = build(name, model, biases=False)(0).item()
    everything = build(name, model, biases=True)(0).item()
    assert weights == pytest.approx(parts[0] + parts[2], rel=1e-5)
    assert everything == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_building_and_calling_a_penalty_leaves_the_model_alone(name):
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    before = [p.detach().clone() for p in model.parameters()]
    for chosen in variants(name):
        penalty = plugin.load("penalties", name).build(chosen, model, 0.3)
        if penalty is not None and name != "gsm":  # gsm adds its gradient before the step
            penalty(0).backward()
        elif penalty is not None:
            assert not penalty(0).requires_grad
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_without_strength_there_is_no_penalty_but_the_growing_ones_need_some(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    chosen = plugin.load("penalties", name).Settings()
    if name in COURSES:
        with pytest.raises(SettingsError, match=rf"decay = 0\.0: penalty {name} .* greater than 0"):
            penalties.build(name, chosen, model, 0.0)
    else:
        assert (penalties.build(name, chosen, model, 0.0) is None) == (name not in STEPPING)
    assert (penalties.build(name, chosen, model, 0.1) is None) == (name == "none")


# ---- other groups ------------------------------------------------------------------------------

GROUPED = ["group_lasso", "group_hoyer", "group_hoyer_square"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GROUPED)
def test_with_grouping_position_every_kernel_position_has_groups_of_its_own(name, shape):
    module = plugin.load("penalties", name)
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    flat = w.view(*shape[:2], -1).numpy() if len(shape) > 1 else None
    if flat is None:
        a, b = abs(w.numpy()).sum(), 0
    else:
        places = range(flat.shape[2])
        a, b = (
            sum(float(np.linalg.norm(flat[..., k], axis=axis).sum()) for k in places)
            for axis in (0, 1)
        )
    s = float(w.norm())
    wanted = {
        "group_lasso": a + b,
        "group_hoyer": (a + b) / s,
        "group_hoyer_square": (a**2 + b**2) / s**2,
    }[name]
    assert float(module.value(w, True)) == pytest.approx(wanted, rel=1e-12)
    v = w.clone().requires_grad_()
    module.value(v, True).backward()
    torch.testing.assert_close(module.gradient(w, True), v.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grouping", ["layer", "position"])
@pytest.mark.parametrize(("groups", "filters"), [(1, 4), (2, 6), (4, 4), (4, 8)])
@pytest.mark.parametrize("name", GROUPED)
def test_a_grouped_convolution_counts_as_the_whole_one_with_zeros_between_groups(
    name, groups, filters, grouping
):
    torch.manual_seed(10)
    grouped = nn.Sequential(nn.Conv2d(4, filters, 3, groups=groups), nn.Conv2d(filters, 3, 1))
    whole = nn.Sequential(nn.Conv2d(4, filters, 3), copy.deepcopy(grouped[1])).double()
    part, rows = 4 // groups, filters // groups
    whole[0].weight.data.zero_()
    for group in range(groups):
        here = slice(rows * group, rows * (group + 1)), slice(part * group, part * (group + 1))
        whole[0].weight.data[here] = grouped[0].weight.detach()[here[0]].double()
    penalties_ = [build(name, m, 0.3, grouping=grouping)(0) for m in (grouped.double(), whole)]
    for total in penalties_:
        total.backward()
    assert float(penalties_[0].detach()) == pytest.approx(float(penalties_[1].detach()), rel=1e-12)
    for group in range(groups):
        here = slice(rows * group, rows * (group + 1)), slice(part * group, part * (group + 1))
        own, wanted = grouped[0].weight.grad[here[0]], whole[0].weight.grad[here]
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-12)
    if groups == 1:
        w, module = grouped[0].weight.detach(), plugin.load("penalties", name)
        by_position = grouping == "position"
        assert module.gradient(w, by_position).mul(0.3).equal(grouped[0].weight.grad)


class Coupled(nn.Module):
    """A residual sum, a depthwise and a grouped convolution, and a linear layer over pixels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.deep, self.back = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
        self.split, self.fc = nn.Conv2d(4, 6, 1, groups=2), nn.Linear(24, 3)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + self.back(self.deep(x))
        return self.fc(self.split(x).flatten(1))


@pytest.mark.parametrize("name", GROUPED)
def test_with_grouping_group_a_group_is_all_that_a_channel_has_in_any_layer(name):
    torch.manual_seed(0)
    model = Coupled().double()
    model.norm.weight.data.uniform_(0.5, 1.5)
    one = plugin.load("penalties", name)
    penalty = one.build(one.Settings(grouping="group"), model, 0.3, (1, 2, 2))
    value = penalty(0)
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    w = dict(model.named_parameters())
    sums = [  # channels of the sum, and channels that reach fc through all pixels
        torch.cat((
            w["stem.weight"][c].flatten(), w["norm.weight"][c].view(1),
            w["deep.weight"][c].flatten(), w["back.weight"][c].flatten(),
            w["back.weight"][:, c].flatten(),
            w["split.weight"][3 * (c // 2) : 3 * (c // 2) + 3, c % 2].flatten(),
        )).norm() for c in range(4)
    ]  # fmt: skip
    ends = [
        torch.cat((w["split.weight"][c].flatten(),
                   w["fc.weight"][:, 4 * c : 4 * c + 4].flatten())).norm()
        for c in range(6)
    ]  # fmt: skip
    total = 0.0
    for norms in (torch.stack(sums), torch.stack(ends)):
        a, s = norms.sum(), norms.square().sum().sqrt()
        total = total + {"group_lasso": a, "group_hoyer": a / s}.get(name, (a / s) ** 2)
    (0.3 * total).backward()
    assert float(value.detach()) == pytest.approx(float(0.3 * total.detach()), rel=1e-12)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    layers = ("stem", "norm", "deep", "back", "split", "fc")
    assert set(found) == set(wanted) == {f"{layer}.weight" for layer in layers}
    for tensor, gradient in wanted.items():
        torch.testing.assert_close(found[tensor], gradient, rtol=1e-9, atol=1e-12)


def test_a_coupled_group_of_zeros_has_no_gradient_and_biases_do_not_count():
    model = Coupled()
    for parameter in model.parameters():
        parameter.data.zero_()
    module = plugin.load("penalties", "group_hoyer_square")
    penalty = module.build(module.Settings(grouping="group"), model, 1.0, (1, 2, 2))
    value = penalty(0)
    value.backward()
    assert float(value.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="biases: are not covered with grouping: group"):
        module.Settings(grouping="group", biases=True)
