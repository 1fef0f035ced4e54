"""Data sets: reading, splitting, hashing, storing, and batches."""

import hashlib
import itertools
import math
import multiprocessing
import os
import pickle
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.stats import chisquare, kstest

from secateur.base import machine, plugin, stage
from secateur.base.errors import DataError, SettingsError
from secateur.base.torchvision_import import import_torchvision
from secateur.data import augment, cutout, dataset, image_files, warp
from secateur.data.augment import Augment, FileAugment
from secateur.data.batches import (
    Batches,
    Normalise,
    evenly_spaced_images,
    first_images,
    sequential_batches,
    stratified_batch,
)
from secateur.data.dataset import DatasetInfo, Images, InMemoryImages
from secateur.data.image_files import ImageFileList
from secateur.deploy.predict import open_classifier
from secateur.nn import checkpoint
from secateur.pipeline.runner import StageContext

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / os.environ.get("SECATEUR_DATA", "data/raw")
CLASSES = ["a", "b", "c"]
IDX = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
CPU = torch.device("cpu")


def read(name, root, **chosen):
    module = plugin.load("datasets", name)
    return module.read(module.Settings(**chosen), root)


def numbered(labels, first=0):
    """Images that encode their own number in two pixels, so that they can be told apart."""
    numbers = torch.arange(first, first + len(labels))
    pixels = torch.stack([numbers // 256, numbers % 256], dim=1).to(torch.uint8)
    return InMemoryImages(pixels.view(-1, 1, 1, 2), torch.tensor(labels))


def numbers(split):
    return [256 * int(image[0, 0, 0]) + int(image[0, 0, 1]) for image in split.images]


def images(train, test=(0, 1, 2)):
    return Images(numbered(list(train)), numbered(list(test), 10_000), CLASSES, (0.0,), (1.0,))


@given(
    counts=st.tuples(*[st.integers(12, 60)] * 3),
    validation=st.floats(0.1, 0.5),
    seed=st.integers(0, 2**31 - 1),
)
@examples(max_examples=25, deadline=None, derandomize=True)
def test_the_split_is_complete_disjoint_and_fair_to_every_class(counts, validation, seed):
    labels = np.repeat([0, 1, 2], counts)
    np.random.default_rng(0).shuffle(labels)
    found = dataset.prepare("toy", images(labels), validation, seed)
    train, val = numbers(found.train), numbers(found.val)
    assert sorted(train + val) == list(range(len(labels)))
    assert numbers(found.test) == [10_000, 10_001, 10_002]
    assert found.info.counts == {"train": len(train), "val": len(val), "test": 3}
    assert abs(len(val) - validation * len(labels)) <= 1
    for part in (found.train, found.val):  # every image has kept its label
        assert part.labels.tolist() == [labels[number] for number in numbers(part)]
    held_out = Counter(found.val.labels.tolist())
    for index, count in enumerate(counts):
        assert abs(held_out[index] - len(val) * count / len(labels)) < 1


def test_the_same_seed_gives_the_same_split_and_another_one_another():
    source = images([0, 1, 2] * 30)
    first, again, other = (dataset.prepare("toy", source, 0.2, s) for s in (3, 3, 4))
    assert numbers(first.val) == numbers(again.val) != numbers(other.val)
    assert first.info == again.info


def test_without_validation_everything_is_trained_on():
    found = dataset.prepare("toy", images([0, 1, 2] * 5), 0, 0)
    assert numbers(found.train) == list(range(15))
    assert len(found.val) == 0


def test_the_hash_changes_with_every_pixel_label_and_division_and_with_nothing_else():
    def hashed(train=None, test=None, validation=0.25, seed=0):
        source = images([0, 1, 2] * 8)
        source = replace(source, train=train or source.train, test=test or source.test)
        return dataset.prepare("toy", source, validation, seed).info.hash

    def altered(split, pixel=False, labels=None):
        pixels = split.images.clone()
        pixels[5 % len(split), 0, 0, 0] += int(pixel)
        return InMemoryImages(pixels, split.labels if labels is None else torch.tensor(labels))

    train, test = numbered([0, 1, 2] * 8), numbered([0, 1, 2], 10_000)
    everything = [
        hashed(),
        hashed(train=altered(train, pixel=True)),
        hashed(train=altered(train, labels=[1, 0, 2] + [0, 1, 2] * 7)),
        hashed(test=altered(test, pixel=True)),
        hashed(test=altered(test, labels=[0, 1, 1])),
        hashed(validation=0.5),
        hashed(validation=0),
        hashed(seed=1),
    ]
    assert len(set(everything)) == len(everything)
    assert hashed() == hashed(train=altered(train)) == everything[0]


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, -1]])
@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_without_a_name_are_refused(part, labels):
    with pytest.raises(DataError, match="labels beyond the 3 classes"):
        dataset.prepare("toy", images(**{"train": [0, 1, 2], part: labels}), 0, 0)


@pytest.mark.parametrize(
    ("labels", "validation", "reason"),
    [
        ([0, 1] * 9, 0.1, "no training image of class 'c'"),
        ([0, 1, 2], 0.5, r"data\.validation = 0\.5"),
        ([0, 1, 2] * 9, 0.01, r"data\.validation = 0\.01"),
    ],
)
def test_a_division_that_leaves_a_class_without_images_is_refused(labels, validation, reason):
    with pytest.raises(DataError, match=f"toy: {reason}"):
        dataset.prepare("toy", images(labels), validation, 0)


