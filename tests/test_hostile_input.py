"""Whatever a file contains, its reader returns the object or raises one of our errors.

All of this happens within limits of time and memory. Every reader is tested in the same way: each
of its valid files is replaced by every kind of object, and files are damaged at random, as often as
SECATEUR_HOSTILE_EXAMPLES says (40 by default; if the variable is set, the outcomes are counted and
printed).
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from secateur.base import plugin, settings
from secateur.base.errors import SecateurError
from secateur.base.torchvision_import import import_torchvision
from secateur.data import dataset
from secateur.data.batches import sequential_batches
from secateur.data.dataset import Images, InMemoryImages
from secateur.gconv import config
from secateur.nn import checkpoint, matching, weights
from secateur.nn.checkpoint import Header
from secateur.pipeline import params_file, recipe, record, tracking
from secateur.pipeline.record import RunRecord
from secateur.training.resume import ResumeStore
from secateur.training.state import TrainingState

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = int(os.environ.get("SECATEUR_HOSTILE_EXAMPLES", "40"))
COUNTS: dict[str, Counter] = {}


# -- the readers, with valid files and a use of the objects that they return -----------------------


@dataclass(frozen=True)
class Reader:
    """A reader, how to make its files, and how to use the object that it returns."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    use: Callable[[Any], object]
    damage: Callable[[st.DataObject, Path], None]
    """Damage one file of a valid folder."""


def bytes_of(draw, path):
    path.write_bytes(draw(hostile.damaged_bytes(path.read_bytes())))


def one_of(pattern, *ways):
    """Damage a file that matches `pattern`, in one of several ways."""

    def damage(data, folder):
        path = data.draw(st.sampled_from(sorted(p for p in folder.rglob(pattern) if p.is_file())))
        data.draw(st.sampled_from([bytes_of, *ways]))(data.draw, path)

    return damage


def json_of(draw, path):
    text = draw(hostile.documents(json.loads(path.read_text())))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@functools.cache
def tree_of(text):
    """The content of a valid YAML file."""
    return json.loads(json.dumps(yaml.safe_load(text)))


def yaml_of(draw, path):
    tree = tree_of(path.read_text())
    path.write_text(draw(hostile.documents(tree, hostile.YAML_VALUES)))


def tensors_of(draw, path):
    path.write_bytes(draw(hostile.damaged_tensors(path.read_bytes())))


def entries_of(draw, path):
    path.write_bytes(draw(hostile.damaged_tensors(path.read_bytes(), ours=False)))


def make_settings(folder):
    shutil.copy(ROOT / "params.yaml", folder)


def use_settings(params):
    for kind in plugin.KEYS:
        assert params.chosen(kind)


HEADER = Header(
    arch="lenet5",
    arch_settings={"filters": [4, 6], "hidden": 5},
    classes=["a", "b", "c"],
    shape=[1, 12, 12],
    mean=[0.5],
    std=[0.25],
    split="5" * 64,
    stage="finetune",
    parent="7" * 64,
    notes={"asked": "x", "reached": {"compression": 1e-05}},
)


def make_checkpoint(folder):
    """A network with masks, a choice, groups and index layers."""
    torch.manual_seed(0)
    model = checkpoint.build_architecture(HEADER)
    from secateur.nn.layers import IndexedConv2d

    name, conv = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)][1]
    made = IndexedConv2d.from_conv(
        conv, conv.weight.detach()[:, :2].contiguous(), conv.bias.detach(), 2,
        torch.tensor([3, 2, 1, 0]), torch.arange(6).flip(0),
    )  # fmt: skip
    model.set_submodule(name, made)
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    masks = {n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in weights.items()}
    choices = {n: torch.zeros(len(p), *[1] * (p.dim() - 1)) > 0 for n, p in weights.items()}
    checkpoint.save(folder / "model.safetensors", HEADER, model, masks, choices)


