"""Comparison of experiments: results read from Git, statistics, the table and the page."""

import csv
import hashlib
import itertools
import json
import shutil
import subprocess
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from scipy import stats

from secateur.base.errors import SecateurError
from secateur.cli import build_parser
from secateur.data import dataset
from secateur.nn import checkpoint
from secateur.nn.checkpoint import Header
from secateur.studies import compare, publish, results
from secateur.studies.definition import PlannedCell, Study
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.plan import Plan
from secateur.studies.report import (
    anchors,
    artifacts,
    by_hand,
    fairness,
    latencies,
    page,
    plots,
    predictions,
    statistics,
    tables,
)
from secateur.studies.report.latencies import ExperimentLatency
from secateur.studies.results import Cell, Result


def test_interval_is_that_of_scipy():
    values = [0.91, 0.93, 0.92, 0.90]
    found = statistics.interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert [found.mean - found.half_width, found.mean + found.half_width] == pytest.approx(
        [low, high], rel=1e-12
    )
    assert statistics.interval([0.9]).half_width is None


def test_interval_of_three_by_hand():
    found = statistics.interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653 of the tables
    assert (found.mean, found.half_width) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))


def test_paired_t_is_the_one_sample_test_of_differences():
    first, second = [0.90, 0.92, 0.95], [0.89, 0.90, 0.92]
    change, p = statistics.paired(first, second)
    assert change.mean == pytest.approx(0.02)
    assert p == pytest.approx(stats.ttest_1samp([0.01, 0.02, 0.03], 0).pvalue, rel=1e-9)
    assert statistics.paired([1.0], [0.5])[1] is None
    assert statistics.paired([1.0, 2.0], [0.5, 1.5])[1] is None


@pytest.mark.parametrize("images", [360, 10_000])
def test_differences_of_as_many_images_are_equal_whatever_the_quotients_round_to(images):
    right = [images - 7, images - 20, images - 101]
    rounded = 0
    for fewer in range(1, 100):
        first = [count / images for count in right]
        second = [(count - fewer) / images for count in right]
        assert statistics.paired(first, second)[1] is None
        rounded += np.ptp(np.subtract(first, second)) > 0
        second[0] = (right[0] - fewer - 1) / images  # one more image
        assert statistics.paired(first, second)[1] is not None
    assert rounded, "some differ only by rounding"


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_mcnemar_by_hand():
    assert statistics.mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert statistics.mcnemar(0, 0) == 1.0


def test_models_of_other_test_images_are_told_apart(tmp_path):
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=chance)
    labels = torch.randint(0, 3, (20,), generator=chance)
    one = predictions._hash(dataset.InMemoryImages(images, labels))
    assert one == predictions._hash(dataset.InMemoryImages(images.clone(), labels.clone()))
    assert one != predictions._hash(dataset.InMemoryImages(images, (labels + 1) % 3))
    assert one != predictions._hash(dataset.InMemoryImages(255 - images, labels))


def test_an_experiment_that_names_no_dataset_is_told_in_one_line():
    with pytest.raises(SecateurError, match=r"old: its params\.yaml names no dataset"):
        predictions.correct(Result("old", {"arch": "lenet5"}, {}))


def test_standard_error_of_360_images_is_half_a_point_and_more():
    assert statistics.standard_error(0.9, 360) == pytest.approx(0.0158114, rel=1e-5)


def test_interval_of_an_accuracy_of_all_images_is_that_of_scipy():
    for right, images in ((360, 360), (0, 360), (9, 10)):
        known = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
        assert statistics.wilson(right / images, images) == pytest.approx(tuple(known))


def test_hypervolume_by_hand_and_by_counting_cells():
    points = [(0.5, 0.8), (0.2, 0.5), (0.6, 0.7), (1.5, 0.9)]
    assert statistics.front(points) == [1, 0, 3]
    assert statistics.hypervolume(points, (1.0, 0.0)) == pytest.approx(0.8 * 0.5 + 0.5 * 0.3)
    grid = (np.arange(100) + 0.5) / 100
    covered = sum(any(c <= x and v >= y for c, v in points[:3])
                  for x, y in itertools.product(grid, grid))  # fmt: skip
    assert statistics.hypervolume(points, (1.0, 0.0)) == pytest.approx(covered / 10_000)


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A Git repository with experiments of invented results, named as by DVC; returns cells."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b.c")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "base")
    (tmp_path / "metrics").mkdir()

    def make(methods, seeds=(1, 2, 3), dense=0.96):
        cells, head = [], git("rev-parse", "HEAD")
        for number, seed in itertools.product(range(methods), seeds):
            for point in (2, 4):
                name = f"m{number}-{point}-s{seed}"
                final = 0.95 - 0.01 * number - 0.01 * point - 0.001 * seed**2 * (number + 1)
                model = {"accuracy": final, "latency_ms": 1.5}
                report = {"seed": seed, "arch": "lenet300", "dataset": "digits",
                          "compression": point, "theoretical_speedup": point,
                          "measured_speedup": 1.1, "hardware": "a processor",
                          "baseline": model | {"accuracy": dense}, "finetuned": model}  # fmt: skip
                params = {"seed": seed, "pruner": "magnitude", "penalty": f"p{number}",
                          "pruners": {"magnitude": {"ratios": 1 - 1 / point}},
                          "penalties": {"other": {"a": number}}}  # fmt: skip
                (tmp_path / results.REPORT).write_text(json.dumps(report))
                (tmp_path / results.PARAMS).write_text(json.dumps(params))
                git("add", ".")
                tree = git("write-tree")
                commit = git("commit-tree", tree, "-p", head, "-m", name)
                git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
                cells.append(Cell(name, f"m{number}", f"{point}x", seed))
        return cells

    make.git = git
    return make


@pytest.fixture
def vectors(monkeypatch):
    """Draw figures only as SVG: PNG takes as long again, and one test checks it."""
    monkeypatch.setattr(plots, "png", lambda figure: b"")


