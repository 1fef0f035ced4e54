"""Files with the number of groups of each convolution, in the format of gconv-prune.

A JSON object: module name, with or without `module.` before it, -> {"G": groups, "F": outputs,
"C": inputs, "id": index among the modules}. Layers that are not named are not changed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.base.documents import read_json
from secateur.base.errors import SettingsError, cut, did_you_mean, shorten

PREFIX = "module."
SHORTCUTS = (".shortcut", ".shortcut.conv")
"""Names in Secateur's architectures for torchvision's `.downsample.0`."""


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All convolutions by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def read(path: Path, model: nn.Module) -> dict[str, int]:
    """Groups of every convolution that the file names, validated against the network.

    An entry with one group for a layer that does not exist is ignored. Raises SettingsError naming
    the file and the entry that does not fit.
    """
    known = convolutions(model)
    found: dict[str, int] = {}
    for layer_name, entry in _entries(path).items():
        key = cut(layer_name)
        groups, outputs, inputs = _sizes(f"{path}: {key}", entry)
        name = _known(layer_name.removeprefix(PREFIX), known)
        if name is None:
            if groups == 1:
                continue
            hint = did_you_mean(key.removeprefix(PREFIX), known)
            raise SettingsError(f"{path}: {key}: the network has no such convolution{hint}")
        layer = known[name]
        if (layer.out_channels, layer.in_channels) != (outputs, inputs):
            raise SettingsError(
                f"{path}: {key}: F = {shorten(outputs)}, C = {shorten(inputs)}, but {name} has "
                f"{layer.out_channels} outputs and {layer.in_channels} inputs: the file is for "
                "another network"
            )
        if outputs % groups or inputs % groups:
            raise SettingsError(
                f"{path}: {key}: G = {shorten(groups)} does not divide F = {outputs} and "
                f"C = {inputs}"
            )
        found[name] = groups
    return found


def to_json(model: nn.Module, groups: Mapping[str, int]) -> str:
    """The content of such a file for the convolutions of a network that `groups` names."""
    place = {name: 1 + k for k, (name, _) in enumerate(model.named_modules())}  # after `module`
    entries = {
        PREFIX + name: {
            "G": groups[name],
            "F": layer.out_channels,
            "C": layer.in_channels,
            "id": place[name],
        }
        for name, layer in convolutions(model).items()
        if name in groups
    }
    return json.dumps(entries, indent=2) + "\n"


def _entries(path: Path) -> dict[str, Any]:
    entries = read_json(path, SettingsError)
    if not isinstance(entries, dict):
        raise SettingsError(f"{path}: must be an object of layers, not a {type(entries).__name__}")
    return entries


def _sizes(where: str, entry: Any) -> tuple[int, int, int]:
    """Groups, outputs and inputs of an entry."""
    if not isinstance(entry, dict):
        raise SettingsError(f"{where}: must be an object with G, F and C")
    for key in ("G", "F", "C"):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise SettingsError(f"{where}: {key} = {shorten(value)}: a whole number is needed")
        if value < 1:
            what = "; the file is a template that has not been filled in" if value == -1 else ""
            raise SettingsError(f"{where}: {key} = {shorten(value)}: must be at least 1{what}")
    return entry["G"], entry["F"], entry["C"]


def _known(name: str, known: Mapping[str, nn.Conv2d]) -> str | None:
    """The network's name for the layer; None if it has no such convolution."""
    stem = name.removesuffix(".downsample.0")
    others = [stem + ending for ending in SHORTCUTS] if stem != name else []
    return next((n for n in (name, *others) if n in known), None)
