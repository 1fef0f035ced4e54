"""Studies with several rounds: what their cells share, agreement with DVC, and the page."""

import contextlib
import functools
import os
import shutil
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml
from dvc.utils.serialize import load_yaml
from test_studies import (
    PARAMS,
    _baseline,
    _descendants,
    coordinator,
    run_study,
    study_of,
    write_study,
)
from workspace import Project

from secateur.base.errors import SettingsError
from secateur.studies import plan, rounds
from secateur.studies.definition import PlannedCell
from secateur.studies.execution.keys import Graph, run_key
from secateur.studies.execution.work import _clear
from secateur.studies.report import by_hand, fairness, tables
from secateur.studies.report import rounds as of_rounds
from secateur.studies.results import Cell, Result

__all__ = ["write_study"]  # imported as a fixture


def a_round(after, sensitivity=0.5, epochs=1):
    """A further round with little work."""
    return {
        "after": after, "sparse_train": {"epochs": 0}, "finetune": {"epochs": epochs},
        "prune": {"pruners": {"std": {"sensitivity": sensitivity}}},
    }  # fmt: skip


TINY = {
    "sparse-train": {
        "cmd": "mkdir -p m/one && echo ${size} > m/one/f", "params": ["size"],
        "deps": ["code"], "outs": ["m/one"],
    },
    "finetune": {"cmd": "cp m/one/f m/two", "deps": ["m/one"], "outs": ["m/two"]},
    "evaluate": {
        "cmd": "ls -R rounds > listing", "deps": ["m/two", "rounds"], "params": ["rounds"],
        "outs": ["listing"], "metrics": [],
    },
}  # fmt: skip
TINY_ROUNDS = {
    "vars": ["../../params.yaml"],
    "stages": {
        "sparse-train": {
            "foreach": "${rounds}",
            "do": {
                "wdir": "../..",
                "cmd": "mkdir -p rounds/${key}/one/b && echo 1 ${key} > rounds/${key}/one/b/f && "
                "echo 2 > rounds/${key}/one/b.c && echo 3 > rounds/${key}/one.json",
                "deps": ["code", "m/${item.after}"], "params": ["rounds.${key}.prune"],
                "outs": ["rounds/${key}/one", "rounds/${key}/one.json"],
            },
        },
        "finetune": {
            "foreach": "${rounds}",
            "do": {
                "wdir": "../..", "cmd": "cp rounds/${key}/one.json rounds/${key}/two",
                "deps": ["rounds/${key}/one.json"], "outs": ["rounds/${key}/two"],
            },
        },
    },
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch, programs):
    """A project like the real one whose stages take no time; it has run, with further rounds."""
    params = {"size": 3, "rounds": {"b": {"after": "two", "prune": {}}, "a2": {"after": "one",
              "prune": {"x": 1e-5}}}}  # fmt: skip
    (tmp_path / "stages/rounds").mkdir(parents=True)
    (tmp_path / "rounds").mkdir()
    for path, content in (("dvc.yaml", {"stages": TINY}), ("params.yaml", params),
                          ("stages/rounds/dvc.yaml", TINY_ROUNDS)):  # fmt: skip
        (tmp_path / path).write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "code").write_text("1")
    (tmp_path / "rounds/.gitignore").write_text("*\n")
    project = Project(tmp_path)
    project.dvc("init", "--no-scm", "-q")
    project.dvc("repro")
    monkeypatch.chdir(tmp_path)
    return project


def locked(project):
    """The stages in both lock files, by name."""
    found = {}
    for lock in ("dvc.lock", "stages/rounds/dvc.lock"):
        found |= load_yaml(str(project.path / lock))["stages"]
    return found


