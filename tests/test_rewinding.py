"""Rewinding: the weights of an early epoch, and the learning rates from there on."""

from types import SimpleNamespace

import pytest
import torch
from test_train import Watcher, content, digits, fit, network, project, state_left  # noqa: F401
from workspace import ROOT

from secateur.base.errors import PruningError, SettingsError
from secateur.base.sections import Baseline, Finetune, Train
from secateur.base.settings import check, validate
from secateur.nn import checkpoint
from secateur.nn.checkpoint import Header
from secateur.training import optim
from stages import finetune

RATES = {"batch_size": 32, "lr": 0.002}


def loaded(weights):
    model = network("lenet300")
    model.load_state_dict(weights)
    return model


def test_weights_of_an_epoch_are_those_of_a_training_that_was_watched_also_after_a_kill():
    prepared, how = digits(), Train(epochs=4, **RATES)
    model = network("lenet300")
    first, watcher = content(model), Watcher(model)
    result = fit(model, prepared, how, "whole", watcher=watcher, keep_epoch=2)
    assert content(loaded(result.weights_to_rewind_to)) == watcher.weights[1]
    untrained = fit(network("lenet300"), prepared, how, "0", keep_epoch=0).weights_to_rewind_to
    assert content(loaded(untrained)) == first
    assert fit(network("lenet300"), prepared, how, "none").weights_to_rewind_to == {}
    killed = network("lenet300")
    with pytest.raises(KeyboardInterrupt):
        fit(killed, prepared, how, "killed", watcher=Watcher(killed, 4, 1), keep_epoch=2)
    assert len(state_left("killed")[1]["history"]) == 3
    again = network("lenet300")
    found = fit(again, prepared, how, "killed", keep_epoch=2).weights_to_rewind_to
    assert content(loaded(found)) == watcher.weights[1] and content(again) == content(model)


@pytest.mark.parametrize(
    "schedule",
    [{"schedule": "cosine", "warmup": 1.5}, {"schedule": "multistep", "milestones": [2, 4.5]},
     {"schedule": "one_cycle"}, {"schedule": "cosine", "schedule_by": "epoch"}],
)  # fmt: skip
def test_the_rate_goes_on_from_the_epoch_that_it_is_rewound_to(schedule):
    whole = Train(epochs=6, lr=0.1, **schedule)
    rest = Train(epochs=4, lr=0.1, schedule_after=2, **schedule)
    for step in range(4 * 7):
        assert optim.rate(rest, step, 7) == pytest.approx(optim.rate(whole, step + 14, 7))


def context(tmp_path, hidden):
    """The context of finetune for rewinding a network with these layers to the one in a file."""
    prepared = digits()
    header = Header(
        arch="lenet300", arch_settings={"hidden": hidden}, classes=prepared.info.classes,
        shape=prepared.info.shape, mean=[0.3], std=[0.4], split=prepared.info.hash,
        stage="baseline",
    )  # fmt: skip
    torch.manual_seed(5)
    early = checkpoint.build_architecture(header)
    checkpoint.save(tmp_path / "epoch.safetensors", header, early, {})

    how = Finetune(epochs=1, init="rewind", rewind_to="models/baseline")
    parts = SimpleNamespace(
        stage=SimpleNamespace(input=lambda path: tmp_path),
        params=SimpleNamespace(arch="lenet300", finetune=how),
        data=prepared,
    )
    return early, parts


def test_a_network_of_its_first_shape_gets_the_early_weights_and_a_smaller_one_is_refused(tmp_path):
    early, parts = context(tmp_path, [16, 8])
    model = network("lenet300", seed=3)
    finetune.rewind(model, parts)
    assert content(model) == content(early)
    _, parts = context(tmp_path, [12, 8])
    with pytest.raises(PruningError, match=r"fc1\.weight is \[16, 64\].*it was \[12, 64\]"):
        finetune.rewind(network("lenet300"), parts)


def test_settings_that_do_not_fit_each_other_are_told(tmp_path):
    for kind, given, words in [
        (Finetune, {"epochs": 1, "init": "rewind"}, "rewind_to must then be models/baseline"),
        (Finetune, {"epochs": 1, "rewind_to": "models/pruned"}, "weights/none' or 'models/base"),
        (Baseline, {"epochs": 3, "keep_epoch": 4}, "keep_epoch: 4 of 3 epochs"),
        (Train, {"epochs": 2, "schedule_after": 3, "schedule": "multistep", "milestones": [5]},
         "5 is not before the last of 5 epochs"),
    ]:  # fmt: skip
        with pytest.raises(SettingsError) as refused:
            validate(kind, given, "x")
        assert words in str(refused.value) and "\n" not in str(refused.value)
    text = (ROOT / "params.yaml").read_text()
    changed = text.replace("rewind_to: weights/none", "rewind_to: models/baseline")
    (tmp_path / "params.yaml").write_text(changed)
    with pytest.raises(SettingsError, match=r"baseline\.keep_epoch must say which epoch"):
        check(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(
        changed.replace("keep_epoch: null", "keep_epoch: 3").replace(
            "rounds: {}", "rounds: {r: {after: finetuned, sparse_train: {}, prune: {}, "
            "finetune: {rewind_to: weights/none}}}",
        )
    )  # fmt: skip
    with pytest.raises(SettingsError, match=r"rounds\.r\.finetune\.rewind_to: the same for all"):
        check(tmp_path / "params.yaml")
