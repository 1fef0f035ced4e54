"""Targets over rounds: shares of the dense network, round by round, with and without masks."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
import yaml
from workspace import ROOT, yaml_text

import secateur
from secateur.base import plugin
from secateur.base.errors import ArgumentError, PruningError, SettingsError
from secateur.base.settings import Params, check, validate
from secateur.nn import cost
from secateur.pipeline.commands import rounds
from secateur.pipeline.record import Chain
from secateur.pruning.apply import apply_decision
from secateur.pruning.decision import PruningContext
from secateur.pruning.target import Target, solve
from secateur.sparsity import masks as masking
from secateur.sparsity.ratios import Rules
from stages import evaluate


def dense(seed=0):
    module = plugin.load("archs", "lenet5")
    torch.manual_seed(seed)
    return module.build(module.Settings(filters=[6, 8], hidden=20), 10, (1, 28, 28))


@pytest.mark.parametrize(("granularity", "remove"), [("weight", False), ("filter", True)])
def test_every_round_leaves_its_share_of_the_dense_network(granularity, remove):
    """Shares are counted on the networks themselves, not taken from the solver. With masks, a round
    keeps those of the rounds before; with removal, it starts from the compact network."""
    magnitude = plugin.load("pruners", "magnitude")
    first, model, held = dense(), dense(), {}
    images = torch.randn(4, 1, 28, 28)
    for share in rounds.shares(0.2, 3):
        chosen = magnitude.Settings(
            granularity=granularity, ranking="global", ratios=0.5,
            target={"params": share, "of": "dense"},
        )  # fmt: skip
        found = magnitude.prune(chosen, PruningContext(model, images, dense=first))
        joined = masking.joined(found.masks, held)
        found = type(found)(joined, found.channels, found.notes)
        made = apply_decision(model, found, images, remove_dead=remove, requested="x")
        model, held = made.model, dict(made.masks)
        left = cost.nonzero(model, held) / cost.parameters(first)
        step = 0 if granularity == "weight" else 0.06  # one filter of this small network
        assert abs(left - share) <= step + 1e-3
        assert found.notes["params_left_asked"] == share


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_network_with_a_dead_branch_is_pruned_again(granularity):
    """Of the dead branch one channel remains, in layers without any weight."""
    module = plugin.load("archs", "resnet_cifar")
    torch.manual_seed(0)
    model = module.build(module.Settings(depth=8), 10, (3, 8, 8)).eval()
    block, images = model.layer1[0], torch.randn(4, 3, 8, 8)
    for conv in (block.conv1, block.conv2):
        conv.weight.data *= 1e-4
    first = secateur.prune(
        model,
        images,
        secateur.pruners.magnitude(granularity="weight", ranking="global", ratios=0.6),
    )
    empty = [name for name, mask in first.masks.items() if not mask.any()]
    assert "layer1.0.conv1.weight" in empty
    second = secateur.pruners.magnitude(granularity=granularity, ratios=0.8)
    again = secateur.prune(first.model, images, second)
    assert again.parameters[1] < first.parameters[1]
    assert not any(again.masks[name].any() for name in empty)
    with pytest.raises(PruningError, match=r"layer conv1 would be left empty by threshold"):
        secateur.prune(first.model, images, secateur.pruners.threshold(sensitivity=9))


def test_without_a_dense_network_a_target_of_it_is_refused():
    context = PruningContext(dense(), torch.randn(1, 1, 28, 28))
    with pytest.raises(ArgumentError, match=r"target\.of"):
        solve(lambda ratio: None, Target(macs=0.5, of="dense"), context)


def test_steps_are_geometric_or_equal_and_end_at_the_target():
    assert rounds.shares(0.008, 3) == pytest.approx([0.2, 0.04, 0.008])
    assert rounds.shares(0.1, 3, equal=True) == pytest.approx([0.7, 0.4, 0.1])
    assert rounds.shares(0.3, 1) == [0.3]


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ({"target": {"params": 0.5, "of": "dense"}}, {"target": {"macs": 0.3}}, {"macs": 0.3}),
        ({"target": {"params": 0.5}}, {"target": None, "ratios": 0.4}, None),
        ({"target": {"params": 0.5}}, {"ratios": "fc1: 0.4"}, {"params": 0.5}),
    ],
)
def test_a_round_replaces_a_target_as_a_whole(first, later, expected):
    pruning = later_round(first, later).chosen("pruners")
    found = pruning.target and pruning.target.model_dump(exclude_defaults=True)
    assert found == expected


def test_a_round_replaces_ratios_as_a_whole_but_single_keys_of_its_section():
    params = later_round({"ratios": {"fc1": 0.5}}, {"ratios": {"fc2": 0.3}})
    assert params.chosen("pruners").ratios == Rules(named=(("fc2", 0.3),))
    assert params.chosen("pruners").criterion == "taylor"
    assert (params.finetune.average.kind, params.finetune.average.decay) == ("swa", 0.5)


def later_round(first, later):
    """Params of a round that changes settings of magnitude, and one of finetune's average."""
    given = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"pruner": "magnitude"}
    given["pruners"]["magnitude"] |= {"criterion": "taylor"} | first
    given["finetune"]["average"]["kind"] = "swa"
    prune = {"pruners": {"magnitude": later}}
    given["rounds"] = {
        "round2": {"after": "finetuned", "sparse_train": {}, "prune": prune,
                   "finetune": {"average": {"decay": 0.5}}}
    }  # fmt: skip
    return validate(Params, given, "").of_round("round2")


