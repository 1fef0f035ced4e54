"""Training: every step by hand, equal results after a kill, and never a step further with NaN."""

import contextlib
import copy
import functools
import hashlib
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.base import plugin
from secateur.base.errors import TrainingError
from secateur.base.sections import Train
from secateur.base.stage import Stage
from secateur.data import augment, dataset
from secateur.data.dataset import DatasetInfo, InMemoryImages
from secateur.pipeline import console
from secateur.pruning.decision import PruningContext
from secateur.sparsity import masks
from secateur.training import determinism, engine, loop, resume
from secateur.training import penalty as penalties
from secateur.training.callbacks import Callback
from secateur.training.evaluation import accuracy

SMALL = {"lenet300": {"hidden": [16, 8]}, "lenet5": {"filters": [4, 6], "hidden": 12}}
ARCHS = sorted(SMALL)
PENALTIES = plugin.names("penalties")
OPTIMIZERS = ["sgd", "adam", "adamw"]
DIGITS = plugin.load("datasets", "digits")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Each test has its own project and runs on the CPU, where results are equal to the byte."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SECATEUR_DEVICE", "cpu")


@functools.cache
def digits(count=200, validation=0.2):
    images = DIGITS.read(DIGITS.Settings(), None)
    images = replace(images, train=images.train.take(range(count)), mean=(0.3,), std=(0.4,))
    return dataset.prepare("digits", images, validation, 0)


def network(arch, chosen=None, seed=0):
    module = plugin.load("archs", arch)
    torch.manual_seed(seed)
    return module.build(module.Settings(**SMALL[arch] if chosen is None else chosen), 10, (1, 8, 8))


def content(model):
    """A hash of all weights."""
    parts = (t.contiguous().numpy().tobytes() for t in model.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Watcher(Callback):
    """Records its calls and the weights after every epoch; stops the training where told to."""

    def __init__(self, model, epoch=None, step=None):
        self.model, self.at = model, (epoch, step)
        self.weights, self.rows, self.steps = [], [], []

    def on_train_start(self, epochs, steps_per_epoch, history):
        self.began = (epochs, steps_per_epoch, len(history))

    def on_step_end(self, epoch, step):
        self.steps.append((epoch, step))
        if self.at == (epoch, step):
            raise KeyboardInterrupt

    def on_epoch_end(self, row):
        self.rows.append(row)
        self.weights.append(content(self.model))
        if self.at == (row["epoch"], None):
            raise KeyboardInterrupt


def fit(model, prepared, settings, name="a", seed=1, watcher=None, **options):
    """Train under the lock of a stage with this name; a second call resumes the training."""
    stage = Stage("baseline", None, {"name": name}, {})
    with resume.single_flight(stage, [], lambda: None) as store:
        callbacks = [watcher] if watcher else []
        return loop.fit(model, prepared, settings, seed, store, callbacks, **options)


def state_left(name="a"):
    stage = Stage("baseline", None, {"name": name}, {})
    with resume.single_flight(stage, [], lambda: None) as store:
        return store.load()


BRIEF = {"interval": 1, "stabilise": 5}
QUICK = {
    "rigl": {"interval": 3, "growth": "random"},
    "gsm": {},
    "gradual": {"begin": 2, "interval": 3, "regrow": True},
    "greg1": BRIEF | {"ceiling": 0.05},
    "greg2": BRIEF | {"pick_growth": 0.01, "ceiling": 0.05},
}


def chosen_penalty(name, model, decay):
    settings = plugin.load("penalties", name).Settings(**QUICK.get(name, {}))
    return penalties.build(name, settings, model, decay)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("arch", "chosen", "epochs", "lr"),
    [("lenet300", {}, 5, 0.002), ("lenet5", {"filters": [8, 16], "hidden": 64}, 4, 0.015)],
    ids=ARCHS,
)
def test_the_digits_are_learnt(arch, chosen, epochs, lr, precision):
    prepared, model = digits(1437), network(arch, chosen)
    how = Train(epochs=epochs, batch_size=64, lr=lr, precision=precision)
    result = fit(model, prepared, how)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[-1]["train_accuracy"] > 0.9
    assert accuracy(model, prepared.test, prepared.info)[0] > 0.9


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/cpuinfo").exists(), reason="for CPUs of Linux"
)
def test_auto_is_bfloat16_where_the_processor_has_instructions_for_it():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    fast = "amx_bf16" in flags or "avx512_bf16" in flags
    assert engine.resolve("auto") == ("bfloat16" if fast else "float32")


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    prepared, settings = digits(), Train(epochs=2, batch_size=32)
    models = [network("lenet300") for _ in range(3)]
    for name, seed, model in zip("abc", (1, 1, 2), models, strict=True):
        torch.manual_seed(ord(name))  # the state of the global generator does not matter
        fit(model, prepared, settings, name, seed)
    assert content(models[0]) == content(models[1]) != content(models[2])