@pytest.mark.parametrize("validation", [0, 0.25])
def test_a_prepared_data_set_comes_back_as_it_was_and_as_the_same_bytes(validation, tmp_path):
    made = dataset.prepare("toy", images([0, 1, 2] * 8), validation, 0)
    dataset.save(tmp_path / "one", made)
    dataset.save(tmp_path / "other", made)
    found = dataset.load(tmp_path / "one")
    assert found.info == made.info
    for part in ("train", "val", "test"):
        was, now = getattr(made, part), getattr(found, part)
        assert now.images.dtype == torch.uint8
        assert torch.equal(now.images, was.images)
        assert torch.equal(now.labels, was.labels)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "missing; run `dvc repro prepare`"),
        (cut, "not a prepared data set"),
        (lambda path: path.write_bytes(b""), "not a prepared data set"),
        (
            lambda path: safetensors.torch.save_file({"train.images": torch.ones(2)}, path),
            "not a prepared data set",
        ),
    ],
    ids=["missing", "cut", "empty", "foreign"],
)
def test_a_damaged_file_is_named(spoil, reason, tmp_path):
    dataset.save(tmp_path, dataset.prepare("toy", images([0, 1, 2]), 0, 0))
    spoil(tmp_path / dataset.FILE)
    with pytest.raises(DataError, match=f"{tmp_path / dataset.FILE}: {reason}"):
        dataset.load(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_an_epoch_hands_out_every_image_once_with_its_label(batch_size):
    prepared = dataset.prepare("toy", images([0, 1, 2] * 8), 0, 0)
    batches = Batches(prepared.train, prepared.info, batch_size, seed=1)
    parts = list(batches.epoch(0))
    assert len(parts) == len(batches) == -(-24 // batch_size)
    assert [len(labels) for _, labels in parts[:-1]] == [batch_size] * (len(parts) - 1)
    seen = [round(255 * float(image[0, 0, 1])) for batch, _ in parts for image in batch]
    assert sorted(seen) == list(range(24))
    assert [int(label) for _, labels in parts for label in labels] == [n % 3 for n in seen]


def test_the_order_depends_on_seed_and_epoch_alone():
    prepared = dataset.prepare("toy", images([0, 1, 2] * 8), 0, 0)

    def order(seed, epoch):
        batches = Batches(prepared.train, prepared.info, 5, seed)
        return torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist()

    first = order(1, 0)
    torch.manual_seed(99)  # neither earlier draws nor other generators matter
    assert order(1, 0) == first
    orders = [order(seed, epoch) for seed in (0, 1, 2**31 - 1) for epoch in range(4)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert prepared.train.labels.tolist() not in orders


@given(
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
)
@examples(max_examples=25, deadline=None, derandomize=True)
def test_normalising_is_what_numpy_says(mean, std):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    expected = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    batch = torch.from_numpy(pixels)
    normalised = Normalise(mean, std, torch.device("cpu"))(batch)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(batch.numpy(), pixels)


def test_pixels_that_are_not_normalised_lie_between_zero_and_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    values = Normalise([0.0], [1.0], torch.device("cpu"))(pixels).flatten().tolist()
    assert values == pytest.approx([0, 0.2, 1])


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    found, source = read("digits", Path("nowhere")), load_digits()
    assert found.train.images.shape == (1437, 1, 8, 8)
    assert found.test.images.shape == (360, 1, 8, 8)
    everything = torch.cat([found.train.images, found.test.images]).numpy()
    levels = np.rint(everything[:, 0].reshape(-1, 64) * (16 / 255)).astype(int)
    labels = torch.cat([found.train.labels, found.test.labels]).numpy()
    rows = np.column_stack([levels, labels])
    theirs = np.column_stack([source.data.astype(int), source.target])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, theirs))
    counts = np.bincount(found.test.labels.numpy())
    assert np.abs(counts - np.bincount(source.target) / 5).max() <= 1
    assert int(everything.max()) == 255


def write_idx(folder, part, pixels, labels):
    """Images and labels in the format of the MNIST files: magic number, sizes, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(">IIII", 0x803, *pixels.shape)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(sizes + pixels.tobytes())
    header = struct.pack(">II", 0x801, len(labels))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(labels))


@pytest.fixture
def offline(monkeypatch):
    """Every download fails at once, also on a machine with a network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", IDX)
def test_files_in_the_format_of_mnist_are_read_as_they_are(name, tmp_path, offline):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    folder = tmp_path / IDX[name] / "raw"
    write_idx(folder, "train", pixels, [5, 0, 4, 1, 9])
    write_idx(folder, "t10k", pixels[:2], [7, 2])
    found = read(name, tmp_path)
    assert np.array_equal(found.train.images.numpy(), pixels[:, None])
    assert np.array_equal(found.test.images.numpy(), pixels[:2, None])
    assert found.train.labels.tolist() == [5, 0, 4, 1, 9]
    assert found.test.labels.tolist() == [7, 2]
    assert (found.mean, found.std) == ((0.0,), (1.0,))
    scaled = read(name, tmp_path, normalise=True)
    published = {"mnist": ((0.1307,), (0.3081,)), "fashion_mnist": ((0.2860,), (0.3530,))}
    assert (scaled.mean, scaled.std) == published[name]


@pytest.mark.parametrize("name", IDX)
def test_damaged_files_are_named_and_not_downloaded_over(name, tmp_path, offline):
    folder = tmp_path / IDX[name] / "raw"
    for part in ("train", "t10k"):
        write_idx(folder, part, np.zeros((3, 28, 28), dtype=np.uint8), [0, 1, 2])
    cut(folder / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match=f"{tmp_path}.* damaged"):
        read(name, tmp_path)


@pytest.mark.parametrize("name", [*IDX, *CIFAR])
def test_without_files_and_network_it_says_where_it_looked(name, tmp_path, offline, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        read(name, stage.raw_folder())
    line = str(caught.value)
    assert "\n" not in line
    assert str(tmp_path / (IDX | CIFAR)[name]) in line
    assert "SECATEUR_DATA" in line


def test_raw_data_is_looked_for_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    assert stage.raw_folder() == tmp_path / "data" / "raw"
    monkeypatch.setenv("SECATEUR_DATA", "elsewhere")
    assert stage.raw_folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("SECATEUR_DATA", "/elsewhere")
    assert stage.raw_folder() == Path("/elsewhere")


@pytest.fixture
def real(tmp_path):
    """The content of SECATEUR_DATA, linked from a temporary folder: nothing is added to it."""
    for path in REAL.iterdir() if REAL.is_dir() else []:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("name", plugin.names("datasets"))
def test_a_data_set_is_what_the_pipeline_expects(name, real, offline):
    module = plugin.load("datasets", name)
    try:
        found = module.read(module.Settings(), real)
    except DataError as error:
        if name == "digits":  # part of scikit-learn, so it is always there
            raise
        pytest.skip(str(error))
    assert len(set(found.classes)) == len(found.classes)
    for part in (found.train, found.test):
        assert part.shape == found.train.shape
        assert part.labels.dtype == torch.int64
        assert part.labels.unique().tolist() == list(range(len(found.classes)))
        if isinstance(part, InMemoryImages):
            assert part.images.dtype == torch.uint8
            assert len(part.images) == len(part.labels)
    assert len(found.mean) == len(found.std) == found.train.shape[0]


@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason=f"no MNIST under {REAL}")
def test_mnist_is_mnist(real, offline):
    found = read("mnist", real)
    assert found.train.images.shape == (60_000, 1, 28, 28)
    assert found.test.images.shape == (10_000, 1, 28, 28)
    assert found.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert found.test.labels[:3].tolist() == [7, 2, 1]
    pixels = found.train.images.numpy() / np.float32(255)
    assert pixels.mean() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std() == pytest.approx(0.3081, abs=1e-4)


# -- augmentation ----------------------------------------------------------------------------------


def coloured(count=40, shape=(3, 7, 5), seed=0, **augmented):
    """Random images of three classes, prepared without a validation split."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *shape), generator=chance, dtype=torch.uint8)
    split = InMemoryImages(pixels, torch.arange(count) % 3)
    found = Images(split, split, CLASSES, (0.4, 0.5, 0.6)[: shape[0]], (0.2, 0.3, 0.4)[: shape[0]])
    return dataset.prepare("toy", replace(found, augment=Augment(**augmented)), 0, 0)


def by_hand(image, top, left, flip, pad):
    """Crop and mirror one image (channels, height, width), pixel by pixel."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source = (row + top - pad, (width - 1 - column if flip else column) + left - pad)
            if 0 <= source[0] < height and 0 <= source[1] < width:
                result[:, row, column] = image[:, source[0], source[1]]
    return result


def batches_of(prepared, epoch=0, size=16, seed=1, **ranks):
    """All batches of an epoch: images and labels."""
    batches = Batches(prepared.train, prepared.info, size, seed, **ranks)
    try:
        return list(batches.epoch(epoch))
    finally:
        batches.close()


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) for one, other in zip(some, others, strict=True)
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (3, True)])
def test_an_augmented_batch_is_what_is_drawn_for_it_pixel_by_pixel(pad, flip, channels):
    prepared = coloured(shape=(channels, 7, 5), pad=pad, flip=flip)
    drawn = augment.plan_epoch(40, 1, 4, prepared.info.augment)
    normalise = Normalise(prepared.info.mean, prepared.info.std, CPU)
    pixels = prepared.train.images.numpy()
    place = 0
    for images, labels in batches_of(prepared, epoch=4):
        rows = [[t[place + i].item() for t in drawn[1:]] for i in range(len(labels))]
        expected = np.stack([by_hand(pixels[row[0]], *row[1:], pad) for row in rows])
        torch.testing.assert_close(images, normalise(torch.from_numpy(expected)), rtol=0, atol=0)
        assert labels.tolist() == [row[0] % 3 for row in rows]
        assert images.dtype == torch.float32
        layout = torch.channels_last if channels > 1 else torch.contiguous_format
        assert images.is_contiguous(memory_format=layout)
        place += len(labels)
    assert place == 40