def unrun(project):
    """A graph on a copy of the project's own files without outputs, with its cache."""
    copy = project.path.parent / f"{project.path.name}-copy"
    shutil.copytree(project.path, copy)
    for made in ("m", "rounds/a2", "rounds/b", "listing"):
        shutil.rmtree(copy / made, ignore_errors=True)
    (copy / ".dvc/config.local").write_text(f"[cache]\n    dir = {project.path}/.dvc/cache\n")
    (copy / ".dvc/tmp/tracked").write_text("dvc.yaml\0params.yaml\0code\0rounds/.gitignore\0")
    return Graph(copy, project.path)


def test_keys_and_folders_of_rounds_are_those_of_dvc(tiny):
    """Every stage is found by its key, and its entry equals that of DVC, including folders."""
    graph = unrun(tiny)
    stages = graph.stages(graph.params)
    made, theirs = {}, locked(tiny)
    for stage in stages:
        entry = graph.entry(stage, graph.params, {name: made[name] for name in stage.upstream})
        own = theirs[stage.name]
        assert {**entry, "outs": own["outs"]} == own
        assert run_key(entry) == run_key(own)
        made[stage.name] = graph.find(entry)
        assert made[stage.name] == own
    assert made.keys() == theirs.keys() and len(made) == 7
    (evaluate,) = [stage for stage in stages if stage.name == "evaluate"]
    assert evaluate.folders == ("rounds",) and "finetune@a2" in evaluate.upstream
    (folder,) = [dep for dep in made["evaluate"]["deps"] if dep["path"] == "rounds"]
    assert not graph.has_object(folder["md5"]), "DVC stores no object for a dependency"
    assert {s.address for s in stages} >= {"finetune", "stages/rounds/dvc.yaml:finetune@b"}
    without = graph.params | {"rounds": {}}
    alone = {stage.name: stage for stage in graph.stages(without)}
    assert alone.keys() == TINY.keys()
    assert graph.shared_folder("rounds", []) == graph.file("rounds")


def test_a_search_ends_its_trials_at_the_finetuning_of_the_last_round(tiny):
    graph = unrun(tiny)
    whole = {"sparse_train": {}, "finetune": {}}
    second = {"b": {"after": "finetuned", "prune": {}} | whole}
    third = second | {"c": {"after": "rounds/b/finetuned", "prune": {}} | whole}
    cells = [
        PlannedCell(name, "", "", 1, None, {"rounds": named})
        for name, named in (("one", {}), ("two", second), ("three", third))
    ]
    for path in ("finetuned", "rounds/b/finetuned"):  # the paths that the tiny models would have
        (tiny.path / "m" / path).mkdir(parents=True)
        (tiny.path / "m" / path / "f").write_text("1")
    made = plan.make(graph, cells, "finetune")
    last = [made.works[ids[-1]].stage.name for ids in made.by_cell]
    assert last == ["finetune", "finetune@b", "finetune@c"]
    assert "evaluate" not in {work.stage.name for work in made.works.values()}
    names = Counter(work.stage.name for work in made.works.values())
    assert set(names.values()) == {1}, "cells share their common rounds"
    bad = third | {"d": third["c"]}
    with pytest.raises(SettingsError, match=r"cell bad: params.yaml: rounds.d.after .* a chain"):
        plan.make(graph, [PlannedCell("bad", "", "", 1, None, {"rounds": bad})])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"two": a_round("rounds/nosuch/finetuned")}, "there is no round nosuch"),
        ({"two": {"after": "finetuned", "prune": {}, "finetune": {}}}, "sparse_train: missing"),
        ({"two": a_round("rounds/two/finetuned")}, "leads in a circle"),
        ({"two": a_round("baseline")}, "rounds.two.after = 'baseline'"),
        ({"two": 5}, "rounds.two = 5"),
    ],
)
def test_what_is_wrong_with_rounds_is_said_in_one_line(write_study, table, message):
    """Before any stage is resolved; a control that counts rounds reports the same mistake."""
    with pytest.raises(SettingsError) as error:
        rounds.names(PARAMS | {"rounds": table})
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SettingsError) as error:
        write_study(settings={"rounds": table}, controls=["dense_longer"])
    assert message in str(error.value)