def network_for(penalty, arch="lenet300"):
    """A network that has something for the penalty to act on."""
    if penalty != "network_slimming":
        return network(arch)
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [n for n in PENALTIES if n not in QUICK])
def test_decay_zero_is_bit_for_bit_training_without_a_penalty(name, arch):
    prepared, settings = digits(), Train(epochs=2, batch_size=32)
    results = {}
    for run, penalty, decay in [("plain", "none", 0.1), ("off", name, 0.0), ("on", name, 0.01)]:
        model = network_for(name, arch)
        penalty = chosen_penalty(penalty, model, decay)
        result = fit(model, prepared, settings, run, penalty=penalty)
        results[run] = content(model), result.history
    assert results["off"] == results["plain"]
    assert (results["on"][0] == results["plain"][0]) == (name == "none")


FIRST_STEP = {  # weight and gradient -> new weight, at rate 0.1 and weight decay 0.2
    "sgd": lambda w, g: w - 0.1 * (1 + 0.9) * (g + 0.2 * w),  # Nesterov looks 0.9 ahead
    "adam": lambda w, g: w - 0.1 * (g + 0.2 * w) / ((g + 0.2 * w).abs() + 1e-8),
    "adamw": lambda w, g: w * (1 - 0.1 * 0.2) - 0.1 * g / (g.abs() + 1e-8),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_is_the_gradient_of_cross_entropy_and_penalty_by_hand(optimizer):
    prepared, model = digits(60, validation=0), network("lenet300")
    images = (prepared.train.images / 255 - 0.3) / 0.4
    reference = copy.deepcopy(model)
    norm = sum(p.abs().sum() for n, p in reference.named_parameters() if n.endswith("weight"))
    logits, labels = reference(images), prepared.train.labels
    loss = F.cross_entropy(logits, labels)
    (loss + 0.01 * norm).backward()
    settings = Train(epochs=1, batch_size=60, optimizer=optimizer, lr=0.1, weight_decay=0.2)
    result = fit(model, prepared, settings, penalty=chosen_penalty("l1", model, 0.01))
    for after, before in zip(model.parameters(), reference.parameters(), strict=True):
        sure = before.grad.abs() > 1e-5  # Adam's first step divides by its magnitude
        expected = FIRST_STEP[optimizer](before.detach(), before.grad)
        torch.testing.assert_close(after[sure], expected[sure], rtol=1e-3, atol=1e-5)
        assert sure.float().mean() > 0.5
    (row,) = result.history
    assert row["penalty"] == pytest.approx(0.01 * norm.item(), rel=1e-5)
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["train_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean())


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("lr", [0.2, 1e-7])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_epoch_that_is_kept_is_the_one_that_the_history_names(keep, lr, seed):
    prepared, model = digits(), network("lenet300", seed=seed)
    watcher = Watcher(model)
    settings = Train(epochs=6, batch_size=20, lr=lr, schedule="constant", keep=keep)
    result = fit(model, prepared, settings, seed=seed, watcher=watcher)
    ranks = [(row["val_accuracy"], -row["val_loss"]) for row in result.history]
    assert result.history == watcher.rows
    assert result.kept_epoch == (ranks.index(max(ranks)) + 1 if keep == "best" else 6)
    assert content(model) == watcher.weights[result.kept_epoch - 1]
    assert len(set(watcher.weights)) == 6
    if lr == 0.2:  # at this high rate, the last epoch is not the best one
        assert ranks.index(max(ranks)) < 5
    else:  # at this low rate, accuracies are equal and the loss decides
        assert len({row["val_accuracy"] for row in result.history}) == 1


def test_of_equal_epochs_the_first_is_kept():
    settings = Train(epochs=3, batch_size=32, lr=1e-30)  # so low that no weight changes
    assert fit(network("lenet300"), digits(), settings).kept_epoch == 1


@pytest.mark.parametrize("keep", ["best", "last"])
def test_without_validation_the_last_epoch_is_kept(keep):
    model = network("lenet300")
    watcher = Watcher(model)
    settings = Train(epochs=3, batch_size=32, lr=0.05, keep=keep)
    result = fit(model, digits(validation=0), settings, watcher=watcher)
    assert result.kept_epoch == 3
    assert content(model) == watcher.weights[-1]
    assert not any(key.startswith("val") for row in result.history for key in row)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_is_that_of_torch_own_scheduler(schedule):
    settings = Train(epochs=4, batch_size=32, lr=0.03, schedule=schedule)
    result = fit(network("lenet300"), digits(100, validation=0), settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.03)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 4)
    rates = []
    for _ in range(16):
        rates.append(scheduler.get_last_lr()[0] if schedule == "cosine" else 0.03)
        optimizer.step()
        scheduler.step()
    assert [row["lr"] for row in result.history] == pytest.approx(rates[3::4], rel=1e-9)
    assert rates[0] == 0.03


def test_the_cosine_starts_at_the_full_rate_and_ends_just_above_zero():
    settings = Train(epochs=3, batch_size=25, lr=0.01)
    history = fit(network("lenet300"), digits(100, validation=0), settings).history
    last_steps = [3, 7, 11]
    expected = [0.005 * (1 + math.cos(math.pi * step / 12)) for step in last_steps]
    assert [row["lr"] for row in history] == pytest.approx(expected)
    assert all(before["lr"] > after["lr"] > 0 for before, after in pairwise(history))


def test_callbacks_hear_of_every_step_and_epoch():
    model = network("lenet300")
    watcher = Watcher(model)
    result = fit(model, digits(100, 0), Train(epochs=2, batch_size=30), watcher=watcher)
    assert watcher.began == (2, 4, 0)
    assert watcher.steps == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3, 4)]
    assert watcher.rows == result.history