def use_checkpoint(found):
    assert all(part.isfinite().all() or True for part in found.tensors.values())
    with contextlib.suppress(SecateurError):
        model = found.model()
        assert model(torch.zeros(1, *found.header.shape)).shape == (1, len(found.header.classes))
        assert all(p.is_floating_point() for p in model.parameters())
    assert found.header.classes and all(isinstance(c, str) for c in found.header.classes)
    assert all(math.isfinite(m) for m in found.header.mean)
    assert all(math.isfinite(s) and s > 0 for s in found.header.std)
    json.dumps(asdict(found.header))


def make_prepared(folder):
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 5, 4), generator=chance, dtype=torch.uint8)
    part = InMemoryImages(images, torch.arange(12) % 3)
    made = Images(part, part, ["a", "b", "c"], (0.5,), (0.25,))
    dataset.save(folder, dataset.prepare("toy", made, 0.25, 0))


def make_listed(folder):
    make_pictures(folder)
    module = plugin.load("datasets", "image_folder")
    images = module.read(module.Settings(memory_mb=0), folder)
    dataset.save(folder / "prepared", dataset.prepare("toy", images, 0, 0))


def read_listed(folder):
    os.environ["SECATEUR_DATA"] = str(folder)
    return dataset.load(folder / "prepared")


def use_dataset(found):
    """Normalise every image once; some damage is found only when images are read."""
    os.environ["SECATEUR_WORKERS"] = "0"
    info = found.info
    for part in (found.train, found.val, found.test):
        assert part.shape == info.shape
        with contextlib.suppress(SecateurError):
            for batch, labels in sequential_batches(part, info, device=torch.device("cpu")):
                assert batch.isfinite().all()
                assert len(batch) == len(labels)
                assert all(0 <= label < len(info.classes) for label in labels.tolist())
    assert info.counts == {n: len(getattr(found, n)) for n in ("train", "val", "test")}


RECORD = RunRecord(
    stage="sparse-train",
    fingerprint="f" * 32,
    params={"decay": 0.1, "sparse_train": {"epochs": 3}},
    metrics={"val_accuracy": 0.5, "kept_epoch": 2.0},
    model="models/sparse/model.safetensors",
    sha256="5" * 64,
    dataset={"name": "digits", "hash": "6" * 64, "train": 10, "val": 2, "test": 3},
    seconds=1.5,
    hardware="CPU",
    run_id="abc",
    model_id=None,
    tracking_uri="sqlite:///mlflow.db",
    upstream={"baseline": "7" * 64},
)


def use_record(found):
    """Use it like the tables, MLflow and `secateur sync`."""
    params_file.flat(found.params)
    assert isinstance(found.identity, str)
    assert f"{found.dataset['name']} {found.dataset['hash']}"
    assert record.MODELS[found.stage].kind
    assert all(isinstance(value, float | int) for value in found.metrics.values())
    assert found.seconds + 1.0 > 0
    assert tracking.pipeline_key({found.stage: found})
    json.dumps(asdict(found))


def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return TrainingState(model, optimizer, {})


def make_state(folder):
    state = trained()
    state.record({"epoch": 1, "lr": 0.1, "val_accuracy": 0.5, "val_loss": 1.0}, keep_best=True)
    store = ResumeStore(folder, [])
    store.save(*state.state_dict())
    store.flush()
    store.note("seconds", 1.5)
    store.note("run_id", "abc")


def read_state(folder):
    store = ResumeStore(folder, [])
    notes = store.note("run_id"), store.note("seconds")
    return store.load(), notes


def use_state(found):
    saved, (run_id, seconds) = found
    assert run_id is None or isinstance(run_id, str)
    assert seconds is None or isinstance(seconds, float | int)
    if saved is None or run_id is None or seconds is None:
        return "discarded with a warning"
    state = trained()
    before = {name: tensor.clone() for name, tensor in state.state_dict()[0].items()}
    try:
        state.load_state_dict(*saved)
    except SecateurError:  # in that case nothing has been loaded
        after, _ = state.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        return "discarded with a warning"
    assert 0 <= state.best_epoch <= len(state.history)
    assert [row["epoch"] for row in state.history] == [*range(1, len(state.history) + 1)]
    return None


