"""Distillation and weight averages: formulas by hand, resuming, what is kept, what is refused."""

import copy
import json
import types
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from test_train import Clock, Watcher, content, digits, fit, network, project, state_left  # noqa: F401
from torch import nn
from workspace import ROOT

from secateur.base import plugin
from secateur.base.errors import ArgumentError, CheckpointError, SettingsError
from secateur.base.sections import Distillation, Train
from secateur.base.settings import Params, validate
from secateur.base.stage import Stage
from secateur.data import dataset
from secateur.data.augment import FileAugment
from secateur.data.batches import Batches, sequential_batches
from secateur.nn import checkpoint
from secateur.nn.checkpoint import Header
from secateur.pipeline import runner
from secateur.training import averaging, distillation
from secateur.training.distillation import Distiller
from secateur.training.engine import Engine

TEACHER = "models/baseline"
RATES = {"epochs": 3, "batch_size": 32, "lr": 0.002}


def settings(**given):
    return Train(distillation={"teacher": TEACHER, **given}, **RATES)


def small(width, seed=0, inplace=False):
    torch.manual_seed(seed)
    relu = nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), relu, nn.Linear(width, 10))


def distiller(model, teacher, how):
    return Distiller(how.distillation, teacher, model, (1, 8, 8), 3)


def test_the_gradient_of_the_divergence_is_that_of_the_paper():
    """T (q - p) for one image, where q and p are the softened outputs: Hinton et al., eq. 2."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    ours.requires_grad_()
    for temperature in (0.5, 1.0, 4.0):
        loss = distillation.softened_divergence(ours, theirs, temperature)
        (gradient,) = torch.autograd.grad(loss.sum(), ours)
        q, p = ((x / temperature).softmax(1) for x in (ours, theirs))
        assert torch.allclose(gradient, temperature * (q - p), rtol=1e-12)
        plain = temperature**2 * (p * (p.log() - q.log())).sum(1)
        assert torch.allclose(loss, plain, rtol=1e-10)


@pytest.mark.parametrize(("parts", "inplace"), [(1, False), (3, False), (1, True)])
def test_a_step_of_training_is_that_of_the_whole_formula(parts, inplace):
    """Labels, outputs and features together, compared with autograd on the formula written out."""
    prepared, model = digits(100), small(6, inplace=inplace)
    teacher = small(9, seed=1, inplace=inplace)
    by_hand, theirs = copy.deepcopy(model), copy.deepcopy(teacher)
    how = Train(
        epochs=1, batch_size=100, optimizer="sgd", momentum=0, lr=0.1, schedule="constant",
        accumulate_grad_batches=parts, keep="last", average={"kind": "none"},
        distillation={"teacher": TEACHER, "temperature": 3, "weight": 0.7,
                      "features": ["1", "3"], "features_weight": 0.5},
    )  # fmt: skip
    made = distiller(model, teacher, how)
    (name,) = made.maps
    to_teacher = copy.deepcopy(made.maps[name])
    assert name == "1" and to_teacher.weight.shape == (9, 6)
    images = (prepared.train.pixels.permute(0, 3, 1, 2) / 255 - 0.3) / 0.4
    labels, total = prepared.train.labels, 0.0
    hidden, wanted = by_hand[1](images.flatten(1)), theirs[1](images.flatten(1))
    logits, taught = by_hand[3](hidden.relu()), theirs[3](wanted.relu())  # not in place
    total = 0.3 * F.cross_entropy(logits, labels)
    total += 0.7 * distillation.softened_divergence(logits, taught, 3.0).mean()
    total += 0.5 * (F.mse_loss(to_teacher(hidden), wanted) + F.mse_loss(logits, taught))
    parameters = [*by_hand.parameters(), to_teacher.weight]
    gradients = torch.autograd.grad(total, parameters)
    expected = [p - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
    fit(model, prepared, how, distiller=made)
    found = [*model.parameters(), made.maps[name].weight]
    for ours, theirs_ in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs_, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_left_as_it_is_and_stays_outside_of_the_model():
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    model = small(6)
    names, before = model.state_dict().keys(), content(teacher)
    fit(model, digits(), settings(), distiller=distiller(model, teacher, settings()))
    assert content(teacher) == before and not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert model.state_dict().keys() == names
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["none", "ema", "swa"])
def test_a_training_with_teacher_and_average_resumes_to_the_same_bytes(kind):
    prepared, teacher = digits(), small(9, seed=1)
    how = settings(features=["1"])
    how = how.model_copy(update={"average": Train(epochs=1, average={"kind": kind}).average})

    def run(name, watcher=None):
        model = small(6)
        watching = watcher and Watcher(model, *watcher)
        made = distiller(model, copy.deepcopy(teacher), how)
        fit(model, prepared, how, name, watcher=watching, distiller=made)
        return content(model)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", (2, 3))
    tensors, info = state_left("killed")
    of_distillation = [n for n in tensors if n.startswith("distillation/")]
    assert len(info["history"]) == 1 and of_distillation == ["distillation/1/weight"]
    assert any(n.startswith("average/") for n in tensors) == (kind != "none")
    assert run("killed") == whole


def test_features_that_do_not_fit_are_one_line():
    model = small(6)
    for features, words in [
        (("1", "Q"), "the network has no layer 'Q'; it has 0, 1, 2, 3"),
        (("0",), "0 gives 64, in the teacher 1x8x8: only the number of channels may differ"),
    ]:
        teacher = small(9)
        if features == ("0",):
            teacher = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(64, 10))
        with pytest.raises(ArgumentError, match=r"distillation\.features") as refused:
            distiller(model, teacher, settings(features=features))
        assert words in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="of no effect without a teacher"):
        Distillation(features=("1",))
    with pytest.raises(ValueError, match=r"weights/<a checkpoint>, or, for .* models/baseline"):
        Distillation(teacher="models/pruned")


class Odd(nn.Module):
    """Has one layer that returns a tuple, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.rnn, self.unused = nn.GRU(8, 4, batch_first=True), nn.Linear(2, 2)
        self.out = nn.Linear(4, 10)

    def forward(self, images):
        return self.out(self.rnn(images.flatten(1, 2))[0].mean(1))


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ("rnn", "'rnn': the layer of the network gives a tuple, not one tensor"),
        ("unused", "'unused': the network never runs this layer"),
    ],
)
def test_layers_without_one_output_are_refused_before_the_training(feature, words):
    with pytest.raises(ArgumentError, match=words):
        distiller(Odd(), Odd(), settings(features=(feature,)))


