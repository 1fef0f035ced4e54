"""GReg: growth of factors, choices, the end of the schedule, and equal results after a kill."""

import copy
import functools
import hashlib
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.base import plugin
from secateur.base.errors import SettingsError
from secateur.base.sections import Train
from secateur.base.settings import section, validate
from secateur.base.stage import Stage
from secateur.data import dataset
from secateur.nn.layers import ChannelSelect
from secateur.penalties._shared import growing, trace
from secateur.pruning import removal
from secateur.pruning.decision import PruningContext
from secateur.sparsity import choices, masks
from secateur.training import loop, resume
from secateur.training.callbacks import Callback
from secateur.training.evaluation import accuracy

METHODS = ["greg1", "greg2"]
GROUPS = ["filter", "channel", "weight"]
DIGITS = plugin.load("datasets", "digits")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SECATEUR_DEVICE", "cpu")


def build(name, model, decay=1e-4, **chosen):
    module = plugin.load("penalties", name)
    with section(f"penalties.{name}"):
        return module.build(validate(module.Settings, chosen, f"penalties.{name}"), model, decay)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@functools.cache
def digits(count=120, validation=0.2):
    images = DIGITS.read(DIGITS.Settings(), None)
    images = dataset.Images(
        images.train.take(range(count)), images.test, images.classes, (0.3,), (0.4,)
    )
    return dataset.prepare("digits", images, validation, 0)