RECIPES = {
    "below": {"about": "b", "base": True, "settings": {"decay": 1, "penalties": {"l1": {}}}},
    "above": {"about": "a", "extends": "below", "settings": {"arch": "lenet5"}},
    "several": {
        "about": "net {net} by {way}",
        "name": "n-{net}-{way}",
        "extends": "below",
        "settings": {"prune": {"recalibrate": 1}},
        "table": {
            "net": {"a": {"decay": 2}, "b": {"decay": 3}},
            "way": {"c": {"pruner": "std"}, "d": {"pruners": {"std": {"sensitivity": 0.5}}}},
        },
    },
}


def make_recipes(folder):
    (folder / "recipes").mkdir()
    for name, content in RECIPES.items():
        (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(ROOT / "params.yaml", folder)


def read_recipes(folder):
    os.chdir(folder)
    return [(name, load_or_error(name)) for name in recipe.read_recipes().names]


def load_or_error(name):
    with contextlib.suppress(SecateurError):
        return recipe.load(name)


def use_recipes(found):
    for name, made in found:
        assert isinstance(name, str)
        if made is not None:
            assert isinstance(made.about, str)
            with contextlib.suppress(SecateurError):
                assert all(isinstance(part, str) for part in made.overrides)


@pytest.fixture(scope="session")
def small_network():
    return group_network()


def group_network():
    torch.manual_seed(0)
    module = plugin.load("archs", "preresnet")
    return module.build(module.Settings(depth=20), 3, (3, 8, 8)).eval()


NETWORK = group_network()


def make_groups(folder):
    names = list(config.convolutions(NETWORK))[2:5]
    (folder / "groups.json").write_text(config.to_json(NETWORK, dict.fromkeys(names, 2)))


def use_groups(found):
    known = config.convolutions(NETWORK)
    for name, groups in found.items():
        assert type(groups) is int and groups >= 1
        assert known[name].out_channels % groups == known[name].in_channels % groups == 0


def make_idx(folder):
    chance = np.random.default_rng(0)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = chance.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw, part, pixels, [i % 10 for i in range(count)])


def write_idx(raw, part, pixels, labels):
    head = np.array([0x803, *pixels.shape], dtype=">i4").tobytes()
    (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    head = np.array([0x801, len(labels)], dtype=">i4").tobytes()
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))


def raw_reader(name, **chosen):
    """Read like the stage `prepare`: split and write the data set, or write nothing."""

    def read(folder):
        module = plugin.load("datasets", name)
        out = folder.parent / f"out-{folder.name}"
        try:
            images = module.read(module.Settings(**chosen), folder)
            dataset.save(out, dataset.prepare(name, images, 0, 0))
            return dataset.load(out)
        except SecateurError:
            assert not out.exists()
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return read


def make_cifar(folder):
    kind = import_torchvision().datasets.CIFAR10
    inner = folder / kind.base_folder
    inner.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for file in CIFAR_FILES:
        content = {"data": rows, "labels": list(range(10))}
        if file == "batches.meta":
            content = {"label_names": [f"class {i}" for i in range(10)]}
        (inner / file).write_bytes(pickle.dumps(content, protocol=2))


CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]


@pytest.fixture(scope="session", autouse=True)
def cifar_of_ours(tmp_path_factory):
    """Replace the published checksums by those of a few random images."""
    folder = tmp_path_factory.mktemp("cifar")
    make_cifar(folder)
    kind = import_torchvision().datasets.CIFAR10
    own = {
        file: hashlib.md5((folder / kind.base_folder / file).read_bytes()).hexdigest()
        for file in CIFAR_FILES
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "train_list", [[f, own[f]] for f in CIFAR_FILES[:5]])
        patch.setattr(kind, "test_list", [["test_batch", own["test_batch"]]])
        patch.setattr(kind, "meta", kind.meta | {"md5": own["batches.meta"]})
        yield


