"""Parametrizations: formulas by hand, the network after collapsing them, and resuming."""

import copy
import math
import types

import pytest
import torch
import yaml
from test_growing import Watcher, content, digits, fit, network, settings
from torch import nn
from workspace import ROOT

from secateur.base import plugin
from secateur.base.errors import SettingsError
from secateur.base.settings import Params, section, validate
from secateur.penalties import l1
from secateur.pruning.decision import PruningContext
from secateur.training import loop
from secateur.training import parametrization as parametrizations
from secateur.training.penalty import TrainingPlan
from stages.sparse_train import train_sparse

NAMES = [name for name in plugin.names("parametrizations") if name != "none"]
VARIATIONAL = plugin.load("parametrizations", "variational_dropout")
ADAM = {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.0}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SECATEUR_DEVICE", "cpu")


def attach(name, model, **chosen):
    schema = plugin.load("parametrizations", name).Settings
    with section(f"parametrizations.{name}"):
        own = validate(schema, chosen, f"parametrizations.{name}")
        return parametrizations.build(name, own, model)


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), dtype=torch.float64)
    layer.weight.data = torch.tensor(weight, dtype=torch.float64)
    return nn.Sequential(layer)


def logit(probability):
    return math.log(probability / (1 - probability))


# ---- soft thresholds ---------------------------------------------------------------------------


def test_the_soft_threshold_by_hand():
    model = linear([[3.0, -0.5, 0.24], [-1.0, 0.2, -0.3]])
    made = attach("str", model, initial=logit(0.25))
    expected = torch.tensor([[2.75, -0.25, 0], [-0.75, 0, -0.05]], dtype=torch.float64)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-7, atol=1e-7)
    assert made.metrics() == {"pruned": 2 / 6, "threshold/0": pytest.approx(0.25)}


def test_its_gradients_are_those_of_autograd_of_the_papers_formula():
    torch.manual_seed(1)
    for shape in ((5, 7), (4, 3, 3, 3)):
        weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        own = plugin.load("parametrizations", "str").SoftThreshold(0.3, weight.device).double()
        s = own.s.detach().clone().requires_grad_()
        upstream = torch.randn(shape, dtype=torch.float64)
        formula = weight.sign() * torch.relu(weight.abs() - torch.sigmoid(s))
        expected = torch.autograd.grad((formula * upstream).sum(), (weight, s))
        used = own(weight)
        found = torch.autograd.grad((used * upstream).sum(), (weight, own.s))
        torch.testing.assert_close(used, formula)
        assert 0 < int((used == 0).sum()) < used.numel()
        torch.testing.assert_close(found, expected)


def test_weight_decay_draws_thresholds_upwards_and_pull_more_so():
    found = {}
    for decay, pull in ((0.0, 0.0), (0.01, 0.0), (0.01, 0.05)):
        model = network()
        made = attach("str", model, initial=-8.0, pull=pull)
        term = parametrizations.joined("str", made, None)
        how = settings(3, weight_decay=decay)
        rows = fit(model, digits(), how, f"{decay} {pull}", penalty=term).history
        found[decay, pull] = rows[-1]["threshold/3"]
    assert list(found.values()) == sorted(set(found.values()))


def test_the_term_of_soft_thresholds_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    made = attach("str", model, initial=-4.0, pull=0.5)
    term = made(0)
    assert float(term.detach()) == 0.5 * 0.5 * (16 + 16)
    term.backward()
    assert made.thresholds["0"].s.grad == 0.5 * -4


# ---- variational dropout -----------------------------------------------------------------------


def test_log_alpha_by_hand_and_what_it_prunes():
    model = linear([[1.0, math.exp(-2), math.exp(-3)]])
    attach("variational_dropout", model, initial=-2.5)
    by_hand = torch.tensor([[-2.5, 1.5, 3.5]], dtype=torch.float64)
    found = model[0].log_alpha().detach()
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    assert (model[0].mean() == 0).tolist() == [[False, False, True]]