def command(**options):
    given = {"steps": 3, "to": 0.1, "of": "macs", "equal": False, "apply": True}
    rounds.command(argparse.Namespace(**given | options))


def test_the_command_writes_rounds_that_params_yaml_accepts(tmp_path, monkeypatch, capsys):
    text = (ROOT / "params.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingsError, match="has no target"):
        command()
    (tmp_path / "params.yaml").write_text(text.replace("pruner: std ", "pruner: magnitude "))
    with pytest.raises(SettingsError, match="--to 1: a share between 0 and 1"):
        command(to=1.0)
    command(apply=False)
    printed = yaml.safe_load(capsys.readouterr().out)
    command()
    params = check(tmp_path / "params.yaml")
    asked = [params, *(params.of_round(name) for name in ("round2", "round3"))]
    left = [p.chosen("pruners").target for p in asked]
    assert [t.macs for t in left] == pytest.approx([0.1 ** (k / 3) for k in (1, 2, 3)], rel=1e-5)
    assert {t.of for t in left} == {"dense"} and list(params.rounds) == ["round2", "round3"]
    assert (
        copy.deepcopy(printed["rounds"])
        == yaml.safe_load((tmp_path / "params.yaml").read_text())["rounds"]
    )


def test_the_command_takes_empty_sections_of_plug_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"pruner": "magnitude"}
    params["datasets"]["digits"] = params["pruners"]["magnitude"] = None
    Path("params.yaml").write_text(yaml_text(params))
    command()
    assert check().chosen("pruners").target.macs == pytest.approx(0.1 ** (1 / 3), rel=1e-5)


def test_evaluate_removes_models_of_old_rounds_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Users and editors may keep folders with other names in models/rounds."""
    monkeypatch.chdir(tmp_path)
    others = {"kept", "old-copy", ".ipynb_checkpoints", "Old"}
    for name in ("old", *others):
        Path("models/rounds", name, "finetuned").mkdir(parents=True)
    evaluate.remove_old_rounds(Chain(("kept",)))
    assert {folder.parent.name for folder in Path("models/rounds").glob("*/finetuned")} == others
    (line,) = capsys.readouterr().out.splitlines()
    assert "models/rounds/old: no round of params.yaml" in line