def test_results_come_from_git_and_damage_costs_one_line(experiments, tmp_path, capsys):
    cells = experiments(1)
    (tmp_path / results.REPORT).write_text("{")
    experiments.git("add", ".")
    commit = experiments.git("commit-tree", experiments.git("write-tree"), "-m", "damaged")
    found = results.read([cells[0].experiment, commit, "no-such-thing"])
    assert [(r.name, r.seed, r.compression) for r in found] == [("m0-2-s1", 1, 2)]
    assert found[0].final == pytest.approx(0.929)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "evaluate.json" in errors[0] and "no-such-thing: left out" in errors[1]
    assert set(results.experiments()) == {cell.experiment for cell in cells}
    experiments.git("update-ref", f"refs/exps/ff/{'f' * 38}/m0-2-s1", commit)
    experiments.git("update-ref", f"refs/exps/00/{'0' * 38}/m0-2-s1", commit)
    assert [r.name for r in results.read(["m0-2-s1"])] == ["m0-2-s1"], "the one on HEAD is read"


@pytest.mark.usefixtures("vectors")
def test_the_page_of_a_study_is_of_its_own_commit_wherever_head_is(experiments, tmp_path):
    """HEAD has moved to another commit, whose experiments have the same names."""
    (tmp_path / "metrics/layers.csv").write_text(
        "model,layer,sparsity_of_dense\nfinetuned,mine,0.5\n"
    )
    cells = experiments(1, seeds=(1,))
    state = Snapshot(tmp_path, experiments.git("rev-parse", "HEAD"), "", tmp_path)
    planned = [PlannedCell(c.experiment, c.method, c.point, c.seed, None, {}) for c in cells]
    study, made = Study("mine", "", tuple(planned), ()), Plan(None, planned, {}, [[], []])
    experiments.git("commit", "-q", "--allow-empty", "-m", "meanwhile")
    (tmp_path / "metrics/layers.csv").write_text(
        "model,layer,sparsity_of_dense\nfinetuned,other,0.5\n"
    )
    experiments(1, seeds=(1,), dense=0.5)
    publish.write_page(state, study, made, tmp_path / "page", "")
    lines = csv.DictReader((tmp_path / "page/table.csv").read_text().splitlines())
    assert {float(line["dense"]) for line in lines} == {0.96}
    layers = (tmp_path / "page/layers.svg").read_text()
    assert "mine" in layers and "other" not in layers
    experiments.git("commit", "-q", "--allow-empty", "-m", "without experiments")
    found = results.read([c.experiment for c in cells], state.revision)
    assert [result.dense for result in found] == [0.96, 0.96]
    assert results.read(["HEAD", "m0-2-s2"], state.revision) == [], "this commit has no experiments"


def test_compare_sorts_and_says_what_differs(experiments, tmp_path, capsys):
    experiments(2, seeds=(1,))
    (tmp_path / results.REPORT).unlink()
    options = Namespace(experiment=[], all=False, sort="compression", json=True, csv=False)
    compare.command(options)
    rows = json.loads(capsys.readouterr().out)
    assert [row["compression"] for row in rows] == [4, 4, 2, 2]
    assert rows[0]["differs"] == "penalty p0, ratios 0.75"  # no settings of penalties not in use
    assert list(rows[0]) == list(compare.COLUMNS)
    options.sort = "macs"
    compare.command(options)
    left = [row["macs"] for row in json.loads(capsys.readouterr().out)]
    assert left == sorted(left) and left[0] < left[-1], "the least are the best"
    options.json, options.csv = False, True
    compare.command(options)
    assert capsys.readouterr().out.startswith(",".join(compare.COLUMNS))


REPORT = {
    "seed": 1, "arch": "lenet300", "dataset": "digits", "compression": 2.0,
    "theoretical_speedup": 2.0, "measured_speedup": 1.0, "hardware": "a processor",
    "baseline": {"accuracy": 0.9, "latency_ms": 1.0},
    "finetuned": {"accuracy": 0.8, "latency_ms": 1.0},
}  # fmt: skip


def test_a_latency_that_was_not_measured_is_sorted_last():
    nan = float("nan")
    rows = [{"latency": value} for value in (nan, 3.0, 1.0, nan, 2.0)]
    assert [row["latency"] for row in compare._sorted(rows, "latency")][:3] == [1.0, 2.0, 3.0]


def test_compare_prints_lists_of_names_as_they_are(capsys):
    """`[fc1]` would be a tag in the markup of rich, and `:car:` a picture."""
    found = [
        Result("one", {"pruner": "m", "prune.branches": ["layer1.2", "layer2.1"]}, REPORT),
        Result("[bold]two:car:", {"pruner": "m", "prune.branches": ["fc1"]}, REPORT),
    ]
    compare._print(compare.table(found))
    printed = capsys.readouterr().out
    assert "branches [layer1.2, layer2.1]" in printed and "branches [fc1]" in printed
    assert "[bold]two:car:" in printed


def test_compare_of_all_commits_has_experiments_of_one_name_of_each(experiments, tmp_path, capsys):
    experiments(1, seeds=(1,))
    experiments.git("commit", "-q", "--allow-empty", "-m", "next")
    experiments(1, seeds=(1, 2), dense=0.5)
    (tmp_path / results.REPORT).unlink()
    options = Namespace(experiment=[], all=True, sort="experiment", json=True, csv=False)
    compare.command(options)
    rows = json.loads(capsys.readouterr().out)
    names = [row["experiment"].partition("@")[0] for row in rows]
    assert names == ["m0-2-s1", "m0-2-s1", "m0-2-s2", "m0-4-s1", "m0-4-s1", "m0-4-s2"]
    assert [row["experiment"] for row in rows if row["seed"] == 2] == ["m0-2-s2", "m0-4-s2"]
    assert {row["dense"] for row in rows[:2]} == {0.96, 0.5}
    for row in rows:  # each name in the table can be passed to the command
        (found,) = results.read([row["experiment"]])
        assert found.dense == row["dense"]


def test_a_name_that_is_no_experiment_is_told_with_those_that_are(experiments):
    made = [cell.experiment for cell in experiments(1)]
    results.check_names([*made, "HEAD", experiments.git("rev-parse", "--short", "HEAD")])
    for name, words in (
        ("m0-2-s11", r"'m0-2-s11': .*there are: m0-2-s1, .*; did you mean m0-2-s1\?$"),
        (
            "workspace",
            r"'workspace': .*; `dvc exp save dvc\.yaml -n NAME` makes one of the workspace$",
        ),
        ("xxx", r"'xxx': .*; `secateur compare --all` lists those of every commit$"),
    ):
        for function, options in ((page.command, {"name": "x"}), (compare.command, {"all": False})):
            if function is page.command or name != "workspace":
                with pytest.raises(SecateurError, match=f"^experiment {words}"):
                    function(Namespace(experiment=[made[0], name], **options))
    for seed in range(4, 20):
        experiments(1, seeds=(seed,))
    with pytest.raises(SecateurError, match=r"m0-2-s18 and 28 more"):
        results.check_names(["xxx"])


