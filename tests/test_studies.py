"""Studies: definitions, the number of pieces of work, and agreement with DVC."""

import contextlib
import csv
import html
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml
from PIL import Image
from workspace import Project, start_warm, warm_children, warm_python, yaml_text

from secateur.base import settings as base_settings
from secateur.base.errors import SecateurError, SettingsError
from secateur.base.sections import Train
from secateur.base.settings import check as check_settings
from secateur.base.settings import check_values, merged
from secateur.cli import build_parser
from secateur.studies import definition, estimate, plan, progress, run, search
from secateur.studies.execution import snapshot
from secateur.studies.execution.keys import Graph
from secateur.studies.report import trials as drawn_trials
from secateur.studies.space import Range
from secateur.training import optim

ROOT = Path(__file__).resolve().parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
TRAINING = ("baseline", "sparse-train", "finetune")


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """Write studies/mine.yaml into an empty folder, and load it."""
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(**content):
        content = {"about": "a test", "seeds": [1]} | content
        (tmp_path / "studies/mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return definition.load("mine", PARAMS)

    return write


METHODS = {
    "L1": {"pruner": "magnitude", "pruners": {"magnitude": {"ratios": "{ratio}"}}},
    "slim": {"pruner": "network_slimming", "pruners": {"network_slimming": {"ratio": "{ratio}"}}},
}


def test_axes_are_combined_and_their_values_filled_in(write_study):
    study = write_study(
        axes={"method": METHODS, "ratio": [0.5, 0.7], "decay": ["1e-4"]},
        seeds=[1, 2],
        exclude=[{"method": "slim", "ratio": 0.7}],
        settings={"baseline": {"epochs": 3}},
    )
    assert [c.name for c in study.cells] == [
        f"mine-{m}-{r}-1e-4-s{s}" for m, r in (("L1", "0.5"), ("L1", "0.7"), ("slim", "0.5"))
        for s in (1, 2)
    ]  # fmt: skip
    cell = study.cells[3]
    assert (cell.method, cell.point, cell.seed, cell.control) == ("L1", "0.7 1e-4", 2, None)
    assert cell.settings == {
        "baseline": {"epochs": 3}, "pruner": "magnitude", "decay": 1e-4, "seed": 2,
        "pruners": {"magnitude": {"ratios": 0.7}},
    }  # fmt: skip


def test_studies_are_listed_with_what_they_compare(write_study, capsys, tmp_path):
    write_study(about="criteria at equal MACs")
    (tmp_path / "studies/broken.yaml").write_text("about: [")
    with pytest.raises(SettingsError, match=r"studies/broken\.yaml"):
        run.command(build_parser().parse_args(["study"]))
    assert capsys.readouterr().out == "mine    criteria at equal MACs\n"


def test_exclude_takes_any_value_that_an_axis_has(write_study):
    axes = {"prune.remove_dead": [True, False], "decay": ["1e-4", 0.001]}
    hidden = {"archs.lenet300.hidden": [[300, 100], [30, 10]]}
    rules = [
        {"prune.remove_dead": True},
        {"decay": 0.0001, "archs.lenet300.hidden": [300, 100]},
        {"decay": [0.001], "archs.lenet300.hidden": [[30, 10], [300, 100]]},
    ]
    study = write_study(axes=axes | hidden, exclude=rules)
    (cell,) = study.cells
    assert cell.settings["prune"] == {"remove_dead": False} and cell.settings["decay"] == 1e-4
    assert cell.settings["archs"] == {"lenet300": {"hidden": [30, 10]}}


def test_labels_may_be_named_low_and_high(write_study):
    study = write_study(axes={"amount": {"low": {"decay": 1e-4}, "high": {"decay": 1e-3}}})
    assert [(c.method, c.settings["decay"]) for c in study.cells] == [("low", 1e-4), ("high", 1e-3)]


def test_controls_change_one_thing(write_study):
    study = write_study(
        axes={"method": METHODS, "ratio": [0.5]},
        settings={"baseline": {"epochs": 7, "lr": 0.5}, "sparse_train": {"epochs": 2},
                  "finetune": {"epochs": 3},
                  "prune": {"branches": ["layer1.0"], "recalibrate": 64, "latency": "torch"}},
        controls=["dense", "dense_longer", "random", "scratch", "smaller"],
    )  # fmt: skip
    found = {}
    for cell in study.cells:
        found.setdefault(cell.control, []).append(cell.settings)
    (dense,), (longer,) = found["dense"], found["dense_longer"]
    assert dense["baseline"]["epochs"] == 7 and longer["baseline"]["epochs"] == 12
    for one in (dense, longer):
        assert one["sparse_train"]["epochs"] == one["finetune"]["epochs"] == 0
        assert one["pruners"]["threshold"]["sensitivity"] == 0 and one["penalty"] == "none"
        assert one["parametrization"] == "none", "parametrizations prune even in no epochs"
        assert one["prune"] == {"branches": [], "remove_dead": False, "group_convolutions": False,
                                "recalibrate": 0, "latency": "none"}  # fmt: skip
    (random,) = found["random"]  # network slimming has none
    assert random["pruners"]["magnitude"] == {"ratios": 0.5, "pick": "random"}
    assert [s["finetune"]["budget"] for s in found["scratch_compute"]] == ["compute"] * 2
    for scratch in found["scratch_epochs"]:
        assert (
            scratch["finetune"]["init"] == "scratch" and scratch["finetune"]["budget"] == "epochs"
        )
        assert (scratch["finetune"]["epochs"], scratch["finetune"]["lr"]) == (7, 0.5)
    (smaller,) = found["smaller"]
    assert smaller["baseline"]["epochs"] == 0 and smaller["finetune"]["epochs"] == 7
    assert any("slim: no control 'random'" in note for note in study.notes)
    assert any("slim: no control 'smaller'" in note for note in study.notes)


def test_methods_have_one_dense_network_in_common_however_it_is_written(write_study):
    baseline = PARAMS["baseline"]
    methods = {
        "as in params.yaml": {},
        "written out": {"baseline": dict(reversed(baseline.items()))},
        "for rewinding": {"baseline": {"keep_epoch": 1}},
        "of another data set": {"datasets": {"cifar10": {"version": 2}}},
    }
    assert PARAMS["dataset"] != "cifar10"
    dense = [
        c for c in write_study(axes={"method": methods}, controls=["dense"]).cells if c.control
    ]
    assert [cell.name for cell in dense] == ["mine-dense-s1"]


def test_several_dense_networks_are_named_by_what_differs(write_study):
    methods = {
        "short": {"baseline": {"epochs": 4}},
        "long": {"baseline": {"epochs": 9, "lr": 0.5}},
        "other": {"baseline": {"epochs": 4}, "arch": "lenet5"},
        "deep": {"baseline": {"epochs": 4}, "arch": "resnet_cifar"},
        "deeper": {
            "baseline": {"epochs": 4},
            "arch": "resnet_cifar",
            "archs": {"resnet_cifar": {"depth": 110}},
        },
    }
    study = write_study(axes={"method": methods}, controls=["dense"])
    depth, lr = PARAMS["archs"]["resnet_cifar"]["depth"], PARAMS["baseline"]["lr"]
    assert [c.point for c in study.cells if c.control] == [
        f"arch lenet300 epochs 4 lr {lr}",
        "arch lenet300 epochs 9 lr 0.5",
        f"arch lenet5 epochs 4 lr {lr}",
        f"arch resnet_cifar epochs 4 lr {lr} depth {depth}",
        f"arch resnet_cifar epochs 4 lr {lr} depth 110",
    ]
    names = [c.name for c in study.cells if c.control]
    assert names[1] == "mine-dense-arch-lenet300-epochs-9-lr-0.5-s1"


def test_a_dense_network_that_is_not_trained_is_no_training_to_copy(write_study):
    """Weights from a file, without further training: new weights would be evaluated as they are."""
    controls = ["dense", "random", "scratch", "smaller"]
    axes = {"method": {"L1": METHODS["L1"]}, "ratio": [0.5]}
    given = {"baseline": {"epochs": 0, "weights": "mine.safetensors"}}
    study = write_study(settings=given, axes=axes, controls=controls)
    assert [cell.control for cell in study.cells] == [None, "dense", "random"]
    words = "its dense network is not trained (baseline.epochs = 0)"
    kinds = ("scratch_epochs", "scratch_compute", "smaller")
    assert {*study.notes} == {f"L1: no control '{kind}': {words}" for kind in kinds}


def test_scratch_adds_to_its_two_parts(write_study):
    both = {"scratch": ["L1"], "scratch_epochs": ["slim"]}
    study = write_study(axes={"method": METHODS, "ratio": [0.5]}, controls=both)
    found = {(cell.control, cell.method) for cell in study.cells if cell.control}
    parts = {(f"scratch_{part}", "L1") for part in ("epochs", "compute")}
    assert found == parts | {("scratch_epochs", "slim")}


@pytest.mark.parametrize("schedule", ["multistep", "cosine"])
def test_a_longer_dense_network_has_the_same_schedule_over_all_epochs(write_study, schedule):
    """Sixteen epochs in place of eight: at every moment, the rate of the eight at half the time."""
    milestones = [4, 6] if schedule == "multistep" else []
    short = {"epochs": 8, "schedule": schedule, "schedule_by": "step", "warmup": 2, "lr": 0.1,
             "milestones": milestones, "schedule_after": 1,
             "average": {"kind": "swa", "start": 11}}  # fmt: skip
    study = write_study(
        settings={"baseline": short, "sparse_train": {"epochs": 3}, "finetune": {"epochs": 5}},
        axes={"method": {"one": {}}},
        controls=["dense_longer"],
    )
    found = {c.control: check_values(merged(PARAMS, c.settings)).baseline for c in study.cells}
    before, after = found[None], found["dense_longer"]
    assert (before.epochs, after.epochs, after.warmup, after.schedule_after) == (8, 16, 4, 2)
    assert list(after.milestones) == [2 * m for m in milestones]
    assert after.average == before.average.model_copy(update={"start": 22})
    for step in range(8 * 10):
        expected = optim.rate(before, step, 10)
        assert optim.rate(after, step, 5) == pytest.approx(expected, rel=1e-12), step


def test_controls_trained_like_the_dense_network_have_no_teacher(write_study):
    """As that network has none; with one round and with two, whose files are the same."""
    taught = {"init": "rewind", "rewind_to": "models/baseline",
              "distillation": {"teacher": "models/baseline", "features": ["fc1"]}}  # fmt: skip
    target = {"target": {"params": 0.5, "of": "dense"}, "granularity": "filter"}
    again = {"after": "finetuned", "sparse_train": {}, "finetune": {"init": "inherit"},
             "prune": {"pruners": {"magnitude": target}}}  # fmt: skip
    study = write_study(
        settings={"baseline": {"keep_epoch": 1}, "pruner": "magnitude", "finetune": taught,
                  "pruners": {"magnitude": target}},
        axes={"method": {"one": {}, "two": {"rounds": {"two": again}}}},
        controls=["scratch", "smaller"],
    )  # fmt: skip
    seen = set()
    for cell in study.cells:
        settings = check_values(merged(PARAMS, cell.settings))
        last = settings.of_round("two") if settings.rounds else settings
        taught_by = last.finetune.distillation
        has_teacher = taught_by.teacher != "weights/none" and bool(
            taught_by.weight or taught_by.features
        )
        assert has_teacher == (cell.control is None), cell.name
        assert (last.finetune.init == "scratch") == (cell.control is not None), cell.name
        if not settings.rounds and cell.control:
            assert last.finetune.rewind_to == taught_by.teacher == "weights/none"
        seen.add((cell.control, bool(settings.rounds)))
    both = {(c, many) for c in (None, "scratch_epochs", "scratch_compute") for many in (0, 1)}
    assert seen == both | {("smaller", False)}


def test_controls_have_the_teacher_of_the_dense_network(write_study):
    """With its own temperature; in a round only if the round's teacher is the same file."""
    ours, other = "weights/ours.safetensors", "weights/other.safetensors"
    taught = {"teacher": ours, "temperature": 3.0, "weight": 0.25}
    target = {"target": {"params": 0.5, "of": "dense"}, "granularity": "filter"}
    again = {"after": "finetuned", "sparse_train": {}, "finetune": {},
             "prune": {"pruners": {"magnitude": target}}}  # fmt: skip
    study = write_study(
        settings={"baseline": {"distillation": taught}, "pruner": "magnitude",
                  "pruners": {"magnitude": target}},
        axes={"method": {
            "none": {}, "other": {"finetune": {"distillation": {"teacher": other}}},
            "ours2": {"finetune": {"distillation": {"teacher": ours}}, "rounds": {"two": again}},
            "none2": {"rounds": {"two": again}},
        }},
        controls=["scratch", "smaller"],
    )  # fmt: skip
    seen = []
    for cell in study.cells:
        settings = check_values(merged(PARAMS, cell.settings))
        dense, last = settings.baseline.distillation, settings
        if settings.rounds:
            last = settings.of_round("two")
        if cell.control:
            assert last.finetune.distillation.model_dump() == {
                "teacher": ours, "code": "weights/none", "temperature": 3.0, "weight": 0.25,
                "features": (), "features_weight": 1.0,
            }, cell.name  # fmt: skip
            assert (dense.teacher == ours) == (cell.control != "smaller"), cell.name
            seen.append((cell.control, bool(settings.rounds)))
    assert set(seen) == {(c, r) for c in ("scratch_epochs", "scratch_compute") for r in (0, 1)} | {
        ("smaller", False)
    }
    assert any("none2: no control 'scratch_epochs': its dense" in note for note in study.notes)


def test_controls_are_trained_like_a_dense_network_with_defaults(write_study, monkeypatch):
    """params.yaml may leave settings out: those of finetune are not settings of the baseline."""
    kept = {"epochs": 8, "distillation": {"teacher": "weights/none", "code": "weights/none"}}
    short = PARAMS | dict.fromkeys(("baseline", "sparse_train"), kept)
    short["finetune"] = kept | {"rewind_to": "weights/none"}
    monkeypatch.setitem(globals(), "PARAMS", short)
    own = {"lr": 0.5, "schedule": "multistep", "milestones": [4], "average": {"kind": "ema"},
           "distillation": {"teacher": "weights/a.safetensors", "features": ["fc1"]}}  # fmt: skip
    pruning = {"granularity": "filter", "target": {"params": 0.5, "of": "dense"}}
    study = write_study(
        settings={"baseline": {"batch_size": 32}, "finetune": own, "pruner": "magnitude",
                  "pruners": {"magnitude": pruning}},
        axes={"method": {"one": {}, "two": {"rounds": {"two": ROUND}}}},
        controls=["scratch", "smaller"],
    )  # fmt: skip
    others = {"epochs", "distillation"}
    expected = Train(epochs=8, batch_size=32).model_dump(exclude=others)
    controls = [cell for cell in study.cells if cell.control]
    for cell in controls:
        settings = check_values(merged(short, cell.settings))
        last = settings.of_round("two") if settings.rounds else settings
        found = last.finetune.model_dump(include=set(Train.model_fields), exclude=others)
        assert found == expected, cell.name
        taught_by = last.finetune.distillation
        assert taught_by.teacher == "weights/none" or taught_by.weight == 0, cell.name
        assert not taught_by.features, cell.name
    assert len(controls) == 6


@pytest.mark.parametrize("own", [{"target": None, "ratios": 0.7}, {"ratios": 0.7}])
def test_a_smaller_network_has_the_amounts_of_its_method(write_study, monkeypatch, own):
    """Also where params.yaml has a target, which the study takes away."""
    given = {"target": {"macs": 0.5, "of": "dense"}, "granularity": "filter"}
    pruners = PARAMS["pruners"] | {"magnitude": given}
    monkeypatch.setitem(globals(), "PARAMS", PARAMS | {"pruners": pruners})
    last = ROUND | {"prune": {"pruners": {"magnitude": {"target": {"params": 0.2, "of": "dense"}}}}}
    study = write_study(
        settings={"pruner": "magnitude", "pruners": {"magnitude": own}},
        axes={"method": {"one": {}, "two": {"rounds": {"two": last}}}},
        controls=["smaller"],
    )
    found = {}
    for cell in study.cells:
        settings = check_values(merged(PARAMS, cell.settings))
        settings = settings.of_round("two") if settings.rounds else settings
        pruner = settings.chosen("pruners")
        found.setdefault(cell.method, []).append((pruner.target, pruner.ratios))
    for method, (of_method, of_control) in found.items():
        assert of_control == of_method, method


ROUND = {"after": "finetuned", "sparse_train": {}, "prune": {}, "finetune": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"nosuch": [1]}}, "axes.nosuch: neither a key of params.yaml nor used as"),
        ({"axes": {"decay": []}}, "axes.decay: has no values"),
        ({"axes": {"decay": [1, 1]}}, "axes.decay: a value is repeated"),
        ({"seeds": [1, 1]}, "each only once"),
        ({"seeds": []}, "seeds = []"),
        ({"exclude": [{"x": 1}]}, "exclude.0.x: no axis"),
        (
            {
                "axes": {"method": METHODS},
                "exclude": [{"method": "L1"}, {"method": ["slim", "l1"]}],
            },
            "exclude.1.method = 'l1': no value of this axis; it has 'L1, slim'",
        ),
        ({"axes": {"decay": [1, 2]}, "exclude": [{"decay": True}]}, "0.decay = True: no value"),
        ({"axes": {"decay": [1, 2]}, "exclude": [{"decay": []}]}, "0.decay = []: no value"),
        ({"axes": {"decay": [1, 2]}, "exclude": [{"decay": [1, 2]}]}, "exclude: it leaves no"),
        ({"axes": {"seed": [1, 2]}}, "axes.seed: of no effect; `seeds` has the seeds"),
        ({"settings": {"seed": 1}}, "settings.seed: of no effect; `seeds` has"),
        ({"axes": {"m": {"a": {"seed": 1}}}}, "axes.m.a.seed: of no effect; `seeds` has"),
        (
            {"axes": {"m": {"a": {"baseline": 3}}}, "controls": ["dense"]},
            "mine.yaml: a: baseline = 3: a table of settings is needed",
        ),
        (
            {
                "settings": {"rounds": {"two": dict(ROUND, finetune={"epochs": "x"})}},
                "controls": ["dense_longer"],
            },
            "rounds.two.finetune.epochs = 'x': a whole number is needed",
        ),
        (
            {
                "settings": {"rounds": {"two": dict(ROUND, prune={"pruners": [1]})}},
                "controls": ["smaller"],
            },
            "mine.yaml: mine: rounds.two.prune.pruners = [1]: a table of settings is needed",
        ),
        ({"axes": {"m": {"low": {}, "high": 1}}}, "axes.m.high = 1: a table is needed"),
        (
            {"controls": ["best"]},
            "mine.yaml: controls.0 = 'best': must be 'dense', 'dense_longer', ",
        ),
        ({"controls": {"dens": ["L1"]}}, "mine.yaml: controls: key 'dens': must be 'dense', "),
        ({"controls": "dense"}, "mine.yaml: controls = 'dense': a list or a table is needed"),
        ({"control": ["dense"]}, "mine.yaml: control: unknown key; allowed: about, axes, "),
        ({"control": ["dense"]}, "; did you mean controls?"),
        ({"seeds": ["1"]}, "mine.yaml: seeds.0 = '1': a whole number is needed"),
        ({"controls": {"random": ["L9"]}}, "controls.random: 'L9' is no method"),
        ({"method": ["x"]}, "method: 'x' is no axis"),
        ({"axes": {"m": {"a b": {}, "a-b": {}}}}, "would both be named mine-a-b-s1"),
        ({"recipe": "nosuch"}, "recipe 'nosuch': there is none"),
        ({"extra": 1}, "extra: unknown key; allowed: "),
        ({"axes": {"decay": {"low": 1e-5, "high": 1e-3}}}, "axes.decay: a range is for a search"),
        ({"axes": {"arch": [*range(200)], "decay": [*range(200)]}}, "40,000 cells"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_in_one_line(write_study, content, message):
    with pytest.raises(SettingsError) as error:
        write_study(**content)
    assert message in str(error.value) and "\n" not in str(error.value)


RANGES = {"decay": {"low": "1e-5", "high": 1e-3, "log": True}, "method": METHODS}
SOUGHT = {"search": {"trials": 6}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"decay": {"low": 1, "high": 1}}}, "low = 1 is not below high = 1"),
        ({"axes": {"decay": {"low": 0, "high": 1, "log": True}}}, "log needs low > 0"),
        ({"axes": {"decay": {"low": 0.5, "high": 1, "step": 2}}}, "step = 2: more than 0"),
        ({"axes": {"decay": {"low": 1, "high": 9, "step": 0.5}}}, "step = 0.5: a whole number"),
        ({"axes": {"decay": {"low": 1, "high": 9, "extra": 1}}}, "extra: unknown key; allowed: "),
        ({"axes": {"nosuch": {"low": 1, "high": 9}}}, "axes.nosuch: neither a key"),
        ({"axes": {"decay": []}}, "axes.decay: has no values"),
        ({"axes": {}}, "there are no axes"),
        ({"controls": ["dense"]}, "controls: not together with search"),
        ({"exclude": [{"decay": 1}]}, "exclude: not together with search"),
        ({"search": {"trials": 0}}, "search.trials = 0"),
        ({"search": {"trials": 1, "objectives": ["macs", "macs"]}}, "each only once"),
        ({"search": {"trials": 1, "objectives": ["speed"]}}, "search.objectives.0 = 'speed'"),
        ({"search": {"trials": 1, "objectives": ["parameters"]}}, "did you mean params?"),
        ({"search": {"trials": 1, "sampler": "grid"}}, "search.sampler = 'grid'"),
    ],
)
def test_what_is_wrong_with_a_search_is_said_in_one_line(write_study, content, message):
    with pytest.raises(SettingsError) as error:
        write_study(**({"axes": RANGES} | SOUGHT | content))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("studies/*.yaml")))
