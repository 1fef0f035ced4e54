"""`secateur rounds`: write rounds that reach a target in several steps into params.yaml."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from secateur.base import files, plugin
from secateur.base.errors import SettingsError
from secateur.base.settings import FILE, Params, check
from secateur.pipeline import console, params_file
from secateur.pipeline.record import FIRST


def shares(target: float, steps: int, equal: bool = False) -> list[float]:
    """The share of the dense network that is left after each step.

    Geometric steps each leave the same share of the previous network; equal steps each remove the
    same share of the dense network.
    """
    if equal:
        return [1 - (1 - target) * step / steps for step in range(1, steps + 1)]
    return [target ** (step / steps) for step in range(1, steps + 1)]


def settings(pruner: str, kind: str, left: list[float]) -> dict[str, Any]:
    """Dotted keys of params.yaml -> values: the round of the main chain, and further rounds."""
    first, *more = ({kind: float(f"{share:.6g}"), "of": "dense"} for share in left)
    rounds: dict[str, Any] = {}
    after = "finetuned"
    for number, target in enumerate(more, start=2):
        name = FIRST.replace("1", str(number))
        rounds[name] = {
            "after": after,
            "sparse_train": {},
            "prune": {"pruners": {pruner: {"target": target}}},
            "finetune": {},
        }
        after = f"rounds/{name}/finetuned"
    return {f"pruners.{pruner}.target": first, "rounds": rounds}


def command(options: argparse.Namespace) -> None:
    """Print the settings, or write them into params.yaml; SettingsError if they do not fit."""
    if not 0 < options.to < 1:
        raise SettingsError(f"--to {options.to:g}: a share between 0 and 1 is needed")
    params = check()
    if "target" not in plugin.load("pruners", params.pruner).Settings.model_fields:
        raise SettingsError(
            f"params.yaml: pruner = {params.pruner!r}: has no target; magnitude and "
            "network_slimming have one"
        )
    left = shares(options.to, options.steps, options.equal)
    changed = settings(params.pruner, options.of, left)
    text = params_file.updated(Path(FILE).read_text(), changed)
    _check(text)
    if options.apply:
        files.write_text(Path(FILE), text)
        steps = ", ".join(f"{share:.4g}" for share in left)
        console.say(f"params.yaml: {options.steps} rounds, after which {steps} is left")
        return
    nested = {"pruners": {params.pruner: {"target": changed[f"pruners.{params.pruner}.target"]}}}
    shown = yaml.safe_dump(nested | {"rounds": changed["rounds"]}, sort_keys=False)
    console.say(shown.rstrip())


def _check(text: str) -> None:
    """SettingsError if params.yaml with this text would be invalid."""
    whole = Params.declared(yaml.safe_load(text))
    whole.chosen("pruners")
    for name in whole.rounds:
        whole.of_round(name)
