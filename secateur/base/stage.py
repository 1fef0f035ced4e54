"""The running stage as dvc.yaml declares it: params, input files, and their fingerprint."""

import contextlib
import functools
import hashlib
import json
import os
import sqlite3
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch

from secateur.base import files, sections, settings
from secateur.base.errors import SecateurError, SettingsError
from secateur.base.files import content_hash
from secateur.base.machine import device, installed_versions, processes, versions


@dataclass(frozen=True)
class Stage:
    """What dvc.yaml declares for a stage; the stage sees nothing else of params.yaml."""

    name: str
    params: settings.Params
    declared: dict[str, Any]
    """The params that dvc.yaml declares for the stage, as plain values; MLflow records these."""
    inputs: dict[str, str]
    """Declared dependency -> hash of its content, code included."""

    def input(self, path: str) -> Path:
        """The path of a dependency, or of a file inside a dependency that is a folder.

        Raises SettingsError if it is not declared or is missing.
        """
        if not {path, *map(str, Path(path).parents)} & self.inputs.keys():
            raise SettingsError(f"dvc.yaml: stage {self.name} does not declare '{path}' in deps")
        if not Path(path).exists():
            raise SettingsError(f"{path}: missing; run `dvc repro` to make it")
        return Path(path)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the result depends on: params, inputs, code, versions, device
        type, threads, processes."""
        key = {
            "stage": self.name,
            "params": self.declared,
            "inputs": self.inputs,
            "device": device().type,
            "threads": torch.get_num_threads(),
            "processes": processes()[0],
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def open_stage(name: str, pipeline: str = "dvc.yaml") -> Stage:
    """Read and validate what the file `pipeline` declares for the stage `name`.

    Checks the whole of params.yaml, the environment variables that decide where the work runs, and
    the versions of the libraries if the stage declares them. Raises SettingsError for the first
    key, value or version that is not allowed.
    """
    from dvc.dependency import ParamsDependency
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    check_settings()
    check_environment()
    declared: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    try:
        with Repo() as repo:
            root = Path(repo.root_dir)
            for dep in repo.stage.load_one(pipeline, name).deps:
                if isinstance(dep, ParamsDependency):
                    declared |= dep.read_params(flatten=False)
                else:
                    path = Path(dep.fs_path).relative_to(root)
                    inputs[path.as_posix()] = content_hash(root / path)
    except NotDvcRepoError as error:
        raise SettingsError(f"dvc.yaml: {error}; run from the root of a DVC project") from None
    except DvcException as error:
        raise SettingsError(f"dvc.yaml: {error}") from None
    except sqlite3.Error as error:
        raise SecateurError(
            f"DVC cannot use the database in which it remembers hashes of files: {error}; is the "
            "disk full, or the size of files limited?"
        ) from None
    params = settings.Params.declared(declared)
    if "libraries" in declared:
        check_libraries(params.libraries)
    return Stage(name, params, declared, inputs)


def check_environment() -> None:
    """Raise SettingsError for an invalid environment variable that decides where the work runs."""
    device()  # SECATEUR_DEVICE
    processes()  # the variables of torchrun and srun


def check_settings() -> None:
    """`settings.check`, unless this content of params.yaml has passed it with this code before.

    The check imports every plug-in, which takes longer than everything else that a stage does
    before its work. A content that has passed is remembered for a week by an empty file in
    `.resume/settings/`. Stages that start at the same time may both check and write the same file.
    """
    try:
        content = Path(settings.FILE).read_bytes()
    except OSError:
        content = b""  # `check` raises the error
    package = Path(settings.__file__).parents[1]
    parts = [hashlib.sha256(content).hexdigest(), content_hash(package), pydantic.VERSION]
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    folder = project_root() / ".resume" / "settings"
    if (folder / key).exists():
        return
    settings.check()
    with contextlib.suppress(SecateurError):  # a folder that cannot be written is no reason to stop
        files.write_text(folder / key, "")
    for old in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another stage removes it too
            if old.stat().st_mtime < time.time() - 7 * 86_400:
                old.unlink()


def check_libraries(wanted: sections.Libraries) -> None:
    """Raise SettingsError if an installed version is not the one that params.yaml names."""
    installed = installed_versions()
    for name, version in wanted.model_dump().items():
        found = installed.get(name)
        if found != version:
            raise SettingsError(
                f"params.yaml: libraries.{name} = {version!r}: {found or 'none'} is installed, and "
                f"results depend on it; install {name}=={version}, or run `secateur libraries "
                "--update`, after which `dvc status` lists what will be made again"
            )


@functools.cache
def revision() -> str | None:
    """The Git commit that is checked out; None without Git or a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def project_root() -> Path:
    """The user's project, even if this is an experiment's temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def raw_folder() -> Path:
    """The folder named by SECATEUR_DATA, by default data/raw, relative to the project."""
    return project_root() / os.environ.get("SECATEUR_DATA", "data/raw")
