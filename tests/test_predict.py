"""Predicted classes: from a checkpoint, an ONNX file and a .pt2 file, and with numpy alone."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from secateur.archs import lenet5, module
from secateur.base.errors import SecateurError
from secateur.cli import main
from secateur.deploy import export, metadata
from secateur.deploy.export import PixelNetwork
from secateur.deploy.predict import Classifier, find_pictures, open_classifier, softmax
from secateur.nn import checkpoint

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_registry")
ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["cat", "dog", "ibis"]
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, one with normalisation inside the file, and pictures in folders."""
    base = tmp_path_factory.mktemp("predict")
    settings = lenet5.Settings(filters=[3, 4], hidden=5)
    torch.manual_seed(3)
    model = lenet5.build(settings, 3, (3, 8, 8)).eval()
    with torch.no_grad():  # so that random pictures get different classes
        *_, bias = [parameter.mul_(3) for parameter in model.parameters()]
        bias -= model(torch.randn(50, 3, 8, 8)).mean(0)
    header = checkpoint.Header(
        "lenet5", settings.model_dump(), CLASSES, [3, 8, 8], MEAN, STD, split="", stage="finetune"
    )
    sha256 = checkpoint.save(base / "outside/model.safetensors", header, model, {})
    for how, network in (("outside", model), ("inside", PixelNetwork(model, MEAN, STD))):
        (base / how).mkdir(exist_ok=True)
        about = metadata.from_header(header, sha256, how, resize=10)
        export.write(network, (3, 8, 8), about, base / how)
    chance = np.random.default_rng(0)
    for k in range(5):
        name = base / f"pictures/{'ab'[k % 2]}/{k}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(name)
    (base / "pictures/a/notes.txt").write_text("no picture")
    return base


def run(*arguments):
    """Run `secateur predict`; returns its output and exit status."""
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        pytest.raises(SystemExit) as end,
    ):
        main(["predict", *map(str, arguments)])
    return output.getvalue(), end.value.code


FILES = [f"{how}/model.{s}" for how in ("outside", "inside") for s in ("onnx", "pt2")]


def test_every_file_gives_the_classes_of_the_network(folder):
    """Compared with the network of the checkpoint, computed in float64."""
    pictures = sorted((folder / "pictures").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in pictures]).astype(np.float64)
    images = torch.from_numpy((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    model = checkpoint.load(folder / "outside/model.safetensors").model().double()
    with torch.no_grad():
        wanted = torch.softmax(model(images), 1)
    assert len({int(k) for k in wanted.argmax(1)}) > 1
    for file in ("outside/model.safetensors", *FILES):
        as_they_are = ("--json", "--top", 3, "--resize", 8)
        found = json.loads(run(folder / file, folder / "pictures", *as_they_are)[0])
        assert [entry["file"] for entry in found] == [str(path) for path in pictures]
        for entry, likely in zip(found, wanted, strict=True):
            assert entry["label"] == CLASSES[int(likely.argmax())]
            assert entry["probability"] == pytest.approx(float(likely.max()), abs=1e-5)
            shown = dict(entry["top"])
            assert shown == pytest.approx(
                dict(zip(CLASSES, likely.tolist(), strict=True)), abs=1e-5
            )
            values = [p for _, p in entry["top"]]
            assert values == sorted(values, reverse=True)


def test_a_line_for_each_picture_in_the_order_given(folder):
    one, two = folder / "pictures/b/1.png", folder / "pictures/a/0.png"
    output, status = run(folder / "outside", one, two)
    lines = output.splitlines()
    assert status == 0 and [line.split()[0] for line in lines] == [str(one), str(two)]
    assert all(re.fullmatch(r"\S+ +(cat|dog|ibis) \d+\.\d\d%", line) for line in lines)


def test_pictures_of_another_size_are_resized_and_cut(folder, tmp_path):
    """The centre of a picture twice as large counts, its border does not; grey becomes colour."""
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, 10:30] = np.random.default_rng(1).integers(0, 256, (20, 20))
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    pixels[:, :9], pixels[:, 31:] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "rim.png")
    Image.fromarray(np.stack([pixels] * 3, -1)).save(tmp_path / "colour.png")
    found = json.loads(run(folder / "outside/model.onnx", tmp_path, "--json", "--resize", 8)[0])
    first, *others = sorted(found, key=lambda entry: entry["file"])
    assert all(entry["probability"] == first["probability"] for entry in others)
    image = Image.open(tmp_path / "wide.png").convert("RGB").resize((16, 8), Image.BILINEAR)
    classifier = open_classifier(folder / "outside/model.safetensors")
    cut = torch.from_numpy(np.array(image)[None, :, 4:12]).permute(0, 3, 1, 2)
    likely = softmax(classifier.run(classifier.preprocess(cut).contiguous().numpy()))
    assert first["probability"] == pytest.approx(float(likely.max()), abs=1e-5)