def content(model):
    parts = (t.contiguous().numpy().tobytes() for t in model.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def settings(epochs=30, **more):
    return Train(
        **{"epochs": epochs, "batch_size": 24, "optimizer": "sgd", "lr": 0.02, "keep": "last",
           "schedule": "constant", "weight_decay": 5e-4, "nesterov": False, **more}
    )  # fmt: skip


class Watcher(Callback):
    """Counts steps, calls `look` after each of them, and stops the training after step `stop`."""

    def __init__(self, stop=None, look=lambda step: None):
        self.stop, self.look, self.steps, self.rows = stop, look, 0, []

    def on_train_start(self, epochs, steps_per_epoch, history):
        self.steps = len(history) * steps_per_epoch

    def on_step_end(self, epoch, step):
        self.steps += 1
        self.look(self.steps - 1)
        if self.stop == self.steps:
            raise KeyboardInterrupt

    def on_epoch_end(self, row):
        self.rows.append(row)


def fit(model, prepared, how, name="a", watcher=None, penalty=None, masks=None):
    stage = Stage("sparse-train", None, {"name": name}, {})
    with resume.single_flight(stage, [], lambda: None) as store:
        callbacks = [watcher] if watcher else []
        with section("sparse_train"):
            options = {"penalty": penalty, "masks": masks}
            return loop.fit(model, prepared, how, 1, store, callbacks, **options)


def factors(penalty, model):
    """Factor of every weight, from the gradient of the penalty."""
    model.zero_grad()
    penalty(penalty.steps).backward()
    return {n: p.grad / p.detach() for n, p in model.named_parameters() if p.grad is not None}


# growth


def test_known_numbers_of_updates_in_float32():
    assert growing.updates_until(1.0, 1e-4) == 10_000
    first = growing.updates_until(0.01, 1e-5, reach=True)
    assert first == 1_001
    assert growing.updates_until(1.0, 1e-4, growing.grown(first, 1e-5)) == 9_900
    slow = torch.zeros(())
    for _ in range(1_001):
        slow += 1e-5
    assert growing.grown(1_001, 1e-5) == float(slow)
    assert growing.updates_until(1.0, 5.0) == 1
    assert growing.updates_until(1.0, 1e-4, start=2.0) == 1
    assert growing.updates_until(1.0, 0.5) == 3, "the ceiling itself does not exceed it"


@pytest.mark.parametrize(
    ("name", "interval", "stabilise", "steps"),
    [("greg1", 10, 10_000, 109_991), ("greg2", 10, 10_000, 119_001),  # CIFAR
     ("greg1", 5, 40_000, 89_996), ("greg2", 5, 40_000, 94_501)],  # ImageNet
)  # fmt: skip
def test_the_published_courses_need_as_many_steps_as_published(name, interval, stabilise, steps):
    penalty = build(name, network(), interval=interval, stabilise=stabilise)
    assert penalty.max_steps == steps


@pytest.mark.parametrize("name", METHODS)
def test_the_clock_announces_exactly_the_steps_that_the_course_takes(name, monkeypatch):
    # the real numbers of updates, 10,000 and more; on so small a layer it takes a second
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    penalty = build(name, model, interval=1, stabilise=7, magnitude_ratio=1e9)
    near = torch.ones(1, dtype=torch.float64)  # ratios below the limit; computing them is slow
    monkeypatch.setattr(growing.PrunedUnits, "magnitude_ratios", lambda _: near)
    changes, before = [], -1.0
    for step in range(20_000):
        assert not penalty.finished
        penalty(step)
        if float(penalty.factor.max()) != before:
            before = float(penalty.factor.max())
            changes.append(step)
        if penalty.finished:
            break
    updates = {"greg1": 10_000, "greg2": 1_001 + 9_900}[name]
    assert changes == list(range(updates))
    assert step + 1 == penalty.max_steps == updates + 7
    assert before > 1.0 >= before - 1.1e-4


def test_the_gradient_grows_by_factor_times_weight_and_by_nothing_else():
    model = network()
    reference = copy.deepcopy(model)
    penalty = build("greg1", model, decay=0.125, interval=2, ratios=0.5)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    for step in range(6):
        for net in (model, reference):
            net.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        value = penalty(step)
        (loss + value).backward()
        F.cross_entropy(reference(images), labels).backward()
        factor = 0.125 * (step // 2 + 1)
        total = 0.0
        for (name, ours), theirs in zip(
            model.named_parameters(), reference.parameters(), strict=True
        ):
            difference = ours.grad - theirs.grad
            expected = torch.zeros_like(difference)
            if name in penalty.pruned.choice:
                expected = factor * penalty.pruned.choice[name] * ours.detach()
                total += 0.5 * float((expected * ours.detach()).sum())
            torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-6)
        assert float(value.detach()) == pytest.approx(total, rel=1e-5)
    assert set(penalty.pruned.choice) == {"0.weight", "3.weight"}


@pytest.mark.parametrize("groups_", GROUPS)
def test_a_step_of_sgd_shrinks_what_is_chosen_by_rate_times_factor_and_weight_decay(groups_):
    prepared, model = digits(96, validation=0), network()
    penalty = build(
        "greg1", model, decay=0.5, granularity=groups_, jump=True, ceiling=2.0, stabilise=0
    )
    plain, ours = copy.deepcopy(model), model
    how = settings(1, batch_size=96, momentum=0.0, lr=0.1)
    fit(plain, prepared, how, "plain")
    start = copy.deepcopy(ours.state_dict())
    fit(ours, prepared, how, "greg", penalty=penalty)
    for name, after in ours.named_parameters():
        pulled = plain.get_parameter(name).detach().clone()
        if name in penalty.pruned.choice:
            pulled -= 0.1 * 2.0 * penalty.pruned.choice[name] * start[name]
        torch.testing.assert_close(after.detach(), pulled, rtol=1e-4, atol=1e-6)


# choices


@pytest.mark.parametrize("groups_", GROUPS)
@pytest.mark.parametrize("pick", ["min", "max"])
def test_greg1_chooses_what_one_shot_l1_would(groups_, pick):
    model = network()
    made = build("greg1", model, granularity=groups_, ratios=0.3, pick=pick).choices()
    for name, choice in made.items():
        weight = model.get_parameter(name).detach()
        axes = {"filter": [1, 2, 3], "channel": [0, 2, 3], "weight": []}[groups_]
        axes = [a for a in axes if a < weight.dim()]
        norms = weight.abs().sum(axes, keepdim=True) if axes else weight.abs()
        gone, kept = norms[choice], norms[~choice]
        assert len(gone) == choices.number_pruned(0.3, norms.numel())
        assert gone.max() <= kept.min() if pick == "min" else gone.min() >= kept.max()
    assert made


def test_greg1_can_choose_at_random_by_its_own_seed():
    model = network()
    state = torch.get_rng_state()
    one, again, other = (build("greg1", model, pick="random", seed=s).choices() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("pick", ["min", "max", "random"])
def test_greg1_chooses_first_what_an_earlier_round_has_pruned(pick):
    """With half of the weights at zero, a ratio of 0.6 chooses all of these and a tenth more."""
    model = network()
    for name, layer in masks.layers(model).items():
        draw = torch.Generator().manual_seed(len(name))
        layer.weight.data *= torch.rand(layer.weight.shape, generator=draw) < 0.5
    made = build("greg1", model, granularity="weight", ratios=0.6, pick=pick).choices()
    for name, choice in made.items():
        weight = model.get_parameter(name).detach()
        assert choice[weight == 0].all(), name
        assert int(choice.sum()) == choices.number_pruned(0.6, weight.numel())


def test_greg1_leaves_what_it_keeps_alone():
    model = network()
    penalty = build("greg1", model, decay=0.25, interval=1)
    for _ in range(3):
        found = factors(penalty, model)
    assert set(found) == {"0.weight", "3.weight"}
    for name, factor in found.items():
        choice = penalty.pruned.choice[name].expand_as(factor)
        assert not factor[~choice].any()
        torch.testing.assert_close(factor[choice], torch.full_like(factor[choice], 0.75))


def test_greg2_grows_on_everything_then_chooses_the_smallest_of_that_moment_then_recovers():
    model = network()
    penalty = build(
        "greg2", model, decay=0.1, interval=1, pick_growth=0.01, pick_ceiling=0.029, recover=-0.002
    )
    dense = build("greg1", model).choices()
    for count in (1, 2):
        assert all((f - 0.01 * count).abs().max() < 1e-6 for f in factors(penalty, model).values())
        assert not penalty.choices()
        assert penalty.metrics()["layers_chosen"] == 0
        assert penalty.metrics()["phase"] == 0
    with torch.no_grad():  # reverse the order of magnitudes before the choice
        model[0].weight.mul_(torch.tensor([1.0, 9, 1, 9, 1, 9]).view(6, 1, 1, 1))
    assert all((f - 0.03).abs().max() < 1e-6 for f in factors(penalty, model).values())
    chosen = penalty.choices()
    assert chosen["0.weight"].flatten().tolist() == [True, False] * 3
    assert torch.equal(chosen["3.weight"], dense["3.weight"])
    same = int((chosen["0.weight"] & dense["0.weight"]).sum()) + 4
    assert penalty.metrics()["overlap"] == pytest.approx(same / 7)
    for count in (1, 2):
        for name, factor in factors(penalty, model).items():
            choice = chosen[name].expand_as(factor)
            expected = torch.where(choice, 0.03 + 0.1 * count, -0.002)
            torch.testing.assert_close(factor, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(penalty.choices()[n], chosen[n]) for n in chosen)


# the end


def separate(model, number, times):
    """Scale the kept groups of one layer to `times` the mean magnitude of the chosen ones."""
    weight = model[number].weight
    order = weight.detach().abs().flatten(1).mean(1).argsort()
    with torch.no_grad():
        size = torch.full((len(weight),), float(times))
        size[order[: math.ceil(len(weight) / 2)]] = 1.0
        mean = weight.abs().flatten(1).mean(1)
        weight.mul_((size / mean).view(-1, 1, 1, 1))


def test_greg1_stops_when_every_layer_is_far_apart_and_not_before():
    model = network()
    penalty = build("greg1", model, decay=1e-3, interval=1, stabilise=3, magnitude_ratio=50)
    separate(model, 0, 100)
    for step in range(5):
        penalty(step)
    assert penalty.phase == growing.GROWING, "only one of two layers"
    separate(model, 3, 1000)
    values = []
    for step in range(5, 100):
        penalty(step)
        values.append(float(penalty.factor.max()))
        if penalty.finished:
            break
    # from a ratio r of about 1, 0.9 r + 0.1 * 1000 exceeds 50 in the first update
    assert values == [values[0]] * 4, "the last growth, then exactly three steps"
    assert len({float(f) for f in penalty.factor}) == 1


def test_the_magnitude_ratio_is_averaged_over_updates():
    model = network()
    penalty = build("greg1", model, decay=1e-3, interval=1, ratios={"0": 0.5}, magnitude_ratio=90)
    separate(model, 0, 1.01)
    penalty(0)
    assert float(penalty.average[0]) == pytest.approx(1.01, rel=1e-5)
    separate(model, 0, 101)
    expected = 1.01
    for step in range(1, 30):
        penalty(step)
        expected = 0.9 * expected + 0.1 * 101
        assert float(penalty.average[0]) == pytest.approx(expected, rel=1e-5)
        assert (penalty.phase == growing.STABILISING) == (expected >= 90)
        if expected >= 90:
            return
    raise AssertionError("never ended")


def test_greg2_stops_each_layer_by_its_own_ratio():
    model = network()
    penalty = build(
        "greg2", model, decay=0.01, interval=1, pick_growth=0.01, ceiling=0.095, stabilise=2,
        magnitude_ratio=50,
    )  # fmt: skip
    separate(model, 0, 1000)
    penalty(0)  # makes the choice
    assert penalty.phase == growing.GROWING
    penalty(1)
    frozen = float(penalty.factor[0])
    assert penalty.active.tolist() == [False, True]
    for step in range(2, 100):
        penalty(step)
        if penalty.finished:
            break
    assert float(penalty.factor[0]) == frozen == pytest.approx(0.02)
    assert float(penalty.factor[1]) == pytest.approx(0.1)
    assert step + 1 == penalty.max_steps == 10 + 2


def test_single_weights_end_by_the_ceiling_alone():
    model = network()
    with torch.no_grad():
        for layer in (model[0], model[3], model[6]):
            layer.weight.copy_(torch.where(torch.rand_like(layer.weight) < 0.5, 1e-9, 1.0))
    penalty = build(
        "greg1", model, decay=0.25, interval=1, granularity="weight", stabilise=0, ratios=0.4
    )
    for step in range(10):
        penalty(step)
        if penalty.finished:
            break
    assert step + 1 == penalty.max_steps == 5


@pytest.mark.parametrize("stabilise", [0, 1, 6])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_training_ends_at_the_exact_step_and_batch_norm_learns_all_the_way(
    name, interval, stabilise
):
    model = network()
    more = {"pick_growth": 0.005} if name == "greg2" else {}
    penalty = build(
        name, model, decay=0.01, interval=interval, ceiling=0.035, stabilise=stabilise, **more
    )
    assert penalty.max_steps == ({"greg1": 4, "greg2": 5}[name] - 1) * interval + 1 + stabilise
    seen = []

    def look(step):
        assert all(module.training for module in model.modules())
        seen.append((float(penalty.factor.max()), model[1].running_mean.clone()))

    watcher = Watcher(look=look)
    result = fit(model, digits(), settings(), watcher=watcher, penalty=penalty)  # 4 steps per epoch
    assert len(seen) == penalty.max_steps
    assert len(result.history) == math.ceil(penalty.max_steps / 4)
    last = [factor for factor, _ in seen]
    assert last[-1 - stabilise :] == [last[-1]] * (1 + stabilise)
    assert stabilise + 1 == len(last) or last[-2 - stabilise] < last[-1]
    assert all(not torch.equal(a[1], b[1]) for a, b in pairwise(seen))
    final = result.history[-1]
    assert final["phase"] == 3
    assert final["factor"] == last[-1]
    assert final["layers_chosen"] == 2
    assert ("overlap" in final) == (name == "greg2")
    assert all(math.isfinite(value) for row in result.history for value in row.values())


def test_jump_goes_to_the_ceiling_at_once():
    model = network()
    penalty = build("greg1", model, decay=1e-4, jump=True, ceiling=0.7, stabilise=9)
    assert penalty.max_steps == 10
    fit(model, digits(), settings(3), penalty=penalty)
    assert penalty.steps == 10
    assert penalty.factor.tolist() == pytest.approx([0.7, 0.7])


def test_what_is_chosen_shrinks_and_the_network_still_learns():
    model = network()
    prepared = digits(600)
    penalty = build("greg1", model, decay=0.1, interval=2, ceiling=5.0, stabilise=200, ratios=0.5)
    fit(model, prepared, settings(30, lr=0.05), penalty=penalty)
    for name, choice in penalty.choices().items():
        size = choices.magnitude_scores(model.get_parameter(name), "filter")
        assert size[choice].max() < 0.05 * size[~choice].min()
    assert accuracy(model, prepared.test, prepared.info)[0] > 0.8


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_a_network_of_single_filters_and_channels_has_none_to_spare(granularity):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3), nn.Flatten())
    with pytest.raises(SettingsError, match=rf"no layer has a {granularity} to spare"):
        build("greg1", model, granularity=granularity)


