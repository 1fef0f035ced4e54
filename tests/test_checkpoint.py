"""Checkpoints: equal models give equal bytes, and nothing else is accepted as a checkpoint."""

import contextlib
import hashlib
import json
import pickle
import resource
import shutil
import subprocess
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import hostile
import pytest
import safetensors.torch
import torch
from torch import nn
from workspace import ROOT, Project, warm_python

from secateur.base import files
from secateur.base.errors import CheckpointError, SecateurError
from secateur.nn import checkpoint, resizing
from secateur.nn.checkpoint import Header
from secateur.pruning import removal
from secateur.sparsity import masks

HEADER = Header(
    arch="lenet300",
    arch_settings={"hidden": [6, 5]},
    classes=["a", "b", "c"],
    shape=[1, 8, 8],
    mean=[0.5],
    std=[0.25],
    split="5" * 64,
    stage="finetune",
    parent="7" * 64,
    notes={"asked": "threshold, sensitivity 0.001", "reached": {"compression": 1e-05}},
)


def network(header=HEADER):
    torch.manual_seed(0)
    return checkpoint.build_architecture(header)


def half(model):
    """Masks that prune every second entry of every weight."""
    return {
        f"{name}.weight": (torch.arange(layer.weight.numel()) % 2 == 0).view(layer.weight.shape)
        for name, layer in masks.layers(model).items()
    }


def saved(folder, name="model.safetensors"):
    """A checkpoint on disk, with half of its weights masked."""
    model = network()
    checkpoint.save(folder / name, HEADER, model, half(model))
    return folder / name


def rewrite(path, metadata=None, drop=(), **tensors):
    """The same file with other tensors or another header, as another program might write it."""
    everything = {k: t for k, t in safetensors.torch.load_file(path).items() if k not in drop}
    metadata = {"secateur": json.dumps(asdict(HEADER))} if metadata is None else metadata
    safetensors.torch.save_file(everything | tensors, path, metadata)


@pytest.mark.parametrize("arch", ["lenet300", "lenet5"])
def test_a_network_comes_back_as_it_was(arch, tmp_path):
    header = Header(arch, {}, ["a", "b", "c"], [1, 28, 28], [0.0], [1.0], "s", "prune")
    model, path = network(header), tmp_path / "new" / "folder" / "model.safetensors"
    chosen = half(model)
    sha256 = checkpoint.save(path, header, model, chosen)
    found = checkpoint.load(path, arch, {}, "s")
    assert found.header == header
    assert found.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(found.masks) == set(chosen)
    assert all(torch.equal(found.masks[n], m) for n, m in chosen.items())
    masks.apply(model, chosen)
    images, rebuilt = torch.rand(2, 1, 28, 28), found.model()
    assert all(torch.equal(rebuilt.state_dict()[n], t) for n, t in model.state_dict().items())
    assert torch.equal(rebuilt.eval()(images), model.eval()(images))


LOAD_WITHOUT_PRUNING = """
import sys
from importlib.util import find_spec
for name in ("pruning", "gconv", "channels", "pruners", "penalties"):
    assert find_spec(f"secateur.{name}"), f"there is no {name}"
    sys.modules[f"secateur.{name}"] = None  # importing it is an error
from pathlib import Path
import safetensors.torch
from secateur.nn import checkpoint, resizing
for folder in map(Path, sys.argv[1:]):
    images = safetensors.torch.load_file(folder / "images.safetensors")["images"]
    logits = checkpoint.load(folder / "model.safetensors").model().eval()(images)
    safetensors.torch.save_file({"logits": logits.detach()}, folder / "logits.safetensors")
"""
REBUILT = ["lenet300", "lenet5"]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """By architecture: the folder with the compact network and the logits that another process
    computed from it, the logits of this process, and the first and last layer, which lost
    weights."""
    folder, made = tmp_path_factory.mktemp("rebuilt"), {}
    for arch in REBUILT:
        (folder / arch).mkdir()
        made[arch] = folder / arch, *save_compact(arch, folder / arch)
    command = [warm_python(), "-c", LOAD_WITHOUT_PRUNING, *(str(folder / arch) for arch in REBUILT)]
    subprocess.run(command, cwd=ROOT, env=Project(ROOT).env(), check=True)
    return made