def killed_and_undisturbed(make, settings, stops, options=lambda model: {}):
    """Results of a training that is stopped several times, and of an undisturbed one."""
    prepared, alone = digits(120), make()
    expected = fit(alone, prepared, settings, "alone", **options(alone))
    done = 0
    for stop in stops:
        model = make()
        watcher = Watcher(model, *stop)
        with pytest.raises(KeyboardInterrupt):
            fit(model, prepared, settings, "killed", watcher=watcher, **options(model))
        assert watcher.began[2] == done, "resumed where the last one had stopped"
        done = stop[0] - (stop[1] is not None)
    model = make()
    watcher = Watcher(model)
    result = fit(model, prepared, settings, "killed", watcher=watcher, **options(model))
    assert watcher.began[2] == done
    return (content(model), result), (content(alone), expected)


@pytest.mark.parametrize(
    "stops",
    [[(1, None)], [(2, None)], [(4, None)], [(1, 2)], [(3, 1)], [(1, None), (2, 2), (3, None)]],
    ids=["after 1", "after 2", "after all", "in 1", "in 3", "three times"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_killed_training_ends_with_the_bytes_of_one_left_alone(arch, optimizer, stops):
    settings = Train(epochs=4, batch_size=32, optimizer=optimizer, lr=0.02, weight_decay=0.01)

    def options(model):
        module = plugin.load("pruners", "std")
        subject = PruningContext(model, torch.zeros(1, 1, 8, 8))
        chosen = module.prune(module.Settings(sensitivity=0.5), subject).masks
        return {
            "penalty": chosen_penalty("hoyer_square", model, 1e-4),
            "masks": chosen,
        }

    killed, alone = killed_and_undisturbed(lambda: network(arch), settings, stops, options)
    assert killed == alone


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_killed_training_without_penalty_masks_or_momentum_does_too(momentum, keep):
    settings = Train(epochs=4, batch_size=32, optimizer="sgd", lr=0.3, momentum=momentum, keep=keep)
    killed, alone = killed_and_undisturbed(lambda: network("lenet5"), settings, [(2, None), (3, 2)])
    assert killed == alone


@pytest.mark.parametrize("name", PENALTIES)
def test_a_killed_training_with_any_penalty_does_too(name):
    def options(model):
        return {"penalty": chosen_penalty(name, model, 0.005)}

    optimizer = "sgd" if name == "gsm" else "adam"
    settings = Train(epochs=6, batch_size=32, keep="last", optimizer=optimizer)
    killed, alone = killed_and_undisturbed(
        lambda: network_for(name), settings, [(1, 1), (2, None)], options
    )
    assert killed == alone


def test_a_killed_training_with_dropout_does_too():
    def make():
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    settings = Train(epochs=3, batch_size=32)
    killed, alone = killed_and_undisturbed(make, settings, [(1, 2), (2, None)])
    assert killed == alone


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["python", "numpy"])
def test_a_killed_training_whose_layers_draw_from_other_generators_does_too(draw):
    """As code for stochastic depth may; the numbers drawn before and after do not matter."""

    class Random(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)) * (draw() if self.training else 1.0)

    def make():
        torch.manual_seed(5)
        return Random(64, 10)

    settings = Train(epochs=3, batch_size=32)
    killed, alone = killed_and_undisturbed(make, settings, [(1, 2), (2, None)])
    assert killed == alone
    states = random.getstate(), repr(np.random.get_state())
    fit(make(), digits(120), settings, "again")
    assert (random.getstate(), repr(np.random.get_state())) == states


