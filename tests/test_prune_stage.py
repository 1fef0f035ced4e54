"""Around a pruner: recalibrated batch-norm statistics, longer training for small networks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.base.errors import TrainingError
from secateur.base.sections import Finetune, Prune
from secateur.data import dataset
from secateur.pipeline import console
from secateur.pruning.decision import PruningContext
from secateur.training import budget
from secateur.training.recalibrate import recalibrate, recalibrate_on
from stages import prune
from stages.sensitivity import __main__ as sensitivity


def network():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU()]
    second = [nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Dropout(0.9), nn.Linear(80, 3))


def test_statistics_are_the_averages_over_batches_and_nothing_else_changes():
    model = network()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(6, 3, 8, 8) + k for k in range(4)]
    assert recalibrate(model, iter(batches)) == 2
    with torch.no_grad():
        seen = [model[0](x) for x in batches]
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    spread = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, spread)
    assert int(model[1].num_batches_tracked) == 4
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[1][:7] for name in changed} == {"running", "num_bat"}
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)
    assert not any(module.training for module in model.modules())


def test_the_images_are_drawn_from_all_also_where_classes_stand_one_after_the_other():
    pixels = torch.zeros(640, 1, 2, 2, dtype=torch.uint8)
    pixels[320:] = 255
    split = dataset.InMemoryImages(pixels, torch.arange(640) // 320)
    images = dataset.Images(split, split, ["dark", "bright"], (0.0,), (1.0,))
    prepared = dataset.prepare("toy", images, 0, 0)
    assert prepared.train.labels.diff().ne(0).sum() == 1, "the images are sorted by class"
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert recalibrate_on(model, prepared, 256, torch.device("cpu")) == (1, 256)
    assert 0.3 < float(model[0].running_mean) < 0.7  # 256 of 640 without replacement: 0.5 +- 0.02


class SeenError(Exception):
    """Ends a stage as soon as it has drawn the images for a criterion."""


@pytest.mark.parametrize("stage", ["prune", "sensitivity"])
def test_criteria_are_given_all_classes_also_where_these_stand_one_after_the_other(
    stage, monkeypatch
):
    labels = torch.arange(900) // 300
    split = dataset.InMemoryImages(torch.zeros(900, 3, 8, 8, dtype=torch.uint8), labels)
    images = dataset.Images(split, split, ["a", "b", "c"], (0.5,) * 3, (0.5,) * 3)
    made = SimpleNamespace(
        model=network, masks={}, choices={}, header=SimpleNamespace(arch="", shape=(3, 8, 8))
    )
    params = SimpleNamespace(
        pruner="magnitude",
        chosen=lambda _: {},
        prune=Prune(),
        sensitivity=SimpleNamespace(criteria=["taylor"], granularity="filter", ratios=[], seed=0),
        seed=0,
    )
    context = SimpleNamespace(
        params=params,
        start=made,
        upstream={"baseline": made},
        data=dataset.prepare("toy", images, 0.1, 0),
    )

    def capture(*given, **_):
        (found,) = (each for each in given if isinstance(each, PruningContext))
        raise SeenError(found.labels.bincount().tolist(), len(found.images))

    monkeypatch.setattr(prune.checkpoint, "build_architecture", lambda _: network())
    monkeypatch.setattr(prune.plugin, "load", lambda *_: SimpleNamespace(prune=capture))
    monkeypatch.setattr(sensitivity, "_ablations", capture)
    with pytest.raises(SeenError) as seen:
        prune.prune(context) if stage == "prune" else sensitivity.measure(context)
    counts, size = seen.value.args
    assert len(counts) == 3 and min(counts) >= 0.3 * size
    assert size == 256


def test_one_image_is_too_few_for_a_norm_of_single_pixels():
    model = nn.Sequential(nn.Conv2d(1, 4, 6), nn.BatchNorm2d(4)).eval()
    with pytest.raises(TrainingError, match="recalibrate: a single image is too few") as caught:
        recalibrate(model, [torch.randn(1, 1, 6, 6)])
    assert "\n" not in str(caught.value)
    assert model[1].momentum == 0.1 and not model[1].training
    assert recalibrate(model, [torch.randn(1, 1, 7, 7)]) == 1, "four pixels are enough"


def test_a_network_without_norms_is_left_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert recalibrate(model, [torch.zeros(2, 1, 2, 2)]) == 0


@pytest.mark.parametrize("validation", [0.2, 0])
def test_the_stage_measures_accuracy_before_and_after(validation, capsys):
    chance = torch.Generator().manual_seed(1)
    labels = torch.arange(300) % 3
    pixels = torch.randint(0, 60, (300, 3, 8, 8), generator=chance, dtype=torch.uint8)
    pixels[torch.arange(300), labels] += 150  # the brightest channel gives the class
    split = dataset.InMemoryImages(pixels, labels)
    images = dataset.Images(split, split, ["a", "b", "c"], (0.5,) * 3, (0.5,) * 3)
    prepared = dataset.prepare("toy", images, validation, 0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    model[3].weight.data, model[3].bias.data = torch.eye(3), torch.zeros(3)
    model[0].running_mean[:] = torch.tensor([50.0, 0, -50])  # far off: all become class c
    metrics = prune.measure_again(SimpleNamespace(data=prepared), model, 200)
    said = capsys.readouterr().out
    assert "from 128 images" in said
    if validation:
        assert metrics["val_accuracy_before"] < 0.5
        assert metrics["val_accuracy_recalibrated"] == 1
        assert "100.00% after" in said
    else:
        assert metrics == {}


@pytest.mark.parametrize(
    ("dense", "pruned", "limit", "epochs"),
    [(100, 50, 2, 20), (255, 100, 4, 26), (1000, 10, 2, 20), (1000, 10, 8, 80), (90, 100, 2, 10)],
)
def test_as_many_epochs_as_the_dense_network_has_computed(dense, pruned, limit, epochs):
    given = Finetune(
        epochs=10, schedule="multistep", milestones=[4, 8], warmup=1, budget_limit=limit,
        average={"kind": "ema", "start": 500},
    )  # fmt: skip
    longer = budget.extend_epochs(given, dense, pruned)
    assert longer.epochs == epochs
    assert longer.milestones == pytest.approx((0.4 * epochs, 0.8 * epochs))
    assert longer.warmup == pytest.approx(0.1 * epochs)
    assert longer.average.start == 50 * epochs and longer.average.kind == "ema"
    assert Finetune(**longer.model_dump()) == longer, "still valid settings"


def test_a_milestone_at_a_whole_epoch_stays_at_one():
    """By one rounding error later, the rate would fall a step, or by epoch a whole epoch, later."""
    for epochs in (60, 90, 160):
        given = Finetune(epochs=epochs, schedule="multistep", milestones=range(1, epochs))
        for longer in range(epochs, 2 * epochs + 1):
            found = budget.stretched(given, longer)["milestones"]
            whole = {m: m * longer // epochs for m in range(1, epochs) if m * longer % epochs == 0}
            assert {m: found[m - 1] for m in whole} == whole


def test_an_average_of_a_share_keeps_its_share():
    given = Finetune(epochs=10, average={"kind": "ema", "start": 0.4})
    assert budget.extend_epochs(given, 100, 50).average == given.average


def test_no_epochs_stay_none_whatever_the_budget():
    assert budget.extend_epochs(Finetune(epochs=0), 100, 50).epochs == 0


def test_outputs_are_listed_under_the_names_that_layers_have(capsys):
    """A network of the user's own may have keys that rich would read as tags."""
    console.outputs([("heads.[fc1]", 10, 5)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["heads.[fc1]", "10", "5", "50%"]