def test_the_studies_of_this_repository_ask_for_what_is_allowed(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = definition.load(name, PARAMS)
    cells = study.cells
    if study.space is not None:
        lowest = {axis: definition.first(values) for axis, values in study.space.axes.items()}
        cells = study.space.cells("t000", lowest)
    differing = {yaml.safe_dump(cell.settings | {"seed": 0}): cell for cell in cells}
    assert differing
    for cell in differing.values():
        (tmp_path / "params.yaml").write_text(yaml_text(merged(PARAMS, cell.settings)))
        check_settings(tmp_path / "params.yaml")


def test_cells_of_a_trial_have_the_values_that_were_chosen(write_study):
    axes = {"ratio": {"low": 0.1, "high": 0.9}, "method": METHODS, "baseline.epochs": [3, 5]}
    study = write_study(axes=axes, seeds=[1, 2], **SOUGHT)
    assert study.cells == () and study.space.axes["method"] == ("L1", "slim")
    chosen = {"ratio": 0.12345, "method": "slim", "baseline.epochs": "5"}
    first, second = study.space.cells("t007", chosen)
    assert (first.name, second.name) == ("mine-t007-s1", "mine-t007-s2")
    assert (first.method, first.point) == ("slim", "t007: ratio 0.123 epochs 5")
    assert first.settings["pruners"] == {"network_slimming": {"ratio": 0.12345}}
    assert first.settings["baseline"] == {"epochs": 5} and second.settings["seed"] == 2
    axes |= {"finetune.epochs": {"low": 1, "high": 9}}
    (first, _) = write_study(axes=axes, seeds=[1, 2], **SOUGHT).space.cells(
        "t008", chosen | {"finetune.epochs": 4}
    )
    assert first.point == "t008: ratio 0.123 baseline.epochs 5 finetune.epochs 4"


@pytest.mark.parametrize("column", ["params", "parameters"])
def test_trials_are_drawn_also_from_a_table_of_an_earlier_version(column, tmp_path):
    table = f"trial,decay,accuracy,{column},best\n0,0.1,0.9,0.5,1\n"
    (tmp_path / drawn_trials.TRIALS).write_text(table)
    (axes,) = drawn_trials.figure(tmp_path, ["accuracy", "params"]).axes
    assert axes.get_xlabel() == "share of the parameters that is left"
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0.5, 0.9]]] * 2