def make_pictures(folder):
    chance = np.random.default_rng(0)
    for part, suffixes in (("train", ("png", "jpg", "bmp")), ("test", ("gif", "ppm"))):
        for name in ("ant", "bee"):
            (folder / "images" / part / name).mkdir(parents=True)
            for suffix in suffixes:
                pixels = chance.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"x.{suffix}")


class Foreign(torch.nn.Module):
    """A network whose weights come from a file of another program."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 3)


def foreign_state(prefix=""):
    state = Foreign().state_dict()
    return {f"{prefix}{name.replace('norm', 'bn')}": tensor for name, tensor in state.items()}


def make_saved(folder):
    """Each kind of file that torch.save writes: a dictionary, the format before 1.6, a network."""
    state = foreign_state("module.")
    state["module.conv.mask"] = torch.ones(4, 1)  # written by gconv-prune
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    file = {"epoch": 3, "state_dict": state, "best_acc": 0.9, "optimizer": optimizer}
    torch.save(file, folder / "best.pth.tar")
    torch.save(foreign_state(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"net": torch.nn.DataParallel(Foreign()), "acc": 95.0}, folder / "whole.pth")


def make_safetensors(folder):
    """A single file, and a folder in the layout of Hugging Face's hub with two parts."""
    state = foreign_state()
    safetensors.torch.save_file(state, folder / "a.safetensors", {"format": "pt"})
    (folder / "hub").mkdir()
    parts = {"1.safetensors": list(state)[:3], "2.safetensors": list(state)[3:]}
    for name, names in parts.items():
        safetensors.torch.save_file({n: state[n] for n in names}, folder / "hub" / name)
    table = {n: part for part, names in parts.items() for n in names}
    for name, content in (
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": table}),
        ("config.json", {"pretrained_cfg": {"mean": [0.5], "std": [0.2], "input_size": [1, 8, 8]}}),
        ("preprocessor_config.json", {"image_mean": [0.5], "image_std": [0.2], "size": 8}),
    ):
        (folder / "hub" / name).write_text(json.dumps(content))


def read_weights(folder):
    return [weights.read(path) for path in sorted(folder.iterdir())]


def use_weights(found):
    """Load them like baseline: rename, match, fill in; an error leaves the network unchanged."""
    for one in found:
        assert all(isinstance(name, str) for name in one.tensors)
        assert len(one.mean) == len(one.std) and all(s > 0 for s in one.std)
        model = Foreign()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rename = {"*bn": "*norm"} if any("bn." in name for name in one.tensors) else {}
        try:
            matching.fill(model, one, rename=rename)
        except SecateurError as error:
            assert "\n" not in str(error) and len(str(error)) < 4000, len(str(error))
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        else:
            assert all(t.isfinite().all() for t in model.state_dict().values())


def saved_of(draw, path):
    if path.name == "whole.pth":
        bytes_of(draw, path)
    else:
        path.write_bytes(draw(hostile.saved(path)))


def parts_of(draw, path):
    if path.name == "old.pt":
        bytes_of(draw, path)
    else:
        path.write_bytes(draw(hostile.repacked(path.read_bytes())))


