"""Optimal brain surgeon: each removal compared with brute force, weights with least squares."""

import copy
import itertools

import pytest
import torch
from torch import nn

from secateur.base import plugin
from secateur.base.errors import ArgumentError
from secateur.nn.layers import IndexedConv2d
from secateur.pruning.apply import apply_decision
from secateur.pruning.decision import PruningContext
from secateur.sparsity.choices import number_pruned

OBS = plugin.load("pruners", "obs")


def least_squares(inputs, row, stay):
    """The best weights for these inputs, and the mean squared change of the output."""
    found = torch.zeros_like(row)
    if stay:
        part = inputs[:, list(stay)]
        found[list(stay)] = torch.linalg.lstsq(part, inputs @ row).solution
    return found, float((inputs @ (found - row)).square().mean())


def linear(rows=3, inputs=5, samples=40, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(samples, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs).double()
    return x, torch.randn(rows, inputs, dtype=torch.float64), x.T @ x / samples


def test_each_removal_is_the_cheapest_one_and_costs_what_brute_force_finds():
    x, rows, second = linear()
    order, costs = OBS.removal(rows, torch.linalg.inv(second))
    for row, chosen, cost in zip(rows, order.tolist(), costs.tolist(), strict=True):
        stay, before = set(range(5)), 0.0
        for removed, added in zip(chosen, cost, strict=True):
            tried = {p: least_squares(x, row, stay - {p})[1] for p in stay}
            assert min(tried, key=tried.get) == removed
            assert tried[removed] - before == pytest.approx(added, rel=1e-6)
            stay, before = stay - {removed}, tried[removed]


def test_what_stays_is_the_least_squares_solution():
    x, rows, second = linear(seed=1)
    kept = OBS.choose(rows, second, 8)
    assert int((~kept).sum()) == 8
    found = OBS.reconstruct(rows, second, kept)
    for row, mask, weights in zip(rows, kept, found, strict=True):
        stay = mask.nonzero().flatten().tolist()
        assert torch.allclose(weights, least_squares(x, row, stay)[0], rtol=1e-7, atol=1e-9)


def test_outputs_share_a_ratio_by_what_the_next_removal_costs():
    """With uncorrelated inputs the cost is w^2, so the smallest weights of all outputs go."""
    rows = torch.tensor([[1.0, -2.0, 3.0], [0.1, 0.2, -5.0], [0.3, 0.4, 0.5]], dtype=torch.float64)
    kept = OBS.choose(rows, torch.eye(3, dtype=torch.float64), 5)
    assert torch.equal(kept, rows.abs() > 0.5)
    for count in range(10):
        assert int((~OBS.choose(rows, torch.eye(3).double(), count)).sum()) == count


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    return nn.Sequential(*layers).eval()


def test_layers_of_a_network_lose_their_share_and_outputs_change_less_than_without_updates():
    model, images = network(), torch.randn(64, 2, 6, 6)
    context = PruningContext(model, images)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = OBS.prune(OBS.Settings(ratios=0.5, damping=1e-6), context)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "model unchanged"
    assert {n: int((~m).sum()) for n, m in found.masks.items()} == {"0.weight": 27, "3.weight": 54}
    made = apply_decision(model, found, images, remove_dead=False).model
    with torch.no_grad():
        first, inputs = model[0](images), model[:3](images)
        plain = {n: before[n] * mask for n, mask in found.masks.items()}
        bias = before["0.bias"]
        without = nn.functional.conv2d(images, plain["0.weight"], bias, stride=2, padding=1)
        assert (made[0](images) - first).norm() < (without - first).norm()
        without = nn.functional.linear(inputs, plain["3.weight"], before["3.bias"])
        assert (made[3](inputs) - model[3](inputs)).norm() < (without - model[3](inputs)).norm()
        best = min(
            float((nn.functional.linear(inputs, before["3.weight"] * mask) - model[3](inputs)
                   + before["3.bias"]).norm())
            for mask in (torch.rand(4, 27).argsort(1) < 13 for _ in itertools.repeat(0, 20))
        )  # fmt: skip
        assert (made[3](inputs) - model[3](inputs)).norm() < best, "20 random masks are worse"


def test_zeros_go_first_and_refusals_are_one_line():
    model, images = network(), torch.randn(8, 2, 6, 6)
    with torch.no_grad():
        model[3].weight[torch.rand(4, 27) < 0.4] = 0
    zeros = model[3].weight == 0
    found = OBS.prune(OBS.Settings(ratios=0.5, skip=["0"]), PruningContext(model, images))
    assert not found.masks["3.weight"][zeros].any()
    with pytest.raises(ArgumentError, match=r"damping.*inputs of 3\.weight are linearly dependent"):
        OBS.prune(OBS.Settings(ratios=0.5, skip=["0"], damping=0), PruningContext(model, images))
    with torch.no_grad():
        model[0].weight[1].zero_()  # zero inputs, of which a low ratio keeps weights
        model[0].bias[1] = 0
    with pytest.raises(ArgumentError, match=r"damping.*inputs of 3\.weight are linearly dependent"):
        few = OBS.Settings(ratios=0.05, skip=["0"], damping=0)
        OBS.prune(few, PruningContext(model, images[:1]))
    grouped = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(72, 2))
    with pytest.raises(ArgumentError, match=r"skip.*0\.weight belongs to a convolution with"):
        OBS.prune(OBS.Settings(), PruningContext(grouped, images))


