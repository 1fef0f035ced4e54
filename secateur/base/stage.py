"""The running stage as dvc.yaml declares it: its params, its input files, and their fingerprint."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.base import settings
from secateur.base.errors import SettingsError
from secateur.base.machine import device, processes, versions


@dataclass(frozen=True)
class Stage:
    """What a stage may see, and nothing else of params.yaml."""

    name: str
    params: settings.Params
    declared: dict[str, Any]
    """The same params as plain values: what is tracked."""
    inputs: dict[str, str]
    """Declared dependency -> hash of its content, code included."""

    def input(self, path: str) -> Path:
        """The given dependency; an error if dvc.yaml does not declare it or nobody has made it."""
        if path not in self.inputs:
            raise SettingsError(f"dvc.yaml: stage {self.name} does not declare '{path}' in deps")
        if not Path(path).exists():
            raise SettingsError(f"{path}: missing; run `dvc repro` to make it")
        return Path(path)

    @property
    def fingerprint(self) -> str:
        """Equal for two runs that must give the same result: params, inputs, code, versions."""
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
    """Read and validate what `pipeline` declares for `name`; the whole of params.yaml is checked.

    Raises SettingsError before any work if a value, a key or an input is not as it must be.
    """
    from dvc.dependency import ParamsDependency
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    settings.check()
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
    return Stage(name, settings.Params.declared(declared), declared, inputs)


def content_hash(path: Path) -> str:
    """sha256 of a file, or of a folder's names and contents; 'missing' if there is neither."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return "missing"
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    parts = [f"{p.relative_to(path).as_posix()} {content_hash(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def project_root() -> Path:
    """The user's project, also from an experiment's temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def raw_folder() -> Path:
    """The folder named by SECATEUR_DATA, by default data/raw; relative ones from the project."""
    return project_root() / os.environ.get("SECATEUR_DATA", "data/raw")