def test_rounds_are_merged_as_other_tables_and_taken_away_by_an_empty_one(write_study, tmp_path):
    second = a_round("finetuned", "{amount}")
    study = write_study(
        settings={"rounds": {"two": second}},
        axes={
            "method": {"some": {}, "none": {"rounds": {}},
                       "more": {"rounds": {"two": {"prune": {}, "finetune": {"epochs": 9}}}}},
            "amount": [0.25], "rounds.two.sparse_train.decay": [0.125],
        },
        exclude=[{"method": "none"}],
    )  # fmt: skip
    some, more = (cell.settings["rounds"]["two"] for cell in study.cells)
    assert some["prune"]["pruners"]["std"]["sensitivity"] == 0.25
    assert some["sparse_train"] == {"epochs": 0, "decay": 0.125}
    assert (some["finetune"]["epochs"], more["finetune"]["epochs"]) == (1, 9)
    none = write_study(settings={"rounds": {"two": a_round("finetuned")}},
                       axes={"method": {"none": {"rounds": {}}}}).cells[0]  # fmt: skip
    assert none.settings["rounds"] == {}
    params = PARAMS | {"rounds": {"two": a_round("finetuned")}}
    assert rounds.whole(params, none.settings)["rounds"] == {}
    assert rounds.changes(none.settings, params) == {"rounds": {}, "seed": 1}
    assert "rounds" not in write_study(settings={"rounds": {}}).cells[0].settings


def test_controls_count_all_rounds(write_study):
    """With a target of the dense network for filters, in two rounds, and without a target."""

    def table(target):
        pruning = {"pruners": {"magnitude": target | {"pick": "max"}}}
        return {"two": a_round("finetuned", epochs=4) | {"prune": pruning}}

    shape = {"granularity": "filter", "target": {"params": 0.5, "of": "dense"}}
    study = write_study(
        settings={"baseline": {"epochs": 7}, "sparse_train": {"epochs": 2}, "pruner": "magnitude",
                  "finetune": {"epochs": 3}, "pruners": {"magnitude": {"granularity": "filter"}}},
        axes={"method": {
            "target": {"pruners": {"magnitude": shape},
                       "rounds": table({"target": {"params": 0.25, "of": "dense"}})},
            "macs": {"pruners": {"magnitude": shape},
                     "rounds": table({"target": {"macs": 0.25, "of": "dense"}})},
            "plain": {"pruners": {"magnitude": shape},
                      "rounds": table({"target": {"params": 0.25}})},
            "ratio": {"rounds": table({"ratios": 0.5})},
        }},
        controls=["dense", "dense_longer", "random", "scratch", "smaller"],
    )  # fmt: skip
    found = {}
    for cell in study.cells:
        found.setdefault(cell.control, []).append(cell.settings)
    for control in ("dense", "dense_longer", "smaller"):
        assert all(cell["rounds"] == {} for cell in found[control])
    assert len(found["dense"]) == len(found["dense_longer"]) == 1
    assert found["dense_longer"][0]["baseline"]["epochs"] == 7 + 2 + 3 + 0 + 4
    for cell in found["random"]:
        again = cell["rounds"]["two"]["prune"]["pruners"]["magnitude"]
        assert cell["pruners"]["magnitude"]["pick"] == again["pick"] == "random"
    for cell in found["scratch_compute"] + found["scratch_epochs"]:
        last = cell["rounds"]["two"]["finetune"]
        assert (last["init"], last["epochs"], cell["finetune"]) == ("scratch", 7, {"epochs": 3})
    smaller, other = found["smaller"]
    assert smaller["pruners"]["magnitude"]["target"] == {"params": 0.25, "of": "dense"}
    assert other["pruners"]["magnitude"]["target"] == {"params": None, "macs": 0.25, "of": "dense"}
    assert any("plain: no control 'smaller': its last round has no" in n for n in study.notes)
    assert smaller["finetune"]["epochs"] == 7
    assert any("ratio: no control 'smaller': its last round has no" in n for n in study.notes)