def saved(path, classes, arch="lenet300", info=None):
    """Save a small network for such images as the checkpoint of a stage."""
    info = info or digits().info
    header = Header(
        arch=arch, arch_settings={"hidden": [5]}, classes=classes, shape=info.shape,
        mean=info.mean, std=info.std, split="", stage="baseline",
    )  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    checkpoint.save(path, header, checkpoint.build_architecture(header), {})


def test_a_teacher_comes_from_a_file_that_fits_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, data = "weights/teacher.safetensors", digits()
    path = tmp_path / name

    def made(declared=name, code="weights/none", arch="lenet300"):
        params = Params.model_construct(arch=arch, archs={}, seed=1)
        stage = Stage("finetune", params, {}, {declared: "", code: ""})
        context = runner.TrainingContext(stage, data, {}, Engine(), None, ())
        return context._distiller(small(6), settings(teacher=name, code=code))

    saved(path, data.info.classes)
    lenet = "secateur/archs/lenet300.py"
    (tmp_path / lenet).parent.mkdir(parents=True)
    (tmp_path / lenet).touch()
    for given in ({}, {"code": lenet}, {"code": lenet, "arch": "lenet5"}):
        assert isinstance(made(**given).teacher.get_submodule("fc1"), nn.Linear)
    with pytest.raises(SettingsError, match="does not declare"):
        made("models/baseline")
    with pytest.raises(SettingsError, match=r"archs/gone\.py: missing"):
        made(code="secateur/archs/gone.py")
    for classes, arch, code, ours, words in [
        (["a", "b"], "lenet300", "weights/none", "lenet300", "cannot teach: its classes = "),
        (data.info.classes, "lenet300", "weights/none", "lenet5",
         "its architecture is 'lenet300', that of the network 'lenet5': the setting distillation"
         f".code must be {lenet}, on which the stage then depends; it is weights/none"),
        (data.info.classes, "lenet300", "secateur/archs", "lenet5", f"must be {lenet}"),
        (data.info.classes, "module", "weights/none", "lenet5", "of yours"),
    ]:  # fmt: skip
        saved(path, classes)
        rename_architecture(path, arch)
        with pytest.raises(CheckpointError, match=r"weights/teacher\.safetensors") as refused:
            made(code=code, arch=ours)
        assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.pipeline