def _searched(space, interrupt):
    """Finish all trials, with values computed from their params; interruptions restart it."""
    while True:
        trials = search.Trials("mine", space)
        trials.claim("as it is")
        if not trials.missing():
            return trials
        for trial in trials.propose():
            if next(interrupt):
                break
            decay, slim = trial.params["decay"], trial.params["method"] == "slim"
            trials.tell(trial, {"accuracy": 1 - abs(decay - 3e-4), "macs": decay + slim})


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_an_interrupted_search_proposes_the_trials_of_one_that_was_not(write_study, sampler):
    how = {"trials": 14, "sampler": sampler, "objectives": ["accuracy", "macs"], "batch": 3}
    space = write_study(axes=RANGES, search=how).space
    pytest.importorskip("optuna")
    whole = _searched(space, itertools.repeat(False)).finished()
    search.journal("mine").unlink()
    broken = _searched(space, itertools.cycle([False, False, True, False, True]))
    assert [t.params for t in broken.finished()] == [t.params for t in whole]
    assert len(whole) == 14 and len({t.params["decay"] for t in whole}) > 4
    assert all(1e-5 <= t.params["decay"] <= 1e-3 for t in whole)
    better = {
        one.number
        for one in whole
        if not any(
            other.values[0] >= one.values[0] and other.values[1] <= one.values[1]
            and other.values != one.values
            for other in whole
        )
    }  # fmt: skip
    assert {trial.number for trial in broken.best()} == better
    assert {row.number for row in broken.rows() if row.best} == better