def test_a_name_of_several_other_commits_is_not_chosen_by_chance(experiments):
    experiments(1, seeds=(1,))
    results.check_names(["m0-2-s1"])
    experiments.git("commit", "-q", "--allow-empty", "-m", "next")
    results.check_names(["m0-2-s1"])
    experiments(1, seeds=(1,), dense=0.5)
    results.check_names(["m0-2-s1"])
    experiments.git("commit", "-q", "--allow-empty", "-m", "without experiments")
    listed = [name for name in results.experiments(everything=True) if name.startswith("m0-2-s1@")]
    assert len(listed) == 2
    results.check_names(listed)
    with pytest.raises(SecateurError, match=r"'m0-2-s1': HEAD has none, and several") as raised:
        results.check_names(["m0-2-s1"])
    assert all(name in str(raised.value) for name in listed)


def test_compare_has_the_workspace_by_its_name(experiments, capsys):
    name = experiments(1, seeds=(1,))[0].experiment
    options = Namespace(experiment=[name, "workspace"], sort="experiment", json=True, csv=False)
    compare.command(options)
    rows = json.loads(capsys.readouterr().out)
    assert [row["experiment"] for row in rows] == [name, "workspace"]


def test_compare_says_how_many_experiments_of_other_commits_it_leaves_out(experiments, capsys):
    options = Namespace(experiment=[], all=False, sort="final", json=True, csv=False)
    experiments(1, seeds=(1, 2))
    compare.command(options)
    assert "left out" not in capsys.readouterr().err
    experiments.git("commit", "-q", "--allow-empty", "-m", "next")
    experiments(1, seeds=(1,))
    said = "left out: 4 experiments of other commits; `secateur compare --all` lists them too\n"
    compare.command(options)
    output = capsys.readouterr()
    assert output.err == said and len(json.loads(output.out)) == 3
    for other in ({"all": True}, {"experiment": ["m0-2-s1"]}):
        compare.command(Namespace(**vars(options) | other))
        assert not capsys.readouterr().err


def test_compare_of_nothing_is_one_line(experiments):
    with pytest.raises(SecateurError, match="no experiment has a result"):
        compare.command(Namespace(experiment=[], all=False, sort="final", json=True, csv=False))


@pytest.mark.parametrize("damaged", [results.PARAMS, results.REPORT])
def test_a_damaged_workspace_costs_compare_one_line(damaged, experiments, tmp_path, capsys):
    experiments(1, seeds=(1,))
    (tmp_path / damaged).write_text("seed: [1")
    compare.command(Namespace(experiment=[], all=False, sort="final", json=True, csv=False))
    output = capsys.readouterr()
    assert len(json.loads(output.out)) == 2
    (line,) = output.err.splitlines()
    assert line.startswith("workspace: left out: ") and damaged in line


@pytest.mark.parametrize(
    ("changed", "inputs", "report", "stage"),
    [
        ({}, "a", "of DVC", None),
        ({"decay": "1e-1"}, "a", "of DVC", None),
        ({"decay": 0.5}, "a", "of DVC", "sparse-train"),
        ({}, "b", "of DVC", "sparse-train"),
        ({"decay": 0.5}, "b", "of a script", None),
        ({"sensitivity": 1}, "a", "of DVC", None),
        ({"rounds": {"round2": {"decay": 0.1}}}, "a", "of DVC", None),
        ({"rounds": {"round2": {"decay": 0.2}}}, "a", "of DVC", "sparse-train@round2"),
    ],
)
def test_compare_leaves_out_a_workspace_of_other_settings(
    changed, inputs, report, stage, experiments, tmp_path, capsys
):
    experiments(1, seeds=(1,))
    params = yaml.safe_load(Path(results.PARAMS).read_text()) | {"decay": 0.1}
    lock = {
        "baseline": {"deps": [], "outs": [{"path": "models/baseline", "md5": "a"}]},
        "sparse-train": {
            "deps": [
                {"path": "models/baseline", "md5": inputs},
                {"path": "secateur/nn", "md5": "c"},
            ],
            "params": {"params.yaml": {"seed": params["seed"], "decay": params["decay"]}},
            "outs": [{"path": "models/sparse", "md5": "d"}],
        },
    }
    if report == "of DVC":
        md5 = hashlib.md5((tmp_path / results.REPORT).read_bytes()).hexdigest()
        lock["evaluate"] = {"deps": [], "outs": [{"path": results.REPORT, "md5": md5}]}
    of_round = {"params": {"params.yaml": {"rounds.round2.decay": 0.1}}, "deps": []}
    optional = {"params": {"params.yaml": {"sensitivity": 0}}, "deps": []}
    for path, stages in {
        "dvc.lock": lock,
        "stages/rounds/dvc.lock": {"sparse-train@round2": of_round},
        "stages/sensitivity/dvc.lock": {"sensitivity": optional},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / results.PARAMS).write_text(yaml.safe_dump(params | changed))
    compare.command(Namespace(experiment=[], all=False, sort="final", json=True, csv=False))
    output = capsys.readouterr()
    names = [row["experiment"] for row in json.loads(output.out)]
    assert ("workspace" in names) == (stage is None)
    assert (f"(stage {stage})" in output.err) == (stage is not None)


@pytest.mark.parametrize("methods", [3, 40])
def test_the_page_holds_every_method_and_asks_for_nothing_else(experiments, tmp_path, methods):
    cells = experiments(methods, seeds=(1, 2, 3) if methods == 3 else (1,))
    page.write(tmp_path / "page", "a <comparison>", cells)
    text = (tmp_path / "page/index.html").read_text()
    assert "a &lt;comparison&gt;" in text and text.count("<svg") == 3
    assert all(f"<td>m{number}</td>" in text for number in range(methods))
    assert "<script" not in text and 'src="' not in text and "<link" not in text
    for name in ("compression.svg", "macs.png", "table.md", "table.tex", "table.csv"):
        assert (tmp_path / "page" / name).stat().st_size
    assert ("cannot be told apart" in text) == (methods == 3)
    assert ("fewer than 3 seeds: no test" in text) == (methods == 40)