def test_as_many_weights_go_as_with_other_pruners():
    model = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 3))
    context = PruningContext(model, torch.randn(16, 5))
    for ratio in (0.4, 0.5, 0.9):
        masks = OBS.prune(OBS.Settings(ratios=ratio), context).masks
        for mask in masks.values():
            assert int((~mask).sum()) == number_pruned(ratio, mask.numel())


def test_an_indexed_convolution_is_the_plain_one_of_permuted_weights():
    plain, images = network(), torch.randn(16, 2, 6, 6) * torch.tensor([1.0, 9]).view(2, 1, 1)
    indexed, order = network(), torch.tensor([1, 0])
    weight, bias = indexed[0].weight.detach()[:, order], indexed[0].bias.detach()
    indexed[0] = IndexedConv2d.from_conv(plain[0], weight, bias, 1, order, None)
    found, wanted = (
        OBS.prune(OBS.Settings(damping=1e-6), PruningContext(m, images)) for m in (indexed, plain)
    )
    torch.testing.assert_close(indexed(images), plain(images))
    assert found.masks["0.weight"][:, order].equal(wanted.masks["0.weight"])
    torch.testing.assert_close(found.weights["0.weight"][:, order], wanted.weights["0.weight"])


class Given(nn.Module):
    """Layers whose weights are passed to functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.m = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = nn.functional.conv2d(self.a(x), self.b.weight, self.b.bias).flatten(2).transpose(1, 2)
        return nn.functional.linear(self.m(x, x, x)[0], self.c.weight, self.c.bias).mean(1)


def test_inputs_of_a_weight_that_a_function_is_given_are_those_of_its_layer():
    """The projection after attention, and a linear layer, are pruned as in a network of modules."""
    torch.manual_seed(0)
    model, images = Given().eval(), torch.randn(8, 2, 5, 5)
    context = PruningContext(model, images)
    with pytest.raises(ArgumentError, match=r"skip.*b\.weight is used outside of its layer"):
        OBS.prune(OBS.Settings(), context)
    found = OBS.prune(OBS.Settings(skip=["b"], damping=1e-6), context)
    assert set(found.masks) == {"a.weight", "c.weight", "m.out_proj.weight"}
    plain, mixed = copy.deepcopy(model.m), nn.Linear(4, 4)
    with torch.no_grad():
        x = nn.functional.conv2d(model.a(images), model.b.weight, model.b.bias).flatten(2).mT
        mixed.load_state_dict(model.m.out_proj.state_dict())
        plain.out_proj.weight.copy_(torch.eye(4))
        plain.out_proj.bias.zero_()
        inputs = plain(x, x, x)[0]
    alone = nn.Sequential(mixed, model.c).eval()
    wanted = OBS.prune(OBS.Settings(damping=1e-6), PruningContext(alone, inputs))
    for name, own in {"m.out_proj.weight": "0.weight", "c.weight": "1.weight"}.items():
        assert found.masks[name].equal(wanted.masks[own])
        torch.testing.assert_close(found.weights[name], wanted.weights[own])