def test_failed_trials_are_tried_again_by_the_next_call_and_once_in_each(write_study):
    """A retried trial keeps its values, and the search ends like one without failures."""
    pytest.importorskip("optuna")
    how = {"trials": 7, "sampler": "random", "objectives": ["accuracy", "macs"], "batch": 3}
    space = write_study(axes=RANGES, search=how).space
    whole = _searched(space, itertools.repeat(False)).finished()
    search.journal("mine").unlink()
    tried = Counter()
    trials = search.Trials("mine", space)
    while trials.missing():
        for trial in trials.propose():
            tried[trial.number] += 1
            if trial.number in (1, 4):
                trials.tell(trial, {"accuracy": 0.5, "macs": 0.5})
            else:
                trials.fail(trial)
    assert tried == dict.fromkeys(range(7), 1) and trials.count() == 2
    assert [bool(row.values) for row in trials.rows()] == [n in (1, 4) for n in range(7)]
    again = search.Trials("mine", space)
    assert again.missing() and [t.number for t in again.propose()] == [0, 2, 3, 5, 6]
    done = _searched(space, itertools.repeat(False))
    assert [t.params for t in done.finished()] == [t.params for t in whole]
    assert done.count() == 7 and len(done.rows()) == 7


def test_a_journal_of_something_else_is_refused(write_study, tmp_path):
    pytest.importorskip("optuna")
    space = write_study(axes=RANGES, **SOUGHT).space
    search.Trials("mine", space).claim("one state of the code")
    written = (tmp_path / "studies/mine.journal").read_bytes()
    search.Trials("mine", space).claim("one state of the code")
    assert (tmp_path / "studies/mine.journal").read_bytes() == written, "nothing new has happened"
    with pytest.raises(SettingsError, match="other axes, objectives, seeds, settings, code or"):
        search.Trials("mine", space).claim("another")
    one = write_study(axes=RANGES, search={"trials": 2, "objectives": ["accuracy"]}).space
    with pytest.raises(SettingsError, match=r"mine\.journal"):
        search.Trials("mine", one)
    (tmp_path / "studies/mine.journal").write_text("{]\n")
    with pytest.raises(SettingsError, match=r"mine\.journal"):
        search.Trials("mine", space)