def test_the_dense_network_learns_from_a_teacher_too(unborn):
    """With all the weight on a teacher that always answers 3, the labels have no influence."""
    unborn.stage_here("prepare")
    data = dataset.load(unborn.path / "data/digits")
    path = unborn.path / "weights/threes.safetensors"
    saved(path, data.info.classes, info=data.info)
    content = {key: torch.zeros_like(t) for key, t in safetensors.torch.load_file(path).items()}
    content["fc2.bias"][3] = 8.0
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    safetensors.torch.save_file(content, path, header)
    taught = {"teacher": "weights/threes.safetensors", "temperature": 1.0, "weight": 1.0}
    given = yaml.safe_load((ROOT / "params.yaml").read_text())["baseline"]["distillation"]
    unborn.params(baseline__epochs=2, baseline__distillation=given | taught)
    unborn.stage_here("baseline")
    model = checkpoint.load(unborn.path / "models/baseline/model.safetensors").model().eval()
    for images, _ in sequential_batches(data.val, data.info, device=torch.device("cpu")):
        assert set(model(images).argmax(1).tolist()) == {3}
    unborn.params(baseline__distillation=given | {"teacher": "models/baseline"})
    line = unborn.stage_here("baseline", ok=False)
    assert "baseline.distillation.teacher: models/baseline: the network that this stage" in line


@pytest.mark.parametrize("code", ["", "/etc/net.py", "../net.py"])
def test_code_of_a_teacher_lies_in_the_project(code):
    with pytest.raises(ValueError, match=r"weights/none, or secateur/archs/"):
        Distillation(teacher="weights/x.safetensors", code=code)


def test_code_without_a_teacher_of_its_own_is_refused():
    for teacher in ("weights/none", TEACHER):
        with pytest.raises(ValueError, match="of no effect without a teacher in weights/"):
            Distillation(teacher=teacher, code="secateur/archs/lenet5.py")


@pytest.mark.parametrize(
    ("augment", "sizes", "features", "once"),
    [
        ({}, [], [], True),
        ({"pad": 1}, [], [], False),
        ({"flip": True}, [], [], False),
        ({"rotate": 3.0}, [], [], False),
        ({}, [{"scale": 0.5, "until": 0.5}], [], False),
        ({}, [], ["1"], False),
    ],
)
def test_the_teacher_sees_images_once_that_never_change(augment, sizes, features, once):
    """And the network always learns from the teacher's outputs for the images of the same batch."""
    prepared = digits(100)
    prepared = replace(prepared, info=replace(prepared.info, augment=FileAugment(**augment)))
    how = Train(
        epochs=2, batch_size=32, accumulate_grad_batches=2, progressive_resizing=sizes,
        distillation={"teacher": TEACHER, "features": features},
    )  # fmt: skip
    model, teacher, seen, wanted = flexible(6), flexible(9), [], []
    made = distiller(model, teacher, how)
    teacher.register_forward_pre_hook(lambda _module, images: seen.append(images[0]))
    taught = made._wanted

    def noted(images, engine):
        logits = taught(images, engine)
        wanted.append((images.clone(), logits))
        return logits

    made._wanted = noted
    fit(model, prepared, how, "once", distiller=made)
    count = len(prepared.train)
    tried = len(sizes)  # an image of each size, before the training
    assert sum(map(len, seen)) == tried + (count if once else 2 * count)
    assert sum(len(images) for images, _ in wanted) == 2 * count
    for images, logits in wanted:
        with torch.no_grad():
            assert torch.allclose(teacher(images), logits, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_order_of_an_epoch_is_that_of_its_batches(rank):
    """In each of two processes; the last batch has one image, which the first process gets."""
    prepared = digits(81, validation=0)
    split, info, cpu = prepared.train, prepared.info, torch.device("cpu")
    batches = Batches(split, info, 16, 3, rank=rank, world=2)
    whole = torch.cat([images for images, _ in sequential_batches(split, info, device=cpu)])
    for epoch in (0, 5):
        images = torch.cat([images for images, _ in batches.epoch(epoch)])
        assert len(images) == 41 - rank
        assert torch.equal(whole[batches.order(epoch)], images)


def flexible(width):
    """A small network that accepts images of any size."""
    torch.manual_seed(width)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
    )