@pytest.mark.usefixtures("vectors")
def test_a_page_has_no_figures_and_tables_of_an_earlier_one(experiments, tmp_path):
    old = ("rounds.csv", "rounds.svg", "curves.png", "latency-onnx-runtime.svg")
    own = ("notes.png", latencies.LATENCIES)
    for name in (*old, *own):
        (tmp_path / name).write_text("of other experiments")
    page.write(tmp_path, "later", experiments(1, seeds=(1,)))
    assert not {*old} & {file.name for file in tmp_path.iterdir()}
    assert all((tmp_path / name).read_text() == "of other experiments" for name in own)
    assert (tmp_path / "latency.svg").is_file()


def test_a_wide_axis_of_accuracies_has_equal_room_for_equal_ratios_of_errors():
    narrow, wide = Figure().add_subplot(), Figure().add_subplot()
    plots.scale_accuracy(narrow, [98.0, 98.5])
    plots.scale_accuracy(wide, [60.0, 90.0, 99.9])
    assert narrow.get_yscale() == "linear" and wide.get_yscale() == "function"
    low, middle, high = (wide.transData.transform((0, y))[1] for y in (90.0, 99.0, 99.9))
    assert middle - low == pytest.approx(high - middle) and high > middle
    bottom, top = wide.get_ylim()
    assert bottom < 60 and 99.9 < top < 100
    plots.scale_accuracy(wide, [0.0, 100.0])  # an error of zero can be drawn too
    assert np.isfinite(wide.transData.transform((0, 100.0))).all()
    forward, backward = wide.yaxis.get_transform(), wide.yaxis.get_transform().inverted()
    around = np.linspace(0, 101, 1000)
    assert np.diff(forward.transform(around)).min() > 0
    assert backward.transform(forward.transform(around)) == pytest.approx(around)


def test_seeds_are_one_row_with_the_differences_paired(experiments):
    cells = experiments(2)
    found = {result.name: result for result in results.read([c.experiment for c in cells])}
    rows = tables.rows([(cell, found[cell.experiment]) for cell in cells])
    assert [(row.label, row.point, len(row.results)) for row in rows] == [
        ("m0", "2x", 3), ("m0", "4x", 3), ("m1", "2x", 3), ("m1", "4x", 3)]  # fmt: skip
    first = tables.differences(rows)[0]
    change = [0.01 + 0.001 * seed**2 for seed in (1, 2, 3)]
    p = stats.ttest_1samp(change, 0).pvalue
    assert float(first[5]) == pytest.approx(p, rel=1e-2)
    assert float(first[6]) == pytest.approx(min(1, 2 * p), rel=1e-2)


def test_cells_made_by_hand_differ_in_method_and_point(experiments):
    names = [cell.experiment for cell in experiments(2, seeds=(1,))]
    made = by_hand.cells_of(results.read(names))
    assert {(cell.method, cell.point) for cell in made} == {
        ("p0, magnitude", "ratios 0.5"), ("p0, magnitude", "ratios 0.75"),
        ("p1, magnitude", "ratios 0.5"), ("p1, magnitude", "ratios 0.75")}  # fmt: skip


def test_a_setting_that_an_older_version_lacks_counts_as_turned_off():
    def result(name, **params):
        return SimpleNamespace(name=name, params={"seed": 1, "pruner": "magnitude", **params})

    old, off = result("old", size=3), result("off", size=3, cutout=0, branches=[])
    other = result("other", size=4, cutout=0, branches=["layer1.2", "layer2.1"])
    assert results.different([old, off]) == []
    assert set(results.different([old, other])) == {"size", "branches"}
    assert results.different([off, result("none", size=3, cutout=None, branches=[])]) == ["cutout"]
    assert compare.differences(other, ["branches"]) == "branches [layer1.2, layer2.1]"


@pytest.mark.parametrize("texts", [("1e-05", "2e-4"), ("0.00001", "0.0002")])
def test_numbers_are_amounts_however_they_are_written(texts):
    """DVC writes 0.00001 as 1e-05, which YAML 1.1 reads as text."""
    shape = "{{seed: 1, pruner: std, penalty: none, pruners: {{std: {{sensitivity: {}}}}}}}"
    report = json.dumps(REPORT).encode()
    small, large = (results.parse(text, shape.format(text).encode(), report) for text in texts)
    assert [(cell.method, cell.point) for cell in by_hand.cells_of([small, large])] == [
        ("none, std", "sensitivity 1e-05"), ("none, std", "sensitivity 0.0002")]  # fmt: skip
    again = results.parse("again", shape.format("1E-5").encode(), report)
    assert results.different([small, again]) == []
    assert not results.different([replace(small, params={"lr": n}) for n in (1, 1.0)])


NO_EFFECT = {
    "export.int8": (True, False), "export.latency_batches": ([1, 32], [1]),
    "sensitivity.drop": (0.01, 0.1), "evaluate.latency_repeats": (200, 3),
    "evaluate.last_epochs": (0, 5), "datasets.image_folder.memory_mb": (1024, 0),
    "latency.threads": (1, 2),
}  # fmt: skip


def with_settings(changed):
    """An experiment with these settings for each seed; changed for the second seed only."""
    both = [{key: values[n] for key, values in changed.items()} for n in range(2)]
    same = {"dataset": "image_folder", "pruner": "magnitude", "penalty": "none"}
    return [
        Result(f"s{seed}", same | own | {"seed": seed}, REPORT | {"seed": seed})
        for seed, own in enumerate(both, 1)
    ]


@pytest.mark.parametrize("key", NO_EFFECT)
def test_seeds_are_one_method_whatever_settings_without_effect_are(key):
    found = with_settings({key: NO_EFFECT[key]})
    assert results.different(found) == []
    assert [(cell.method, cell.point) for cell in by_hand.cells_of(found)] == [
        ("none, magnitude", "as set")
    ] * 2
    rows = [tables.Row("m", "1", False, (result,)) for result in found]
    assert fairness.setup(*rows) == ("S4.2", "")


@pytest.mark.parametrize(
    "changed",
    [
        {"evaluate.latency_batch": (1, 32)},
        {"datasets.image_folder.size": (16, 32)},
        {"latency.threads": (1, 2), "prune.latency": ("torch", "torch")},
        {"latency.threads": (1, 2), "rounds.round2.prune.latency": ("torch", "torch")},
    ],
)
def test_settings_that_can_change_a_result_are_methods_of_their_own(changed):
    found, key = with_settings(changed), next(iter(changed))
    assert results.different(found) == [key]
    name, values = key.rpartition(".")[2], changed[key]
    assert [cell.method for cell in by_hand.cells_of(found)] == [
        f"none, magnitude, {name} {value}" for value in values
    ]