@pytest.mark.pipeline
def test_a_search_evaluates_what_no_other_trial_beats(project):
    pytest.importorskip("optuna")
    axes = {"pruners.std.sensitivity": {"low": 0.1, "high": 2.0}}
    how = {"trials": 4, "sampler": "random", "batch": 2}
    study_of(project, axes=axes, search=how)
    log = run_study(project)
    assert "trial 3: accuracy" in log and "4 of 4 done" in log
    with (project.path / "report/mine/trials.csv").open() as lines:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]
    best = [
        int(one["trial"])
        for one in rows
        if not any(
            (other["accuracy"], -other["params"]) != (one["accuracy"], -one["params"])
            and other["accuracy"] >= one["accuracy"]
            and other["params"] <= one["params"]
            for other in rows
        )
    ]
    assert len(rows) == 4 and best == [int(row["trial"]) for row in rows if row["best"]]
    named = project.run("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps")
    assert {f"mine-t{number:03d}-s1" for number in best} == {
        name for name in named.split() if name.startswith("mine-t")
    }
    for number in best:  # the search and evaluate report the same parameters
        show = f"refs/exps/{_baseline(project)}/mine-t{number:03d}-s1:metrics/evaluate.json"
        report = json.loads(project.run("git", "show", show))
        assert 1 / report["compression"] == pytest.approx(rows[number]["params"])
    again = run_study(project)
    assert "0 pieces of work were run" in again and "trial" not in again.replace("trials", "")
    assert "4 in studies/mine.journal, 0 to be run" in run_study(project, "--plan")


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("axes", "cell"),
    [
        (
            {"method": {"A": {}, "B": {"finetun": {}}}},
            "mine-method-B-s1: params.yaml: finetun: unk",
        ),
        (
            {"data.validation": {"low": 0.1, "high": 0.7, "step": 0.5}},
            "mine-data.validation-0.6-s1: params.yaml: data.validation = 0.6: must be",
        ),
    ],
)
def test_a_search_checks_all_labels_and_ends_before_it_begins(project, axes, cell):
    """And leaves no journal that a corrected study would be refused for."""
    pytest.importorskip("optuna")
    decay = {"decay": {"low": 1e-5, "high": 1e-4}}
    how = {"trials": 1, "sampler": "random", "batch": 1, "objectives": ["params"]}
    short = {"baseline": {"epochs": 1}, "sparse_train": {"epochs": 0}, "finetune": {"epochs": 0}}
    study_of(project, axes=axes | decay, search=how, settings=short)
    log = run_study(project, ok=False)
    assert f"error: cell {cell}" in log and len(log.splitlines()) == 1
    study_of(project, axes=decay, search=how, settings=short)
    assert "1 of 1 done" in run_study(project)


@pytest.mark.pipeline
def test_a_search_judges_a_network_whose_last_training_has_no_epochs(project):
    """Nothing is pruned, so its accuracy on the validation images is that of the dense network."""
    pytest.importorskip("optuna")
    short = {"baseline": {"epochs": 1}, "sparse_train": {"epochs": 0}, "finetune": {"epochs": 0}}
    study_of(
        project, settings=short | {"pruner": "threshold", "penalty": "none"},
        axes={"pruners.threshold.sensitivity": {"low": 0.0, "high": 1e-12}},
        search={"trials": 1, "sampler": "random", "objectives": ["accuracy"]},
    )  # fmt: skip
    assert "1 of 1 done" in run_study(project)
    with (project.path / "report/mine/trials.csv").open() as lines:
        (row,) = csv.DictReader(lines)
    project.run("git", "stash", "-u", "-q")
    project.dvc("exp", "apply", "mine-t000-s1")
    record = json.loads((project.path / "models/baseline.run.json").read_text())
    assert float(row["accuracy"]) == record["metrics"]["val_accuracy"] > 0.1


