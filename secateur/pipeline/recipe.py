"""Run a published experiment by name, over several seeds, and report mean and spread.

Every seed is a DVC experiment of its own (`<recipe>-seed<n>`, in a temporary copy: the workspace
stays as it is), so whatever has run before comes from the cache.

    secateur recipe                      lists the recipes
    secateur recipe NAME --seeds 1 2 3   runs one and prints its table
    secateur recipe NAME --apply         writes its settings into params.yaml instead

A recipe changes what it names; everything else comes from params.yaml as it is, so start from a
clean one: `git checkout params.yaml`.
"""

import argparse
import difflib
import io
import itertools
import json
import math
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import ConfigDict, JsonValue, TypeAdapter
from rich.console import Console
from rich.table import Table

from secateur.base.documents import read_yaml, validated
from secateur.base.errors import SecateurError, SettingsError, cut, shorten
from secateur.pipeline import console, params_file
from secateur.pipeline.record import MODELS

FOLDER = Path("recipes")


MAX_COMBINATIONS = 10_000
"""Recipes of one table."""


@dataclass(frozen=True)
class _File:
    """Content of a recipe's file, or of one combination of its table."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    about: str
    settings: dict[str, JsonValue] = field(default_factory=dict)
    name: str | None = None
    base: bool = False
    extends: str | None = None
    table: dict[str, dict[str | int | float, dict[str, JsonValue]]] = field(default_factory=dict)


_FILE = TypeAdapter(_File)


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from params.yaml, and what they are for."""

    name: str
    about: str
    settings: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The settings as arguments of `dvc exp run`."""
        parts = []
        for key, value in changes(self.settings, _params()).items():
            if isinstance(value, Mapping):
                flow = yaml.safe_dump(dict(value), default_flow_style=True, width=math.inf)
                parts += ["-S", f"{key}={flow.strip()}"]
                continue
            simple = isinstance(value, int | float) or re.fullmatch(r"[\w./-]+", str(value))
            plain = simple and not isinstance(value, bool | None)
            text = str(value) if plain else json.dumps(value)
            parts += ["-S", f"{key}={text}"]
        return parts


def changes(
    settings: Mapping[str, Any], params: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Settings by joined keys; a table stays one where `params` has a plain value or null."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        below = params.get(key, {})
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            found |= changes(value, below, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _params() -> dict[str, Any]:
    content = read_yaml(Path("params.yaml"), SettingsError)
    if not isinstance(content, dict):
        raise SettingsError("params.yaml: must be a table of settings")
    return content


def load(name: str) -> Recipe:
    """Read a recipe; raises SettingsError with similar names if there is none of this name."""
    written = _written()
    if name not in written or written[name].base:
        close = ", ".join(difflib.get_close_matches(name, names(), n=5)) or "none of a similar name"
        raise SettingsError(
            f"recipe {shorten(name)}: there is none in {FOLDER}/; there are: {close}; "
            "`secateur recipe` lists all"
        )
    settings = _settings(name, written, ())
    if "libraries" in settings:
        raise SettingsError(f"recipe {name}: libraries: a recipe runs with what is installed")
    return Recipe(name, written[name].about, settings)


def names() -> list[str]:
    """All recipes that can be run, sorted."""
    return sorted(name for name, content in _written().items() if not content.base)


def _written() -> dict[str, _File]:
    """Name -> what is written under it, over all files; SettingsError naming one that is wrong.

    A file is one recipe of its own name: `about` and `settings`, with `extends` on top of those of
    another one, with `base: true` for others to extend only. Or it has a `table` too, with settings
    for every value of every axis: then it is as many recipes as there are combinations, and `name`
    and `about` have the axes in braces.
    """
    found: dict[str, _File] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        content = validated(_FILE, read_yaml(path, SettingsError), str(path), SettingsError)
        if math.prod(len(axis) for axis in content.table.values()) > MAX_COMBINATIONS:
            raise SettingsError(f"{path}: table: more than {MAX_COMBINATIONS:,} combinations")
        for values in itertools.product(*(axis.items() for axis in content.table.values())):
            place = {axis: str(v) for axis, (v, _) in zip(content.table, values, strict=True)}
            name = _fill(content.name or path.stem, place, path)
            if name in found:
                raise SettingsError(f"{path}: there is another recipe named {cut(name)}")
            settings = content.settings
            for _, own in values:
                settings = _merged(settings, own)
            about = _fill(content.about, place, path)
            found[name] = replace(content, about=about, settings=settings)
    return found


def _fill(text: str, place: Mapping[str, str], path: Path) -> str:
    """The text with the values of the axes in place of their names in braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in place:
            raise SettingsError(f"{path}: {cut(match[0])}: table has no such axis")
        return place[match[1]]

    return re.sub(r"\{([^{}]*)\}", value, text)