def test_long_labels_leave_room_for_the_axes():
    label = "none, magnitude, branches [layer1.2, layer2.1], image_folder.augment.cutout 8"
    points = [plots.Point(1.5, 0.87, 0.01), plots.Point(1.8, 0.86, 0.01)]
    figure = plots.trade_off({label: points, "other": points}, {"dense": 0.88}, [], "latency")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.png(figure)
    assert figure.axes[0].get_position().width > 0.5


def test_ticks_of_a_wide_axis_do_not_overlap():
    """A dense network at 100 % and a pruned one that guesses: 99.7 to 100 are a few points high."""
    points = [plots.Point(1.2, 1.0, None), plots.Point(2.0, 0.8, 0.1), plots.Point(20.0, 0.15, 0.1)]
    figure = plots.trade_off({"m": points}, {"dense": 1.0}, [], "cost")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    shown = [
        label for label in axes.get_yticklabels() if axes.get_ylim()[0] <= label.get_position()[1]
    ]
    boxes = [label.get_window_extent() for label in shown]
    assert shown[0].get_text() == "100" and len(shown) > 6
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))


def drawings(lines):
    """Each kind of figure that has labels, drawn, of the labels and points of `lines`."""
    history = {"baseline": [0.5, 0.7], "finetune": [0.8, 0.9]}
    drawn = [
        plots.trade_off(lines, {"dense": 0.9}, [], "cost"),
        plots.curves(dict.fromkeys(lines, history)),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
    return drawn


def test_names_of_many_layers_do_not_overlap():
    names = [f"layer{n}.{k}.conv1" for n in (1, 2, 3) for k in range(40)]
    figure = plots.layers({"method": dict.fromkeys(names, 0.5)})
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == len(names)
    assert all(one.x1 <= other.x0 + 0.5 for one, other in itertools.pairwise(boxes))
    meaning = figure.axes[1].yaxis.label.get_window_extent()
    assert meaning.y0 >= 0 and meaning.y1 <= figure.bbox.height


def test_labels_are_drawn_as_they_are_written():
    """matplotlib omits `_hidden` from a legend, and reads a formula between two `$`."""
    written = ["_hidden", r"cost $\frac{ $", "$x$", "dense"]
    points = [plots.Point(2.0, 0.9, None)]
    for figure in drawings(dict.fromkeys(written, points)):
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert shown[:4] == written
    theirs = [(r"by \$theirs$", 2.0, 0.8)]
    figure = plots.trade_off({"own": points}, {"dense": 0.9}, [], "a $ in $\\frac{$", theirs)
    assert plots.svg(figure)
    assert figure.legends[0].get_texts()[-1].get_text() == r"1: by \$theirs$ (not ours)"
    figure = plots.layers({label: {r"$\frac{$": 0.5, "_b": 0.5} for label in written})
    assert plots.svg(figure)
    (axes, _) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == written
    assert [text.get_text() for text in axes.get_xticklabels()] == [r"$\frac{$", "_b"]


@pytest.mark.parametrize(("count", "words"), [(7, 40), (10, 40), (25, 10), (40, 1), (3, 100)])
def test_every_entry_of_a_legend_is_within_the_figure(count, words):
    points = [plots.Point(1.5, 0.87, 0.01), plots.Point(1.8, 0.86, 0.01)]
    for figure in drawings({f"method {n} " + "setting 8, " * words: points for n in range(count)}):
        legend, canvas = figure.legends[0].get_window_extent(), figure.bbox
        assert canvas.x0 <= legend.x0 and legend.x1 <= canvas.x1
        assert canvas.y0 <= legend.y0 and legend.y1 <= canvas.y1
        assert figure.axes[0].get_position().width > 0.3


def test_a_word_longer_than_a_line_of_the_legend_is_broken():
    points = [plots.Point(1.5, 0.87, 0.01), plots.Point(1.8, 0.86, 0.01)]
    for figure in drawings({"x" * 150: points}):
        window, legend = figure.axes[0].get_window_extent(), figure.legends[0].get_window_extent()
        assert 0.5 * figure.bbox.width < window.x1 < legend.x0 < legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("points", "scale"),
    [
        ([(0.995, 0.012), (0.9, 0.08)], "function"),
        ([(1.0, 0.0), (0.97, 0.05)], "function"),
        ([(0.88, 0.15), (0.86, 0.02)], "linear"),
    ],
)
def test_bars_of_intervals_are_within_the_axes_up_to_100_percent(points, scale):
    """Bars as drawn, not as asked for; a point at 100 % has room above it."""
    own = [plots.Point(2.0 + n, *point) for n, point in enumerate(points)]
    figure = plots.trade_off({"m": own}, {"dense": 0.9}, [], "cost")
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    (bars,) = axes.collections
    drawn = np.array([segment[:, 1] for segment in bars.get_segments()])
    asked = np.array([[accuracy - half, accuracy + half] for accuracy, half in points])
    assert drawn == pytest.approx(np.clip(100 * asked, 0, 100))
    figure.draw_without_rendering()
    ends = axes.transData.transform([(2, end) for end in drawn.flat])[:, 1]
    window = axes.get_window_extent()
    room = 0.02 * window.height
    assert ends.min() > window.y0 + room and ends.max() < window.y1 - room


def row_of(label, dense, control=False, **params):
    """A row of one experiment with this dense accuracy and these settings."""
    own = {"arch": "resnet_cifar", "dataset": "digits"} | {
        key.replace("__", "."): value for key, value in params.items()
    }
    report = REPORT | {"dataset": own["dataset"], "baseline": {"accuracy": dense}}
    report["seed"] = own.get("seed", 1)
    return tables.Row(label, "1", control, (Result(label, own, report),))