def test_every_offset_comes_equally_often_and_half_of_the_images_are_mirrored():
    drawn = augment.plan_epoch(8100, 0, 0, Augment(pad=4, flip=True))
    pairs = Counter(zip(drawn.top.tolist(), drawn.left.tolist(), strict=True))
    assert set(pairs) == {(top, left) for top in range(9) for left in range(9)}
    expected = 8100 / 81
    chi = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert chi < 80 + 4 * math.sqrt(160)
    assert abs(drawn.flip.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(8100)
    assert drawn.image.sort().values.tolist() == list(range(8100))


def test_without_augmentation_images_come_as_they_are_and_as_they_came_before_there_was_any():
    plain, moved = coloured(), coloured(pad=3, flip=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1 * 1_000_003 + 2))
    labels = torch.cat([labels for _, labels in batches_of(plain, epoch=2)])
    assert torch.equal(labels, plain.train.labels[order])
    assert torch.equal(labels, torch.cat([part for _, part in batches_of(moved, epoch=2)]))
    normalise = Normalise(plain.info.mean, plain.info.std, CPU)
    images = torch.cat([images for images, _ in batches_of(plain, epoch=2)])
    assert torch.equal(images, normalise(plain.train.images[order]))


def still(count, angle=0.0, right=0.0, down=0.0):
    """The same rotation and displacement for all images."""
    moved = torch.zeros(count, 2, warp.GRID, warp.GRID)
    moved[:, 0], moved[:, 1] = right, down
    return warp.WarpPlan(torch.full((count,), angle), moved)


def test_turns_and_displacements_move_pixels_where_they_should():
    """Quarter turns and shifts by whole and half pixels are known by hand, others from scipy."""
    pixels = torch.randint(0, 256, (3, 6, 6, 2), dtype=torch.uint8)
    whole = pixels.float()
    torch.testing.assert_close(warp.warp(pixels, still(3)), whole, atol=1e-3, rtol=0)
    turned = warp.warp(pixels, still(3, angle=math.pi / 2))
    torch.testing.assert_close(turned, whole.rot90(1, (1, 2)), atol=1e-3, rtol=0)
    moved = warp.warp(pixels, still(3, right=1, down=-2))
    expected = torch.zeros_like(whole)
    expected[:, 2:, :-1] = whole[:, :-2, 1:]
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=0)
    half = warp.warp(pixels, still(3, right=0.5))[:, :, :-1]
    torch.testing.assert_close(half, (whole[:, :, 1:] + whole[:, :, :-1]) / 2, atol=1e-3, rtol=0)
    plan = warp.plan_warps(3, 1, 2, Augment(rotate=20, elastic=0.7))
    fine = zoom_cubic(plan.displacement.double().numpy(), 6)
    found = warp.warp(pixels, plan).numpy()
    for image in range(3):
        angle = float(plan.angle[image])
        down, across = np.mgrid[:6, :6] - 2.5
        x = math.cos(angle) * across - math.sin(angle) * down + fine[image, 0] + 2.5
        y = math.sin(angle) * across + math.cos(angle) * down + fine[image, 1] + 2.5
        for channel in range(2):
            source = whole[image, :, :, channel].numpy()
            by_scipy = map_coordinates(source, [y, x], order=1, mode="grid-constant")
            assert np.abs(found[image, :, :, channel] - by_scipy).max() < 0.05