# reports, and the trained network


def test_the_trace_has_kept_against_chosen_by_layer(monkeypatch):
    monkeypatch.setattr(trace, "MAX_POINTS", 50)
    model = network()
    penalty = build("greg1", model, decay=0.01, interval=2, ceiling=0.095, stabilise=100)
    first = {
        n: choices.magnitude_scores(model.get_parameter(n), "filter") for n in penalty.pruned.choice
    }
    result = fit(model, digits(), settings(30), penalty=penalty)
    rows = penalty.trace_table()
    assert penalty.max_steps == 119  # 10 updates in 19 steps, then 100 steps
    assert [row["step"] for row in rows] == [*range(0, 119, 3), 119]
    assert len(rows) <= trace.MAX_POINTS + 1
    assert set(rows[0]) == {"step", "factor", "kept", "chosen", "kept 0", "chosen 0", "kept 3",
                            "chosen 3"}  # fmt: skip
    for number in ("0", "3"):
        size, choice = first[f"{number}.weight"], penalty.pruned.choice[f"{number}.weight"]
        assert rows[0][f"chosen {number}"] == pytest.approx(float(size[choice].mean()))
        assert rows[0][f"kept {number}"] == pytest.approx(float(size[~choice].mean()))
    assert rows[0]["kept"] == pytest.approx((rows[0]["kept 0"] + rows[0]["kept 3"]) / 2)
    last, kept = result.history[-1], rows[-1]
    ratio = (kept["kept 0"] / kept["chosen 0"] + kept["kept 3"] / kept["chosen 3"]) / 2
    assert last["magnitude_ratio"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("points", [0, 2])
def test_a_trace_is_restored_only_if_its_points_have_the_same_shape(points):
    one, two = trace.Trace((3, 2)), trace.Trace((3, 2))
    for step in range(points):
        one.add(step, torch.rand(3, 2))
    two.load_state_dict(one.state_dict())
    assert [step for step, _ in two.points] == list(range(points))
    for (_, own), (_, other) in zip(one.points, two.points, strict=True):
        assert torch.equal(own, other) and own is not other
    with pytest.raises(ValueError, match=rf"penalty: trace of \({points}, 3, 2\) does not fit"):
        trace.Trace((3, 4)).load_state_dict(one.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_all_there_is(name):
    how = {"decay": 0.01, "interval": 1, "ceiling": 0.06, "stabilise": 4}
    how |= {"pick_growth": 0.005} if name == "greg2" else {}
    model = network()
    one = build(name, model, **how)
    for step in range(one.max_steps):
        state = {n: t.clone() for n, t in one.state_dict().items()}
        assert all(type(t) is torch.Tensor for t in state.values())
        two = build(name, model, **how)
        two.load_state_dict(state)
        assert two.finished == one.finished
        assert two.metrics() == one.metrics()
        assert torch.equal(one(step), two(step))
        again = two.state_dict()
        now = one.state_dict()
        assert set(now) == set(again)
        assert all(torch.equal(now[n], again[n]) for n in now)
        with torch.no_grad():
            model[3].weight.mul_(0.99)
    assert one.finished


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", METHODS)
def test_killed_at_any_step_of_any_phase_it_ends_with_the_same_bytes(name, kind):
    more = {"pick_growth": 0.002, "recover": -0.01} if name == "greg2" else {"pick": "random"}
    how = {
        "decay": 0.02,
        "interval": 2,
        "ceiling": 0.07,
        "stabilise": 5,
        "granularity": kind,
        **more,
    }
    prepared = digits(72)  # 3 steps per epoch

    def run(which, stop=None):
        model = network()
        penalty = build(name, model, **how)
        watcher = Watcher(stop)
        try:
            result = fit(model, prepared, settings(10), which, watcher, penalty)
        except KeyboardInterrupt:
            return None
        return content(model), result, penalty.trace_table(), {
            n: c.tolist() for n, c in penalty.choices().items()
        }  # fmt: skip

    alone = run("alone")
    needs = build(name, network(), **how).max_steps
    phases = {row["phase"] for row in alone[1].history}
    assert phases >= ({0, 1, 2, 3} if name == "greg2" else {1, 2, 3})
    every = 1 if kind == "weight" else 3  # steps between stops: an update takes 2, an epoch 3
    for stop in range(1, needs + 1, every):
        assert run(f"killed {stop}", stop) is None
        assert run(f"killed {stop}") == alone, stop
    for stop in range(1, needs + 1, 3 * every):  # killed again and again
        run("often", stop)
    assert run("often") == alone


# mistakes


@pytest.mark.parametrize("name", METHODS)
def test_epochs_too_few_for_the_clock_are_told_before_training_with_the_numbers(name):
    model = network()
    before, penalty = content(model), build(name, model, interval=1, stabilise=0)
    needed = {"greg1": 10_000, "greg2": 10_901}[name]
    watcher = Watcher()
    line = (
        rf"sparse_train\.epochs = 20: the penalty may need {needed:,} steps until it is finished; "
        rf"at 4 steps an epoch that is {math.ceil(needed / 4):,} epochs"
    )
    with pytest.raises(SettingsError, match=line):
        fit(model, digits(), settings(20), watcher=watcher, penalty=penalty)
    assert content(model) == before
    assert watcher.steps == 0


def test_just_enough_epochs_are_enough():
    for epochs, fits in ((3, True), (2, False)):
        penalty = build("greg1", model := network(), decay=1.5, interval=1, stabilise=8)
        assert penalty.max_steps == 9  # 4 steps per epoch
        if fits:
            fit(model, digits(), settings(epochs), str(epochs), penalty=penalty)
        else:
            with pytest.raises(SettingsError, match=r"9 steps .* 3 epochs"):
                fit(model, digits(), settings(epochs), str(epochs), penalty=penalty)


def test_the_best_epoch_would_be_one_before_the_end_and_is_refused():
    penalty = build("greg1", model := network(), decay=1.5, stabilise=1)
    with pytest.raises(SettingsError, match=r"sparse_train\.keep = 'best': .* must be 'last'"):
        fit(model, digits(), settings(keep="best"), penalty=penalty)


MISTAKES = [  # penalty, setting, value, text that the message must contain
    *[(n, k, v, w) for n in METHODS for k, v, w in [
        ("ratios", 1.0, "must be at least 0 and less than 1"),
        ("ratios", -0.5, "must be at least 0"),
        ("ratios", float("nan"), "must be"),
        ("granularity", "kernel", "'filter', 'channel', 'weight' or 'group'"),
        ("interval", 0, "greater than or equal to 1"),
        ("interval", 2.5, "a whole number is needed"),
        ("ceiling", 0, "greater than 0"),
        ("ceiling", -1, "greater than 0"),
        ("ceiling", float("nan"), "finite"),
        ("magnitude_ratio", 0, "greater than 0"),
        ("stabilise", -1, "greater than or equal to 0"),
        ("stabilise", True, "a number is needed"),
        ("spread", 1, "unknown key"),
    ]],
    ("greg1", "pick", "middle", "'min', 'max' or 'random'"),
    ("greg1", "jump", "perhaps", "true or false is needed"),
    ("greg1", "seed", -1, "greater than or equal to 0"),
    ("greg2", "pick_ceiling", 0, "greater than 0"),
    ("greg2", "pick_ceiling", 1.0, "1 must be below ceiling, 1"),
    ("greg2", "pick_growth", -1e-5, "greater than 0"),
    ("greg2", "recover", 0.1, "less than or equal to 0"),
    ("greg2", "pick", "max", "unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value", "line"), MISTAKES)
def test_a_setting_out_of_range_is_told_by_name(name, key, value, line):
    with pytest.raises(SettingsError, match=rf"penalties\.{name}\.{key}") as caught:
        build(name, network(), **{key: value})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "decay", "chosen", "line"),
    [
        ("greg1", 0.0, {}, r"decay = 0\.0: penalty greg1 grows .* greater than 0"),
        ("greg2", 0.0, {}, r"decay = 0\.0: penalty greg2 grows .* greater than 0"),
        (
            "greg1",
            1e-9,
            {},
            r"decay = 1e-09: ceiling 1 is out of reach in steps .*\(penalty greg1\)",
        ),
        ("greg2", 1e-9, {}, r"decay = 1e-09: ceiling 1 is out of reach .*\(penalty greg2\)"),
        (
            "greg2",
            1e-4,
            {"pick_growth": 1e-11},
            r"penalties\.greg2\.pick_growth = 1e-11: pick_ceiling .*",
        ),
        ("greg1", 1e-4, {"ratios": {"5": 0.5}}, "5: there are 3 convolutions and linear layers"),
        ("greg2", 1e-4, {"ratios": {"2": 0.5}}, r"2 = 0.5 is for layer 6, .* are the classes"),
        ("greg1", 1e-4, {"ratios": {"conv*": 0.5}}, r"conv\* matches no layer; there are: 0, 3, 6"),
        ("greg1", 1e-4, {"ratios": 0}, "nothing would be pruned"),
    ],
)
def test_what_only_the_network_can_tell_is_told_when_the_penalty_is_built(
    name, decay, chosen, line
):
    with pytest.raises(SettingsError, match=rf"^params\.yaml: .*({line})"):
        build(name, network(), decay, **chosen)


