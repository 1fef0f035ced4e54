"""The environment: what the lock file holds, and which programs `make` runs."""

import os
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from workspace import Project, warm_python

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
ENTRY = re.compile(
    r"^(\S+)==(\S+)(?: ; .+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)


def named(group):
    """Requirements of a dependency group, including those of the groups that it includes."""
    found = []
    for entry in PROJECT["dependency-groups"][group]:
        found += named(entry["include-group"]) if isinstance(entry, dict) else [Requirement(entry)]
    return found


def locked(name):
    """Versions of a package in the lock file: several if they depend on the Python version."""
    return [match[2] for match in ENTRY.finditer(LOCK) if match[1] == canonicalize_name(name)]


@pytest.mark.parametrize("needed", named("dev"), ids=str)
def test_every_package_that_a_group_names_is_in_the_lock(needed):
    assert locked(needed.name)
    assert all(needed.specifier.contains(version) for version in locked(needed.name))


def test_the_package_runs_with_what_is_locked():
    extra = PROJECT["project"]["optional-dependencies"]
    for text in [
        *PROJECT["project"]["dependencies"],
        *(r for some in extra.values() for r in some),
    ]:
        needed = Requirement(text)
        assert locked(needed.name)
        assert all(needed.specifier.contains(version) for version in locked(needed.name))


def test_results_are_of_the_versions_that_are_locked():
    libraries = yaml.safe_load((ROOT / "params.yaml").read_text())["libraries"]
    assert {name: [version] for name, version in libraries.items()} == {
        name: locked(name) for name in libraries
    }


def test_the_lock_has_a_version_and_hashes_for_everything_and_nothing_else():
    rest = ENTRY.sub("", LOCK).splitlines()
    assert all(re.fullmatch(r" *#( +(via )?[\w.:()-]+)?( .*)?", line) for line in rest)
    assert not re.search(r"://|/\w|find-links|index-url", LOCK)


def test_builds_that_pypi_lacks_are_in_the_lock():
    for requirement, hashes in PROJECT["tool"]["secateur"]["hashes"].items():
        entry = next(m for m in ENTRY.finditer(LOCK) if f"{m[1]}=={m[2]}" == requirement)
        assert all(f"--hash={value}" in entry[3] for value in hashes)


def test_a_build_of_another_version_than_the_locked_one_is_refused():
    add_hashes = runpy.run_path(str(ROOT / "tools/lock.py"))["add_hashes"]
    with pytest.raises(SystemExit, match=r"builds of torch==1\.0, but the lock has torch==2"):
        add_hashes(LOCK, {"torch==1.0": ["sha256:0"]})
    with pytest.raises(SystemExit, match=r"builds of nothing==1\.0, but the lock has no nothing"):
        add_hashes(LOCK, {"nothing==1.0": ["sha256:0"]})


def test_every_supported_python_is_stated_and_tested():
    prefix = "Programming Language :: Python :: "
    stated = [c.removeprefix(prefix) for c in PROJECT["project"]["classifiers"] if prefix in c]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["ci"]["strategy"]["matrix"]["python-version"] == stated[1:]
    assert PROJECT["project"]["requires-python"] == f">={stated[1]}"
    assert f"Python {stated[1]} to {stated[-1]}" in (ROOT / "README.md").read_text()


@pytest.fixture
def make(tmp_path):
    """Run `make` in a folder whose environment has group `run`; its dvc and pip print their calls.

    Only group `run` is installed, so targets that need another group install it first.
    """
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()

    def run(folder, target="repro"):
        dvc = tmp_path / folder / "bin/dvc"
        dvc.parent.mkdir(parents=True, exist_ok=True)
        real = Path(warm_python()).parent / "dvc"
        dvc.write_text(f'#!/bin/sh\ncase $1 in repro) echo "$0 $@" ;; *) {real} "$@" ;; esac\n')
        dvc.chmod(0o755)
        python = dvc.with_name("python")
        checks = '"-m secateur check") ;;'  # silent if the settings are valid
        python.write_text(f'#!/bin/sh\ncase "$*" in {checks} *) echo "pip $*" ;; esac\n')
        python.chmod(0o755)
        ready = tmp_path / folder / ".ready-run"
        if not ready.exists():
            ready.touch()
        command = ["make", target, f"VENV={folder}"]
        # otherwise the make that runs these tests would pass its options to this one
        env = {name: value for name, value in Project(tmp_path).env().items() if "MAKE" not in name}
        env.pop("MFLAGS", None)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("place", ["", "elsewhere/"])
def test_make_runs_the_environments_programs_wherever_it_is(place, make, tmp_path):
    if place:
        place = str(tmp_path / place) + "/"
    dvc = f"{place or f'{tmp_path}/'}.venv/bin/dvc"
    assert make(f"{place}.venv")[-1] == f"{dvc} repro dvc.yaml stages/sensitivity/dvc.yaml"
    assert make(f"{place}.venv", "export")[-1] == f"{dvc} repro dvc.yaml stages/export/dvc.yaml"


def test_the_first_run_needs_no_group_but_its_own(make):
    """The stamp of `run` exists, so everything that pip installs belongs to another group."""
    assert not [line for line in make(".venv") if line.startswith("pip")]
    (line,) = [line for line in make(".venv", "export") if line.startswith("pip")]
    assert line.endswith("--group export") and "--require-hashes" in line
    assert not [line for line in make(".venv", "export") if line.startswith("pip")], "only once"


def test_the_packages_of_export_are_in_no_group_of_the_first_run():
    names = {needed.name for needed in named("export")}
    assert names == {
        Requirement(r).name for r in PROJECT["project"]["optional-dependencies"]["export"]
    }
    assert names and not names & {needed.name for needed in named("run")}
    assert names <= {needed.name for needed in named("dev")}, "otherwise the tests could not run"


def test_an_archive_without_git_runs_and_a_repository_made_later_is_used(make, tmp_path):
    assert make(".venv")[0].startswith("no Git repository here: pipelines run; ")
    config = tmp_path / ".dvc/config.local"
    assert "no_scm = true" in config.read_text()
    assert len(make(".venv")) == 1  # reported only once
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert len(make(".venv")) == 1
    assert "no_scm" not in config.read_text()


def test_the_command_runs_the_code_around_it_and_elsewhere_that_of_its_own_project(make, tmp_path):
    stamp = tmp_path / ".venv/.ready-run"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (0, 0))  # so that it is made again, together with the launcher
    make(".venv", "git")
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$PYTHONPATH $*"\n')
    other = tmp_path / "other project"
    (other / "secateur").mkdir(parents=True)
    (other / "secateur/__main__.py").touch()
    (other / "below").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder, project in {other / "below": other, other: other, Path("/"): tmp_path}.items():
        command = [tmp_path / ".venv/bin/secateur", "version"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.stdout == f"{project} -m secateur version\n", done.stderr
