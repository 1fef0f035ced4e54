"""Progressive resizing: sizes by epoch, the pixels of a smaller image, errors, and resuming."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from secateur.base import plugin
from secateur.base.errors import ArgumentError
from secateur.base.sections import ImageScale, Train
from secateur.base.stage import Stage
from secateur.data import dataset, progressive_resizing
from secateur.data.progressive_resizing import ProgressiveResizing
from secateur.pipeline import console
from secateur.training import loop, resume
from secateur.training.callbacks import Callback
from secateur.training.distillation import Distiller

PARTS = [{"scale": 0.5, "until": 0.3}, {"scale": 0.75, "until": 0.7}]
DIGITS = plugin.load("datasets", "digits")


def settings(epochs=10, **given):
    return Train(epochs=epochs, batch_size=64, lr=0.01, progressive_resizing=PARTS, **given)


class Pooled(nn.Module):
    """Global pooling; records the image size of every pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 10)
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, *images.shape[-2:]))
        return self.out(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SECATEUR_DEVICE", "cpu")
    images = DIGITS.read(DIGITS.Settings(), None)
    images = replace(images, train=images.train.take(range(128)))
    return dataset.prepare("digits", images, 0.25, 0)


def fit(model, data, wanted, name="a", callbacks=(), **options):
    """Train as a stage of this name; a second call resumes a training that was stopped."""
    with resume.single_flight(Stage("baseline", None, {"name": name}, {}), [], list) as store:
        return loop.fit(model, data, wanted, 1, store, callbacks, **options)


def test_the_size_follows_the_share_of_the_epochs():
    """By hand: 0.3 and 0.7 of 10 epochs are 3 and 7; of 5 epochs 1.5 and 3.5, rounded 2 and 4."""
    ten = ProgressiveResizing(settings(10))
    assert [ten.scale(epoch) for epoch in range(10)] == [0.5] * 3 + [0.75] * 4 + [1.0] * 3
    five = ProgressiveResizing(settings(5))
    assert [five.scale(epoch) for epoch in range(5)] == [0.5] * 2 + [0.75] * 2 + [1.0]
    two, one = ProgressiveResizing(settings(2)), ProgressiveResizing(settings(1))
    assert [two.scale(0), two.scale(1), one.scale(0)] == [0.5, 1.0, 1.0], "the last is never small"
    assert ten(torch.zeros(2, 3, 28, 20), 0).shape == (2, 3, 14, 10)
    assert ten(torch.zeros(2, 3, 30, 7), 4).shape == (2, 3, 22, 5)
    assert ten(torch.zeros(0, 3, 8, 8), 0).shape == (0, 3, 8, 8), "for a process without images"


def test_at_full_size_the_images_are_those_that_were_given():
    images = torch.rand(2, 3, 8, 8)
    assert ProgressiveResizing(settings(10))(images, 9) is images
    assert ProgressiveResizing(Train(epochs=10))(images, 0) is images


@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_pixels_are_those_of_pillow(scale):
    """Pillow's bilinear filter averages all pixels too; it rounds to whole values of 0 to 255."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 24), dtype=np.uint8)
    parts = Train(epochs=10, progressive_resizing=[{"scale": scale, "until": 0.5}])
    made = ProgressiveResizing(parts)(torch.from_numpy(pixels)[None, None].float(), 0)[0, 0]
    size = (round(24 * scale), round(32 * scale))
    wanted = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    assert np.abs(made.numpy() - np.asarray(wanted, np.float32)).max() <= 1.01


def test_a_training_sees_small_images_first_and_is_judged_at_full_size(digits):
    model = Pooled()
    result = fit(model, digits, settings(10))
    steps = [height for training, height, _ in model.seen if training]
    assert steps == [4] * 6 + [6] * 8 + [8] * 6, "two batches per epoch"
    checks = [size for training, *size in model.seen if not training]
    assert checks[:2] == [[4, 4], [6, 6]], "checked before the first step"
    assert len(checks) == 12 and all(size == [8, 8] for size in checks[2:])
    scales = [row["image_scale"] for row in result.history]
    assert scales == [0.5] * 3 + [0.75] * 4 + [1.0] * 3


class Stop(Callback):
    """Interrupts the training after an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, row):
        if row["epoch"] == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [2, 3, 7])