def test_the_highest_number_is_that_of_optuna():
    optuna = pytest.importorskip("optuna")
    for low, high, step in [
        (0.1, 0.7, 0.5),
        (0.1, 0.7, 0.2),
        (0.0, 0.3, 0.1),
        (1, 9, 3),
        (0.5, 1, 0.2),
    ]:
        space = Range(low=low, high=high, step=step)
        with warnings.catch_warnings(action="ignore"):
            kinds = optuna.distributions
            kind = kinds.IntDistribution if space.whole else kinds.FloatDistribution
            assert space.highest == kind(low, high, step=step).high
        assert isinstance(space.highest, int) == space.whole
    assert Range(low=0.5, high=1).highest == 1


@pytest.mark.pipeline
def test_a_search_for_accuracy_without_validation_images_ends_before_it_trains(
    unborn, monkeypatch, tmp_path
):
    """A data set with its own val can be searched, whatever data.validation says."""
    pytest.importorskip("optuna")
    for split, name in itertools.product(("train", "val", "test"), "ab"):
        (tmp_path / "images" / split / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), 9 * number).save(
                tmp_path / "images" / split / name / f"{number}.png"
            )
    unborn.enter(monkeypatch, SECATEUR_DATA=str(tmp_path))
    start_warm(monkeypatch)
    axes = {"pruners.std.sensitivity": {"low": 0.1, "high": 2.0}}
    options = build_parser().parse_args(["study", "mine", "--workers", "1"])
    for own in ({"dataset": "digits"}, {"dataset": "image_folder", "datasets": {"image_folder": {
            "folder": "images", "size": 8, "channels": 1}}}):  # fmt: skip
        settings = {"penalty": "none", "data": {"validation": 0}} | own
        study_of(unborn, axes=axes, search={"trials": 2}, settings=settings)
        state = snapshot.take(unborn.path)
        space = definition.load("mine", base_settings.raw()).space
        refused = pytest.raises(SettingsError, match=r"set data\.validation above 0")
        with state.held(), refused if own["dataset"] == "digits" else contextlib.nullcontext():
            graph = Graph(state.copy("plan"), state.root)
            search._check_validation(state, graph, space, options)
        made = [path.name for path in unborn.path.glob(".dvc/cache/runs/*/*/*")]
        assert len(made) == 1 + (own["dataset"] != "digits"), "only data sets have been prepared"


def test_a_runtime_that_is_missing_is_named_before_anything_runs(monkeypatch, tmp_path):
    """In an empty folder, where any later check would report a missing study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    options = build_parser().parse_args(["study", "mine", "--latency", "openvino"])
    with pytest.raises(SecateurError, match=r"openvino is needed to run \.onnx files"):
        run.command(options)


def test_a_study_that_is_not_there_is_named_with_those_that_are(write_study):
    write_study()
    with pytest.raises(SettingsError, match=r"study 'mien': there is none .*: mine"):
        definition.load("mien", PARAMS)


def test_a_grid_costs_one_training_for_each_thing_that_differs(tmp_path):
    """All grids of up to four decays, pruners' settings and seeds, on this repository's stages."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True,
        check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "metrics/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for rest in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "state"]):
        subprocess.run([*command, *rest], cwd=tmp_path, check=True)
    planned = subprocess.run(
        [warm_python(), "-c", (ROOT / "tests/planned.py").read_text(), str(tmp_path)],
        cwd=tmp_path, env=Project(tmp_path).env(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(planned.stdout)
    assert len(found) == 4**3
    for grid in found:
        (decays, prunes, seeds), counts = grid["sizes"], grid["stages"]
        assert counts["prepare"] == 1
        assert counts["prune"] == counts["evaluate"] == counts["finetune"]
        assert sum(counts[name] for name in TRAINING) == seeds * (1 + decays + decays * prunes)
        assert grid["trainings"] == seeds * (1 + decays + decays * prunes)
        assert grid["in order"]


def study_of(project, **content):
    short = {"about": "a test", "seeds": [1], "settings": {"penalty": "none"}}
    (project.path / "studies").mkdir(exist_ok=True)
    (project.path / "studies/mine.yaml").write_text(
        yaml.safe_dump(short | content, sort_keys=False)
    )


def run_study(project, *options, tracking="off", **more):
    command = ["python", "-m", "secateur", "study", "mine", "--workers", "2", *options]
    return project.run(*command, SECATEUR_TRACKING=tracking, **warm_children(), **more)


@pytest.mark.pipeline
def test_the_keys_are_those_of_dvc_and_so_is_the_experiment(project):
    """Results of `dvc repro` are found, and the cell's experiment has DVC's own dvc.lock."""
    seed = base_settings.raw(project.path / "params.yaml")["seed"]
    study_of(project, seeds=[seed], settings={})
    log = run_study(project)
    assert "1 of 1 cells are experiments of DVC; 0 pieces of work were run" in log
    show = ["git", "show", f"refs/exps/{_baseline(project)}/mine-s{seed}:dvc.lock"]
    ours = yaml.safe_load(project.run(*show))
    assert ours == yaml.safe_load((project.path / "dvc.lock").read_text())
    assert project.run("git", "diff", "HEAD", show[2].partition(":")[0]) == ""
    again = run_study(project, "--latency", "torch", "--repeats", "3")
    assert f"latency: 1 of 1: mine-s{seed}" in again and "0 pieces of work" in again
    assert "torch.export speed-up" in (project.path / "report/mine/table.md").read_text()
    assert "up to date" in run_study(project, "--latency", "torch", "--repeats", "3")
    study_of(project, seeds=[seed], settings={}, axes={"finetune.epochs": [0]})
    assert "2 pieces of work were run" in run_study(project)
    study_of(project, seeds=[seed], settings={}, axes={"finetune.epochs": [0, 5]})
    shown = run_study(project, "--plan")
    assert re.search("finetune .* 1 to be run", shown)
    assert "no records" in shown, "the time of no epochs says nothing about five"


@pytest.mark.pipeline
def test_what_dvc_cannot_read_is_told_in_one_line(unborn):
    study_of(unborn)
    (unborn.path / "dvc.yaml").write_text("stages: [\n")
    (line,) = run_study(unborn, "--plan", ok=False).strip().splitlines()
    assert line.startswith("error: DVC: ") and "dvc.yaml" in line


def test_what_reads_a_failed_piece_is_no_work_that_is_left():
    reads = {"data": [], "dense": ["data"], "l1": ["dense"], "other": ["data"], "both": ["l1"]}
    works = {id: plan.Work(id, None, {n: n for n in all}, 0)
             for id, all in reads.items()}  # fmt: skip
    made = plan.Plan(None, [], works, entries={"data": {}})
    left = [work.id for work in made.still_possible(["dense"])]
    assert left == ["other"]
    assert [work.id for work in made.still_possible([])] == ["dense", "l1", "other", "both"]


def test_a_budget_of_computation_is_work_of_its_own_kind():
    declared = {"finetune": {"epochs": 5, "budget": "epochs"}, "arch": "lenet5"}
    longer = {"finetune": {"epochs": 5, "budget": "compute"}, "arch": "lenet5"}
    assert estimate._kind("finetune", declared)[0] != estimate._kind("finetune", longer)[0]


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ((90.0, [], 1), "about 90 s left"),
        ((90.0, [], 2), "about 45 s left"),
        ((90.0, ["prune"], 0), "more than 90 s left"),
        (
            (0.0, ["baseline", "finetune"], 2),
            "time left is known when the first baseline has ended",
        ),
        ((0.0, [], 1), "nearly finished"),
    ],
)
def test_the_time_left_in_words(known, words):
    assert progress.time_left(*known) == words