def test_each_dense_network_has_a_line_of_its_own():
    same = [row_of("a", 0.9), row_of("b", 0.8, baseline__keep_epoch=3)]
    longer = row_of("dense_longer: a", 0.99, control=True, baseline__epochs=99)
    assert tables.dense([*same, longer]) == {"dense": pytest.approx(0.85)}
    assert tables.dense([longer]) == {"dense": 0.99}
    second = row_of("b", 0.7, seed=2)
    assert tables.dense([*same, second]) == {"dense": pytest.approx((0.85 + 0.7) / 2)}
    rows = [
        row_of("a", 1.0, dataset="mnist"), row_of("a", 0.9, archs__resnet_cifar__depth=20),
        row_of("b", 0.8, archs__resnet_cifar__depth=20, pruner="other"),
        row_of("b", 0.7, archs__resnet_cifar__depth=56),
    ]  # fmt: skip
    lines = tables.dense(rows)
    assert lines == {
        "dense: dataset mnist": 1.0, "dense: dataset digits, depth 20": pytest.approx(0.85),
        "dense: dataset digits, depth 56": 0.7,
    }  # fmt: skip
    axes = page._figure(rows, "compression", []).axes[0]
    assert [line.get_ydata()[0] for line in axes.get_lines()[-3:]] == pytest.approx([100, 85, 70])
    many = {f"dense {number}": 0.9 for number in range(plots.MOST_DENSE + 1)}
    figure = plots.trade_off({"m": [plots.Point(2.0, 0.9, None)]}, many, [], "cost")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["m"]


def test_each_data_set_has_a_note_on_its_test_images_in_any_order():
    """sqrt(0.8 * 0.2 / 100) = 0.04; with all n right, Wilson's lower end is n / (n + z^2)."""
    rows = [row_of("a", 1.0, dataset="mnist"), row_of("b", 0.9), row_of("c", 0.7)]
    left = {
        name: artifacts.Artifacts("", {}, images, None)
        for name, images in (("a", 360), ("b", 100), ("c", 100))
    }
    said = page._image_notes(rows, left)
    first, second = said
    assert first.startswith("digits: 100 test images: ") and "error of 4.00 points;" in first
    low = 100 * 360 / (360 + stats.norm.ppf(0.975) ** 2)
    assert second.startswith("mnist: 360 test images: ") and f" {low:.2f} to 100.00 %" in second
    assert page._image_notes(rows[::-1], left) == said
    untrained = row_of("smaller: b", 0.1, control=True)
    of_smaller = left | {"smaller: b": artifacts.Artifacts("", {}, 100, None)}
    assert page._image_notes([*rows, untrained], of_smaller) == said
    (alone,) = page._image_notes(rows[1:], left)
    assert alone.startswith("100 test images: ")


@pytest.mark.usefixtures("vectors")
def test_a_seed_counts_once_in_a_report(experiments, tmp_path, capsys):
    """From two studies that share a cell: an equal result is left out, another one is kept."""
    cell, other_point = experiments(1, seeds=(1,))
    known = results.read([cell.experiment])[0]
    commits = {"same": known.report, "other": known.report | {"compression": 3}}
    head = experiments.git("rev-parse", "HEAD")
    for name, report in commits.items():
        (tmp_path / results.REPORT).write_text(json.dumps(report))
        (tmp_path / results.PARAMS).write_text(
            experiments.git("show", f"{known.commit}:params.yaml")
        )
        experiments.git("add", ".")
        commit = experiments.git("commit-tree", experiments.git("write-tree"), "-m", name)
        experiments.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
    method, own = "p0, magnitude", (f"p0, magnitude ({cell.experiment})", "p0, magnitude (other)")
    for others, methods in (["same"], {method}), (["same", "other"], {method, *own}):
        names = ["--name", "two", cell.experiment, other_point.experiment, *others]
        page.command(build_parser().parse_args(["report", *names]))
        lines = csv.DictReader((tmp_path / "report/two/table.csv").read_text().splitlines())
        found = [(line["method"], line["seeds"]) for line in lines]
        assert set(found) == {(each, "1") for each in methods} and len(found) == 1 + len(others)
        said = "left out, for others have their settings, seed and results: same"
        assert said in capsys.readouterr().out
        assert said in (tmp_path / "report/two/index.html").read_text()


def _keep(cache, content):
    """Put a file into DVC's cache; returns its hash, which is its name there."""
    md5 = hashlib.md5(content).hexdigest()
    place = cache / "files" / "md5" / md5[:2] / md5[2:]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return md5


@pytest.mark.usefixtures("vectors")
def test_curves_and_layers_come_from_the_cache_by_the_hashes_of_the_lock(experiments, tmp_path):
    history = _keep(tmp_path / "shared", b"epoch,val_accuracy\n1,0.5\n2,0.75\n")
    listing = json.dumps([{"relpath": "history.csv", "md5": history}]).encode()
    folder = _keep(tmp_path / "shared", listing)
    outs = {"baseline": ("models/baseline", folder), "finetune": ("models/finetuned", "0" * 32)}
    more = {"finetune@more": ("models/rounds/more/finetuned", folder)}
    (tmp_path / "stages/rounds").mkdir(parents=True)
    for file, made in (("dvc.lock", outs), ("stages/rounds/dvc.lock", more)):
        stages = {name: {"outs": [{"path": p, "md5": md5}]} for name, (p, md5) in made.items()}
        (tmp_path / file).write_text(json.dumps({"stages": stages}))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config.local").write_text("[cache]\n    dir = ../shared\n")
    (tmp_path / "metrics/layers.csv").write_text(
        "model,layer,sparsity_of_dense\nfinetuned,fc1,0.9\nfinetuned,fc2,0.5\nbaseline,fc1,0\n"
    )
    cells = experiments(1, seeds=(1,))
    left = artifacts.read(results.read([cells[0].experiment]))[cells[0].experiment]
    assert artifacts.validation_curves([left, left]) == {"baseline": [0.5, 0.75]}  # others are gone
    chained = results.read([cells[0].experiment])[0]
    chained.report["rounds"] = {"round1": {}, "more": {}}
    left_by_both = artifacts.read([chained])[chained.name]
    assert list(left_by_both.histories) == ["baseline", "finetune@more"]
    assert artifacts.layer_sparsity([left]) == {"fc1": 0.9, "fc2": 0.5}
    assert (left.test_images, left.revision) == (None, None)
    page.write(tmp_path / "report", "mine", cells)
    text = (tmp_path / "report/index.html").read_text()
    assert page.CAPTIONS["curves"] in text and page.CAPTIONS["layers"] in text
    assert (tmp_path / "report/layers.svg").is_file()


