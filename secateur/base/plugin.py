"""Find a data set, architecture, penalty, pruner and so on: the file name is the registry.

A plug-in is a module; the protocols below define what each kind of module must provide. Types from
the rooms below appear in annotations only and are not imported at run time.
"""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, overload

from secateur.base.errors import SettingsError, cut, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from secateur.data.dataset import Images
    from secateur.pruning.decision import PruningContext, PruningDecision
    from secateur.training.parametrization import Parametrization
    from secateur.training.penalty import Penalty

Kind = Literal["datasets", "archs", "penalties", "parametrizations", "pruners"]
KEYS: dict[Kind, str] = {
    "datasets": "dataset",
    "archs": "arch",
    "penalties": "penalty",
    "parametrizations": "parametrization",
    "pruners": "pruner",
}
"""Folder of plug-ins -> the top-level key of params.yaml that names the plug-in in use."""

_PACKAGE = Path(__file__).resolve().parents[1]


class Plugin(Protocol):
    """What every plug-in has."""

    Settings: Any
    """Class of its settings, a `sections.Strict`, which validates its section of params.yaml."""


class DatasetPlugin(Plugin, Protocol):
    """A module of secateur/datasets."""

    def read(self, settings: Any, root: Path) -> "Images":
        """Read training and test images; `root` is the folder of raw data."""


class ArchPlugin(Plugin, Protocol):
    """A module of secateur/archs; that package's docstring lists further, optional functions."""

    def build(self, settings: Any, classes: int, shape: tuple[int, int, int]) -> "nn.Module":
        """Build the network with new weights for images of `shape` (C, H, W)."""


class PenaltyPlugin(Plugin, Protocol):
    """A module of secateur/penalties."""

    def build(self, settings: Any, model: "nn.Module", decay: float) -> "Penalty":
        """Build the penalty of strength `decay` on the weights of `model`.

        A penalty that follows channels through the network takes a fourth parameter, `shape`: the
        shape of an image, (channels, height, width).
        """


class ParametrizationPlugin(Plugin, Protocol):
    """A module of secateur/parametrizations."""

    def build(self, settings: Any, model: "nn.Module") -> "Parametrization | None":
        """Parametrize the weights of `model`, in place; None if nothing is parametrized."""


class PrunerPlugin(Plugin, Protocol):
    """A module of secateur/pruners."""

    def prune(self, settings: Any, context: "PruningContext") -> "PruningDecision":
        """Decide which weights or channels are pruned; the network itself is not changed."""


def names(kind: Kind) -> list[str]:
    """Names of all plug-ins of a kind, sorted; files with a leading underscore are shared code."""
    return sorted(p.stem for p in (_PACKAGE / kind).glob("*.py") if not p.stem.startswith("_"))


def find(kind: Kind, name: str, key: str | None = None) -> Path:
    """File of a plug-in; raises SettingsError with the known names if there is no such plug-in.

    `key` is the key of params.yaml that the name was read from, by default that of KEYS.
    """
    path = _PACKAGE.joinpath(kind, f"{name}.py")
    is_name = kind in get_args(Kind) and re.fullmatch(r"[a-z]\w{,63}", name, re.ASCII)
    if not is_name or not path.is_file():
        name = cut(name, 60)
        raise SettingsError(
            f"params.yaml: {cut(key or KEYS[kind], 80)} = {name!r}: there is no "
            f"secateur/{kind}/{name}.py; "
            f"there are: {', '.join(names(kind))}{did_you_mean(name, names(kind))}"
        )
    return path


@overload
def load(kind: Literal["datasets"], name: str) -> DatasetPlugin: ...
@overload
def load(kind: Literal["archs"], name: str) -> ArchPlugin: ...
@overload
def load(kind: Literal["penalties"], name: str) -> PenaltyPlugin: ...
@overload
def load(kind: Literal["parametrizations"], name: str) -> ParametrizationPlugin: ...
@overload
def load(kind: Literal["pruners"], name: str) -> PrunerPlugin: ...
@overload
def load(kind: Kind, name: str) -> Plugin: ...
def load(kind: Kind, name: str) -> Any:
    """Import the plug-in `secateur/<kind>/<name>.py`, and no other plug-in."""
    find(kind, name)
    return importlib.import_module(f"secateur.{kind}.{name}")