@pytest.mark.parametrize("log_alpha", [-7.5, -3.0, -0.5, 0.0, 1.0, 3.0, 7.0])
def test_the_divergence_is_the_papers_approximation(log_alpha):
    k1, k2, k3, alpha = 0.63576, 1.87320, 1.48695, math.exp(log_alpha)
    negative = k1 / (1 + math.exp(-(k2 + k3 * log_alpha))) - 0.5 * math.log(1 + 1 / alpha) - k1
    weight = torch.full((2, 3), 0.7, dtype=torch.float64)
    given = log_alpha + torch.log(weight.square() + 1e-8)
    assert float(VARIATIONAL.divergence(weight, given)) == pytest.approx(-6 * negative, rel=1e-9)
    assert -negative > 0
    assert float(VARIATIONAL.divergence(weight, given + 0.1)) < -6 * negative, "noise costs less"


def test_the_gradient_of_the_divergence_is_that_of_autograd():
    torch.manual_seed(2)
    weight = torch.randn(40, 30, dtype=torch.float64, requires_grad=True)
    variance = (3 * torch.randn(40, 30, dtype=torch.float64)).requires_grad_()
    log_alpha = (variance - torch.log(weight.square() + 1e-8)).clamp(-8, 8)
    reached = torch.sigmoid(1.87320 + 1.48695 * log_alpha)
    formula = (0.63576 * (1 - reached) + 0.5 * torch.log1p(torch.exp(-log_alpha))).sum()
    expected = torch.autograd.grad(3 * formula, (weight, variance))
    found = VARIATIONAL.divergence(weight, variance)
    torch.testing.assert_close(found, formula)
    torch.testing.assert_close(torch.autograd.grad(3 * found, (weight, variance)), expected)
    assert bool((log_alpha.abs() == 8).any()), "some entries are at the limit"


def test_the_divergence_is_close_to_the_integral_that_it_approximates():
    """KL(N(1, alpha) || 1/|w|) = -0.5 log alpha + E log |1 + sqrt(alpha) e| + constant, with the
    constant for which it tends to zero as alpha grows (section 4.4)."""
    noise = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(200_000.0) + 0.5) / 200_000)

    def integral(log_alpha):
        alpha = math.exp(log_alpha)
        logs = torch.log((1 + math.sqrt(alpha) * noise.double()).abs().clamp_min(1e-12))
        return float(logs.mean()) - 0.5 * log_alpha

    limit = integral(20.0)
    for log_alpha in (-4.0, -1.0, 0.0, 1.0, 3.0):
        approximate = float(VARIATIONAL.divergence(torch.ones(1), torch.tensor([log_alpha])))
        assert approximate == pytest.approx(integral(log_alpha) - limit, abs=0.02)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_outputs_have_the_mean_and_variance_that_noisy_weights_lead_to(kind):
    torch.manual_seed(3)
    if kind == "linear":
        layer, inputs = nn.Linear(6, 3), torch.randn(1, 6).expand(20_000, 6)
    else:
        layer, inputs = nn.Conv2d(2, 3, 2), torch.randn(1, 2, 2, 2).expand(20_000, -1, -1, -1)
    model = nn.Sequential(layer)
    attach("variational_dropout", model, initial=-2.0)
    found = model.train()(inputs).detach().double().flatten(1)
    flat = inputs[0].flatten().double()
    mean = layer.weight.detach().double().flatten(1) @ flat + layer.bias.detach()
    variance = math.exp(-2.0) * float(flat.square().sum())
    # five times the standard errors of a mean and of a variance of n draws
    assert (found.mean(0) - mean).abs().max() < 5 * math.sqrt(variance / len(found))
    assert (found.var(0) / variance - 1).abs().max() < 5 * math.sqrt(2 / len(found))