def save_compact(arch, folder):
    header = Header(arch, {}, ["a", "b", "c"], [1, 28, 28], [0.0], [1.0], "s", "prune")
    model, images = network(header).eval(), torch.rand(2, 1, 28, 28)
    first, last = (list(masks.layers(model))[i] for i in (0, -1))
    with torch.no_grad():
        model.get_submodule(first).weight[3:] = 0
        model.get_submodule(last).weight[:, 5:] = 0
    chosen = {name: p.detach() != 0 for name, p in masks.prunable(model, "weights").items()}
    compact = removal.remove_dead(model, chosen, images[:1])
    checkpoint.save(folder / "model.safetensors", header, compact.model, compact.masks)
    safetensors.torch.save_file({"images": images}, folder / "images.safetensors")
    return model(images).detach(), first, last


@pytest.mark.parametrize("arch", REBUILT)
def test_a_compact_network_is_rebuilt_without_the_code_that_pruned_it(arch, rebuilt):
    folder, wanted, first, last = rebuilt[arch]
    found = checkpoint.load(folder / "model.safetensors", arch, {}, "s")
    assert found.tensors[f"{first}.weight"].shape[0] == 3
    assert found.tensors[f"{last}.weight"].shape[1] == 5
    logits = safetensors.torch.load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


class Keeps(nn.Linear):
    """Keeps a tensor that it creates in its first forward pass."""

    factor = None

    def forward(self, images):
        if self.factor is None:
            self.factor = torch.arange(self.out_features)
        return super().forward(images.flatten(1)) * self.factor


def test_a_network_that_was_filled_can_be_trained_whatever_it_keeps_from_a_pass():
    model = Keeps(64, 3)
    made = checkpoint.Checkpoint(replace(HEADER, arch=""), dict(Keeps(64, 3).state_dict()), {})
    made.fill(model, "it does not fit").train()
    model(torch.randn(2, *HEADER.shape)).sum().backward()
    assert model.weight.grad is not None


def test_equal_models_are_equal_bytes(tmp_path):
    header = replace(HEADER, arch="lenet5", arch_settings={"filters": [3, 4], "hidden": 5})
    one, other = network(header), network(header)
    chosen = half(one)
    checkpoint.save(tmp_path / "a.safetensors", header, one, chosen)
    with torch.no_grad():  # differences that do not make another model:
        other.to(memory_format=torch.channels_last).eval()  # memory layout and mode
        for name, mask in chosen.items():  # signs of zeros
            other.get_parameter(name)[~mask] = -0.0
    backwards = dict(reversed(chosen.items()))  # order of entries
    header = replace(header, notes=dict(reversed(header.notes.items())))
    checkpoint.save(tmp_path / "b" / "c.safetensors", header, other, backwards)
    one_file, other_file = tmp_path / "a.safetensors", tmp_path / "b" / "c.safetensors"
    assert one_file.read_bytes() == other_file.read_bytes()
    with torch.no_grad():
        other.fc1.bias[0] += 1e-6
    checkpoint.save(other_file, header, other, chosen)
    assert one_file.read_bytes() != other_file.read_bytes()


@pytest.mark.parametrize("shape", [(6, 1), (1, 64), (6, 64)], ids=["filter", "channel", "weight"])
def test_what_a_penalty_has_chosen_comes_back_and_is_neither_mask_nor_weight(shape, tmp_path):
    model, path = network(), tmp_path / "model.safetensors"
    choices = {"fc1.weight": (torch.arange(6 * 64).view(6, 64) % 5 == 0)[: shape[0], : shape[1]]}
    plain = checkpoint.save(path, HEADER, model, {})
    assert checkpoint.load(path).choices == {}
    assert checkpoint.save(path, HEADER, model, {}, choices) != plain
    found = checkpoint.load(path)
    assert set(found.choices) == set(choices)
    assert torch.equal(found.choices["fc1.weight"], choices["fc1.weight"])
    assert found.masks == {}
    assert set(found.model().state_dict()) == set(model.state_dict())