class Clock:
    """A penalty with a state that changes at every step; it ends the training after step `last`."""

    def __init__(self, model, last=10):
        self.weights = [p for p in model.parameters() if p.dim() > 1]
        self.steps, self.last = torch.zeros(()), last

    @property
    def finished(self):
        return bool(self.steps >= self.last)

    def __call__(self, step):
        assert step == int(self.steps), "steps are counted over all epochs, none twice"
        self.steps += 1
        return 1e-4 * self.steps * sum(w.square().sum() for w in self.weights)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"].clone()


@pytest.mark.parametrize("stop", [(1, None), (2, 2), (3, None)], ids=["early", "within", "at end"])
def test_a_penalty_with_a_memory_ends_a_killed_training_where_it_ends_another(stop):
    def options(model):
        return {"penalty": Clock(model)}

    settings = Train(epochs=8, batch_size=24)  # 4 steps per epoch: the third epoch is the last
    killed, alone = killed_and_undisturbed(lambda: network("lenet300"), settings, [stop], options)
    assert len(alone[1].history) == 3
    assert killed == alone


@pytest.mark.parametrize("last", [1, 3, 4, 5, 8])
def test_a_penalty_ends_the_training_after_that_very_step(last):
    model = network("lenet300")
    watcher, penalty = Watcher(model), Clock(model, last)
    result = fit(
        model, digits(120), Train(epochs=8, batch_size=24), watcher=watcher, penalty=penalty
    )
    assert len(watcher.steps) == int(penalty.steps) == last
    assert len(result.history) == math.ceil(last / 4)


def test_the_row_of_an_epoch_that_a_penalty_cuts_short_is_about_what_was_seen():
    settings, rows = Train(epochs=1, batch_size=25, optimizer="sgd", lr=1e-30), []
    for last in (2, 4):  # the rate is so low that no weight changes
        model = network("lenet300")
        rows += fit(model, digits(100, 0), settings, str(last), penalty=Clock(model, last)).history
    half, whole = rows
    assert half["train_loss"] == pytest.approx(whole["train_loss"], rel=0.1)
    assert half["train_loss"] != whole["train_loss"]
    assert half["penalty"] / whole["penalty"] == pytest.approx(1.5 / 2.5, rel=1e-5)
    assert 0 <= half["train_accuracy"] <= 1