def test_the_divergence_is_over_the_images_and_warms_up():
    model = linear([[0.5, -2.0]])
    made = attach("variational_dropout", model, warmup=0.5, strength=3.0)
    made.start(TrainingPlan(settings(1, **ADAM), 40, 600))
    whole = 3 / 600 * float(VARIATIONAL.divergence(model[0].weight, model[0].log_variance).detach())
    values = [float(made(step).detach()) for step in (0, 5, 10, 20, 39)]
    assert values == pytest.approx([0, whole / 4, whole / 2, whole, whole])


def test_what_its_variances_cannot_be_trained_with_is_refused():
    model = network()
    term = parametrizations.joined(
        "variational_dropout", attach("variational_dropout", model), None
    )
    with pytest.raises(SettingsError, match=r"sparse_train\.optimizer = 'sgd': .* adam, adamw"):
        fit(model, digits(), settings(1), penalty=term)
    with pytest.raises(SettingsError, match=r"sparse_train\.weight_decay = 0\.01: .* must be 0"):
        fit(model, digits(), settings(1, **ADAM | {"weight_decay": 0.01}), penalty=term)


def test_a_warm_up_that_is_longer_than_the_training_is_refused():
    made = attach("variational_dropout", network(), warmup=5)
    term = parametrizations.joined("variational_dropout", made, None)
    key = r"^params\.yaml: parametrizations\.variational_dropout\.warmup = 5\.0: .* has 4 steps"
    with pytest.raises(SettingsError, match=key), section("sparse_train"):
        term.start(TrainingPlan(settings(1, **ADAM), 4, 100))
    term.start(TrainingPlan(settings(1, **ADAM), 5, 100))


# ---- both --------------------------------------------------------------------------------------

CASES = {
    "str": ({"initial": -3.0}, {}),
    "variational_dropout": ({"initial": -4.0, "threshold": 0.5, "strength": 0.02}, ADAM),
}


def trained(name, run="a", watcher=None, masks=None, model=None):
    """A model that has been trained for some epochs with parametrized weights."""
    chosen, how = CASES[name]
    model = model or network()
    made = attach(name, model, **chosen)
    term = parametrizations.joined(name, made, None)
    result = fit(model, digits(), settings(5, **how), run, watcher, term, masks)
    return model, made, result