READERS = {
    "settings": Reader(
        make_settings,
        lambda folder: settings.check(folder / "params.yaml"),
        use_settings,
        one_of("params.yaml", yaml_of, yaml_of),
    ),
    "checkpoint": Reader(
        make_checkpoint,
        lambda folder: checkpoint.load(folder / "model.safetensors"),
        use_checkpoint,
        one_of("*.safetensors", tensors_of, tensors_of, tensors_of),
    ),
    "weights of torch.save": Reader(
        make_saved, read_weights, use_weights, one_of("*.p*", saved_of, saved_of, parts_of)
    ),
    "weights in safetensors": Reader(
        make_safetensors, read_weights, use_weights,
        lambda data, folder: data.draw(st.sampled_from([
            one_of("*.json", json_of, json_of), one_of("*.safetensors", entries_of, entries_of),
        ]))(data, folder),
    ),
    "prepared data in memory": Reader(
        make_prepared, dataset.load, use_dataset,
        one_of("*.safetensors", tensors_of, tensors_of, tensors_of),
    ),
    "prepared list of files": Reader(
        make_listed, read_listed, use_dataset,
        one_of("*.safetensors", tensors_of, tensors_of, tensors_of),
    ),
    "record": Reader(
        lambda folder: record.save(folder / "sparse.run.json", RECORD),
        lambda folder: record.load(folder / "sparse.run.json"),
        use_record,
        one_of("*.json", json_of, json_of, json_of),
    ),
    "resume state": Reader(
        make_state, read_state, use_state,
        lambda data, folder: data.draw(st.sampled_from([
            one_of("*.safetensors", tensors_of, tensors_of, tensors_of),
            one_of("notes.json", json_of, json_of),
        ]))(data, folder),
    ),
    "recipe": Reader(
        make_recipes, read_recipes, use_recipes, one_of("recipes/*.yaml", yaml_of, yaml_of, yaml_of)
    ),
    "group file": Reader(
        make_groups,
        lambda folder: config.read(folder / "groups.json", NETWORK),
        use_groups,
        one_of("*.json", json_of, json_of, json_of),
    ),
    "idx": Reader(make_idx, raw_reader("mnist"), use_dataset, one_of("*-ubyte")),
    "CIFAR batches": Reader(make_cifar, raw_reader("cifar10"), use_dataset, one_of("*batch*")),
    "image folder": Reader(
        make_pictures, raw_reader("image_folder"), use_dataset, one_of("images/*/*/*")
    ),
}  # fmt: skip


# -- the property ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No network access, no worker processes, and a current folder that may be changed."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SECATEUR_WORKERS", "0")
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Valid files by reader; tests copy them and never change them."""
    made = {}
    for name, reader in READERS.items():
        made[name] = tmp_path_factory.mktemp("valid") / "files"
        made[name].mkdir()
        reader.make(made[name])
    return made


@contextlib.contextmanager
def copy_of(folder):
    """A copy that every user can access."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="hostile-") as place:
        Path(place).chmod(0o755)
        yield Path(shutil.copytree(folder, Path(place) / "files", symlinks=True))
        os.chdir("/")