@pytest.mark.usefixtures("vectors")
def test_latencies_are_columns_of_the_models_that_were_measured(experiments, tmp_path):
    """Means by hand; times of other models with that name and damaged tables are ignored."""
    lock = {"stages": {"finetune": {"outs": [{"path": "models/finetuned", "md5": "1.dir"}]}}}
    (tmp_path / "dvc.lock").write_text(json.dumps(lock))
    cells = [cell for cell in experiments(1) if cell.point == "2x"]
    place = ("onnxruntime", 1, 1, "a processor")
    times = [
        ExperimentLatency("m0-2-s1", "1.dir", *place, dense_ms=4.0, latency_ms=2.0),
        ExperimentLatency("m0-2-s2", "1.dir", *place, dense_ms=4.0, latency_ms=1.0),
        ExperimentLatency("m0-2-s3", "0.dir", *place, dense_ms=4.0, latency_ms=0.01),
    ]
    folder = tmp_path / "report"
    folder.mkdir()
    latencies.write(folder, times)
    assert latencies.read(folder) == times
    page.write(folder, "mine", cells)
    (line,) = csv.DictReader((folder / "table.csv").read_text().splitlines())
    assert float(line["latency ONNX Runtime"]) == 1.5
    assert float(line["speedup ONNX Runtime"]) == 3.0
    half = stats.t.ppf(0.975, 1) * 1.0  # for 2 and 4: s / sqrt(2) = 1
    assert float(line["speedup ONNX Runtime_half_width"]) == pytest.approx(half)
    text = (folder / "index.html").read_text()
    assert "<th>ONNX Runtime speed-up</th>" in text and page.MEASURED in text
    assert "latency in ONNX Runtime: batch 1, 1 thread, float32, a processor" in text
    assert (folder / "latency-onnx-runtime.svg").is_file()
    found = results.read([cell.experiment for cell in cells])
    older = (folder / "latency.csv").read_text().replace(",repeats", "").replace(",0\n", "\n")
    (folder / "latency.csv").write_text(older)
    assert latencies.read(folder) == times, "a table without repeats"
    (note,) = latencies.notes(latencies.columns(found, [replace(times[0], repeats=1000), times[1]]))
    assert "the shortest of many or 1,000 passes" in note and latencies.OF_PROGRAMS not in note
    other = [replace(times[0], batch=8), *times]
    assert list(latencies.columns(found, other)) == [
        "ONNX Runtime, batch 8, threads 1, a processor",
        "ONNX Runtime, batch 1, threads 1, a processor",
    ]
    for damage in ("experiment,model\na,b\n", "\0", (folder / "latency.csv").read_text() + "x,y\n"):
        (folder / "latency.csv").write_text(damage)
        assert latencies.read(folder) == []
    page.write(folder, "mine", cells)
    assert "ONNX" not in (folder / "index.html").read_text()


def test_networks_of_the_cache_are_measured_once(experiments, tmp_path):
    """Real checkpoints in DVC's cache; missing ones are reported in one line."""
    header = Header("lenet300", {"hidden": [6, 5]}, ["a", "b"], [1, 8, 8], [0.5], [0.5], "5", "a")
    outs = []
    for name, width in (("baseline", 6), ("finetuned", 3)):
        own = replace(header, arch_settings={"hidden": [width, 5]})
        checkpoint.save(tmp_path / "m", own, checkpoint.build_architecture(own), {})
        md5 = _keep(tmp_path / ".dvc/cache", (tmp_path / "m").read_bytes())
        listing = json.dumps([{"relpath": "model.safetensors", "md5": md5}]).encode()
        outs.append({"path": f"models/{name}", "md5": _keep(tmp_path / ".dvc/cache", listing)})
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"all": {"outs": outs}}}))
    cells = experiments(1, seeds=(1,))
    found = results.read([cell.experiment for cell in cells])
    conditions, said = latencies.Conditions(("torch",), repeats=3), []
    times = list(latencies.measure(found, conditions, [], said.append))
    assert [line.experiment for line in times] == [result.name for result in found]
    assert all(line.dense_ms > 0 and line.latency_ms > 0 for line in times) and len(said) == 2
    assert list(latencies.measure(found, conditions, times, said.append)) == []
    assert len(said) == 2
    folder, names = tmp_path / "page", [result.name for result in found]
    for repeats, kept in ((3, 3), (7, 7), (5, 7)):  # more repeats are measured again, fewer are not
        words = ["report", "--latency", "torch", "--repeats", str(repeats), "--name", "x", *names]
        page.measure(folder, found, build_parser().parse_args(words))
        stored = latencies.read(folder)
        assert [(line.experiment, line.repeats) for line in stored] == [(n, kept) for n in names]
        (note,) = latencies.notes(latencies.columns(found, stored))
        assert f"the shortest of {kept} passes" in note
        assert note.startswith("latency in torch.export: ") and latencies.OF_PROGRAMS in note
    networks, image = latencies._networks(found[0])
    assert networks["dense"].fc1.out_features == 6 and networks["finetuned"].fc1.out_features == 3
    assert image.shape == (1, 1, 8, 8)
    shutil.rmtree(tmp_path / ".dvc/cache")
    assert list(latencies.measure(found[:1], conditions, [], said.append)) == []
    assert "models/baseline is not in DVC's cache" in said[-1]


@pytest.mark.usefixtures("vectors")
def test_damaged_tables_are_left_out(experiments, tmp_path):
    (tmp_path / "metrics/layers.csv").write_text('a,b\n1,2,3\n"')
    (tmp_path / "dvc.lock").write_text("stages: [1")
    cells = experiments(1, seeds=(1,))
    page.write(tmp_path / "report", "mine", cells)
    assert page.CAPTIONS["layers"] not in (tmp_path / "report/index.html").read_text()


def test_bootstrap_by_the_normal_approximation():
    """1,000 images: only the first network gets 60 of them right, only the second another 20."""
    first = [True] * 60 + [False] * 20 + [True] * 920
    second = [False] * 60 + [True] * 20 + [True] * 920
    low, high = statistics.bootstrap(first, second)
    mean, spread = 0.04, 1.96 * ((0.08 - 0.04**2) / 1000) ** 0.5
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=2e-3)
    assert statistics.bootstrap(first, first) == (0.0, 0.0)