class Poison:
    """A penalty that is `value` times a weight sum at one step, and zero at all others."""

    finished = False

    def __init__(self, model, at, value):
        self.weight, self.at, self.value = next(model.parameters()), at, value

    def __call__(self, step):
        return self.weight.sum() * (self.value if step == self.at else 0.0)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("batch_size", "at", "epoch", "step"), [(32, 0, 1, 1), (32, 12, 3, 3), (1, 225, 2, 66)]
)
def test_a_loss_that_is_no_number_stops_the_training_and_the_good_state_is_kept(
    batch_size, at, epoch, step, value
):
    model = network("lenet300")
    settings, watcher = Train(epochs=4, batch_size=batch_size), Watcher(model)
    options = {"penalty": Poison(model, at, value)}
    with pytest.raises(
        TrainingError, match=rf"epoch {epoch}, step {step} .*after epoch {epoch - 1}"
    ):
        fit(model, digits(), settings, watcher=watcher, **options)
    state = state_left()
    if epoch == 1:
        assert state is None
        return
    tensors, info = state
    assert info["history"] == watcher.rows
    assert len(info["history"]) == epoch - 1
    good = network("lenet300")
    good.load_state_dict(
        {n.removeprefix("model/"): t for n, t in tensors.items() if n[:6] == "model/"}
    )
    assert content(good) == watcher.weights[-1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rate_that_is_far_too_high_is_told(optimizer):
    settings = Train(epochs=2, batch_size=16, optimizer=optimizer, lr=1e30)
    with pytest.raises(TrainingError, match=r"loss became \S+ at epoch 1, step \d+ \(lr 1e\+30\)"):
        fit(network("lenet300"), digits(), settings)


def test_weights_that_explode_in_the_last_step_of_an_epoch_are_no_good_state():
    settings = Train(epochs=1, batch_size=1000, optimizer="sgd", lr=1e38)
    with pytest.raises(TrainingError, match="epoch 1"):
        fit(network("lenet300"), digits(), settings)
    assert state_left() is None


class Cliff(Poison):
    """A penalty with value zero and no finite gradient, like sqrt at zero."""

    def __call__(self, step):
        return torch.sqrt(self.weight.square().sum() * 0)


def test_a_gradient_that_is_no_number_in_the_last_step_is_told():
    model = network("lenet300")
    options = {"penalty": Cliff(model, 0, 0)}
    with pytest.raises(TrainingError, match="epoch 1"):
        fit(model, digits(validation=0), Train(epochs=1, batch_size=1000), **options)


def test_one_image_too_few_for_a_batch_norm_is_told():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    data = digits(validation=0)
    settings = Train(epochs=1, batch_size=len(data.train) - 1, lr=1e-3)
    with pytest.raises(TrainingError, match="leaves 1 image for the last pass"):
        fit(model, data, settings)


def test_a_network_with_an_auxiliary_classifier_in_training_is_told():
    class Auxiliary(nn.Linear):
        def forward(self, images):
            logits = super().forward(images.flatten(1))
            return (logits, logits) if self.training else logits

    with pytest.raises(TrainingError, match=r"^the network returns a tuple in training mode, as"):
        fit(Auxiliary(64, 10), digits(), Train(epochs=1))


def test_a_network_with_a_tensor_of_five_axes_is_trained():
    """Its convolutions become channels-last, for which tensors need four axes."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 10))
    model.volume = nn.Parameter(torch.ones(1, 2, 3, 4, 5))
    model.register_buffer("image", torch.rand(2, 3, 4, 5))
    before = model.image.clone()
    result = fit(model, digits(), Train(epochs=1, keep="last"))
    assert len(result.history) == 1 and torch.equal(model.image, before)
    for tensor in (model[0].weight, model.image):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_masks_are_held_and_other_weights_learn():
    model = network("lenet5")
    before = copy.deepcopy(model.state_dict())
    chosen = {"conv2.weight": torch.rand(model.conv2.weight.shape) > 0.5}
    masks.apply(model, chosen)
    fit(model, digits(), Train(epochs=1), masks=chosen)
    assert torch.equal(model.conv2.weight != 0, chosen["conv2.weight"])
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])


@pytest.mark.parametrize("count", [1, 999, 1000, 2345])
def test_accuracy_and_loss_are_what_numpy_says(count):
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    labels = chance.integers(0, 3, count)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.9)).train()
    weight, bias = (p.detach().double().numpy() for p in model.parameters())
    logits = (pixels.reshape(count, 16) / 255 - 0.5) / 0.25 @ weight.T + bias
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    split = InMemoryImages(torch.from_numpy(pixels), torch.from_numpy(labels))
    info = DatasetInfo("toy", ["a", "b", "c"], split.shape, [0.5], [0.25], "", {})
    right, loss = accuracy(model, split, info)
    assert right == np.mean(logits.argmax(axis=1) == labels)
    assert loss == pytest.approx(-np.log(chances[range(count), labels]).mean(), rel=1e-5)


def test_tensors_that_a_network_keeps_while_it_is_measured_serve_in_training():
    class Keeps(nn.Linear):
        factor = None

        def forward(self, images):
            if self.factor is None:
                self.factor = torch.arange(3)
            return super().forward(images.flatten(1)) * self.factor

    split = InMemoryImages(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4).long())
    info = DatasetInfo("toy", ["a", "b", "c"], split.shape, [0.5], [0.25], "", {})
    model = Keeps(16, 3)
    accuracy(model, split, info)
    model.train()(torch.ones(2, 1, 4, 4)).sum().backward()
    assert model.weight.grad is not None


def test_without_epochs_the_network_is_handed_on_as_it_came():
    model = network("lenet300")
    before = content(model)
    result = fit(model, digits(50), Train(epochs=0))
    assert (result.history, result.kept_epoch) == ([], 0)
    assert content(model) == before


def global_state():
    """The parts of torch's global state that a training changes."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        float(torch.tensor([1e-38]) * 1e-2) == 0.0,
        torch.get_rng_state().tolist(),
    )


