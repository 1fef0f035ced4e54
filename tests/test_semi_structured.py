"""2:4 masks by hand, and single entries of biases and scales next to those of weights."""

import pytest
import torch
import yaml
from torch import nn

from secateur.base import plugin
from secateur.base.errors import SettingsError
from secateur.base.settings import section, validate
from secateur.pruning.decision import PruningContext
from secateur.sparsity import masks
from secateur.sparsity.semi_structured import smaller_two_of_four

MAGNITUDE = plugin.load("pruners", "magnitude")


def prune(model, images=None, **chosen):
    images = torch.zeros(2, 4, 5, 5) if images is None else images
    with section("pruners.magnitude"):
        own = validate(MAGNITUDE.Settings, chosen, "pruners.magnitude")
        context = PruningContext(model, images, torch.tensor([0, 1]))
        return MAGNITUDE.prune(own, context)


def test_of_each_four_consecutive_inputs_the_two_smallest_go():
    layer = nn.Linear(8, 2)
    layer.weight.data = torch.tensor(
        [[1.0, -4, 2, -3, 0.5, 0.1, -0.2, 0.3], [5, 5, 5, 5, 0, -1, 0, 0]]
    )
    kept = prune(nn.Sequential(nn.Flatten(), layer), granularity="2:4").masks["1.weight"]
    by_hand = [[0, 1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1, 0, 1]]  # of equal ones the first go
    assert kept.int().tolist() == by_hand


@pytest.mark.parametrize("groups", [1, 2])
def test_consecutive_inputs_of_a_convolution_are_channels_at_one_position(groups):
    torch.manual_seed(0)
    scores = torch.rand(6, 8 // groups, 3, 3)
    chosen = smaller_two_of_four(scores)
    for filter_ in range(6):
        for row in range(3):
            for column in range(3):
                for first in range(0, 8 // groups, 4):
                    four = scores[filter_, first : first + 4, row, column]
                    gone = chosen[filter_, first : first + 4, row, column]
                    assert int(gone.sum()) == 2
                    assert four[gone].max() < four[~gone].min()


def test_layers_without_a_multiple_of_four_inputs_are_passed_over_and_it_is_told_what_is_gained():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8),
                          nn.Linear(8, 2))  # fmt: skip
    decision = prune(model, granularity="2:4", criterion="l2", skip=["2"])
    assert set(decision.masks) == {"0.weight"}
    (line,) = decision.lines
    assert "on a CPU nothing is gained" in line
    with pytest.raises(
        SettingsError, match=r"granularity = '2:4': no layer has a multiple of four"
    ):
        prune(model[3:4], granularity="2:4")


@pytest.mark.parametrize(
    "more", [{"ratios": 0.4}, {"ranking": "global"}, {"target": {"params": 0.4}}, {"round_to": 4}]
)
def test_there_is_nothing_to_set_about_2_4(more):
    (key,) = more
    with pytest.raises(SettingsError, match=rf"pruners\.magnitude\.{key}: granularity 2:4 prunes"):
        prune(nn.Sequential(nn.Linear(8, 2)), granularity="2:4", **more)


def test_yaml_may_take_it_for_a_number_of_base_sixty():
    written = yaml.safe_load("granularity: 2:4")
    assert written == {"granularity": 124}
    assert MAGNITUDE.Settings(**written).granularity == "2:4"


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1e-6, 1.0, 2.0]))
        model[3].bias.copy_(torch.tensor([1e-7, 3.0, -2e-7, 4.0, 5.0]))
    return model


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "fisher", "lamp"])
@pytest.mark.parametrize("scope", ["weights_and_biases", "weights_and_scales"])
def test_biases_and_scales_are_ranked_with_the_weights(scope, criterion):
    model = network()
    images = torch.randn(2, 4, 5, 5)
    kept = prune(model, images, granularity="weight", scope=scope, ranking="global", ratios=0.3,
                 criterion=criterion).masks  # fmt: skip
    covered = masks.prunable(model, scope)
    total = sum(parameter.numel() for parameter in covered.values())
    assert set(kept) <= set(covered)
    assert sum(int((~mask).sum()) for mask in kept.values()) == -(-3 * total // 10)
    small = {"weights_and_biases": ("3.bias", [0, 2]), "weights_and_scales": ("1.weight", [0])}
    name, entries = small[scope]
    if criterion in ("l1", "l2"):
        assert (~kept[name]).nonzero().flatten().tolist() == entries


def test_within_layers_a_bias_has_the_ratio_of_its_layer():
    kept = prune(network(), granularity="weight", scope="weights_and_biases", ratios="1: 0.4").masks
    assert set(kept) == {"3.weight", "3.bias"}
    assert kept["3.bias"].tolist() == [False, True, False, True, True]
    assert int((~kept["3.weight"]).sum()) == 54


def test_what_does_not_go_with_biases_and_scales_is_told():
    with pytest.raises(SettingsError, match="criterion = 'wanda': needs weights only"):
        prune(network(), granularity="weight", scope="weights_and_biases", criterion="wanda")
    with pytest.raises(SettingsError, match="scope: weights_and_biases needs granularity: weight"):
        prune(network(), scope="weights_and_biases")
    with pytest.raises(
        SettingsError, match=r"scope = 'weights_and_scales': the scales .* one number"
    ):
        prune(network(), granularity="weight", scope="weights_and_scales", ratios="1: 0.4")