def test_a_layer_of_two_million_single_weights_starts_at_once():
    model = nn.Sequential(nn.Linear(2048, 1000))
    for name in METHODS:
        penalty = build(name, model, granularity="weight", ratios=0.827)
        penalty(0).backward()
        assert sum(penalty.pruned.numbers.values()) == math.ceil(0.827 * 2_048_000)
    chosen = build("greg1", model, granularity="weight", ratios=0.827).choices()["0.weight"]
    assert int(chosen.sum()) == math.ceil(0.827 * 2_048_000)


# whole channel groups


class Summed(nn.Module):
    """A sum of three tensors, one of them a selection of channels, and a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.deep, self.up = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)
        self.select = ChannelSelect(torch.tensor([-1, 0, 1, 2, 3, -1]))
        self.inner, self.back = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = self.up(torch.relu(self.deep(x))) + self.select(x)
        x = x + self.back(torch.relu(self.inner(x)))
        return self.fc(x.mean((2, 3)))


def summed(seed=3):
    torch.manual_seed(seed)
    model = Summed().eval()
    model.norm.weight.data.uniform_(0.5, 1.5)
    return model


def grow(name, model, decay=0.5, **chosen):
    module = plugin.load("penalties", name)
    given = {"granularity": "group", **chosen}
    with section(f"penalties.{name}"):
        own = validate(module.Settings, given, f"penalties.{name}")
        return module.build(own, model, decay, (1, 5, 5))


def coupled_means(model):
    """Mean |w| of all weights coupled to each channel of the stem, of the sum, and of the block."""
    w = {n: p.detach().abs() for n, p in model.named_parameters()}
    parts = {
        "stem": [w["stem.weight"], w["norm.weight"], w["deep.weight"],
                 w["up.weight"].transpose(0, 1)],
        "up": [w["up.weight"], w["inner.weight"].transpose(0, 1), w["back.weight"],
               w["fc.weight"].T],
        "inner": [w["inner.weight"], w["back.weight"].transpose(0, 1)],
    }  # fmt: skip
    return {
        name: torch.cat([t.reshape(len(own[0]), -1) for t in own], dim=1).mean(1)
        for name, own in parts.items()
    }


def lowest(scores, number):
    return set(scores.sort().indices[:number].tolist())


def test_groups_are_chosen_and_penalised_in_all_layers_that_hold_them():
    model = summed()
    penalty = grow("greg1", model, ratios=0.5)
    chosen = {n: lowest(s, math.ceil(len(s) / 2)) for n, s in coupled_means(model).items()}
    found = {
        name: {int(penalty.pruned.coupled.number[i]) for i in ids[penalty.pruned.choice[name]]}
        for name, ids in penalty.pruned.channels.items()
    }
    starts = {"stem": 0, "up": 4, "inner": 10}  # channels are numbered over all groups in order
    assert found == {n: {starts[n] + c for c in own} for n, own in chosen.items()}
    own = factors(penalty, model)
    near = {n: torch.tensor([0.5 * (c in chosen[n]) for c in range(len(s))])
            for n, s in coupled_means(model).items()}  # fmt: skip
    wanted = {
        "stem.weight": near["stem"].view(-1, 1, 1, 1),
        "norm.weight": near["stem"],
        "up.weight": near["up"].view(-1, 1, 1, 1) + near["stem"].view(1, -1, 1, 1),
        "inner.weight": near["inner"].view(-1, 1, 1, 1) + near["up"].view(1, -1, 1, 1),
        "fc.weight": near["up"].view(1, -1),
    }
    for name, factor in wanted.items():
        torch.testing.assert_close(own[name], factor.expand_as(own[name]), rtol=1e-5, atol=1e-7)
    kept, gone = penalty.pruned.magnitudes()
    for place, (name, scores) in enumerate(coupled_means(model).items()):
        is_chosen = torch.tensor([c in chosen[name] for c in range(len(scores))])
        assert float(gone[place]) == pytest.approx(float(scores[is_chosen].mean()), rel=1e-5)
        assert float(kept[place]) == pytest.approx(float(scores[~is_chosen].mean()), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_chosen_as_groups_is_removed_whole_from_its_checkpoint(name, tmp_path):
    model = summed()
    given = {"pick_ceiling": 0.4, "pick_growth": 0.2} if name == "greg2" else {}
    penalty = grow(name, model, ratios=0.5, interval=1, **given)
    for step in range(4):
        penalty(step)
    assert penalty.pruned.choice and penalty.metrics()["layers_chosen"] == 3
    stored = penalty.choices()
    assert set(stored) == {
        "stem.weight", "up.weight", "select.index", "inner.weight", "back.weight",
    }  # fmt: skip
    assert all(choices.fits(choice, model.state_dict()[n]) for n, choice in stored.items())
    other = grow(name, summed(), ratios=0.5, interval=1, **given)
    other.load_state_dict(penalty.state_dict())
    assert all(torch.equal(c, stored[n]) for n, c in other.choices().items())
    batch = torch.randn(3, 1, 5, 5)
    subject = PruningContext(model, batch, choices=stored)
    decided = plugin.load("pruners", "chosen").prune(None, subject)
    assert not decided.masks
    assert {n: len(i) for n, i in decided.channels.items()} == {"stem": 2, "up": 3, "inner": 3}
    model, batch = model.double(), batch.double()
    small = removal.remove(model, decided.channels, batch).model
    with torch.no_grad():
        masked = removal.mask(model, decided.channels, batch)(batch)
        assert float((small(batch) - masked).abs().max()) <= 1e-9


def test_a_part_of_a_group_s_layers_that_chose_removes_nothing():
    model = summed()
    penalty = grow("greg1", model, ratios={"up": 0.5})
    stored = penalty.choices()
    assert set(stored) == {"up.weight", "select.index", "back.weight"}
    for missing in stored:
        some = {n: c for n, c in stored.items() if n != missing}
        subject = PruningContext(model, torch.zeros(1, 1, 5, 5), choices=some)
        assert not plugin.load("pruners", "chosen").prune(None, subject).channels


def test_balanced_parts_grow_in_pairs_and_a_group_needs_the_shape_of_an_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten(),
                          nn.Linear(100, 3)).eval()  # fmt: skip
    penalty = grow("greg1", model, ratios=0.5)
    stored = penalty.choices()
    assert stored["0.weight"].flatten().view(2, 3).sum(1).tolist() == [2, 2]
    assert stored["1.weight"].flatten().view(2, 2).sum(1).tolist() == [1, 1]
    module = plugin.load("penalties", "greg1")
    with pytest.raises(SettingsError, match="the shape of an image is needed"):
        module.build(module.Settings(granularity="group"), model, 0.1)