def test_the_size_for_evaluation_is_written_only_if_there_is_one(tmp_path):
    """So other files keep the bytes that they had before this key was introduced."""
    for resize in (None, 9):
        header = replace(HEADER, resize=resize)
        checkpoint.save(tmp_path / "model.safetensors", header, network(), {})
        assert (b"resize" in (tmp_path / "model.safetensors").read_bytes()) == (resize is not None)
        assert checkpoint.load(tmp_path / "model.safetensors").header == header


def test_masks_that_keep_everything_are_left_out(tmp_path):
    model = network()
    everything = {name: p == p for name, p in model.named_parameters()}
    checkpoint.save(tmp_path / "model.safetensors", HEADER, model, everything)
    assert checkpoint.load(tmp_path / "model.safetensors").masks == {}


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{path}: .*{length} bytes; truncated"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path).model()


class Bomb:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


MISTAKES = {
    "missing": (Path.unlink, "missing; run `dvc repro`"),
    "folder": (replace_by_folder, ""),
    "empty": (lambda p: p.write_bytes(b""), r"0 bytes"),
    "text": (lambda p: p.write_text("not a checkpoint, but long enough"), "foreign"),
    "truncated": (truncate, "truncated"),
    "lengthened": (lengthen, "not a whole safetensors file"),
    "zip pickle": (lambda p: torch.save({"a": Bomb()}, p), "a pickle"),
    "legacy pickle": (
        lambda p: torch.save({"a": Bomb()}, p, _use_new_zipfile_serialization=False),
        "a pickle",
    ),
    "bare pickle": (lambda p: p.write_bytes(pickle.dumps(Bomb())), "a pickle"),
    "text pickle": (lambda p: p.write_bytes(pickle.dumps(Bomb(), protocol=0)), "foreign"),
    "weights of someone else": (
        lambda p: safetensors.torch.save_file({"fc1.weight": torch.ones(2)}, p),
        "not written by Secateur",
    ),
    "someone else's metadata": (
        lambda p: rewrite(p, metadata={"format": "pt"}),
        "not written by Secateur",
    ),
    "header no JSON": (lambda p: rewrite(p, metadata={"secateur": "{"}), "header cannot be read"),
    "header no table": (lambda p: rewrite(p, metadata={"secateur": "7"}), "header cannot be read"),
    "header incomplete": (
        lambda p: rewrite(p, metadata={"secateur": '{"arch": "lenet300"}'}),
        "header cannot be read",
    ),
    "another format": (
        lambda p: rewrite(p, metadata={"secateur": json.dumps(asdict(HEADER) | {"format": 99})}),
        "format 99; this version reads 1",
    ),
    "mask of another shape": (
        lambda p: rewrite(p, **{"mask:fc1.weight": torch.ones(2, 2) > 0}),
        "mask without a tensor of its shape: fc1.weight",
    ),
    "mask of nothing": (
        lambda p: rewrite(p, **{"mask:fc9.weight": torch.ones(2, 2) > 0}),
        "mask without a tensor of its shape: fc9.weight",
    ),
    "choice of another shape": (
        lambda p: rewrite(p, **{"choice:fc1.weight": torch.ones(5, 1) > 0}),
        "choice without a tensor that it fits: fc1.weight",
    ),
    "choice of nothing": (
        lambda p: rewrite(p, **{"choice:fc9.weight": torch.ones(6, 1) > 0}),
        "choice without a tensor that it fits: fc9.weight",
    ),
    "choice of numbers": (
        lambda p: rewrite(p, **{"choice:fc1.weight": torch.ones(6, 1)}),
        "choice without a tensor that it fits: fc1.weight",
    ),
    "mask of numbers": (lambda p: rewrite(p, **{"mask:fc1.weight": torch.ones(6, 64)}), "fc1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_checkpoint_is_refused_in_one_line_that_names_the_file(
    mistake, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path)
    spoil, reason = MISTAKES[mistake]
    spoil(path)
    with pytest.raises(CheckpointError, match=f"^{path}: .*{reason}") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = saved(tmp_path)
    checkpoint.load(path, "lenet300", {"hidden": [6, 5]}, "5" * 64)
    with pytest.raises(CheckpointError, match=rf"{path}: .*'lenet300', params ask for 'lenet5'"):
        checkpoint.load(path, "lenet5", {})
    with pytest.raises(CheckpointError, match=rf"{path}: .*\[6, 5\].*\[6, 4\]"):
        checkpoint.load(path, "lenet300", {"hidden": [6, 4]})
    with pytest.raises(CheckpointError, match=rf"{path}: .*another split \(5+\) .*\(6+\)"):
        checkpoint.load(path, "lenet300", {"hidden": [6, 5]}, "6" * 64)


@pytest.mark.parametrize(
    ("drop", "tensors"),
    [
        (["fc2.bias"], {}),
        ([], {"fc9.weight": torch.ones(2, 2)}),
        (["mask:fc1.weight"], {"fc1.weight": torch.ones(6, 64, 1)}),
        ([], {"fc2.weight": torch.ones(5, 4), "mask:fc2.weight": torch.ones(5, 4) > 0}),
        (["fc3.weight", "fc3.bias", "mask:fc3.weight"], {}),
    ],
    ids=["no bias", "one too many", "other axes", "layers that do not fit", "no last layer"],
)
def test_tensors_that_do_not_fit_the_architecture_are_refused(drop, tensors, tmp_path):
    path = saved(tmp_path)
    rewrite(path, drop=drop, **tensors)
    with pytest.raises(CheckpointError, match="do not fit architecture 'lenet300'"):
        checkpoint.load(path).model()


@contextlib.contextmanager
def disk_with_room_for(count):
    """No file may grow beyond `count` bytes; Python ignores the signal, so the write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 1000])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(room, tmp_path):
    path = saved(tmp_path)
    before, other = path.read_bytes(), replace(HEADER, stage="prune")
    with disk_with_room_for(room), pytest.raises(SecateurError) as caught:
        checkpoint.save(path, other, network(), {})
    assert str(path) in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    checkpoint.save(path, other, network(), {})
    assert checkpoint.load(path).header.stage == "prune"


@contextlib.contextmanager
def read_only_folder():
    """A folder that is read-only, even if the tests run as root."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    saved(folder)
    folder.chmod(0o555)
    try:
        with hostile.ordinary_user():
            yield folder
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_named_and_left_as_it_is():
    model = network()
    with read_only_folder() as folder:
        before = (folder / "model.safetensors").read_bytes()
        for name in ("model.safetensors", "new.safetensors", "new/folder/model.safetensors"):
            with pytest.raises(SecateurError, match=f"{folder / name}: .*ermission denied"):
                checkpoint.save(folder / name, HEADER, model, {})
        assert (folder / "model.safetensors").read_bytes() == before
        assert [p.name for p in folder.iterdir()] == ["model.safetensors"]


def test_a_file_is_not_written_where_a_folder_stands(tmp_path):
    (tmp_path / "model.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(SecateurError, match="cannot be written"):
        files.write_text(tmp_path / "model.safetensors", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_write_that_fails_in_any_other_way_leaves_nothing_behind(tmp_path):
    path = tmp_path / "about.json"
    files.write_text(path, "old")
    with pytest.raises(TypeError):
        files.write_bytes(path, "no bytes")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_convolution_that_lost_all_groups_but_one_comes_back_with_one(tmp_path):
    """The dense network has two groups; only the header says that one is left."""
    dense = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1))
    small = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1)).eval()
    state = small.state_dict()
    resizing.resize(dense, {n: t.shape for n, t in state.items()}, resizing.describe_layers(small))
    resizing.load_state(dense, state)
    images = torch.rand(2, 4, 5, 5)
    assert dense[0].groups == 1
    assert torch.equal(dense.eval()(images), small(images))