def a_result(name, table, last=0.9, **params):
    """The result of an invented experiment in which each round halves the network."""
    names = ["round1", *table] if table else []
    model = {"accuracy": last, "macs": 50, "latency_ms": 1.0}
    report = {
        "seed": 1, "arch": "a", "dataset": "d", "compression": 4.0, "theoretical_speedup": 2.0,
        "measured_speedup": 1.0, "finetuned": model,
        "baseline": {"accuracy": 0.95, "macs_dense": 100},
        "rounds": {n: model | {"accuracy": last + 0.1 / (k + 2), "compression": 2.0**k}
                   for k, n in enumerate(names, 1)},
    }  # fmt: skip
    flat = {"seed": 1, "dataset": "d", "arch": "a", "pruner": "magnitude", "penalty": "none",
            "finetune.epochs": 5, "finetune.lr": 0.1, "sparse_train.epochs": 2}  # fmt: skip
    flat |= {f"rounds.{n}.{key}": value for n, own in table.items() for key, value in own.items()}
    return Result(name, flat | params, report)


SHARE = "pruners.magnitude.target.params"
DENSE = {"pruners.magnitude.target.of": "dense"}


def test_experiments_of_several_rounds_are_grouped_by_what_the_last_one_has(tmp_path):
    """One and two rounds to one size: two methods at one point; without a target: many points."""
    two = {"x": {"after": "finetuned", f"prune.{SHARE}": 0.25}}
    found = [
        a_result("once", {}, **DENSE | {SHARE: 0.25}),
        a_result("twice", two, **DENSE | {SHARE: 0.5}),
        a_result("twice, less first", two, **DENSE | {SHARE: 0.4}),
    ]
    cells = by_hand.cells_of(found)
    assert len({cell.point for cell in cells}) == 1
    assert "rounds 1" in cells[0].method and all("rounds 2" in c.method for c in cells[1:])
    assert len({cell.method for cell in cells}) == 3
    ratio = "pruners.magnitude.ratios"
    again = {"after": "finetuned"}
    found = [
        a_result(str(n), {f"r{k}": again for k in range(2, n + 1)}, **{ratio: 0.5})
        for n in (1, 2, 3)
    ]
    cells = by_hand.cells_of(found)
    assert {cell.method for cell in cells} == {"none, magnitude"}
    assert [cell.point for cell in cells] == ["rounds 1", "rounds 2", "rounds 3"]
    assert by_hand.cells_of(found[:1])[0].point == "as set"


def test_the_page_has_each_round_and_setups_count_the_epochs_of_all():
    again = {"after": "finetuned", "finetune.epochs": 10}
    once, more = a_result("once", {}), a_result("more", {"x": again})
    longer = a_result("longer", {}, **{"finetune.epochs": 15, "sparse_train.epochs": 4})
    renamed = a_result("renamed", {"y": again | {"finetune.lr": 0.5}})
    rows = {
        r.name: tables.rows([(Cell(r.name, r.name, "", 1), r)])[0]
        for r in (once, more, longer, renamed)
    }
    lines = of_rounds.lines(list(rows.values()))
    assert [(row.label, name) for row, name, _ in lines][:2] == [("more", "round1"), ("more", "x")]
    figures = lines[1][2]
    assert (figures["compression"].mean, figures["macs"].mean) == (4.0, 0.5)
    assert of_rounds.as_csv(list(rows.values())).count("\n") == 5
    said = fairness.setup(rows["once"], rows["more"])
    assert said == ("S2", "finetune.epochs 5 and 15, over all rounds")
    assert fairness.setup(rows["longer"], rows["more"]) == ("S3.1", "rounds 1 and 2")
    assert fairness.setup(rows["more"], rows["renamed"]) == (
        "S3.1", "rounds.round2.finetune.lr None and 0.5"
    )  # fmt: skip
    assert fairness.setup(rows["more"], rows["more"]) == ("S4.2", "")