def rename_architecture(path, arch):
    """Write another architecture into the header of the file."""
    content = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["secateur"]) | {"arch": arch}
    safetensors.torch.save_file(content, path, {"secateur": json.dumps(header)})


def test_the_teacher_is_a_dependency_of_the_stages_that_have_one():
    """`weights/none` never changes, so only the path counts. All rounds use the same files."""
    continued = {"sparse-train": "sparse_train", "finetune": "finetune"}
    for file, names, taught in [
        ("dvc.yaml", "", {"baseline": "baseline", **continued}),
        ("stages/rounds/dvc.yaml", "do", continued),
    ]:
        stages = yaml.safe_load((ROOT / file).read_text())["stages"]
        for stage, section in taught.items():
            found = stages[stage][names] if names else stages[stage]
            for key in ("teacher", "code"):
                assert f"${{{section}.distillation.{key}}}" in found["deps"]
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section in ("baseline", "sparse_train", "finetune"):
        for key in ("teacher", "code"):
            assert given[section]["distillation"][key] == "weights/none"
    for key, value in [("teacher", TEACHER), ("code", "secateur/archs/lenet5.py")]:
        given["rounds"] = {
            "round2": {"after": "finetuned", "sparse_train": {}, "prune": {},
                       "finetune": {"distillation": {key: value}}}
        }  # fmt: skip
        params = validate(Params, given, "")
        wrong = rf"rounds\.round2\.finetune\.distillation\.{key}: all rounds"
        with pytest.raises(SettingsError, match=wrong):
            params.of_round("round2")


def averaged(kind, **given):
    return Train(average={"kind": kind, **given}, keep="last", **RATES)


def weights_after_each_step(prepared, how):
    """The weights after every step of a training without averaging."""
    model, seen = network("lenet300"), []

    class Looker(Watcher):
        def on_step_end(self, epoch, step):
            seen.append({n: t.clone() for n, t in model.state_dict().items()})

    fit(model, prepared, how, "plain", watcher=Looker(model))
    return seen


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_those_of_the_definition(kind):
    prepared, model = digits(), network("lenet300")
    steps = weights_after_each_step(prepared, Train(keep="last", **RATES))
    fit(model, prepared, averaged(kind, decay=0.8, start=1 / 3), kind)
    per_epoch = len(steps) // 3
    for name, found in model.state_dict().items():
        if kind == "swa":
            expected = torch.stack([steps[k * per_epoch - 1][name] for k in (1, 2, 3)]).mean(0)
        else:
            expected = steps[per_epoch - 1][name]
            for later in steps[per_epoch:]:
                expected = 0.8 * expected + 0.2 * later[name]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6), name


