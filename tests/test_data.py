"""Data: what is read, how it is divided, hashed, kept, and handed out in batches."""

import os
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from secateur.core import data, plugin, raw
from secateur.core.data import Batches, Images, Normalise, Split
from secateur.core.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
LENT = ROOT / os.environ.get("SECATEUR_DATA", "data/raw")
CLASSES = ["a", "b", "c"]
IDX = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def read(name, root, **chosen):
    module = plugin.load("datasets", name)
    return module.read(module.Settings(**chosen), root)


def numbered(labels, first=0):
    """Images that carry their own number in two pixels, so that each can be told apart."""
    numbers = torch.arange(first, first + len(labels))
    pixels = torch.stack([numbers // 256, numbers % 256], dim=1).to(torch.uint8)
    return Split(pixels.view(-1, 1, 1, 2), torch.tensor(labels))


def numbers(split):
    return [256 * int(image[0, 0, 0]) + int(image[0, 0, 1]) for image in split.images]


def images(train, test=(0, 1, 2)):
    return Images(numbered(list(train)), numbered(list(test), 10_000), (0.0,), (1.0,))


@given(
    counts=st.tuples(*[st.integers(12, 60)] * 3),
    validation=st.floats(0.1, 0.5),
    seed=st.integers(0, 2**31 - 1),
)
@examples(max_examples=25, deadline=None, derandomize=True)
def test_the_split_is_complete_disjoint_and_fair_to_every_class(counts, validation, seed):
    labels = np.repeat([0, 1, 2], counts)
    np.random.default_rng(0).shuffle(labels)
    found = data.prepare("toy", CLASSES, images(labels), validation, seed)
    train, val = numbers(found.train), numbers(found.val)
    assert sorted(train + val) == list(range(len(labels)))
    assert numbers(found.test) == [10_000, 10_001, 10_002]
    assert found.about.counts == {"train": len(train), "val": len(val), "test": 3}
    assert abs(len(val) - validation * len(labels)) <= 1
    for part in (found.train, found.val):  # every image kept its label
        assert part.labels.tolist() == [labels[number] for number in numbers(part)]
    held_out = Counter(found.val.labels.tolist())
    for index, count in enumerate(counts):
        assert abs(held_out[index] - len(val) * count / len(labels)) < 1


def test_the_same_seed_gives_the_same_split_and_another_one_another():
    source = images([0, 1, 2] * 30)
    first, again, other = (data.prepare("toy", CLASSES, source, 0.2, s) for s in (3, 3, 4))
    assert numbers(first.val) == numbers(again.val) != numbers(other.val)
    assert first.about == again.about


def test_without_validation_everything_is_trained_on():
    found = data.prepare("toy", CLASSES, images([0, 1, 2] * 5), 0, 0)
    assert numbers(found.train) == list(range(15))
    assert len(found.val) == 0


def test_the_hash_changes_with_every_pixel_label_and_division_and_with_nothing_else():
    def hashed(train=None, test=None, validation=0.25, seed=0):
        source = images([0, 1, 2] * 8)
        source = replace(source, train=train or source.train, test=test or source.test)
        return data.prepare("toy", CLASSES, source, validation, seed).about.hash

    def altered(split, pixel=False, labels=None):
        pixels = split.images.clone()
        pixels[5 % len(split), 0, 0, 0] += int(pixel)
        return Split(pixels, split.labels if labels is None else torch.tensor(labels))

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
        data.prepare("toy", CLASSES, images(**{"train": [0, 1, 2], part: labels}), 0, 0)


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
        data.prepare("toy", CLASSES, images(labels), validation, 0)


@pytest.mark.parametrize("validation", [0, 0.25])
def test_a_prepared_data_set_comes_back_as_it_was_and_as_the_same_bytes(validation, tmp_path):
    made = data.prepare("toy", CLASSES, images([0, 1, 2] * 8), validation, 0)
    data.save(tmp_path / "one", made)
    data.save(tmp_path / "other", made)
    found = data.load(tmp_path / "one")
    assert found.about == made.about
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
    data.save(tmp_path, data.prepare("toy", CLASSES, images([0, 1, 2]), 0, 0))
    spoil(tmp_path / data.FILE)
    with pytest.raises(DataError, match=f"{tmp_path / data.FILE}: {reason}"):
        data.load(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_an_epoch_hands_out_every_image_once_with_its_label(batch_size):
    prepared = data.prepare("toy", CLASSES, images([0, 1, 2] * 8), 0, 0)
    batches = Batches(prepared.train, prepared.about, batch_size, seed=1)
    parts = list(batches.epoch(0))
    assert len(parts) == len(batches) == -(-24 // batch_size)
    assert [len(labels) for _, labels in parts[:-1]] == [batch_size] * (len(parts) - 1)
    seen = [round(255 * float(image[0, 0, 1])) for batch, _ in parts for image in batch]
    assert sorted(seen) == list(range(24))
    assert [int(label) for _, labels in parts for label in labels] == [n % 3 for n in seen]


def test_the_order_depends_on_seed_and_epoch_alone():
    prepared = data.prepare("toy", CLASSES, images([0, 1, 2] * 8), 0, 0)

    def order(seed, epoch):
        batches = Batches(prepared.train, prepared.about, 5, seed)
        return torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist()

    first = order(1, 0)
    torch.manual_seed(99)  # the past and other generators have no say
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


@pytest.mark.parametrize("name", IDX)
def test_without_files_and_network_it_says_where_it_looked(name, tmp_path, offline, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        read(name, raw.folder())
    line = str(caught.value)
    assert "\n" not in line
    assert str(tmp_path / IDX[name]) in line
    assert "SECATEUR_DATA" in line


def test_raw_data_is_looked_for_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    assert raw.folder() == tmp_path / "data" / "raw"
    monkeypatch.setenv("SECATEUR_DATA", "elsewhere")
    assert raw.folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("SECATEUR_DATA", "/elsewhere")
    assert raw.folder() == Path("/elsewhere")


@pytest.fixture
def lent(tmp_path):
    """The files lent for tests, seen from a folder of our own, so that none is added there."""
    for path in LENT.iterdir() if LENT.is_dir() else []:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("name", plugin.names("datasets"))
def test_a_data_set_is_what_the_pipeline_expects(name, lent, offline):
    module = plugin.load("datasets", name)
    try:
        found = module.read(module.Settings(), lent)
    except DataError as error:
        pytest.skip(str(error))
    assert len(set(module.CLASSES)) == len(module.CLASSES)
    for part in (found.train, found.test):
        assert part.images.dtype == torch.uint8
        assert part.images.shape[1:] == found.train.images.shape[1:]
        assert part.labels.dtype == torch.int64
        assert len(part.images) == len(part.labels)
        assert part.labels.unique().tolist() == list(range(len(module.CLASSES)))
    assert len(found.mean) == len(found.std) == found.train.images.shape[1]


@pytest.mark.skipif(not (LENT / "MNIST").is_dir(), reason=f"no MNIST under {LENT}")
def test_mnist_is_mnist(lent, offline):
    found = read("mnist", lent)
    assert found.train.images.shape == (60_000, 1, 28, 28)
    assert found.test.images.shape == (10_000, 1, 28, 28)
    assert found.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert found.test.labels[:3].tolist() == [7, 2, 1]
    pixels = found.train.images.numpy() / np.float32(255)
    assert pixels.mean() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std() == pytest.approx(0.3081, abs=1e-4)
