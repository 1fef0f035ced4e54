"""One definition of compression: prune, evaluate and MLflow agree on networks with batch norms."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from secateur.base import plugin
from secateur.base.sections import Evaluate, Prune
from secateur.data import dataset
from secateur.nn import checkpoint, cost
from secateur.nn.checkpoint import Header
from secateur.pipeline import tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.record import Chain, RunRecord
from stages import evaluate, prune

pytestmark = pytest.mark.pipeline

CLASSES = ["a", "b", "c"]
CHAINS = {
    "resnet-a": ("resnet_cifar", {"depth": 8}, "network_slimming", {"ratio": 0.4}),
    "resnet-b": ("resnet_cifar", {"depth": 8, "shortcut": "B"}, "magnitude", {"ratios": 0.5}),
    "resnet-depth": ("resnet_cifar", {"depth": 14}, "branches", {"number": 2}),
    "preresnet": ("preresnet", {"depth": 11}, "network_slimming", {"coupled": "union"}),
    "preresnet-basic": ("preresnet", {"depth": 8, "block": "basic"}, "gconv", {"groups": 4}),
    "resnet-bottleneck": (
        "resnet_cifar",
        {"depth": 11, "block": "bottleneck"},
        "std",
        {"sensitivity": 0.5, "scope": "weights_and_biases"},
    ),
    "densenet": ("densenet", {"depth": 10}, "network_slimming", {"ratio": 0.3}),
    "condensenet": (
        "condensenet",
        {"stages": [2, 2, 2]},
        "magnitude",
        {"granularity": "weight", "ratios": 0.9},
    ),
    "wide-resnet": (
        "wide_resnet",
        {"depth": 10, "widen": 1},
        "magnitude",
        {"granularity": "channel", "ratios": 0.3},
    ),
    "resnext": (
        "resnext",
        {"depth": 11, "cardinality": 4, "base_width": 4},
        "threshold",
        {"sensitivity": 0.02},
    ),
    "densenet-bc": (
        "densenet",
        {"depth": 10, "bottleneck": True, "compression": 0.5},
        "magnitude",
        {"ratios": 0.25, "ranking": "global"},
    ),
}


@pytest.fixture(scope="module")
def store(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(finished.path / "mlflow.db", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("SECATEUR_TRACKING", "on")
        yield Store(strict=True)


@pytest.fixture(scope="module")
def data():
    chance = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (30, 8, 8, 3), generator=chance, dtype=torch.uint8)
    split = dataset.InMemoryImages.from_pixels(pixels, torch.arange(30) % 3)
    images = dataset.Images(split, split, CLASSES, (0.5,) * 3, (0.5,) * 3)
    return dataset.prepare("toy", images, 0, 0)


def saved(folder, name, model, masks, notes, arch=("", {})):
    header = Header(*arch, CLASSES, [3, 8, 8], [], [], "", name, notes=notes)
    checkpoint.save(folder / f"{name}.safetensors", header, model, masks)
    found = SimpleNamespace(masks=masks, choices={}, header=header)
    found.model = lambda: copy.deepcopy(model)
    return found


def trained_on(model, masks):
    """The network as if trained further: every entry has changed, and pruned ones are zero."""
    model, chance = copy.deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.01 + 0.1 * torch.rand(parameter.shape, generator=chance)
            if name in masks:
                parameter *= masks[name]
    return model


@pytest.mark.parametrize("name", CHAINS)
def test_all_stages_and_mlflow_agree(name, data, store, tmp_path, capsys):
    arch, arch_settings, pruner, chosen = CHAINS[name]
    module = plugin.load("archs", arch)
    torch.manual_seed(0)
    model = module.build(module.Settings(**arch_settings), 3, (3, 8, 8)).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # shifts stay zero, as in every new network
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert norms and cost.compression(model, model, {}) == 1

    settings = plugin.load("pruners", pruner).Settings(**chosen)
    context = SimpleNamespace(
        params=SimpleNamespace(
            pruner=pruner,
            prune=Prune(group_convolutions=pruner == "gconv"),
            evaluate=Evaluate(latency_batch=2, latency_repeats=3),
            chosen=lambda _: settings,
            dataset="toy",
            arch=arch,
            seed=1,
        ),
        data=data,
        header=lambda parent, **notes: notes,
    )
    dense = saved(tmp_path, "dense", model, {}, {}, (arch, arch_settings))
    context.start = dense
    pruned = prune.prune(context)
    final = trained_on(pruned.model, pruned.masks)
    notes = pruned.header
    context.upstream = {
        "baseline": dense,
        "sparse-train": dense,
        "prune": saved(tmp_path, "pruned", pruned.model, pruned.masks, notes),
        "finetune": saved(tmp_path, "final", final, pruned.masks, notes),
    }
    context.chain, context.last = Chain(()), lambda stage: context.upstream[stage]
    report, layers = evaluate.measure(context, {})

    # counted from the file alone: after training, no unpruned parameter is zero
    tensors = safetensors.torch.load_file(tmp_path / "final.safetensors")
    left = sum(int(tensors[key].count_nonzero()) for key, _ in final.named_parameters())
    every = sum(parameter.numel() for parameter in model.parameters())
    assert left < every
    assert report["compression"] == pruned.metrics["compression"] == every / left
    assert report["pruned"]["nonzero"] == report["finetuned"]["nonzero"] == left
    assert report["baseline"]["nonzero"] == report["baseline"]["params"] == every
    every_layer = [row["layer"] for row in layers.rows if row["model"] == "baseline"]
    assert [row["layer"] for row in layers.rows if row["model"] == "finetuned"] == every_layer
    gone = [row for row in layers.rows if row["shape"] == "removed" and row["model"] == "finetuned"]
    assert len(gone) == (4 if pruner == "branches" else 0)  # two branches of two convolutions
    assert all(row["sparsity_of_dense"] == 1 and row["macs_dense"] == 0 for row in gone)
    of_layers = sum(row["nonzero"] for row in layers.rows if row["model"] == "finetuned")
    of_norms = sum(
        p.numel() for m in final.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )
    assert of_layers + of_norms == left

    made = RunRecord(
        "prune", name, {}, pruned.metrics, "model", "0", {"name": "toy", "hash": "1"}, 1.0, "cpu"
    )
    run_id = tracking.pipeline({"prune": made}, {}, report, [], store)
    run = store.client.get_run(run_id)
    assert run.data.metrics["compression"] == report["compression"]
    stage = store.client.get_run(run.data.tags["run.prune"])
    assert stage.data.metrics["compression"] == report["compression"]


def test_the_end_of_a_training_is_the_mean_and_deviation_of_its_last_epochs():
    history = [{"epoch": k, "val_accuracy": a} for k, a in enumerate((0.1, 0.5, 0.7, 0.9), 1)]
    (found,) = evaluate.end_of_training(history, Evaluate(last_epochs=3)).values()
    assert found == pytest.approx({"mean": 0.7, "deviation": 0.2, "epochs": 3})
    (found,) = evaluate.end_of_training(history[:1], Evaluate(last_epochs=3)).values()
    assert found == {"mean": 0.1, "deviation": 0.0, "epochs": 1}
    for rows, count in ((history, 0), ([], 3), ([{"epoch": 1, "loss": 1.0}], 3)):
        assert evaluate.end_of_training(rows, Evaluate(last_epochs=count)) == {}