def test_what_is_masked_stays_zero_in_an_average():
    prepared, model = digits(), network("lenet300")
    mask = torch.rand(16, 64) > 0.5
    fit(model, prepared, averaged("ema"), masks={"fc1.weight": mask})
    weight = model.get_parameter("fc1.weight")
    assert not weight[~mask].any() and weight[mask].any()


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("gradual", {"ratios": 0.8, "begin": 0.2, "end": 0.8, "regrow": True}),
        ("gradual", {"ratios": 0.8, "begin": 0.2, "end": 0.8}),
        ("rigl", {"ratio": 0.8, "interval": 2, "until": 0.9}),
    ],
)
def test_an_average_has_the_zeros_of_what_is_pruned_meanwhile(name, chosen, kind):
    prepared, model = digits(), network("lenet300")
    module = plugin.load("penalties", name)
    penalty = module.build(module.Settings(**chosen), model, 0.0)
    fit(model, prepared, averaged(kind), kind, penalty=penalty)
    for weight, choice in penalty.choices().items():
        found = model.get_parameter(weight)
        assert choice.any() and not found[choice].any() and found[~choice].all()


@pytest.mark.parametrize(
    ("average", "steps", "line"),
    [
        ({"kind": "ema", "start": 10}, None, "at step 10, .* could take in is 10; "),
        ({"kind": "swa", "start": 10_000}, None, "at step 10,000, .* a share of all 10$"),
        ({"kind": "ema", "start": 0.7}, 7, "= 0.7: .* at step 7, .* could take in is 7; "),
        ({"kind": "swa", "start": 5}, 9, "could take in is 5; "),
        ({"kind": "ema", "start": 9}, None, None),
        ({"kind": "swa", "start": 0}, 5, None),
        ({"kind": "none", "start": 10}, None, None),
    ],
)
def test_an_average_that_would_never_begin_is_refused(average, steps, line):
    """In two epochs of five steps; a penalty may end the training after some of them."""
    how = Train(epochs=2, average=average)
    ends = types.SimpleNamespace(
        max_steps=steps, finished=False, choices=dict, trace_table=list, metrics=dict,
        state_dict=dict, load_state_dict=lambda state: None,
    )  # fmt: skip
    averaging.check(how.model_copy(update={"epochs": 0}), 5)
    if line is None:
        averaging.check(how, 5, ends if steps else None)
        return
    with pytest.raises(ArgumentError, match=line):
        averaging.check(how, 5, ends if steps else None)


def test_a_training_does_not_start_with_an_average_that_would_never_begin():
    with pytest.raises(ArgumentError, match=r"average\.start = 10000\.0: "):
        fit(network("lenet300"), digits(), averaged("swa", start=10_000))


@pytest.mark.parametrize(("start", "warned"), [(10, 0), (12, 1)])
def test_an_average_that_a_penalty_ends_too_early_is_told(start, warned, capsys):
    """The penalty ends the training after step 10 of 20, which could not be known before."""
    how = Train(epochs=5, batch_size=40, average={"kind": "ema", "start": start})
    model = small(6)
    fit(model, digits(), how, penalty=Clock(model))
    line = "warning: the penalty ended the training before weights were averaged (average.start)"
    assert capsys.readouterr().err.splitlines() == [line] * warned


def test_statistics_of_an_average_are_measured_for_its_weights():
    """Compared with mean and variance of the same 100 images, computed directly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10))
    prepared = digits(200, validation=0.5)
    fit(model, prepared, averaged("ema", recalibrate=100))
    images = (prepared.train.pixels.permute(0, 3, 1, 2) / 255 - 0.3) / 0.4
    with torch.no_grad():
        outputs = model[0](images).transpose(0, 1).flatten(1)
    assert torch.allclose(model[1].running_mean, outputs.mean(1), atol=1e-5)
    assert torch.allclose(model[1].running_var, outputs.var(1), rtol=1e-4)


def test_with_several_processes_the_maps_get_the_mean_gradient():
    model, how = small(6), settings(features=["1"])
    made = distiller(model, small(9, seed=1), how)
    made.maps["1"].weight.grad = torch.ones(9, 6)

    class Two(Engine):
        world = 2

        def __init__(self):
            self.device = torch.device("cpu")

        def all_reduce(self, values):
            return values + 3.0  # sum over the other process

    made.average_gradients(Two())
    assert torch.equal(made.maps["1"].weight.grad, torch.full((9, 6), 2.0))