SAME = {
    "dataset": "digits", "arch": "lenet300", "archs.lenet300.hidden": [3], "baseline.epochs": 9,
    "finetune.epochs": 5, "finetune.lr": 0.1, "sparse_train.epochs": 4, "sparse_train.lr": 0.2,
    "seed": 1, "penalty": "none", "archs.vgg.depth": 11,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "label", "lacks"),
    [
        ({"pruner": "other", "archs.vgg.depth": 19}, "S4.2", ""),
        ({"baseline.keep_epoch": 2, "sparse_train.lr": 0.3}, "S4.1", "sparse_train.lr 0.2 and 0.3"),
        ({"baseline.warmup": 0, "data.cutout": 0}, "S4.2", ""),  # settings that the first lacks
        ({"sparse_train.lr": 0.3}, "S4.1", "sparse_train.lr 0.2 and 0.3"),
        ({"sparse_train.epochs": 8}, "S3.2", "sparse_train.epochs 4 and 8"),
        ({"finetune.lr": 0.2}, "S3.1", "finetune.lr 0.1 and 0.2"),
        ({"finetune.epochs": 6, "finetune.lr": 0.2}, "S2", "finetune.epochs 5 and 6"),
        ({"baseline.epochs": 10}, "S1", "baseline.epochs 9 and 10"),
        ({"arch": "lenet5"}, "none", "arch lenet300 and lenet5"),
        ({"compression": 2.2}, "none", "compression 2.0 and 2.2"),
    ],
)
def test_the_setup_is_the_strictest_that_two_methods_fulfil(changed, label, lacks):
    rows = [
        tables.Row("m", "1", False, (Result("x", params, {"compression": compression}),))
        for params, compression in ((SAME, 2.0), (SAME | changed, changed.get("compression", 2.02)))
    ]
    assert fairness.setup(*rows) == (label, lacks)


def test_a_round_that_repeats_a_setting_of_the_first_one_does_not_differ():
    first, key = {"finetune.lr": 0.1}, "rounds.round2.finetune.lr"
    assert fairness._differing(first, first | {key: 0.1}, ("finetune.",)) == ""
    assert fairness._differing(first, first | {key: 0.2}, ("finetune.",)) == f"{key} None and 0.2"


@pytest.mark.usefixtures("vectors")
def test_published_results_are_drawn_and_marked_as_not_ours(experiments, tmp_path, monkeypatch):
    cells = experiments(2)
    known = [anchors.Anchor("theirs", 0.9, "a paper", compression=3.0)]
    monkeypatch.setitem(anchors.PUBLISHED, ("digits", "lenet300", None), known)
    page.write(tmp_path / "report", "mine", cells)
    html = (tmp_path / "report/index.html").read_text()
    assert "Published results" in html and "a paper" in html
    assert "theirs (not ours)" in (tmp_path / "report/compression.svg").read_text()
    assert "theirs" not in (tmp_path / "report/macs.svg").read_text(), "no published MACs"


def test_published_results_are_those_of_one_depth(monkeypatch):
    known = [anchors.Anchor("theirs", 0.9, "a paper", macs=2.0)]
    monkeypatch.setitem(anchors.PUBLISHED, ("cifar10", "resnet_cifar", 56), known)
    report = REPORT | {"dataset": "cifar10", "arch": "resnet_cifar"}
    rows = [
        tables.Row(str(d), "", False, (Result("x", {"archs.resnet_cifar.depth": d}, report),))
        for d in (56, 20)
    ]
    assert page._published(rows[:1]) == known
    assert page._published(rows[1:]) == page._published(rows) == []


LABELS = [
    r"L1 & 50% <b>bold</b> a|b _#~~x~~ ^{}\ x\|",
    "*Taylor* ≥ 2",
    "[a](b) `c` $x$ &lt;",
    "_h_",
    "a\nb",
]


def test_labels_in_markdown_are_shown_as_they_are_written():
    rows = [row_of(label, 0.9) for label in LABELS]
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(tables.as_markdown(rows))
    shown = [
        "".join(part.content for part in cell.children)
        for opened, cell in itertools.pairwise(tokens)
        if opened.type == "td_open"
    ]
    assert shown[:: len(tables.FIXED)] == [label.replace("\n", " ") for label in LABELS]
    kinds = {part.type for token in tokens for part in token.children or ()}
    assert kinds == {"text"}, "no emphasis, tags or links"
    assert r"\$x\$" in tables.as_markdown(rows), "no formula on GitHub"


def test_labels_in_latex_have_no_ligatures_and_no_options():
    """`<` and `>` are other letters in OT1, and `[` at the start of a line would be a length."""
    text = tables.as_latex([row_of("a<b>|", 0.9), row_of("[a]", 0.9)])
    assert "\n" + r"a\textless{}b\textgreater{}\textbar{} & 1" in text and "\n{[}a] & 1" in text


def test_a_stage_of_one_epoch_is_a_point():
    stages = {"baseline": [0.5, 0.6], "sparse-train": [0.7], "finetune": [0.8]}
    lines = plots.curves({"m": stages}).axes[0].get_lines()
    assert [line.get_marker() in (".", "o") for line in lines] == [False, True, True]


def test_short_names_of_settings_are_as_long_as_it_takes():
    keys = ["baseline.epochs", "finetune.epochs", "pruners.std.sensitivity"]
    params = {"pruner": "std", "finetune.epochs": 3, "pruners.std.sensitivity": 0.5}
    said = compare.differences(Result("x", params, {}), keys)
    assert said == "finetune.epochs 3, sensitivity 0.5"


def test_settings_of_plugins_that_a_round_does_not_use_are_left_out():
    key = "rounds.round1.pruners.magnitude.ratios"
    for pruner, words in (("magnitude", "round1 ratios 0.5"), ("std", "")):
        result = Result("x", {"pruner": pruner, key: 0.5}, {})
        assert compare.differences(result, [key]) == words


def test_settings_of_a_parametrization_that_is_not_used_make_no_method():
    key = "parametrizations.str.initial"
    for name, methods in (("none", 1), ("str", 2)):
        found = [
            Result(f"s{n}", {"parametrization": name, key: float(n)}, REPORT | {"seed": n})
            for n in (1, 2)
        ]
        assert len({cell.method for cell in by_hand.cells_of(found)}) == methods, name


def test_settings_of_a_further_round_are_named_after_it():
    keys = ["pruners.threshold.sensitivity", "sparse_train.epochs"]
    keys += [f"rounds.second.{part}.epochs" for part in ("sparse_train", "finetune")]
    keys += ["rounds.second.prune.pruners.threshold.sensitivity", "rounds.third.finetune.epochs"]
    params = {"pruner": "threshold"} | dict(zip(keys, range(1, 7), strict=True))
    said = compare.differences(Result("x", params, {}), keys)
    assert said == (
        "sensitivity 1, epochs 2, second sparse_train.epochs 3, second finetune.epochs 4, "
        "second sensitivity 5, third epochs 6"
    )