def test_the_file_says_how_pictures_are_resized(folder):
    def side(model, *resize) -> Classifier:
        return open_classifier(folder / model, *resize).view.resize

    assert side("outside/model.onnx") == side("inside/model.pt2") == 10
    assert side("outside/model.safetensors") == 8, "a checkpoint has none: the network's size"
    assert side("outside/model.onnx", 9) == 9


def test_folders_are_searched_for_pictures_that_are_not_hidden(folder, tmp_path):
    picture = (folder / "pictures/a/0.png").read_bytes()
    for name in (".folder/a.png", "dir.png/._a.png", "dir.png/a.PNG", "b.png", ".hidden.png"):
        (tmp_path / ".root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".root" / name).write_bytes(picture)
    root = tmp_path / ".root"
    assert find_pictures([root]) == [root / "b.png", root / "dir.png/a.PNG"]
    assert find_pictures([root / ".hidden.png"]) == [root / ".hidden.png"], "named by the user"


def test_names_that_stdout_cannot_encode_are_printed_with_backslashes(folder, tmp_path):
    name = os.fsencode(tmp_path / "a") + b"\xff.png"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write((folder / "pictures/a/0.png").read_bytes())
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")) as output:
        with pytest.raises(SystemExit) as end:
            main(["predict", str(folder / "outside"), str(tmp_path)])
        output.flush()
    assert end.value.code == 0
    assert output.buffer.getvalue().startswith(f"{tmp_path}/a\\udcff.png  ".encode())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.onnx", "pictures"], "nowhere.onnx: missing"),
        (["pictures", "pictures"], "pictures: holds none of model.safetensors, model.onnx"),
        (["pictures/a/notes.txt", "pictures"], "must be a .safetensors, .onnx or .pt2 file"),
        (["outside/model.onnx", "nowhere.png"], "nowhere.png: missing"),
        (["outside/model.onnx", "outside"], "outside: no pictures in it"),
        (["outside/model.onnx", "pictures/a/notes.txt"], "notes.txt: not a readable image"),
        (["outside/model.onnx", "pictures", "--resize", "7"], "--resize 7: "),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    output, status = run(*arguments)
    assert status == 1 and output.startswith("error: ") and said in output
    assert output.count("\n") == 1


def test_a_number_below_one_is_refused(folder):
    output, status = run(folder / "outside", folder / "pictures", "--top", "0")
    assert status == 2 and "at least 1" in output


def test_softmax_of_large_logits():
    found = softmax(np.float32([[1000, 1000 + np.log(3)], [-2000, 0]]))
    assert found.sum(1) == pytest.approx([1, 1])
    assert found[0] == pytest.approx([0.25, 0.75], abs=1e-4) and found[1, 1] == 1


def test_a_checkpoint_of_a_foreign_network_is_refused(folder, tmp_path):
    header = checkpoint.Header("", {}, [], [3, 8, 8], [], [], split="", stage="prune")
    checkpoint.save(tmp_path / "model.safetensors", header, torch.nn.Linear(2, 2), {})
    with pytest.raises(SecateurError, match="not of an architecture of Secateur"):
        open_classifier(tmp_path)


def test_numpy_and_onnxruntime_suffice(folder, tmp_path):
    """The script in docs/export.md runs in a process that cannot import torch or Secateur."""
    page = (ROOT / "docs/export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (script,) = [block for block in blocks if "import onnxruntime" in block]
    forbidden = "import sys; sys.modules.update(torch=None, secateur=None, onnx=None, PIL=None)\n"
    (tmp_path / "run.py").write_text(forbidden + script)
    pictures = sorted((folder / "pictures").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in pictures])
    np.save(tmp_path / "images.npy", pixels)
    wanted = [p.label for p in open_classifier(folder / "outside").predict(pictures)]
    for how in ("outside", "inside"):
        command = [sys.executable, "run.py", str(folder / how / "model.onnx"), "images.npy"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == wanted


def test_a_network_of_the_users_own_is_opened_where_params_yaml_names_its_function(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(ROOT / "tests/own_network.py", tmp_path / "theirs.py")
    own = {"target": "theirs:Net", "source": "theirs.py", "arguments": {"width": 3}}
    shape = (3, 8, 8)
    model = module.build(module.Settings(**own), 3, shape).eval()
    header = checkpoint.Header(
        "module", own, CLASSES, [*shape], MEAN, STD, split="", stage="finetune"
    )
    checkpoint.save(tmp_path / "model.safetensors", header, model, {})
    original, picture = type(model), next(folder.glob("pictures/a/*.png"))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    monkeypatch.setattr(sys.modules["theirs"], "Net", lambda **_: pytest.fail("ran"))
    output, status = run("model.safetensors", picture)
    assert status == 1 and "; it is not in this folder; an exported file needs no" in output
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    output, status = run("model.safetensors", picture)
    assert status == 1 and output.count("\n") == 1
    assert "'target': 'theirs:Net'" in output and "'target': None" in output
    monkeypatch.setattr(sys.modules["theirs"], "Net", original)
    params["archs"]["module"] = own
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    output, status = run("model.safetensors", picture)
    assert status == 0 and re.search(r"\.png  (cat|dog|ibis) \d+\.\d\d%$", output.strip()), output