def _settings(name: str, written: Mapping[str, _File], seen: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a recipe on top of those that it extends."""
    below = written[name].extends
    if below is None:
        return dict(written[name].settings)
    if below not in written or below in (*seen, name):
        raise SettingsError(f"recipe {cut(name)}: extends {cut(below)}, which is no other recipe")
    return _merged(_settings(below, written, (*seen, name)), written[name].settings)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables, `above` where they differ; tables within them likewise."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def run(recipe: Recipe, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Run one experiment per seed; returns their reports, with the seconds of every stage."""
    reports = []
    for seed in seeds:
        name = f"{recipe.name}-seed{seed}"
        subprocess.run(["dvc", "exp", "remove", "-q", name], capture_output=True, check=False)
        command = ["dvc", "exp", "run", "--temp", "-n", name, *recipe.overrides, "-S"]
        if subprocess.run([*command, f"seed={seed}"], check=False).returncode:
            raise SecateurError(f"recipe {recipe.name}: seed {seed} failed (see above)")
        reports.append(_report(name))
    return reports


def _report(experiment: str) -> dict[str, Any]:
    """What evaluate wrote in an experiment, and how long its stages took."""
    from dvc.api import DVCFileSystem

    tree = DVCFileSystem(rev=experiment)
    report: dict[str, Any] = json.loads(tree.read_bytes("metrics/evaluate.json"))
    report["layers"] = tree.read_bytes("metrics/layers.csv").decode()
    records = {s: json.loads(tree.read_bytes(str(m.record))) for s, m in MODELS.items()}
    report["seconds"] = {stage: record["seconds"] for stage, record in records.items()}
    return report


def show(recipe: Recipe, seeds: Sequence[int], reports: Sequence[dict[str, Any]]) -> None:
    """Print a table with one row per seed, and mean and sample standard deviation below."""
    columns = {
        "dense error %": lambda r: 100 * (1 - r["baseline"]["accuracy"]),
        "error %": lambda r: 100 * (1 - r["finetuned"]["accuracy"]),
        "compression x": lambda r: r["compression"],
        "MACs left": lambda r: r["finetuned"]["macs"],
        "MACs, dense kernels": lambda r: r["finetuned"]["macs_dense"],
        "speed-up x": lambda r: r["measured_speedup"],
        "seconds": lambda r: sum(r["seconds"].values()),
    }
    values = {heading: [read(report) for report in reports] for heading, read in columns.items()}
    table = Table(title=f"{recipe.name}: {recipe.about}", title_justify="left")
    for heading in ("seed", *columns, "alive outputs"):
        table.add_column(heading, justify="right")
    for number, (seed, report) in enumerate(zip(seeds, reports, strict=True)):
        cells = [_words(column[number]) for column in values.values()]
        table.add_row(str(seed), *cells, _alive(report))
    if len(reports) > 1:
        table.add_section()
        table.add_row("mean", *[_words(statistics.fmean(column)) for column in values.values()])
        table.add_row("std", *[_words(statistics.stdev(column)) for column in values.values()])
    Console(width=max(130, Console().width)).print(table)
    took = {s: statistics.fmean(r["seconds"][s] for r in reports) for s in reports[0]["seconds"]}
    console.say("seconds  " + ", ".join(f"{stage} {mean:.0f}" for stage, mean in took.items()))
    console.say(f"on       {reports[0]['hardware']}")


def _alive(report: dict[str, Any]) -> str:
    """Outputs of every layer of the finetuned network that are alive."""
    layers = pd.read_csv(io.StringIO(report["layers"]))
    return "-".join(map(str, layers[layers.model == "finetuned"].filters_alive))


def _words(value: float) -> str:
    """Format with about four significant digits, and separators of thousands."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{min(max(digits, 0), 2)}f}"


def apply(recipe: Recipe) -> None:
    """Write the settings into params.yaml; its comments and everything else stay."""
    params_file.update(changes(recipe.settings, _params()))
    console.say(f"params.yaml has the settings of {recipe.name}; `dvc repro` runs them")


def command(options: argparse.Namespace) -> None:
    """`secateur recipe`: list the recipes, apply one, or run it and print its table."""
    if options.name is None:
        written = {name: c for name, c in _written().items() if not c.base}
        for name in sorted(written):
            console.say(f"{name:{max(map(len, written))}}  {written[name].about}")
        return
    recipe = load(options.name)
    if options.apply:
        apply(recipe)
    else:
        show(recipe, options.seeds, run(recipe, options.seeds))
