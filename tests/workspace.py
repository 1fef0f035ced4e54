"""A working copy of the repository for tests: real files, real DVC, real MLflow."""

import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "baseline": {"epochs": 4},
    "sparse_train": {"epochs": 6},
    "finetune": {"epochs": 3},
    "evaluate": {"latency_repeats": 5},
}
STAGES = ["prepare", "baseline", "sparse_train", "prune", "finetune", "evaluate"]
MODELS = ["baseline", "sparse", "pruned", "finetuned"]
AT_START = frozenset(os.environ)
"""Variables before libraries were imported: scikit-learn and Secateur itself set more of them."""
PROGRAMS: dict[str, str] = {}
"""Variables that make `python` and `dvc` start warm (tests/warm); set by conftest.py."""


def yaml_text(value):
    """YAML of a value, by the C dumper if there is one: ten times as fast."""
    return yaml.dump(value, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


def warm_children():
    """A variable with which commands that start more Pythons, like a study, start them warm."""
    server = PROGRAMS.get("WARM_SERVER")
    return {"WARM_EXECUTABLE": str(Path(server).parent / "bin/python")} if server else {}


def warm_python():
    """The warm `python` if a server is running, as for workers of pytest-xdist; otherwise this one,
    which starts sooner than a server."""
    server = os.environ.get("WARM_SERVER")
    return str(Path(server).parent / "bin/python") if server else sys.executable


def start_warm(patch):
    """Let Python processes that this process starts through `sys.executable` be warm."""
    patch.setattr(sys, "executable", warm_children().get("WARM_EXECUTABLE", sys.executable))


def ran(log):
    """Names of the stages that DVC has run, in order."""
    return [line.split("'")[1] for line in log.splitlines() if line.startswith("Running stage")]


@dataclass
class Project:
    """A working copy in its own folder."""

    path: Path

    def run(self, *command, ok=True, timeout=900, **env):
        """Run a command in the project; returns the output of both streams together."""
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
            if not k.startswith(("DVC_", "MLFLOW_", "SECATEUR_", "PYTEST_", "PYTHONDONTWRITE"))
            and not (k.startswith(("KMP_", "GOMP_")) and k not in AT_START)
        }  # fmt: skip
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        defaults = {"PATH": path, "SECATEUR_TRACKING": "off", "OMP_NUM_THREADS": "1"}
        return clean | defaults | PROGRAMS | more

    def dvc(self, *arguments, **options):
        return self.run("dvc", *arguments, **options)

    def stage(self, name, *arguments, **options):
        return self.run("python", "-m", f"stages.{name}", *arguments, **options)

    def start(self, name, *arguments):
        """Start a stage that saves every epoch, in its own process group; does not wait for it."""
        return subprocess.Popen(
            ["python", "-m", f"stages.{name}", *arguments], cwd=self.path,
            env=self.env(SECATEUR_SAVE_SECONDS="0"), text=True, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def stage_here(self, name, *arguments, ok=True, **env):
        """Run a stage like `stage`, but in this process: for stages that end before they train."""
        output, status = io.StringIO(), None
        terminate = signal.getsignal(signal.SIGTERM)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            self.enter(patch, **env)
            patch.setattr(sys, "argv", [f"stages.{name}", *arguments])
            try:
                runpy.run_module(f"stages.{name}", run_name="__main__")
            except SystemExit as end:
                status = end.code
            finally:
                signal.signal(signal.SIGTERM, terminate)
        assert (status in (0, None)) == ok, f"{name}: status {status}\n{output.getvalue()}"
        return output.getvalue()

    def enter(self, patch, **env):
        """Let this process work in the project, like a command started by `run`."""
        patch.chdir(self.path)
        wanted = self.env(**env)
        for key in os.environ.keys() - wanted.keys():
            patch.delenv(key)
        for key, value in wanted.items():
            patch.setenv(key, value)

    def params(self, **changes):
        """Change params.yaml; `section__key` stands for a nested key."""
        file = self.path / "params.yaml"
        params = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for key, value in changes.items():
            *sections, last = key.split("__")
            table = params
            for section in sections:
                table = table[section]
            table[last] = value
        file.write_text(yaml_text(params))

    def runs(self, condition=""):
        """Runs in the project's MLflow store."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("secateur")
        return list(client.search_runs([experiment.experiment_id], condition))

    def model_bytes(self):
        return {m: (self.path / f"models/{m}/model.safetensors").read_bytes() for m in MODELS}

    def saved_states(self, stage):
        """Times at which the states of a stage's unfinished trainings were saved, by file."""
        return {
            file: file.stat().st_mtime_ns
            for file in self.path.glob(f".resume/{stage}/*/state.safetensors")
        }

    def commit(self):
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", "state")

    def clone(self, path, remote):
        """A Git clone with everything that DVC stores for this project, by a remote in a folder."""
        self.dvc("remote", "add", "-d", "shelf", str(remote))
        self.commit()
        self.dvc("push", "--run-cache")
        self.run("git", "clone", "-q", str(self.path), str(path))
        clone = Project(path)
        clone.dvc("pull", "--run-cache", ok=None)  # evaluate's report is in Git, not in the remote
        return clone

    def copy(self, path):
        shutil.copytree(self.path, path, symlinks=True)
        return Project(path)


def fresh_project(path):
    """The repository's files in their present state, with short trainings, as a Git repository."""
    from secateur.base.machine import installed_versions

    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    ).stdout.split()  # fmt: skip
    compiled = [cache_from_source(name) for name in listed if name.endswith(".py")]
    for name in [*listed, *compiled]:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "metrics/")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)  # keeps the time that compiled code refers to
    empty = "metrics/sensitivity.csv"  # only its header, as in Git: in ROOT, it may have rows
    (path / empty).parent.mkdir()
    (path / empty).write_text((ROOT / empty).read_text().split("\n")[0] + "\n")
    for lock in [path / "dvc.lock", *path.glob("stages/*/dvc.lock")]:
        lock.unlink(missing_ok=True)
    project = Project(path)
    project.params(**{f"{s}__{k}": v for s, keys in SHORT.items() for k, v in keys.items()})
    project.params(libraries=installed_versions())
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "config", "user.name", "tester")
    project.run("git", "config", "user.email", "tester@localhost")
    project.commit()
    return project
