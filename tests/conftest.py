"""A project of its own for every test that runs the pipeline: real files, real DVC, real MLflow."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from secateur.base.allocator import tune_process

tune_process()  # before any test imports torch: several workers share the processors

ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "baseline": {"epochs": 4},
    "sparse_train": {"epochs": 6},
    "finetune": {"epochs": 3},
    "evaluate": {"latency_repeats": 5},
}


@dataclass
class Project:
    """A working copy in a folder of its own."""

    path: Path

    def run(self, *command, ok=True, timeout=900, **env):
        """Run a command there; output of both streams together."""
        result = subprocess.run(
            command, cwd=self.path, env=self.env(**env), text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if ok is not None:
            assert (result.returncode == 0) == ok, f"{command}:\n{result.stdout}"
        return result.stdout

    def env(self, **more):
        clean = {
            k: v for k, v in os.environ.items()
            if not k.startswith(("DVC_", "MLFLOW_", "SECATEUR_", "PYTEST_"))
        }  # fmt: skip
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        defaults = {"PATH": path, "SECATEUR_TRACKING": "off", "OMP_NUM_THREADS": "1"}
        return clean | defaults | more

    def dvc(self, *arguments, **options):
        return self.run("dvc", *arguments, **options)

    def stage(self, name, **options):
        return self.run(sys.executable, "-m", f"stages.{name}", **options)

    def params(self, **changes):
        """Change params.yaml; `section__key` stands for a nested key."""
        file = self.path / "params.yaml"
        params = yaml.safe_load(file.read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            table = params
            for section in sections:
                table = table[section]
            table[last] = value
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def commit(self):
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", "state")

    def copy(self, path):
        shutil.copytree(self.path, path, symlinks=True)
        return Project(path)


def fresh_project(path):
    """The repository's files as they are now, with short trainings, as a Git repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "metrics/")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    for lock in (path / "dvc.lock", path / "stages/sensitivity/dvc.lock"):
        lock.unlink(missing_ok=True)
    project = Project(path)
    project.params(**{f"{s}__{k}": v for s, keys in SHORT.items() for k, v in keys.items()})
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "config", "user.name", "tester")
    project.run("git", "config", "user.email", "tester@localhost")
    project.commit()
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project whose pipeline has run once, with MLflow. Read it, or copy it; never change it."""
    project = fresh_project(tmp_path_factory.mktemp("finished") / "project")
    project.log = project.dvc("repro", SECATEUR_TRACKING="on")
    project.commit()
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished project, to be changed at will."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def unborn(tmp_path):
    """A project in which nothing has run."""
    (tmp_path / "unborn").mkdir()
    return fresh_project(tmp_path / "unborn")
