"""Which stages DVC runs, and which it skips."""

import re

import pytest
from workspace import STAGES, ran

pytestmark = pytest.mark.pipeline


def test_the_first_run_runs_everything_and_the_second_nothing(finished):
    assert ran(finished.log) == [s.replace("_", "-") for s in STAGES]
    assert "up to date" in finished.dvc("repro")


def test_new_plugins_and_changed_observers_leave_everything_valid(project):
    penalty = project.path / "secateur/penalties/mine.py"
    penalty.write_text((project.path / "secateur/penalties/l1.py").read_text())
    for observer in ("tracking", "console"):
        file = project.path / f"secateur/pipeline/{observer}.py"
        file.write_text(file.read_text() + "\n# changed\n")
    assert "up to date" in project.dvc("status", "dvc.yaml")
    file = project.path / "secateur/pruning/criteria.py"
    file.write_text(file.read_text() + "\n# changed\n")
    status = project.dvc("status", "dvc.yaml")
    changed = {line.removesuffix(":") for line in status.splitlines() if line.endswith(":")}
    assert "prune" in changed and not changed & {"prepare", "baseline", "sparse-train"}


def test_another_library_version_makes_all_that_depends_on_it_stale(project):
    project.params(libraries__torch="1.0.0")
    status = project.dvc("status", "dvc.yaml")
    stale = {line.rstrip(":") for line in status.splitlines() if re.fullmatch(r"[a-z-]+:", line)}
    assert stale == {"baseline", "sparse-train", "prune", "finetune", "evaluate"}
    assert status.count("libraries") == 5


def test_experiments_run_only_what_they_change(project):
    log = project.dvc("exp", "run", "-S", "decay=1e-5")
    assert ran(log) == ["sparse-train", "prune", "finetune", "evaluate"]
    assert ran(project.dvc("exp", "run", "-S", "decay=0.0003")) == []
    project.dvc("checkout")  # as `exp apply` does; the other pipelines have never run