def test_what_another_cell_has_left_in_a_shared_folder_is_removed(tmp_path):
    upstream = [{"outs": [{"path": "models/rounds/two/pruned"}]}]
    task = SimpleNamespace(folders={"models/rounds": [".gitignore"]}, upstream=upstream)
    kept = ["models/rounds/.gitignore", "models/rounds/two/pruned/model", "models/pruned/model"]
    gone = ["models/rounds/two/.pruned.tmp", "models/rounds/three/pruned/model"]
    for path in kept + gone:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    _clear(tmp_path, task)
    assert [path for path in kept + gone if (tmp_path / path).exists()] == kept


@pytest.mark.pipeline
def test_rounds_are_shared_and_dvc_has_nothing_to_add_to_a_cell(project):
    """DVC's own result is found, cells share all before round 3, and a killed study resumes."""
    project.params(rounds={"round2": a_round("finetuned", 0.4)})
    project.dvc("repro")
    project.commit()
    seed = PARAMS["seed"]
    third = {name: {"rounds": {"round3": a_round("rounds/round2/finetuned", amount)}}
             for name, amount in (("a", 0.3), ("b", 0.6))}  # fmt: skip
    study_of(
        project, seeds=[seed], settings={}, axes={"m": {"two": {}, "one": {"rounds": {}}, **third}}
    )
    shown = run_study(project, "--plan")
    assert "trainings  6, of them 2 to be run" in shown
    assert "sparse-train@round2     1,     1 from the cache," in shown
    ours = f"refs/exps/{_baseline(project)}/mine"
    process = coordinator(project, "--workers", "1")
    while not entries(project, "stages.prune --round round3") and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None
    for pid in [process.pid, *_descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    log = run_study(project, tracking="on")
    assert "4 of 4 cells are experiments of DVC" in log
    commands = Counter(entries(project, "stages."))
    assert commands["python -m stages.sparse_train --round round3"] == 1
    assert commands["python -m stages.finetune --round round3"] == 2
    assert commands["python -m stages.sparse_train --round round2"] == 1
    assert project.run("git", "diff", "HEAD", f"{ours}-two-s{seed}") == ""
    lock = yaml.safe_load(project.run("git", "show", f"{ours}-a-s{seed}:stages/rounds/dvc.lock"))
    assert len(lock["stages"]) == 6
    (parent,) = project.runs("tags.kind = 'study'")
    children = project.runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_name = {child.info.run_name: child.data for child in children}
    assert len(by_name) == 4 and "prune_round3/seconds" in by_name[f"mine-b-s{seed}"].metrics
    page = (project.path / "report/mine/index.html").read_text()
    assert "<h2>By round</h2>" in page and "<td>round3</td>" in page
    project.run("python", "-m", "secateur", "report", f"mine-a-s{seed}", "--name", "x")
    assert (project.path / "report/x/rounds.csv").read_text().count("round3") == 1
    project.run("git", "stash", "-u", "-q")
    for cell in (f"mine-b-s{seed}", f"mine-one-s{seed}"):
        project.run("git", "clean", "-fdXq", "models/rounds")
        project.dvc("exp", "apply", cell)
        log = project.dvc("repro")
        assert "up to date" in log and "Running stage" not in log
        project.run("git", "reset", "-q", "--hard")


def entries(project, part):
    """Commands in the run cache that contain `part`, one for each entry."""
    paths = (project.path / ".dvc/cache/runs").glob("??/*/*")
    found = [command_of(path) for path in paths if path.suffix != ".tmp"]
    return [command for command in found if part in command]


@functools.cache
def command_of(path):
    """The command of an entry of the run cache; cached, since entries never change."""
    return yaml.safe_load(path.read_text())["cmd"]
