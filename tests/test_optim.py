"""Optimizers and rates compared with torch's own schedulers, and split steps with whole ones."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import lr_scheduler

from secateur.base.sections import Train
from secateur.parametrizations.str import SoftThreshold
from secateur.training import optim
from secateur.training.engine import Engine
from secateur.training.step import TrainStep

EPOCHS, STEPS = 7, 5


def rates(**settings):
    """The rate at every step, from our formula."""
    settings = Train(epochs=EPOCHS, lr=0.3, **settings)
    return [optim.rate(settings, step, STEPS) for step in range(EPOCHS * STEPS)]


def by_torch(make, count):
    """The rates of a torch scheduler in `count` of its own steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    scheduler, found = make(optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_multistep_by_epoch_is_that_of_torch():
    wanted = by_torch(lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.2), EPOCHS)
    found = rates(schedule="multistep", milestones=[2, 5], gamma=0.2, schedule_by="epoch")
    assert found[::STEPS] == pytest.approx(wanted)
    assert found == [rate for rate in found[::STEPS] for _ in range(STEPS)]


def test_cosine_by_epoch_is_that_of_torch():
    wanted = by_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS), EPOCHS)
    assert rates(schedule="cosine", schedule_by="epoch")[::STEPS] == pytest.approx(wanted)


def test_one_cycle_has_the_corners_of_torch():
    total = EPOCHS * STEPS
    peak = round(0.3 * total)
    wanted = by_torch(
        lambda o: lr_scheduler.OneCycleLR(o, 0.3, total, pct_start=0.3, cycle_momentum=False), total
    )
    found = rates(schedule="one_cycle")
    assert found[0] == pytest.approx(0.3 / 25) == pytest.approx(wanted[0])
    assert max(found) == pytest.approx(0.3, rel=0.01)
    assert abs(found.index(max(found)) - peak) <= 1
    assert all(a < b for a, b in pairwise(found[:peak]))
    assert all(a > b for a, b in pairwise(found[peak + 1 :]))
    assert found == pytest.approx(wanted, abs=0.3 * 0.09)  # torch's schedule is one step shorter


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_warm_up_rises_in_equal_steps_and_ends_at_the_rate(schedule):
    found = rates(schedule=schedule, warmup=2)
    assert found[:10] == pytest.approx([0.3 * (step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(0.3)
    by_epoch = rates(schedule=schedule, warmup=2, schedule_by="epoch")
    assert by_epoch[::STEPS][:3] == pytest.approx([0.15, 0.3, 0.3])


@pytest.mark.parametrize(
    "wrong",
    [
        {"milestones": [7], "schedule": "multistep"},
        {"milestones": [3, 2], "schedule": "multistep"},
        {"schedule": "multistep"},
        {"warmup": 7},
        {"warmup": 1, "schedule": "one_cycle"},
        {"accumulate_grad_batches": 129},
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValidationError):
        Train(epochs=EPOCHS, **wrong)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def test_norms_and_biases_can_be_spared_the_weight_decay():
    model = small()
    for spared, wanted in (("all", {0.1}), ("weights", {0.1, 0.0})):
        made = optim.optimizer(
            model, Train(epochs=1, optimizer="sgd", weight_decay=0.1, weight_decay_on=spared)
        )
        decay = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
        assert set(decay.values()) == wanted
        assert len(decay) == len(list(model.parameters()))
    assert [decay[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0, 0.1, 0]


def decaying(model):
    made = optim.optimizer(model, Train(epochs=1, weight_decay=0.1, weight_decay_on="weights"))
    decay = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
    return {name for name, p in model.named_parameters() if decay[id(p)] > 0}


def test_weights_that_decay_are_those_of_layers_and_projections_of_attention_alone():
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
        "separate": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        "transposed": nn.ConvTranspose2d(3, 4, 2),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "root": nn.RMSNorm(4),
        "layer": nn.LayerNorm((2, 4)),
        "slopes": nn.PReLU(4),
    })  # fmt: skip
    model.class_token = nn.Parameter(torch.zeros(1, 1, 8))
    model.layer_scale = nn.Parameter(torch.zeros(8, 1, 1))
    assert decaying(model) == {
        "attention.in_proj_weight", "attention.out_proj.weight", "separate.q_proj_weight",
        "separate.k_proj_weight", "separate.v_proj_weight", "separate.out_proj.weight",
        "transposed.weight",
    }  # fmt: skip


def test_what_weights_are_computed_from_decays_as_they_do():
    model = small()
    parametrize.register_parametrization(model[0], "weight", SoftThreshold(-5.0, "cpu"))
    parametrize.register_parametrization(model[4], "bias", nn.Identity())
    assert decaying(model) == {
        "0.parametrizations.weight.original", "0.parametrizations.weight.0.s", "4.weight",
    }  # fmt: skip


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_the_textbook_one(nesterov):
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    settings = Train(
        epochs=1, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01
    )
    made = optim.optimizer(holder, settings)
    by_hand, speed = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        weight.grad = torch.tensor([0.5, 1.0], dtype=torch.float64) * (step + 1)
        slope = weight.grad + 0.01 * by_hand
        speed = 0.9 * speed + slope
        by_hand = by_hand - 0.1 * (slope + 0.9 * speed if nesterov else speed)
        made.step()
    assert torch.allclose(weight, by_hand, rtol=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_without_its_decorators_an_optimizer_of_torch_does_the_same(kind):
    """Equal to the byte, with hooks and state, even if torch's own class has been used before."""
    settings = {"lr": 0.1, "fused": True, "weight_decay": 0.01}
    settings |= {"momentum": 0.9, "nesterov": True} if kind == "SGD" else {}
    found, calls = [], []
    for make in (getattr(torch.optim, kind), getattr(optim, kind)):
        weight = nn.Parameter(torch.linspace(-1, 1, 7))
        made = make([weight], **settings)
        made.register_step_post_hook(lambda *_: calls.append(1))
        for step in range(3):
            made.zero_grad()
            (weight.sin() * (step + 1)).sum().backward()
            made.step()
        state = made.state_dict()
        again = make([weight], **settings)
        again.load_state_dict(state)
        weight.grad = torch.ones_like(weight)
        again.step()
        found.append([weight.detach().clone(), *again.state_dict()["state"][0].values()])
    assert len(calls) == 6
    for own, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(own), torch.as_tensor(other))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("parts", [1, 2, 3, 10])
def test_a_step_in_parts_is_the_whole_step(parts, smoothing):
    images, labels = torch.randn(10, 3, 6, 6), torch.randint(0, 5, (10,))
    model = small()
    model[1].eval()  # batch statistics would depend on the parts
    model[1].train = lambda mode=True: model[1]
    settings = Train(
        epochs=1,
        batch_size=10,
        optimizer="sgd",
        lr=0.1,
        accumulate_grad_batches=parts,
        label_smoothing=smoothing,
    )
    step = TrainStep(model, optim.optimizer(model, settings), None, settings, Engine(), 1)
    step.start_epoch()
    loss = step(images, labels, 10, 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    other = small()
    other[1].eval()
    logits = other(images)
    chances = logits.log_softmax(1)
    aim = F.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    wanted = -(aim * chances).sum(1).mean()
    wanted.backward()
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    for found, parameter in zip(gradients, other.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-6)
    assert float(step.correct) == float((logits.argmax(1) == labels).sum())