class GlobalState(Callback):
    """Records the global state during the training, and raises `error` if there is one."""

    def __init__(self, error=None):
        self.error, self.seen = error, []

    def on_step_end(self, epoch, step):
        self.seen.append(global_state())
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, TrainingError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("on", [False, True])
def test_global_torch_state_is_restored_on_return_and_on_errors(on, error):
    initial, model, prepared = global_state(), network("lenet300"), digits()
    try:
        torch.use_deterministic_algorithms(on, warn_only=on)
        torch.utils.deterministic.fill_uninitialized_memory = on
        torch.set_flush_denormal(on)
        torch.manual_seed(5)
        before, callback = global_state(), GlobalState(error)
        assert before[:4] == (on, on, on, on)
        raised = pytest.raises(type(error)) if error else contextlib.nullcontext()
        with raised:
            fit(model, prepared, Train(epochs=1, batch_size=64), watcher=callback)
        assert global_state() == before
        assert callback.seen[0][:4] == (True, False, False, True)
    finally:
        torch.use_deterministic_algorithms(initial[0], warn_only=initial[1])
        torch.utils.deterministic.fill_uninitialized_memory = initial[2]
        torch.set_flush_denormal(initial[3])


def test_an_error_before_the_first_step_restores_the_global_state_too():
    before, model = global_state(), network("lenet300")
    wrong = {"missing.weight": torch.ones(1, dtype=torch.bool)}
    torch.manual_seed(5)
    before = global_state()
    with pytest.raises(Exception, match="missing"):
        fit(model, digits(), Train(epochs=1), masks=wrong)
    assert global_state() == before


class Seeds(Callback):
    """Records the seed of the global generator in every epoch."""

    def __init__(self):
        self.seeds = []

    def on_epoch_end(self, row):
        self.seeds.append(torch.initial_seed())


def test_dropout_draws_from_a_stream_of_its_own_by_seed_and_epoch():
    settings, found = Train(epochs=3, batch_size=64), {}
    for seed in (0, 1, 2):
        callback = Seeds()
        fit(network("lenet300"), digits(100), settings, str(seed), seed, watcher=callback)
        found[seed] = callback.seeds
    drawn = [seed for seeds in found.values() for seed in seeds]
    shuffling = {seed * 1_000_003 + epoch for seed in found for epoch in range(3)}
    assert len(set(drawn)) == 9
    assert not shuffling & set(drawn)
    with torch.random.fork_rng():
        for seed, seeds in found.items():
            for epoch, expected in enumerate(seeds):
                determinism.seed_layers(seed, epoch, CPU)
                assert torch.initial_seed() == expected


def test_the_layers_of_every_rank_have_other_random_numbers_than_the_shuffling():
    drawn = []
    with torch.random.fork_rng():
        for seed, epoch, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
            for _ in range(2):  # equal arguments give equal numbers
                determinism.seed_layers(seed, epoch, CPU, rank)
                drawn.append(torch.randperm(50).tolist())
            drawn.append(augment.plan_epoch(50, seed, epoch, augment.Augment()).image.tolist())
    layers = [drawn[k] for k in range(0, 12, 3)]
    assert layers == [drawn[k] for k in range(1, 12, 3)]
    assert not any(numbers in layers for numbers in drawn[2::3])
    assert len({tuple(numbers) for numbers in layers}) == 4


@pytest.mark.parametrize(("lr", "warned"), [(1.0, 1), (0.1, 0)])
def test_a_network_that_loses_what_it_has_learnt_is_told_once(lr, warned, capsys):
    settings = Train(
        epochs=20, batch_size=20, optimizer="sgd", lr=lr, schedule="constant", warmup=19
    )
    progress = console.Training("baseline", lambda _epoch: 1.0)
    rows = fit(network("lenet300"), digits(), settings, "a", watcher=progress).history
    fits = [row["train_accuracy"] for row in rows]
    assert (fits[-1] < max(fits) / 3) == bool(warned), fits
    said = capsys.readouterr().out
    assert said.count("warning: baseline: accuracy on the training images fell from") == warned
    again = console.Training("baseline", lambda _epoch: 1.0)  # a resumed training detects it too
    again.on_train_start(21, 8, rows[:-1])
    again.on_epoch_end(rows[-1])
    assert capsys.readouterr().out.count(f"to {fits[-1]:.1%} in epoch 20;") == warned