def outcome(name, folder):
    """The outcome of a read; fails unless it is an object or one of our errors."""
    reader, before = READERS[name], hostile.snapshot(folder)
    try:
        with hostile.limits():
            kind = reader.use(reader.read(folder)) or "object"
    except SecateurError as error:
        kind, line = type(error).__name__, str(error)
        assert "\n" not in line
        assert len(line) < 700, f"{len(line)} characters: {line[:2000]}"
        line.encode("utf-8", "backslashreplace")
    else:
        line = ""
    assert name == "resume state" or hostile.snapshot(folder) == before, "a reader writes nothing"
    COUNTS.setdefault(name, Counter())[kind] += 1
    return kind, line


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name, valid):
    with copy_of(valid[name]) as folder:
        assert outcome(name, folder) == ("object", "")


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_give_an_object_or_one_of_our_errors(name, valid):
    @hypothesis_settings(
        max_examples=EXAMPLES,
        derandomize="SECATEUR_HOSTILE_EXAMPLES" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def holds(data):
        with copy_of(valid[name]) as folder:
            READERS[name].damage(data, folder)
            outcome(name, folder)

    holds()


@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.parametrize("name", READERS)
def test_whatever_stands_in_the_place_of_a_file_or_folder_is_no_crash_and_no_hang(
    name, kind, valid
):
    paths = [path.relative_to(valid[name]) for path in sorted(valid[name].rglob("*"))]
    with copy_of(valid[name]) as folder:
        outcome(name, folder)  # imports modules while files are still accessible
        for path in paths:
            if kind == "plain file" and not (folder / path).is_dir():
                continue
            hostile.KINDS[kind](folder / path)
            with hostile.ordinary_user() if kind == "unreadable" else contextlib.nullcontext():
                outcome(name, folder)
            restore(folder, valid[name])


def restore(folder, source):
    """Restore the folder to the content of `source`."""
    for path in sorted(folder.rglob("*")):
        if not os.path.lexists(source / path.relative_to(folder)) and os.path.lexists(path):
            hostile.remove(path)
    for original in sorted(source.rglob("*")):
        path = folder / original.relative_to(source)
        if original.is_dir():
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
                path.mkdir()
            path.chmod(original.stat().st_mode)
        elif not same(path, original):
            if os.path.lexists(path):
                hostile.remove(path)
            shutil.copy2(original, path)


def same(path, original):
    """Whether a plain file has the mode and the content of another one."""
    if path.is_symlink() or not path.is_file():
        return False
    here, there = path.stat(), original.stat()
    return (here.st_mode, here.st_size) == (there.st_mode, there.st_size) and (
        path.read_bytes() == original.read_bytes()
    )


def header_with(**fields):
    """Change fields of our header in a checkpoint or in a prepared data set."""

    def change(folder):
        path = next(folder.glob("*.safetensors"))
        header, data = hostile.parts_of(path.read_bytes())
        ours = json.loads(header["__metadata__"]["secateur"])
        target = ours.get("about", ours)
        for key, value in fields.items():
            target[key] = hostile.Raw(value) if isinstance(value, str) else value
        header["__metadata__"]["secateur"] = hostile.written(ours)
        path.write_bytes(hostile.joined(json.dumps(header), data))
        if "about" in ours and not any(isinstance(v, str) for v in fields.values()):
            (folder / "about.json").write_text(json.dumps(target))

    return change


def tensor_of(name, make):
    """Replace the tensor of this name."""

    def change(folder):
        path = next(folder.glob("*.safetensors"))
        header, _ = hostile.parts_of(path.read_bytes())
        tensors = safetensors.torch.load(path.read_bytes())
        tensors[name] = make(tensors[name])
        safetensors.torch.save_file(tensors, path, header["__metadata__"])

    return change


def idx_with(part, count, labels, side=28):
    def change(folder):
        pixels = np.zeros((count, side, side), dtype=np.uint8)
        write_idx(folder / "MNIST" / "raw", part, pixels, [i % 10 for i in range(labels)])

    return change


def of_file(name, change):
    return lambda folder: change(folder / name)


def saved_as(make):
    """Replace the object in a file of torch.save."""
    return lambda folder: torch.save(make(), folder / "best.pth.tar")


def tied(levels):
    """A network of few modules, each of which contains the next one twice."""
    network = torch.nn.Linear(1, 1)
    for _ in range(levels):
        network = torch.nn.Sequential(network, network)
    return network


def in_itself():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    network._modules["1"] = network
    return network


REFUSED = [
    (
        "weights of torch.save",
        saved_as(lambda: hostile.doubled(40, ["model", "net", "state_dict"])),
        "no weights in it",
    ),
    ("weights of torch.save", saved_as(lambda: tied(40)), "too many parts, or contains itself"),
    ("weights of torch.save", saved_as(in_itself), "too many parts, or contains itself"),
    (
        "weights of torch.save",
        saved_as(lambda: {"fc.weight": torch.zeros(1).expand(2**20, 2**20)}),
        "fc.weight: not an ordinary tensor .1,099,511,627,776 elements that share memory",
    ),
    (
        "weights of torch.save",
        lambda folder: hostile.as_sparse(2**40)(folder / "old.pt"),
        "old.pt: 1,099,511,627,776 bytes; at most",
    ),
    ("checkpoint", header_with(classes=[]), "classes = .*at least one"),
    ("checkpoint", header_with(classes='"abc"'), "classes = 'abc'"),
    ("checkpoint", header_with(classes=10), "classes = 10"),
    ("checkpoint", header_with(classes=["a", "b"]), "3 outputs for 2 classes"),
    ("checkpoint", header_with(shape=[1, 10**9, 10**9]), "shape.1 = 1000000000"),
    ("checkpoint", header_with(shape=[1, 2**20, 2**20]), "more than 134,217,728 values"),
    ("checkpoint", header_with(mean="[NaN]"), "mean.0 = nan"),
    ("checkpoint", header_with(std=[0]), "std.0 = 0"),
    ("checkpoint", header_with(resize=10**9), "resize = 1000000000"),
    ("checkpoint", header_with(layers={"conv2": {"groups": 0}}), "layers.conv2.groups = 0"),
    ("checkpoint", header_with(layers={"nothing": {"before": 3}}), "no index of length 3"),
    ("checkpoint", header_with(layers={"nothing.at.all": {"removed": 1}}), "no attribute"),
    ("checkpoint", header_with(layers={"": {"removed": 1}}), "without a target name"),
    ("checkpoint", header_with(layers={"conv2": {"removed": 1}}), "do not fit"),
    ("checkpoint", header_with(notes="[" * 100_000), "nested more than 32 deep"),
    ("checkpoint", header_with(arch_settings={"filters": [4, 6], "hidden": 10**12}), "memory"),
    ("checkpoint", tensor_of("fc1.weight", torch.Tensor.long), "fc1.weight holds torch.int64"),
    ("checkpoint", tensor_of("fc1.weight", torch.Tensor.bool), "bool"),
    (
        "prepared data in memory",
        tensor_of("train.labels", lambda t: torch.full_like(t, 99)),
        "label 99 of 3",
    ),
    ("prepared data in memory", tensor_of("train.labels", lambda t: t - 1), "label -1 of 3"),
    ("prepared data in memory", tensor_of("train.labels", lambda t: t[:-1]), "train: 9 images"),
    ("prepared data in memory", header_with(counts={"train": 9, "val": 3, "test": 1}), "test: 1"),
    ("prepared data in memory", header_with(mean="[NaN]"), "about.mean.0 = nan"),
    ("prepared data in memory", header_with(std=[0]), "std.0 = 0"),
    ("prepared data in memory", of_file("about.json", Path.unlink), "about.json: missing"),
    ("prepared data in memory", of_file("about.json", hostile.as_fifo), "about.json: .*a FIFO"),
    ("idx", idx_with("train", 20, 19), "19 labels, where train-images-idx3-ubyte has 20 images"),
    ("idx", idx_with("train", 10, 60), "60 labels, where train-images-idx3-ubyte has 10 images"),
    ("idx", idx_with("t10k", 10, 10, side=27), "images of 27x27 pixels; they must be 28x28"),
    ("idx", idx_with("train", 20, 20, side=1), "images of 1x1 pixels; they must be 28x28"),
    ("image folder", of_file("images/train/ant/x.png", hostile.as_fifo), "x.png: .* a FIFO"),
    ("image folder", of_file("images/train/ant/x.png", hostile.as_link("..")), "that it is in"),
]


@pytest.mark.parametrize(("name", "change", "reason"), REFUSED)
def test_what_was_accepted_once_is_refused_in_one_line(name, change, reason, valid):
    def read(folder):
        found = READERS[name].read(folder)
        return found.model() if name == "checkpoint" else found

    with copy_of(valid[name]) as folder:
        change(folder)
        with hostile.limits(), pytest.raises(SecateurError, match=reason) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_the_outcomes_are_printed_if_asked_for(capsys):
    if "SECATEUR_HOSTILE_EXAMPLES" not in os.environ:
        return
    with capsys.disabled():
        print()
        for name, counts in COUNTS.items():
            objects = counts["object"]
            kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items() if kind != "object")
            print(f"{name:24} {counts.total():6} inputs: {objects} objects, {kinds}")