@pytest.mark.pipeline
def test_cells_that_are_the_same_work_are_told(project):
    """Pruner std has no use for the ratios of magnitude, and sparse-train one for the decay."""
    axes = {"pruners.magnitude.ratios": [0.25, 0.5], "decay": [0.0003, 0.0001]}
    study_of(project, axes=axes, controls=["dense"])
    shown = run_study(project, "--plan")
    told = [line.split("note")[1].strip() for line in shown.splitlines() if "note " in line]
    end = "once more: the settings in which they differ have no effect"
    assert told == [
        f"mine-0.5-{decay}-s1 is mine-0.25-{decay}-s1 {end}" for decay in (0.0003, 0.0001)
    ]


class _Busy:
    """An executor whose tasks never finish."""

    slots = 1

    def __init__(self):
        self.begun, self.waits = [], 0

    def submit(self, task):
        self.begun.append(task.stage)

    def wait(self, seconds):
        assert seconds == progress.OFTEN
        self.waits += 1
        if self.waits == 5:
            raise KeyboardInterrupt
        return []

    def close(self):
        pass


@pytest.mark.pipeline
def test_while_a_piece_runs_the_time_left_is_said(project, monkeypatch, capsys):
    """Estimated from the time per epoch of the stages that have been trained."""
    seed = base_settings.raw(project.path / "params.yaml")["seed"]
    study_of(project, seeds=[seed], settings={"finetune": {"epochs": 400, "budget": "compute"}})
    project.enter(monkeypatch)
    study = definition.load("mine", base_settings.raw())
    state = snapshot.take(project.path)
    made = run.prepare(state, study)
    assert [work.stage.name for work in made.missing()] == ["finetune", "evaluate"]
    monkeypatch.setattr(progress, "SELDOM", 0.0)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    busy = _Busy()
    with pytest.raises(KeyboardInterrupt):
        progress.Progress(state, made).finish(busy)
    lines = capsys.readouterr().out.splitlines()
    assert busy.begun == ["finetune"] and len(lines) == 4
    for line in lines:
        assert re.search(r"pieces, 0 of 1 cells, after \d+ s, about \d+ (s|min) left$", line), line


def _baseline(project):
    revision = project.run("git", "rev-parse", "HEAD").strip()
    return f"{revision[:2]}/{revision[2:]}"


@pytest.mark.pipeline
def test_each_training_runs_once_and_dvc_has_nothing_to_add_to_a_cell(
    project,
):
    study_of(
        project, seeds=[4],
        axes={"pruners.std.sensitivity": [0.5, 0.75], "decay": [0.001]}, controls=["smaller"],
    )  # fmt: skip
    shown = run_study(project, "--plan")
    assert "cells      2" in shown and "trainings  4, of them 4 to be run" in shown
    log = run_study(project)
    assert "2 of 2 cells are experiments of DVC; 8 pieces of work were run" in log
    note = "mine: no control 'smaller': it does not remove whole outputs by pruner magnitude"
    assert f"note: {note}\n" in log
    assert note in html.unescape((project.path / "report/mine/index.html").read_text())
    again = run_study(project)
    assert "2 of 2 cells are experiments of DVC; 0 pieces of work were run" in again
    pair = ["mine-0.5-0.001-s4", "mine-0.75-0.001-s4"]
    log = project.run("python", "-m", "secateur", "report", *pair, "--name", "two")
    reports = [json.loads(project.run("git", "show", f"{ref}:metrics/evaluate.json"))
               for ref in (f"refs/exps/{_baseline(project)}/{name}" for name in pair)]  # fmt: skip
    page = (project.path / "report/two/index.html").read_text()
    words = r"same (\d+) test images: only the first is right on (\d+), only the second on (\d+)"
    images, first, second = map(int, re.search(words, page).groups())
    gap = reports[0]["finetuned"]["accuracy"] - reports[1]["finetuned"]["accuracy"]
    assert (first - second) / images == pytest.approx(gap, abs=1e-9)
    listed = project.dvc("exp", "list", "--name-only").split()
    names = {f"mine-{t}-0.001-s4" for t in ("0.5", "0.75")}
    assert names <= set(listed)
    project.run("git", "stash", "-u", "-q")
    project.dvc("exp", "apply", "mine-0.75-0.001-s4")
    log = project.dvc("repro")
    assert "up to date" in log and "Running stage" not in log
    record = json.loads((project.path / "models/finetuned.run.json").read_text())
    assert record["params"]["seed"] == 4


@pytest.mark.pipeline
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_command_goes_on(kills, project):
    """Coordinator and workers are killed in turn while they work; records count the trainings."""
    alive = []
    study_of(project, seeds=[5], axes={"pruners.std.sensitivity": [0.5, 0.75]})
    for number in range(kills):
        began = time.time()
        process = coordinator(project, "--workers", "2", "--no-mlflow")
        while process.poll() is None and not works_since(project, began):
            time.sleep(0.02)
        time.sleep(0.3 * (number % 5))
        alive.append(process.poll() is None)
        if number % 2:
            process.kill()
        else:
            for pid in _descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(1)
            process.kill()
        process.wait()
    assert all(alive[:2])
    assert "2 of 2 cells are experiments of DVC" in run_study(project)
    trained = Counter()
    for entry in (project.path / ".dvc/cache/runs").glob("*/*/*"):
        if entry.name.endswith(".tmp"):  # written by DVC, in a process that was killed
            continue
        content = yaml.safe_load(entry.read_text())
        if content["params"]["params.yaml"].get("seed") == 5:
            trained[content["cmd"]] += 1
    assert trained["python -m stages.baseline"] == trained["python -m stages.sparse_train"] == 1
    assert trained["python -m stages.finetune"] == 2


