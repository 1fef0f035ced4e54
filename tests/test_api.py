"""The Python API: any traceable network, proof before return, files, and errors about arguments."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from workspace import Project

import secateur
from secateur.archs import lenet300
from secateur.base import plugin
from secateur.base.errors import CheckpointError, SettingsError
from secateur.base.torchvision_import import import_torchvision
from secateur.data.batches import Normalise
from secateur.nn import checkpoint
from secateur.sparsity import masks

ROOT = Path(__file__).resolve().parents[1]
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def folder(tmp_path):
    """A model of the pipeline, as in models/finetuned."""
    torch.manual_seed(0)
    settings = lenet300.Settings()
    header = checkpoint.Header(
        "lenet300", settings.model_dump(), [f"class {k}" for k in range(10)], [1, 8, 8], [0.3],
        [0.4], split="", stage="finetune", resize=9,
    )  # fmt: skip
    model = lenet300.build(settings, 10, (1, 8, 8))
    mask = torch.rand(model.fc1.weight.shape) > 0.5
    checkpoint.save(tmp_path / "model.safetensors", header, model, {"fc1.weight": mask})
    return tmp_path


def half(**settings):
    return secateur.pruners.magnitude(ratios=0.5, **settings)


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_importing_the_package_imports_no_library():
    code = "import secateur, sys; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert python(code).stdout == "[]\n"


def test_every_public_name_is_there_and_listed():
    assert set(secateur.__all__) <= set(dir(secateur))
    assert all(getattr(secateur, name) is not None for name in secateur.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = secateur.nothing


@pytest.mark.parametrize("name", plugin.names("pruners"))
def test_every_pruner_is_callable_with_its_settings_as_arguments(name):
    module = getattr(secateur.pruners, name)
    assert module is plugin.load("pruners", name)
    configured = module()
    assert (configured.name, configured.settings) == (name, module.Settings())
    assert list(inspect.signature(module).parameters) == list(module.Settings.model_fields)
    assert name in dir(secateur.pruners)


def test_a_pruner_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(AttributeError, match=r"'nope'; there are: branches, chosen, gconv"):
        _ = secateur.pruners.nope


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0.5}, "ratio: unknown argument.*did you mean ratios"),
        ({"groups": "filter"}, "groups: renamed; write granularity"),
        ({"ratios": 2}, "^ratios = 2: must be at least 0 and less than 1 "),
        ({"criterion": "l3"}, "criterion = 'l3': .*'l1'"),
        ({"ranking": "global", "ratios": [0.5]}, "ratios: ranking global"),
    ],
)
def test_a_setting_that_cannot_be_is_told_as_an_argument(settings, words):
    with pytest.raises(SettingsError, match=words) as told:
        secateur.pruners.magnitude(**settings)
    assert str(told.value).endswith("(magnitude)")
    assert "params.yaml" not in str(told.value) and "pruners." not in str(told.value)


@pytest.mark.parametrize(
    "pruner",
    [
        lambda: half(skip=["nope"]),
        lambda: secateur.pruners.magnitude(ratios={"nope": 0.5}),
        lambda: half(criterion="lamp", granularity="weight", target={"params": 1e-9}),
        lambda: half(criterion="geometric_median", granularity="weight"),
        lambda: half(criterion="taylor"),
        lambda: secateur.pruners.chosen(),
        lambda: secateur.pruners.gconv(skip=["nope"]),
        lambda: secateur.pruners.gconv(groups=None, config="../nope.json"),
        lambda: secateur.pruners.network_slimming(target={"macs": 1e-9}),
        lambda: secateur.pruners.threshold(sensitivity=1e9),
    ],
)
def test_errors_about_the_network_speak_of_arguments_too(net, pruner):
    with pytest.raises(secateur.SecateurError) as told:
        secateur.prune(net, IMAGES, pruner())
    assert "params.yaml" not in str(told.value) and "pruners." not in str(told.value)


@pytest.mark.parametrize(
    ("pruner", "settings", "line"),
    [
        ("chosen", {}, "pruner chosen: the network carries no choice; train it with a penalty"),
        ("gconv", {"groups": None, "config": "nope"}, "config = 'nope': recipes/groups/nope: miss"),
        ("gconv", {"groups": None, "config": "../nope"}, "config = '../nope': must be a file in"),
        ("gconv", {"criterion": "taylor"}, "labels: criterion taylor needs one for each image"),
        ("magnitude", {"criterion": "taylor"}, "labels: criterion taylor needs one for each"),
        ("magnitude", {"criterion": "fisher"}, "labels: criterion fisher needs one for each"),
        ("magnitude", {"target": {"latency": 0.5}}, "latency: target = {latency: 0.5} needs the"),
        ("network_slimming", {}, "coupled = 'skip': no scale of a batch normalisation decides"),
        ("oracle", {"ratios": 0.1}, "labels: pruner oracle needs one for each image"),
    ],
)
def test_what_the_network_or_the_call_lacks_is_told_as_an_argument(net, pruner, settings, line):
    net.norm = nn.Identity()
    with pytest.raises(secateur.SecateurError, match=f"^{re.escape(line)}") as told:
        secateur.prune(net, IMAGES, getattr(secateur.pruners, pruner)(**settings))
    assert not re.search(r"params\.yaml|pruner = |stage|dvc|sparse.train", str(told.value))


@pytest.mark.parametrize("name", sorted({*plugin.names("pruners")} - {"chosen", "branches"}))
def test_pruned_and_masked_network_compute_the_same(net, name):
    before = copy.deepcopy(net.state_dict())
    few = {"ratios": {"conv1": 0.01}} if name == "oracle" else {}
    labels = torch.zeros(len(IMAGES), dtype=torch.int64)
    result = secateur.prune(net, IMAGES, getattr(secateur.pruners, name)(**few), labels=labels)
    assert not result.model.training and net.training
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    assert result.max_difference <= 1e-4
    assert set(result.differences) == {"difference_float64", "difference_float32"}
    for key, mask in result.masks.items():
        assert (result.model.get_parameter(key)[~mask] == 0).all()


def test_the_result_is_what_the_settings_ask_for(net):
    result = secateur.prune(net, IMAGES, half())
    assert (result.model.conv1.out_channels, result.model.conv2.out_channels) == (6, 12)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (net, result.model))
    assert result.parameters == (before, after) and result.compression == before / after
    assert result.notes["ratio_reached"] == 0.5
    assert str(result).startswith("magnitude(ratios=0.5): ")


def test_norms_over_several_gpus_are_pruned_as_others_are(net):
    nn.init.uniform_(net.norm.running_mean, -1, 1)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    ordinary, found = (secateur.prune(model, IMAGES, half()) for model in (net, synchronised))
    assert found.model.norm.num_features == 6
    for name, tensor in ordinary.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name


def test_single_weights_without_removal_stay_in_place(net):
    pruner = secateur.pruners.std(sensitivity=0.5)
    result = secateur.prune(net, IMAGES, pruner, remove_dead=False)
    assert result.max_difference == 0 and not result.differences
    assert result.model.conv1.weight.shape == net.conv1.weight.shape
    expected = torch.where(result.masks["conv1.weight"], net.conv1.weight, 0.0)
    assert torch.equal(result.model.conv1.weight, expected)


def test_labels_serve_criteria_that_look_at_the_loss(net):
    result = secateur.prune(
        net, IMAGES, half(criterion="taylor"), labels=torch.arange(8, dtype=torch.int64) % 5
    )
    assert result.model.conv1.out_channels == 6
    assert all(parameter.grad is None for parameter in net.parameters())


def test_groups_become_group_convolutions_on_request(net):
    pruner = secateur.pruners.gconv(groups=3, skip=["conv1"])
    result = secateur.prune(net, IMAGES, pruner, group_convolutions=True)
    assert result.model.conv2.groups == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images: torch.uint8"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "images: a batch"),
        ({"pruner": "magnitude"}, "pruner: one with its settings"),
        ({"group_convolutions": "gconv"}, "group_convolutions = 'gconv': must be True or False"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: .* int64 \(8,\) is needed"),
        ({"latency": 3}, "latency: a int; the table of measure_latency"),
        ({"remove_dead": "no"}, "remove_dead = 'no': must be True or False"),
        ({"images": IMAGES.to("meta")}, "images: a tensor on the device meta"),
        ({"labels": torch.arange(8).to("meta")}, "labels: a tensor on the device meta"),
        ({"model": Net().to("meta")}, "model: conv1.weight: a tensor on the device meta"),
        ({"model": Net().double()}, "torch.float64; call model.float"),
        ({"model": nn.Flatten()}, "has no parameters"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_named(net, change, words):
    arguments = {"model": net, "images": IMAGES, "pruner": half()} | change
    with pytest.raises(secateur.SecateurError, match=words):
        secateur.prune(**arguments)


def test_a_network_that_cannot_be_traced_is_refused(net):
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(secateur.SecateurError, match=r"(?i)trace"):
        secateur.prune(Branching(), IMAGES, half())


def test_a_channel_graph_prints_groups_members_and_reasons(net):
    net.train()
    text = str(secateur.channel_graph(net, IMAGES))
    assert net.training
    assert text.startswith("Net, input 3x16x16: 4 groups, 36 of 44 channels removable\n")
    assert re.search(r"^conv1 +12  conv1 +conv2 +norm$", text, re.MULTILINE)
    assert re.search(r"^head +5  head\n  locked: an output of the network$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80


def test_a_network_of_ones_own_is_saved_and_loaded_into_a_dense_one(net, tmp_path):
    result = secateur.prune(net, IMAGES, half())
    with torch.no_grad():
        result.model.head.bias += 1  # as training would change it
    secateur.save(result, tmp_path / "small.safetensors")
    dense = Net()
    small = secateur.load(str(tmp_path / "small.safetensors"), into=dense)
    assert small is dense and not small.training
    assert torch.equal(small(IMAGES), result.model(IMAGES))
    assert small.classes == [] and small.origin.header.format == 1
    assert torch.equal(small.preprocess(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)),
                       torch.ones(1, 3, 2, 2))  # fmt: skip


def test_masks_are_saved_and_kept_through_a_second_pruning(net, tmp_path):
    first = secateur.prune(net, IMAGES, secateur.pruners.std(sensitivity=0.5))
    secateur.save(first, tmp_path / "a.safetensors")
    loaded = secateur.load(tmp_path / "a.safetensors", into=Net())
    assert torch.equal(loaded.origin.masks["conv2.weight"], first.masks["conv2.weight"])
    second = secateur.prune(loaded, IMAGES, half())
    mask = second.masks["conv2.weight"]
    assert mask.shape == second.model.conv2.weight.shape and not mask.all()
    assert (second.model.conv2.weight[~mask] == 0).all()
    assert second.model.origin.masks.keys() == second.masks.keys()


def test_masks_are_kept_through_a_second_pruning_in_one_session(net, tmp_path):
    pruner = secateur.pruners.magnitude(granularity="weight", ratios=0.9)
    first = secateur.prune(net, IMAGES, pruner, remove_dead=False)
    copied = copy.deepcopy(first.model)
    for model in (first.model, copied):
        filters = secateur.pruners.magnitude(ratios={"conv1": 0.5})
        second = secateur.prune(model, IMAGES, filters, remove_dead=False)
        secateur.save(second, tmp_path / "a.safetensors")
        loaded = secateur.load(tmp_path / "a.safetensors", into=Net())
        mask = second.masks["head.weight"]
        assert torch.equal(mask, first.model.head.weight != 0)
        assert torch.equal(loaded.origin.masks["head.weight"], mask)
        weights = [p.count_nonzero() for p in second.model.parameters() if p.dim() > 1]
        assert sum(map(torch.count_nonzero, second.masks.values())) == sum(weights)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("obs", {"ratios": 0.5}),
        ("magnitude", {"granularity": "2:4"}),
        ("magnitude", {"granularity": "group", "criterion": "l2", "ratios": 0.5}),
        ("oracle", {"ratios": {"conv1": 0.1}}),
    ],
)
def test_masks_are_in_force_for_a_network_that_was_trained_without_them(net, name, settings):
    """Masked weights that have moved since count as zeros, also where a pruner measures."""
    own = {"labels": torch.arange(8) % 5, "remove_dead": False}
    pruner = secateur.pruners.magnitude(granularity="2:4")
    first = secateur.prune(net, IMAGES, pruner, **own)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    held = copy.deepcopy(first.model)
    masks.apply(held, first.masks)
    pruner = getattr(secateur.pruners, name)(**settings)
    found, expected = (secateur.prune(m, IMAGES, pruner, **own) for m in (first.model, held))
    assert found.notes == expected.notes
    left = expected.model.state_dict()
    assert all(torch.equal(t, left[n]) for n, t in found.model.state_dict().items())


def test_a_model_of_the_pipeline_is_loaded_from_its_folder(folder, tmp_path):
    model = secateur.load(folder)
    assert not model.training and model.classes[3] == "class 3"
    pixels = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    images = model.preprocess(pixels)
    assert torch.equal(images, Normalise([0.3], [0.4], torch.device("cpu"))(pixels))
    assert torch.allclose(images, model.preprocess(pixels / 255), atol=1e-6)
    result = secateur.prune(model, images, half())
    assert result.model.preprocess == model.preprocess
    secateur.save(result, tmp_path / "small.safetensors")
    small = secateur.load(tmp_path / "small.safetensors")
    assert torch.equal(small(images), result.model(images))
    assert small.classes == model.classes and small.origin.header.arch == "lenet300"
    assert small.origin.header.parent == model.origin.sha256
    assert small.origin.header.resize == 9


def test_attributes_of_the_network_itself_are_left_alone(net, tmp_path):
    secateur.save(secateur.prune(net, IMAGES, half()), tmp_path / "a.safetensors")
    dense = Net()
    dense.classes = 5
    assert secateur.load(tmp_path / "a.safetensors", into=dense).classes == 5


@pytest.mark.parametrize("kind", ["pth", "own", "pruned"])
def test_classes_of_the_network_itself_are_left_alone(kind, net, tmp_path):
    """A list that it holds, or a property that cannot be set; those of a file may be replaced."""

    class Named(Net):
        classes = property(lambda self: "abcde")

    if kind == "pth":
        torch.save(net.state_dict(), tmp_path / "a")
    else:
        secateur.save(secateur.prune(net, IMAGES, half()), tmp_path / "a")
    net.classes = list("abcde")
    dense = secateur.prune(net, IMAGES, half()).model if kind == "pruned" else net
    for _ in range(2):
        assert secateur.load(tmp_path / "a", into=dense).classes == list("abcde")
    assert isinstance(dense.origin, secateur.api.Origin)
    assert secateur.load(tmp_path / "a", into=Named()).classes == "abcde"


def test_classes_of_one_file_are_replaced_by_those_of_the_next(net, tmp_path):
    for name in "abcde", "fghij":
        header = checkpoint.Header("", {}, list(name), [3, 8, 8], [], [], split="", stage="prune")
        checkpoint.save(tmp_path / name, header, net, {})
        assert secateur.load(tmp_path / name, into=net).classes == list(name)
        assert net.origin.header.classes == list(name)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 8, 8), "3 axes"),
        (torch.zeros(1, 3, 8, 8), "3 channels; 1 are needed"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), "torch.int64"),
    ],
)
def test_images_that_cannot_be_preprocessed_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        secateur.Preprocess((0.5,), (0.5,))(images)


def test_files_that_cannot_be_loaded_are_told(net, tmp_path):
    own, pickle, other = (tmp_path / name for name in ("own", "pickle", "other"))
    secateur.save(secateur.prune(net, IMAGES, half()), own)
    torch.save(net.state_dict(), pickle)
    checkpoint.safetensors.torch.save_file(net.state_dict(), other)

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(5, 5)

    for path, into, words in [
        (tmp_path / "nothing", None, "nothing: no such file"),
        (tmp_path, None, "neither model.safetensors nor pytorch_model.bin"),
        (pickle, None, r"pickle: weights without an architecture, .* load\(path, into=MyNet\(\)\)"),
        (other, None, "not written by Secateur"),
        (own, None, r"load\(path, into=MyNet\(\)\)"),
        (own, Other(), "do not fit into = Other: extra.weight is missing"),
        (own, nn.Sequential(), "do not fit into = Sequential"),
    ]:
        with pytest.raises(CheckpointError, match=words) as told:
            secateur.load(path, into=into)
        assert "dvc" not in str(told.value)


def test_an_argument_of_load_that_cannot_be_meant_is_named(net, tmp_path):
    own, other = tmp_path / "own", tmp_path / "other.pt"
    secateur.save(secateur.prune(net, IMAGES, half()), own)
    torch.save(net.state_dict(), other)
    for path in (own, other):
        for into, words in [
            (3, "into: a int"),
            (Net, "into: Net; an instance of torch.nn.Module"),
            (Net().to("meta"), "into: conv1.weight: a tensor on the device meta"),
        ]:
            with pytest.raises(SettingsError, match=words):
                secateur.load(path, into=into)
        for rename in ("a", ["a"], {1: "a"}, {"a": None}):
            with pytest.raises(SettingsError, match=r"rename: .* a dict of names"):
                secateur.load(path, into=Net(), rename=rename)
    with pytest.raises(CheckpointError, match=r"own: written by Secateur, .*; rename is for"):
        secateur.load(own, into=Net(), rename={"zz": "yy"})
    assert secateur.load(own, into=Net(), rename={}).conv1.out_channels == 6


def test_a_network_that_a_file_does_not_fit_is_left_as_it_was(net, tmp_path):
    secateur.save(secateur.prune(net, IMAGES, half()), tmp_path / "a.safetensors")

    class Fixed(Net):
        def forward(self, x):
            x = self.norm(self.conv1(x)).view(-1, 12, 16, 16)
            return self.head(self.conv2(x).mean((2, 3)))

    fixed = Fixed()
    with pytest.raises(CheckpointError, match="do not fit into = Fixed"):
        secateur.load(tmp_path / "a.safetensors", into=fixed)
    assert fixed.conv1.weight.shape == (12, 3, 3, 3) and fixed(IMAGES).shape == (8, 5)


def test_a_convolution_with_another_kernel_is_not_filled(net, tmp_path):
    """It would keep the attribute kernel_size of one network and the padding of the other."""
    secateur.save(secateur.prune(net, IMAGES, half()), tmp_path / "a.safetensors")
    dense = Net()
    dense.conv1 = nn.Conv2d(3, 12, 5, padding=2)
    with pytest.raises(CheckpointError, match=r"conv1.weight has a kernel of 3 x 3, needs 5 x 5"):
        secateur.load(tmp_path / "a.safetensors", into=dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_is_loaded_into_a_network_of_any_precision(net, tmp_path, dtype):
    result = secateur.prune(net, IMAGES, half())
    secateur.save(result, tmp_path / "a.safetensors")
    loaded = secateur.load(tmp_path / "a.safetensors", into=Net().to(dtype))
    expected = result.model.to(dtype).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def test_only_what_prune_returned_is_saved(net, tmp_path):
    with pytest.raises(TypeError, match="what `prune` returned"):
        secateur.save(net, tmp_path / "a.safetensors")


def test_a_layer_that_is_replaced_after_pruning_loses_its_mask_before_it_is_saved(net, tmp_path):
    result = secateur.prune(net, IMAGES, secateur.pruners.std(), remove_dead=False)
    result.model.head = nn.Sequential(nn.Linear(24, 3))
    with pytest.raises(SettingsError, match=r"masks name head.weight, which result.model lacks"):
        secateur.save(result, tmp_path / "a")
    result.model.head = nn.Linear(24, 3)
    with pytest.raises(SettingsError, match=r"mask of head.weight is \(5, 24\), .* has \(3, 24\)"):
        secateur.save(result, tmp_path / "a")
    del result.masks["head.weight"]
    secateur.save(result, tmp_path / "a")
    other = Net()
    other.head = nn.Linear(24, 3)
    assert torch.equal(secateur.load(tmp_path / "a", into=other)(IMAGES), result.model(IMAGES))


def test_torchvision_resnet18_is_pruned_saved_and_loaded(tmp_path):
    models = import_torchvision().models
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    result = secateur.prune(models.resnet18(num_classes=10), images, half(criterion="l2"))
    assert result.model.layer1[0].conv1.out_channels == 32 and result.max_difference <= 1e-4
    secateur.save(result, tmp_path / "small.safetensors")
    small = secateur.load(tmp_path / "small.safetensors", into=models.resnet18(num_classes=10))
    assert torch.equal(small(images), result.model(images))


@pytest.mark.usefixtures("programs")
def test_a_network_defined_in_main_is_pruned():
    """As in a notebook: the class is defined in __main__, and no file contains its code."""
    code = inspect.getsource(Net).join([
        "import torch, secateur\nfrom torch import nn\n",
        "\nr = secateur.prune(Net(), torch.randn(2, 3, 8, 8), secateur.pruners.magnitude())\n"
        "print(r.model.conv1.out_channels)",
    ])  # fmt: skip
    assert Project(ROOT).run("python", "-c", code) == "6\n"