def zoom_cubic(coarse, size):
    """Keys's cubic convolution (a = -0.75) with repeated borders and aligned corners."""

    def weight(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    count = coarse.shape[-1]
    matrix = np.zeros((size, count))
    for row in range(size):
        place = row * (count - 1) / (size - 1)
        for near in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[row, min(max(near, 0), count - 1)] += weight(place - near)
    return matrix @ coarse @ matrix.T


def test_distortions_are_drawn_as_asked_and_depend_on_seed_and_epoch_alone():
    how = Augment(rotate=15, elastic=1.5)
    plan = warp.plan_warps(4000, 3, 7, how)
    degrees = np.rad2deg(plan.angle.numpy())
    assert np.abs(degrees).max() <= 15 and kstest(degrees, "uniform", (-15, 30)).pvalue > 1e-4
    assert abs(float(plan.displacement.std()) / 1.5 - 1) < 0.02
    assert abs(float(plan.displacement.mean())) < 0.03
    again, other = warp.plan_warps(4000, 3, 7, how), warp.plan_warps(4000, 3, 8, how)
    assert torch.equal(plan.angle, again.angle) and not torch.equal(plan.angle, other.angle)
    assert warp.plan_warps(4, 0, 0, Augment(pad=2, flip=True)) is None
    prepared = coloured(shape=(1, 7, 5), pad=1, rotate=10, elastic=0.5)
    alone = batches_of(prepared, epoch=2)
    assert same(alone, batches_of(prepared, epoch=2))
    ranks = [batches_of(prepared, epoch=2, rank=r, world=2) for r in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for rank, part in enumerate(parts):
            torch.testing.assert_close(part[0], whole[0][rank::2])
    plain = batches_of(coloured(shape=(1, 7, 5), pad=1), epoch=2)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, plain, strict=True)), "same order"


def test_cutout_hides_one_square_of_every_training_image():
    """Compared with images without cutout: zeros in the planned square, checked pixel by pixel."""
    prepared, plain = coloured(shape=(2, 7, 9), pad=1, cutout=4), coloured(shape=(2, 7, 9), pad=1)
    centres = cutout.plan_cutouts(40, 1, 2, 4, (7, 9))
    found = torch.cat([images for images, _ in batches_of(prepared, epoch=2)])
    whole = torch.cat([images for images, _ in batches_of(plain, epoch=2)])
    for image, before, (row, column) in zip(found, whole, centres.tolist(), strict=True):
        for y, x in itertools.product(range(7), range(9)):
            inside = row - 2 <= y <= row + 1 and column - 2 <= x <= column + 1
            assert torch.equal(image[:, y, x], before[:, y, x] * (not inside)), (y, x)
    shown, expected = (
        list(sequential_batches(d.train, d.info, device=CPU)) for d in (prepared, plain)
    )
    assert same(shown, expected), "evaluation sees whole images"