def coordinator(project, *options):
    """Run the study in a real process, which can be killed alone; its workers are warm."""
    code = (
        "import os, runpy, sys; sys.path[0] = os.getcwd(); sys.argv[0] = 'secateur'\n"
        "sys.executable = os.environ.get('WARM_EXECUTABLE', sys.executable)\n"
        "runpy.run_module('secateur', run_name='__main__', alter_sys=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "study", "mine", *options], cwd=project.path,
        env=project.env(**warm_children()), stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def works_since(project, began):
    """Whether a piece of work has begun since `began`, in seconds since 1970."""
    logs = (project.path / ".dvc/tmp/studies/work").glob("*/*.log")
    return any(log.stat().st_mtime >= began for log in logs)


def _descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found


@pytest.mark.pipeline
def test_what_a_stage_refuses_is_one_line_and_the_other_cells_are_finished(project):
    study_of(
        project, settings={}, seeds=[base_settings.raw(project.path / "params.yaml")["seed"]],
        axes={"method": {
            "bad": {"pruner": "magnitude", "pruners": {"magnitude": {
                "ratios": {"nosuchlayer": 0.5}}}},
            "good": {},
        }},
    )  # fmt: skip
    log = run_study(project, ok=False)
    assert "1 of 2 cells are experiments of DVC" in log and "`dvc exp apply mine-good-s" in log
    assert "error: 1 pieces of work failed, so 1 cells are missing:" in log and "nosuchlayer" in log
    study_of(project, axes={"decay": [-1.0]})
    assert "error: cell mine-1-s1: params.yaml: decay" in run_study(project, ok=False)
    again = {"after": "rounds/no/pruned", "sparse_train": {}, "prune": {}, "finetune": {}}
    study_of(project, settings={"rounds": {"round2": again}})
    said = "error: cell mine-s1: params.yaml: rounds.round2.after = 'rounds/no/pruned': there is no"
    assert said in run_study(project, ok=False)


@pytest.mark.pipeline
@pytest.mark.parametrize("labels", [{"bad": {"finetun": {}}}, {"good": {}, "bad": {"finetun": {}}}])
def test_a_key_that_no_stage_reads_is_refused_though_all_work_is_finished(project, labels):
    seed = base_settings.raw(project.path / "params.yaml")["seed"]
    study_of(project, seeds=[seed], settings={}, axes={"method": labels})
    log = run_study(project, ok=False)
    assert f"error: cell mine-bad-s{seed}: params.yaml: finetun: unknown key" in log
    assert "mine-" not in project.dvc("exp", "list", "--name-only")


@pytest.mark.pipeline
def test_mlflow_gets_a_parent_with_the_page_and_children_once(project):
    """In the real store: unchanged results are written again only if the store is another one."""
    seed = base_settings.raw(project.path / "params.yaml")["seed"]
    study_of(project, seeds=[seed], settings={})
    first = run_study(project, tracking="on")
    (parent,) = project.runs("tags.kind = 'study'")
    (child,) = project.runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert (parent.info.status, child.data.tags["kind"]) == ("FINISHED", "pipeline")
    assert child.info.run_name == f"mine-s{seed}" and "MLflow: " in first
    report = json.loads((project.path / "metrics/evaluate.json").read_text())
    assert child.data.metrics["finetuned/accuracy"] == report["finetuned"]["accuracy"]
    page = Path(urlparse(parent.info.artifact_uri).path, "index.html")  # inside the copied project
    assert page.read_bytes() == (project.path / "report/mine/index.html").read_bytes()
    again = run_study(project, tracking="on")
    assert "report/mine/index.html: up to date" in again and "MLflow" not in again
    (project.path / "mlflow.db").rename(project.path / "elsewhere.db")
    run_study(project, tracking="on")
    assert len(project.runs("tags.kind = 'study'")) == 1
    assert len(project.runs("tags.kind = 'pipeline'")) == 1


EXECUTE = """
import json, sys
from pathlib import Path
from secateur.base import settings
from secateur.studies import definition, run
from secateur.studies.execution import local, on_ray, on_slurm, snapshot
from secateur.studies.execution.experiments import Experiments
from secateur.studies.progress import Progress
state = snapshot.take(Path.cwd())
study = definition.load("mine", settings.raw())
made = run.prepare(state, study)
executor = {
    "local": lambda: local.LocalExecutor(state, 2, made.graph.ignored),
    "ray": lambda: on_ray.RayExecutor(state, made.graph.ignored, 2),
    "slurm": lambda: on_slurm.SlurmExecutor(state, 4, {}, cluster="local"),
}[sys.argv[1]]()
progress = Progress(state, made, Experiments(state, made, study.name))
try:
    progress.finish(executor)
finally:
    executor.close()
models = {
    cell.name: {out["path"]: out["md5"] for entry in made.entries_of(number).values()
                for out in entry["outs"] if out["md5"].endswith(".dir")}
    for number, cell in enumerate(made.cells)
}
print(json.dumps({"ran": progress.ran, "failed": progress.failed, "models": models}))
"""


def executed(project, kind):
    """Run the study with an executor; the stages that ran, and hashes of all output folders."""
    log = project.run(sys.executable, "-c", EXECUTE, kind, PYTHONPATH=str(project.path))
    return json.loads(log.splitlines()[-1])


@pytest.mark.pipeline
@pytest.mark.parametrize(("kind", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_all_executors_make_the_same_bytes_and_each_of_them_once(kind, package, project, tmp_path):
    """For slurm, submitit's local cluster is used, which starts processes instead of jobs."""
    pytest.importorskip(package)
    study_of(project, seeds=[7], axes={"pruners.std.sensitivity": [0.5, 0.75]})
    here = executed(project.copy(tmp_path / "local"), "local")
    there = executed(project, kind)
    once = {"baseline": 1, "sparse-train": 1, "prune": 2, "finetune": 2, "evaluate": 2}
    assert Counter(here["ran"]) == Counter(there["ran"]) == once
    assert here["failed"] == there["failed"] == {}
    assert here["models"] == there["models"]
    finetuned = {cell["models/finetuned"] for cell in there["models"].values()}
    assert len(there["models"]["mine-0.5-s7"]) >= 5 and len(finetuned) == 2