def test_a_killed_training_ends_with_the_bytes_of_one_left_alone(epoch, digits):
    whole, cut = Pooled(), Pooled()
    fit(whole, digits, settings(10), "alone")
    with pytest.raises(KeyboardInterrupt):
        fit(cut, digits, settings(10), "killed", [Stop(epoch)])
    cut = Pooled()
    fit(cut, digits, settings(10), "killed")
    assert sum(training for training, *_ in cut.seen) == 2 * (10 - epoch), "training was resumed"
    prints = [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in m.state_dict().values())).hexdigest()
        for m in (whole, cut)
    ]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("already", [0, 4])
def test_the_time_that_is_left_counts_pixels(already, monkeypatch, capsys):
    """Epochs of 10 steps: 3 at half size, 25 s each; 4 at three quarters, 56.25 s; 3 of 100 s."""
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    whole = settings(10)
    bar = console.Training("baseline", ProgressiveResizing(whole).pixels)
    bar.on_train_start(whole.epochs, 10, [{}] * already)
    passed = [25.0] * 3 + [56.25] * 4 + [100.0] * 3
    total = sum(passed[already:])
    for epoch in range(already, 10):
        for step in range(10):
            clock[0] += passed[epoch] / 10
            bar.on_step_end(epoch + 1, step + 1)
            said = capsys.readouterr().out
            left = re.findall(r"(\d+) s left", said)
            assert all(abs(float(seconds) - (total - clock[0])) <= 0.5 for seconds in left), said
            assert left or passed[epoch] < 100


def test_a_network_for_one_size_is_refused_and_left_as_it_was():
    module = plugin.load("archs", "lenet5")
    model = module.build(module.Settings(), 10, (1, 28, 28)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"images of 14x14 \(scale 0\.5\), only of 28x28"):
        progressive_resizing.check(model, [ImageScale(scale=0.5, until=0.5)], (1, 28, 28))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_teacher_for_one_size_is_refused_before_the_training(digits):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    how = Train(**settings().model_dump() | {"distillation": {"teacher": "models/baseline"}})
    model = Pooled()
    made = Distiller(how.distillation, teacher, model, (1, 8, 8), 3)
    with pytest.raises(
        ArgumentError, match=r"the teacher does not take images of 4x4 .* a teacher"
    ):
        fit(model, digits, how, distiller=made)


@pytest.mark.parametrize("message", ["Wrong height! Expected 8\nbut got 4", ""])
def test_a_network_that_asserts_its_size_is_refused_too(message):
    class Asserts(nn.Linear):
        def forward(self, images):
            if images.shape[-1] != 8:
                raise AssertionError(message)  # pytest would rewrite an assert statement
            return super().forward(images.flatten(1))

    words = "Wrong height! Expected 8 but got 4" if message else "AssertionError"
    with pytest.raises(ArgumentError, match=rf"only of 8x8: {words}; take none"):
        progressive_resizing.check(Asserts(64, 3), [ImageScale(scale=0.5, until=0.5)], (1, 8, 8))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{"scale": 1.0, "until": 0.5}], "scale"),
        ([{"scale": 0.0, "until": 0.5}], "scale"),
        ([{"scale": 0.5, "until": 1.0}], "until"),
        ([{"scale": 0.5}], "until"),
        ([{"scale": 0.5, "until": 0.5}, {"scale": 0.7, "until": 0.5}], "must rise"),
        ([{"scale": 0.5, "until": 0.5}, {"scale": 0.7, "until": 0.2}], "must rise"),
    ],
)
def test_parts_that_make_no_sense_are_refused(parts, words):
    with pytest.raises(ValidationError, match=words):
        Train(epochs=10, progressive_resizing=parts)