@pytest.mark.parametrize("name", NAMES)
def test_collapsed_it_computes_what_it_computed_in_eval_mode(name):
    plain = network()
    model, made, result = trained(name)
    images = torch.randn(7, 1, 8, 8)
    expected = model.eval()(images)
    pruned = made.metrics()["pruned"]
    assert result.history[-1]["pruned"] == pruned
    assert 0.1 < pruned < 0.95
    zeros = made.collapse()
    assert torch.equal(model(images), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert shapes == {n: t.shape for n, t in plain.state_dict().items()}
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    copy.deepcopy(model)
    counted = sum(int(choice.sum()) for choice in zeros.values())
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert counted == sum(int((w == 0).sum()) for w in weights)
    assert counted / sum(w.numel() for w in weights) == pytest.approx(pruned)
    for pruner in ("chosen", "threshold"):
        module = plugin.load("pruners", pruner)
        own = module.Settings(**({"sensitivity": 1e-30, "scope": "weights"} if pruner != "chosen"
                                 else {}))  # fmt: skip
        decision = module.prune(own, PruningContext(model, images, choices=zeros))
        for key, mask in decision.masks.items():
            assert torch.equal(mask, model.get_parameter(key) != 0), "all zeros, and only them"


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_share_a_weight_compute_with_the_same_weight_until_the_end(name):
    model = nn.Sequential(
        nn.Flatten(), *(nn.Linear(64, 64) for _ in range(2)), nn.ReLU(), nn.Linear(64, 10)
    )
    model[2].weight = model[1].weight
    model, made, _ = trained(name, model=model)
    images = torch.randn(7, 1, 8, 8)
    expected = model.eval()(images)
    assert 0.05 < made.metrics()["pruned"] < 0.95
    made.collapse()
    assert torch.equal(model(images), expected)
    assert model[2].weight is model[1].weight
    assert {type(layer) for layer in (model[1], model[2])} == {nn.Linear}


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_step_it_ends_with_the_same_bytes(name):
    alone, _, expected = trained(name, "alone")
    for stop in (1, 5, 10, 15):
        with pytest.raises(KeyboardInterrupt):
            trained(name, "killed", Watcher(stop=stop))
    killed, _, found = trained(name, "killed")
    assert content(killed) == content(alone)
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_the_training_holds_at_zero_stay_zero_and_bring_no_noise(name):
    masks = {"3.weight": torch.arange(8 * 6 * 9).view(8, 6, 3, 3) % 3 > 0}
    model, made, _ = trained(name, masks=masks)
    if name == "variational_dropout":
        assert float(model[3].log_variance[~masks["3.weight"]].max().detach()) < -40
    made.collapse()
    assert not model[3].weight[~masks["3.weight"]].any()
    assert model[3].weight[masks["3.weight"]].any()


@pytest.mark.parametrize("name", NAMES)
def test_layers_may_be_left_alone_but_not_all_of_them(name):
    model = network()
    made = attach(name, model, skip=["2"])
    assert list(made.layers) == ["0", "3"]
    with pytest.raises(SettingsError, match=rf"parametrizations\.{name}\.skip: no layer is left"):
        attach(name, network(), skip=["*"])
    with pytest.raises(
        SettingsError, match=rf"parametrizations\.{name}\.skip: fc9 matches no layer"
    ):
        attach(name, network(), skip=["fc9"])


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_is_on_the_weights_underneath(name):
    model = network()
    penalty = l1.build(l1.Settings(), model, 0.5)
    alone = float(penalty(0).detach())
    made = attach(name, model)
    term = parametrizations.joined(name, made, penalty)
    term.start(TrainingPlan(settings(1, **ADAM), 40, 100))
    assert float(term(0).detach()) == pytest.approx(alone + float(made(0).detach()), rel=1e-6)
    penalty(0).backward()
    own = [p for n, p in model.named_parameters() if n.startswith("3.") and p.dim() == 4]
    assert torch.equal(own[0].grad, 0.5 * own[0].sign())


@pytest.mark.parametrize("name", NAMES)
def test_two_that_prune_by_themselves_are_refused(name):
    model = network()
    gradual = plugin.load("penalties", "gradual")
    penalty = gradual.build(gradual.Settings(), model, 0.0)
    with (
        pytest.raises(SettingsError, match=f"params.yaml: parametrization = '{name}': prunes by"),
        section(f"parametrizations.{name}"),
    ):
        parametrizations.joined(name, attach(name, model), penalty)


@pytest.mark.parametrize("name", NAMES)
def test_without_epochs_sparse_train_hands_the_network_on_as_it_came(name):
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    given |= {"penalty": "none", "parametrization": name}
    given["sparse_train"]["epochs"] = 0
    given["parametrizations"][name]["initial"] = 3.0  # it would prune all weights
    model = network()
    before = content(model)
    context = types.SimpleNamespace(
        params=validate(Params, given, ""), data=digits(), round_name=None,
        start=types.SimpleNamespace(model=lambda: model, masks={}),
        fit=lambda model, how, **_: loop.FitResult([], 0), header=lambda *_, **notes: notes,
    )  # fmt: skip
    result = train_sparse(context)
    assert result.model is model and content(model) == before
    assert "parametrization" not in result.header and not result.choices


def test_without_a_parametrization_model_and_penalty_are_left_as_they_are():
    model, penalty = network(), object()
    before, kinds = content(model), [type(m) for m in model.modules()]
    made = attach("none", model)
    assert made is None
    assert parametrizations.joined("none", made, penalty) is penalty
    assert content(model) == before
    assert [type(m) for m in model.modules()] == kinds