def test_cutouts_are_drawn_evenly_and_depend_on_seed_and_epoch_alone():
    centres = cutout.plan_cutouts(7000, 3, 7, 2, (7, 5))
    counts = torch.bincount(centres[:, 0] * 5 + centres[:, 1], minlength=35)
    assert len(counts) == 35 and chisquare(counts.numpy()).pvalue > 1e-4
    assert torch.equal(cutout.plan_cutouts(7000, 3, 7, 2, (7, 5)), centres)
    assert not torch.equal(cutout.plan_cutouts(7000, 3, 8, 2, (7, 5)), centres)
    assert not torch.equal(cutout.plan_cutouts(7000, 4, 7, 2, (7, 5)), centres)
    assert cutout.plan_cutouts(4, 0, 0, 0, (7, 5)) is None
    prepared = coloured(shape=(1, 7, 5), pad=1, cutout=3)
    alone = batches_of(prepared, epoch=2)
    ranks = [batches_of(prepared, epoch=2, rank=r, world=2) for r in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert all(torch.equal(part[0], whole[0][rank::2]) for rank, part in enumerate(parts))


def test_cutout_that_would_hide_whole_images_is_refused():
    coloured(shape=(1, 7, 5), cutout=4)
    with pytest.raises(
        DataError, match=r"datasets\.toy\.augment\.cutout = 5 hides whole images of 7x5; .* than 5"
    ):
        coloured(shape=(1, 7, 5), cutout=5)


def test_augmentation_depends_on_seed_and_epoch_alone():
    prepared = coloured(pad=3, flip=True)
    first = batches_of(prepared)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(batches_of(prepared), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert not same(batches_of(prepared, epoch=1), first)
    assert not same(batches_of(prepared, seed=2), first)


def dealt(prepared, world, size, epoch=0):
    """The batches of all ranks, merged into whole batches."""
    parts = [batches_of(prepared, epoch, size, rank=rank, world=world) for rank in range(world)]
    whole = []
    for step in zip(*parts, strict=True):
        count = sum(len(labels) for _, labels in step)
        images = torch.empty(count, *step[0][0].shape[1:])
        labels = torch.empty(count, dtype=torch.int64)
        for rank, (mine, names) in enumerate(step):
            images[rank::world], labels[rank::world] = mine, names
        whole.append((images, labels))
    return whole


@pytest.mark.parametrize(("world", "size"), [(1, 16), (2, 16), (3, 16), (4, 39)])
def test_ranks_share_out_exactly_the_batches_of_one_process(world, size):
    prepared = coloured(pad=2, flip=True)
    assert same(dealt(prepared, world, size), batches_of(prepared, size=size))
    for rank in range(world):
        batches = Batches(prepared.train, prepared.info, size, 1, rank=rank, world=world)
        assert len(batches) == -(-40 // size)


@pytest.mark.parametrize("world", [1, 3])
def test_in_order_gives_every_image_once_unmoved(world):
    prepared = coloured(pad=2, flip=True)
    info, test = prepared.info, prepared.test
    normalise = Normalise(info.mean, info.std, CPU)
    for rank in range(world):
        chunks = list(sequential_batches(test, info, device=CPU, size=16, rank=rank, world=world))
        parts = [range(first, min(first + 16, 40)) for first in (0, 16, 32)]
        mine = [number for part in parts for number in part[rank::world]]
        assert torch.equal(torch.cat([i for i, _ in chunks]), normalise(test.images[mine]))
        assert torch.cat([labels for _, labels in chunks]).tolist() == [i % 3 for i in mine]
    assert torch.equal(first_images(test, info, 5), normalise(test.images[:5]))
    assert len(first_images(test, info, 1000)) == 40
    assert torch.equal(evenly_spaced_images(test, info, 5), normalise(test.images[::8]))
    assert torch.equal(evenly_spaced_images(test, info, 27)[-2:], normalise(test.images[[37, 38]]))
    assert torch.equal(evenly_spaced_images(test, info, 1000), first_images(test, info, 1000))


@pytest.mark.parametrize("order", ["by class", "in turn"])
def test_a_batch_for_criteria_has_the_same_share_of_every_class(order):
    numbers = torch.arange(64)
    labels = numbers // 16 if order == "by class" else numbers % 4
    pixels = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 224, 224, 1)
    split = InMemoryImages(pixels, labels)
    info = DatasetInfo("toy", [*"abcd"], [1, 224, 224], [0.0], [1.0], "", {})
    images, found = stratified_batch(split, info)
    assert found.bincount().tolist() == [2, 2, 2, 2]
    drawn = (images[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(labels[drawn], found)
    assert len(set(drawn.tolist())) == 8


def test_large_images_are_evaluated_a_few_at_a_time():
    pixels = torch.zeros(20, 3, 1024, 1024, dtype=torch.uint8)
    info = DatasetInfo("toy", CLASSES, [3, 1024, 1024], [0.0] * 3, [1.0] * 3, "", {})
    first, _ = next(
        iter(sequential_batches(InMemoryImages(pixels, torch.zeros(20)), info, device=CPU))
    )
    assert len(first) == 5


# -- CIFAR -----------------------------------------------------------------------------------------


def write_cifar(root, name, monkeypatch):
    """Random images in the layout of the published archive, unpacked; returns the arrays."""
    kind = getattr(import_torchvision().datasets, name.upper())
    folder = root / kind.base_folder
    folder.mkdir()
    chance = np.random.default_rng(0)
    ten = name == "cifar10"
    key, classes = ("labels", 10) if ten else ("fine_labels", 100)
    made, sums = {"train": [], "test": []}, {}

    def put(file, content):
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for part, listed in (("train", kind.train_list), ("test", kind.test_list)):
        for number, (file, _) in enumerate(listed):
            rows = chance.integers(0, 256, (classes, 3072), dtype=np.uint8)
            labels = [(number + i) % classes for i in range(classes)]
            sums[file] = put(file, {"data": rows, key: labels})
            made[part].append((rows, labels))
        monkeypatch.setattr(kind, f"{part}_list", [[file, sums[file]] for file, _ in listed])
    names = [f"class {i}" for i in range(classes)]
    meta = kind.meta | {"md5": put(kind.meta["filename"], {kind.meta["key"]: names})}
    monkeypatch.setattr(kind, "meta", meta)
    return folder, made, names


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_from_the_files_of_its_archive(name, tmp_path, monkeypatch, offline):
    folder, made, names = write_cifar(tmp_path, name, monkeypatch)
    assert folder == tmp_path / CIFAR[name]
    found = read(name, tmp_path)
    assert found.classes == names
    for part in ("train", "test"):
        rows = np.concatenate([rows for rows, _ in made[part]])
        split = getattr(found, part)
        assert np.array_equal(split.images.numpy(), rows.reshape(-1, 3, 32, 32))
        assert split.labels.tolist() == [label for _, labels in made[part] for label in labels]
    assert found.augment == Augment(pad=4, flip=True)
    prepared = dataset.prepare(name, found, 0, 0)
    dataset.save(tmp_path / "out", prepared)
    assert dataset.load(tmp_path / "out").info == prepared.info


def test_the_normalisation_of_cifar_is_a_choice(tmp_path, monkeypatch, offline):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    assert read("cifar10", tmp_path).std == (0.2023, 0.1994, 0.2010)
    assert read("cifar10", tmp_path, normalise="imagenet").mean == (0.485, 0.456, 0.406)
    assert read("cifar10", tmp_path, normalise="cifar100").mean == (0.5071, 0.4867, 0.4408)
    plain = read("cifar10", tmp_path, normalise="none", augment={"pad": 0, "flip": False})
    assert (plain.mean, plain.std, plain.augment) == ((0.0,) * 3, (1.0,) * 3, Augment())


@pytest.mark.parametrize(("spoil", "reason"), [(cut, "damaged"), (Path.unlink, "missing")])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_of_cifar_is_named(file, spoil, reason, tmp_path, monkeypatch, offline):
    folder, _, _ = write_cifar(tmp_path, "cifar10", monkeypatch)
    spoil(folder / file)
    with pytest.raises(DataError, match=f"CIFAR10: {folder / file}: {reason}"):
        read("cifar10", tmp_path)


# -- folders of pictures ---------------------------------------------------------------------------


def draw_picture(path, number, size=(9, 6), mode="RGB"):
    """A different picture for every number; png and bmp keep the exact pixels."""
    bands = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}[mode]
    pixels = np.random.default_rng(number).integers(
        0, 256, (size[1], size[0], bands), dtype=np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if bands == 1 else pixels, mode).save(path)
    return pixels


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A raw folder with images/train and images/test: three classes of 8 and 4 pictures."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "raw"))
    monkeypatch.setenv("SECATEUR_WORKERS", "0")
    folder = tmp_path / "raw" / "images"
    for label, name in enumerate(["ant", "Bee", "cow"]):
        for number in range(12):
            part = "train" if number < 8 else "test"
            draw_picture(folder / part / name / f"{number}.png", 100 * label + number)
    return folder


def own(pictures, **chosen):
    return read("image_folder", pictures.parent, **chosen)


def prepared_own(pictures, **chosen):
    return dataset.prepare("image_folder", own(pictures, **chosen), 0, 0)


def refuses(pictures, reason, **chosen):
    with pytest.raises(DataError) as caught:
        own(pictures, **chosen)
    assert "\n" not in str(caught.value)
    assert reason in str(caught.value)


def test_a_folder_of_pictures_is_read_class_by_class_in_the_order_of_bytes(pictures):
    found = own(pictures)
    assert found.classes == ["Bee", "ant", "cow"]
    assert found.train.images.shape == (24, 3, 6, 9)
    assert found.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with Image.open(pictures / "train" / "ant" / "3.png") as picture:
        expected = np.asarray(picture).transpose(2, 0, 1)
    assert np.array_equal(found.train.images[8 + 3].numpy(), expected)
    assert found.val is None
    assert found.augment == FileAugment(flip=True)


def test_kept_in_memory_or_in_files_evaluation_and_training_see_the_same(pictures):
    kept = prepared_own(pictures, augment={"pad": 2, "flip": True})
    listed = prepared_own(pictures, augment={"pad": 2, "flip": True}, memory_mb=0)
    assert isinstance(kept.train, InMemoryImages)
    assert isinstance(listed.train, ImageFileList)
    assert kept.info.shape == listed.info.shape == [3, 6, 9]
    assert kept.info.counts == listed.info.counts
    pairs = [
        [list(sequential_batches(d.test, d.info, device=CPU, size=5)) for d in (kept, listed)],
        [batches_of(d, epoch=3, size=7) for d in (kept, listed)],
        [dealt(d, 3, 7) for d in (kept, listed)],
    ]
    for one, other in pairs:
        assert same(one, other)
    assert torch.equal(
        first_images(kept.train, kept.info, 5), first_images(listed.train, listed.info, 5)
    )
    assert torch.equal(
        evenly_spaced_images(kept.train, kept.info, 3),
        evenly_spaced_images(listed.train, listed.info, 3),
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("area", [1.0, 0.2])
def test_the_number_of_workers_changes_nothing(area, pictures, monkeypatch):
    prepared = prepared_own(
        pictures, size=5, memory_mb=0, augment={"pad": 1, "flip": True, "area": area}
    )
    found = {}
    for workers in ("0", "1", "3"):
        monkeypatch.setenv("SECATEUR_WORKERS", workers)
        batches = Batches(prepared.train, prepared.info, 7, seed=1)
        found[workers] = [batch for epoch in range(2) for batch in batches.epoch(epoch)]
        alive = len(multiprocessing.active_children())
        assert alive == int(workers), "workers stay alive between epochs"
        batches.close()
        assert not multiprocessing.active_children()
        found[workers] += list(sequential_batches(prepared.test, prepared.info, device=CPU, size=5))
    assert same(found["0"], found["1"])
    assert same(found["0"], found["3"])
    assert len(found["0"]) == 2 * 4 + 3


def test_an_epoch_that_is_left_half_way_does_not_spoil_the_next(pictures, monkeypatch):
    prepared = prepared_own(pictures, memory_mb=0)
    whole = batches_of(prepared, epoch=1, size=3)
    monkeypatch.setenv("SECATEUR_WORKERS", "2")
    batches = Batches(prepared.train, prepared.info, 3, seed=1)
    next(iter(batches.epoch(0)))
    assert same(list(batches.epoch(1)), whole)
    batches.close()
    with pytest.raises(RuntimeError, match="the loader of images is closed"):
        next(iter(batches.epoch(1)))


def test_a_list_of_files_comes_back_as_it_was_and_as_the_same_bytes(pictures, tmp_path):
    made = dataset.prepare("image_folder", own(pictures, memory_mb=0), 0.25, 0)
    dataset.save(tmp_path / "one", made)
    dataset.save(
        tmp_path / "other", dataset.prepare("image_folder", own(pictures, memory_mb=0), 0.25, 0)
    )
    found = dataset.load(tmp_path / "one")
    assert found.info == made.info
    assert found.info.counts == {"train": 18, "val": 6, "test": 12}
    for part in ("train", "val", "test"):
        was, now = getattr(made, part), getattr(found, part)
        assert [now.path(i) for i in range(len(now))] == [was.path(i) for i in range(len(was))]
        assert (now.view, now.labels.tolist()) == (was.view, was.labels.tolist())
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes(), "no path of this machine"
    cut(tmp_path / "one" / dataset.FILE)
    with pytest.raises(DataError, match="not a prepared data set"):
        dataset.load(tmp_path / "one")
    pictures.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no such folder; set SECATEUR_DATA"):
        dataset.load(tmp_path / "other")


@pytest.mark.parametrize("memory", [0, 1024])
def test_order_on_disk_and_threads_do_not_change_the_artifact_but_contents_do(
    memory, pictures, monkeypatch, tmp_path
):
    def hashed():
        return prepared_own(pictures, memory_mb=memory).info.hash

    first, scandir = hashed(), os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Reversed)
        patch.setenv("SECATEUR_WORKERS", "3")
        assert hashed() == first
    path = pictures / "train" / "cow" / "5.png"
    draw_picture(path, 4242)
    assert hashed() != first
    draw_picture(path, 205)
    assert hashed() == first
    path.unlink()
    assert hashed() != first


def test_an_image_that_has_changed_since_is_named(pictures):
    prepared = prepared_own(pictures, memory_mb=0)
    path = pictures / "train" / "cow" / "5.png"
    draw_picture(path, 1, size=(20, 20))
    for workers in ("0", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SECATEUR_WORKERS", workers)
            with pytest.raises(DataError) as caught:
                batches_of(prepared)
        assert str(caught.value) == f"{path}: changed since `prepare`; run `dvc repro -f prepare`"
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: missing"):
        batches_of(prepared)


def own_val(pictures):
    for number, name in enumerate(["ant", "Bee", "cow"]):
        draw_picture(pictures / "val" / name / "1.png", 900 + number)


@pytest.mark.parametrize("memory", [0, 1024])
def test_a_val_of_their_own_is_used_and_nothing_else_is_held_out(memory, pictures):
    own_val(pictures)
    found = dataset.prepare("image_folder", own(pictures, memory_mb=memory), 0.5, 0)
    assert found.info.counts == {"train": 24, "val": 3, "test": 12}
    assert found.val.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("memory", [0, 1024])
@pytest.mark.parametrize(
    "content", [b"", b"no picture", None], ids=["empty", "text", "cut in half"]
)
def test_a_damaged_picture_is_named(content, memory, pictures):
    path = pictures / "test" / "ant" / "9.png"
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    refuses(pictures, f"{path}: not a readable image", memory_mb=memory)


def test_a_picture_of_more_than_eight_bits_is_refused(pictures):
    path = pictures / "train" / "ant" / "0.png"
    Image.fromarray(np.full((6, 9), 40_000, dtype=np.uint16)).save(path)
    refuses(pictures, f"{path}: not a readable image: more than 8 bits")


def test_an_empty_class_folder_is_refused(pictures):
    (pictures / "train" / "dog").mkdir()
    refuses(pictures, f"{pictures / 'train' / 'dog'}: no images in it")


def test_a_class_that_test_lacks_or_alone_has_is_refused(pictures):
    (pictures / "test" / "ant").rename(pictures / "away")
    refuses(pictures, f"{pictures / 'test' / 'ant'}: no such folder; every class needs images")
    (pictures / "away").rename(pictures / "test" / "ape")
    refuses(pictures, f"{pictures / 'test' / 'ape'}: train/ has no such class")


def test_a_val_that_lacks_a_class_is_refused(pictures):
    draw_picture(pictures / "val" / "ant" / "1.png", 1)
    refuses(pictures, f"{pictures / 'val' / 'Bee'}: no such folder; every class needs images")


def test_missing_folders_are_named(pictures):
    (pictures / "test").rename(pictures / "tests")
    refuses(pictures, f"{pictures / 'test'}: no such folder")
    refuses(pictures, f"{pictures.parent / 'photos'}: no such folder", folder="photos")


def test_a_folder_without_pictures_is_refused(pictures):
    (pictures.parent / "bare" / "train").mkdir(parents=True)
    refuses(pictures, "no class folders; images go to train/<class>/", folder="bare")
    draw_picture(pictures.parent / "bare" / "train" / "1.png", 1)
    refuses(pictures, "1.png: an image outside of the class folders", folder="bare")


def test_hidden_files_and_notes_are_passed_over_and_other_files_refused(pictures):
    before = prepared_own(pictures).info
    for name in (".DS_Store", "notes.txt", "Thumbs.db", ".hidden.png"):
        (pictures / "train" / "ant" / name).write_text("not a picture")
    (pictures / "train" / "README.md").write_text("about them")
    draw_picture(pictures / "train" / ".ipynb_checkpoints" / "1.png", 1)
    assert prepared_own(pictures).info == before
    path = pictures / "train" / "ant" / "film.mp4"
    path.write_text("not a picture")
    refuses(pictures, f"{path}: neither an image")


def test_folders_within_a_class_belong_to_it(pictures):
    before = own(pictures).train
    path = pictures / "train" / "cow" / "7.png"
    (pictures / "train" / "cow" / "a" / "b").mkdir(parents=True)
    path.rename(pictures / "train" / "cow" / "a" / "b" / "1.PNG")
    now = own(pictures).train
    assert torch.equal(now.labels, before.labels)
    assert torch.equal(now.images[-1], before.images[-1])


def test_names_that_are_no_utf8_are_read_all_the_same(pictures, tmp_path):
    path = pictures / "train" / "cow" / "7.png"
    try:
        path.rename(path.with_name(os.fsdecode(b"\xff.png")))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    made = prepared_own(pictures, memory_mb=0)
    dataset.save(tmp_path / "out", made)
    found = dataset.load(tmp_path / "out")
    assert found.train.names[23] == b"train/cow/\xff.png"
    assert same(batches_of(found), batches_of(made))


def test_grey_pictures_become_coloured_beside_coloured_ones(pictures):
    grey = draw_picture(pictures / "train" / "Bee" / "0.png", 1, mode="L")
    draw_picture(pictures / "train" / "Bee" / "1.png", 2, mode="RGBA")
    found = own(pictures)
    assert found.train.images.shape[1] == 3
    assert np.array_equal(found.train.images[0].numpy(), np.repeat(grey.transpose(2, 0, 1), 3, 0))


def test_if_all_are_grey_there_is_one_channel_unless_more_are_asked_for(pictures):
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        draw_picture(path, number, mode="LA" if number % 2 else "L")
    found = own(pictures)
    assert found.train.images.shape == (24, 1, 6, 9)
    assert found.mean == pytest.approx((0.449,))
    assert own(pictures, channels=3).train.images.shape == (24, 3, 6, 9)
    listed = prepared_own(pictures, memory_mb=0)
    assert same(batches_of(listed), batches_of(prepared_own(pictures)))


def test_a_single_channel_can_be_asked_for(pictures):
    found = own(pictures, channels=1)
    with Image.open(pictures / "train" / "Bee" / "0.png") as picture:
        assert np.array_equal(found.train.images[0, 0].numpy(), np.asarray(picture.convert("L")))


def test_different_sizes_need_one_to_be_set(pictures):
    path = pictures / "train" / "cow" / "0.png"
    draw_picture(path, 1, size=(30, 20))
    refuses(pictures, f"{path}: 30x20 pixels, where 0.png has 9x6; set datasets.image_folder.size")
    assert own(pictures, size=6).train.images.shape == (24, 3, 6, 6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (50, 31), (31, 50), (8, 8), (7, 97)])
def test_resizing_and_cutting_is_torchvisions(shape, tmp_path):
    import_torchvision()
    from torchvision import transforms

    path = tmp_path / "one.png"
    draw_picture(path, 3, size=shape)
    with Image.open(path) as picture:
        for size, resize in ((6, 6), (5, 8), (20, 23)):
            theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
            ours = image_files._resize_and_crop(
                picture, image_files.ImageView(3, size, size, resize)
            )
            assert np.array_equal(np.asarray(ours), np.asarray(theirs(picture)))


def test_random_crops_have_the_areas_and_ratios_that_are_asked_for():
    boxes = np.array([augment.random_resized_crop((500, 375), 0.08, 0, 0, i) for i in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 500
    assert boxes[:, 3].max() <= 375
    share, ratio = width * height / (500 * 375), width / height
    assert 0.075 < share.min() < 0.1
    assert share.max() > 0.95
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    import_torchvision()
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = Image.new("RGB", (500, 375))
    theirs = [RandomResizedCrop.get_params(blank, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    top, left, tall, wide = np.array(theirs).T
    for ours, other in ((boxes[:, 0], left), (boxes[:, 1], top), (width, wide), (height, tall)):
        error = math.hypot(ours.std(), other.std()) / math.sqrt(4000)
        assert abs(ours.mean() - other.mean()) < 4 * error
    assert (
        len(
            {augment.random_resized_crop((500, 375), 0.08, s, e, 0) for s in (0, 1) for e in (0, 1)}
        )
        == 4
    )
    assert augment.random_resized_crop((1000, 10), 0.9, 0, 0, 0) == (494, 0, 507, 10)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Two classes of a few photographs of different sizes and colours."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "raw"))
    monkeypatch.setenv("SECATEUR_WORKERS", "0")
    folder = tmp_path / "raw" / "imagenet"
    for number in range(12):
        part, name = ("train", "val")[number % 3 == 0], f"n0{number % 2}"
        path = folder / part / name / f"{name}_{number}.JPEG"
        draw_picture(
            path, number, size=(40 + number, 60 - number), mode="L" if number == 4 else "RGB"
        )
    return folder


def test_imagenet_is_listed_unopened_and_cropped_anew_in_every_epoch(imagenet):
    found = read("imagenet", imagenet.parent, size=32, resize=36)
    assert found.classes == ["n00", "n01"]
    prepared = dataset.prepare("imagenet", found, 0, 0)
    assert prepared.info.shape == [3, 32, 32]
    assert prepared.info.counts == {"train": 8, "val": 0, "test": 4}
    epochs = [batches_of(prepared, epoch, size=8) for epoch in (0, 0, 1)]
    assert same(epochs[0], epochs[1])
    assert not same(epochs[0], epochs[2])
    assert epochs[0][0][0].is_contiguous(memory_format=torch.channels_last)
    import_torchvision()
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    usual = transforms.Compose([
        transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    theirs = ImageFolder(str(imagenet / "val"), usual)
    ((images, labels),) = sequential_batches(prepared.test, prepared.info, device=CPU)
    torch.testing.assert_close(images, torch.stack([image for image, _ in theirs]))
    assert labels.tolist() == theirs.targets


def test_a_checkpoint_says_how_evaluation_resizes_pictures(imagenet, tmp_path):
    """One of the pictures has the size of the network's input; evaluation enlarges it too."""
    draw_picture(imagenet / "val/n00/small.JPEG", 5, size=(32, 32))
    found = read("imagenet", imagenet.parent, size=32, resize=36)
    prepared = dataset.prepare("imagenet", found, 0, 0)
    settings = {"filters": [2, 2], "hidden": 3}
    params = SimpleNamespace(arch="lenet5", archs={"lenet5": settings})
    header = StageContext(SimpleNamespace(name="baseline", params=params), prepared, {}).header()
    model = checkpoint.build_architecture(header)
    checkpoint.save(tmp_path / "model.safetensors", header, model, {})
    classifier = open_classifier(tmp_path)
    paths = [prepared.test.path(index) for index in range(5)]
    pixels = np.stack([image_files.decode_file(path, classifier.view) for path in paths])
    seen = classifier.preprocess(dataset.channels_first(torch.from_numpy(pixels)))
    ((images, _),) = sequential_batches(prepared.test, prepared.info, device=CPU)
    assert torch.equal(seen, images)


def test_a_random_crop_is_torchvisions_crop_of_the_same_box(imagenet):
    import_torchvision()
    from torchvision.transforms import functional

    found = read("imagenet", imagenet.parent, size=32, resize=36, augment={"area": 0.08})
    prepared = dataset.prepare("imagenet", found, 0, 0)
    ((images, _),) = batches_of(prepared, epoch=2, size=8, seed=5)
    order = augment.plan_epoch(8, 5, 2, prepared.info.augment).image.tolist()
    for image, index in zip(images, order, strict=True):
        with Image.open(found.train.path(index)) as file:
            picture = file.convert("RGB")
        left, top, right, bottom = augment.random_resized_crop(picture.size, 0.08, 5, 2, index)
        theirs = functional.resized_crop(picture, top, left, bottom - top, right - left, [32, 32])
        pixels = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)[None]
        normalise = Normalise(prepared.info.mean, prepared.info.std, CPU)
        assert torch.equal(image, normalise(pixels)[0])


def test_workers_are_the_machines_affair(monkeypatch):
    monkeypatch.setenv("SECATEUR_WORKERS", "3")
    assert machine.workers() == machine.workers(2) == 3
    monkeypatch.setenv("SECATEUR_WORKERS", "many")
    with pytest.raises(SettingsError, match="SECATEUR_WORKERS = 'many'"):
        machine.workers()
    monkeypatch.delenv("SECATEUR_WORKERS")
    assert 1 <= machine.workers(2) <= machine.workers() <= 16


@pytest.mark.parametrize("name", ["/etc", "../other", "a/../..", ""])
def test_the_folder_lies_below_the_raw_one(name):
    with pytest.raises(ValueError, match="SECATEUR_DATA"):
        plugin.load("datasets", "image_folder").Settings(folder=name)


@pytest.mark.skipif(
    not (REAL / "cifar10-jpeg" / "train").is_dir(), reason=f"no cifar10-jpeg under {REAL}"
)
def test_sixty_thousand_jpegs_are_read_within_the_memory_promised():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = dataset.prepare(
        "image_folder", read("image_folder", REAL, folder="cifar10-jpeg"), 0.1, 0
    )
    assert found.info.counts == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert found.info.shape == [3, 32, 32]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB
