"""Run a published experiment by name, over several seeds, and report mean and standard deviation.

Every seed is a separate DVC experiment (`<recipe>-seed<n>`, run in a temporary copy, so that the
workspace does not change); results of earlier runs come from the cache.

    secateur recipe                      lists the recipes
    secateur recipe NAME --seeds 1 2 3   runs one and prints its table
    secateur recipe NAME --apply         writes its settings into params.yaml instead

A recipe changes only the settings that it names; all others are taken from params.yaml, so start
from a clean one: `git checkout HEAD params.yaml`.
"""

import argparse
import contextlib
import difflib
import io
import itertools
import json
import math
import os
import re
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.base import settings as base_settings
from secateur.base.documents import read_yaml, validated
from secateur.base.errors import SecateurError, SettingsError, cut, shorten
from secateur.base.settings import merged
from secateur.pipeline import console, params_check, params_file, record
from secateur.pipeline.record import chain_of

FOLDER = Path("recipes")
MAX_RECIPES = 10_000
"""Largest number of recipes in one file."""


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from params.yaml, with a description."""

    name: str
    about: str
    settings: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The settings as arguments of `dvc exp run`."""
        parts = []
        for key, value in changes(self.settings, base_settings.raw()).items():
            new = "+" * bool(re.fullmatch(r"rounds\.\w+", key))  # a key that does not exist yet
            simple = isinstance(value, int | float) or re.fullmatch(r"[\w./-]+", str(value))
            plain = simple and not isinstance(value, bool | None)
            text = str(value) if plain else _flow(value)
            parts += ["-S", f"{new}{key}={text}"]
        return parts


def _flow(value: object) -> str:
    """The value as DVC takes it: JSON, but with the keys of tables unquoted."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return json.dumps(value)


def changes(
    settings: Mapping[str, Any], params: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Settings by joined keys; a table is kept whole where `params` has a plain value or null.

    A round that `params` does not have is also kept whole, and so are an empty table that it does
    not have, and a table whose own keys have dots, such as patterns of layer names; the latter is
    merged with that of `params`.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        below = params.get(key, None if prefix == "rounds." else {})
        is_new = key not in params and not value
        if is_new or not isinstance(value, Mapping) or not isinstance(below, Mapping):
            found[f"{prefix}{key}"] = value
        elif any("." in str(name) for name in value):
            found[f"{prefix}{key}"] = merged(below, value)
        else:
            found |= changes(value, below, f"{prefix}{key}.")
    return found


def load(name: str) -> Recipe:
    """The recipe of this name; SettingsError with similar names if there is none."""
    return read_recipes().recipe(name)


class _Written(BaseModel):
    """The content of a recipe file.

    A file is one recipe, named like the file, with `about` and `settings`. With `extends` its
    settings are on top of those of another recipe; with `base: true` it is only there to be
    extended. A file with a `table`, which has settings for every value of every axis, is one recipe
    for each combination; `name` and `about` then contain the axes in braces.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    about: str
    settings: dict[str, JsonValue] = {}
    extends: str | None = None
    base: bool = False
    name: str | None = None
    table: dict[str, dict[str | int | float, dict[str, JsonValue]]] = {}


_WRITTEN = TypeAdapter(_Written)


@dataclass(frozen=True)
class Recipes:
    """All recipes of the folder; each file is read once."""

    written: dict[str, _Written]
    """By name, with the values of the axes filled in."""
    errors: list[str]
    """One line for every damaged file, whose recipes are left out."""

    @property
    def names(self) -> list[str]:
        """All recipes that can be run, sorted."""
        return sorted(name for name, found in self.written.items() if not found.base)

    def recipe(self, name: str) -> Recipe:
        """The recipe of this name; SettingsError with similar names if there is none."""
        if name not in self.names:
            close = difflib.get_close_matches(name, self.names, n=5)
            unread = "".join(f"; {error}" for error in self.errors)
            raise SettingsError(
                f"recipe {shorten(name)}: there is none in {FOLDER}/; of a similar name: "
                f"{', '.join(close) or 'none'}; `secateur recipe` lists all"
                f"{unread}"
            )
        settings = self.settings(name)
        if "libraries" in settings:
            raise SettingsError(f"recipe {name}: libraries: a recipe runs with what is installed")
        return Recipe(name, self.written[name].about, settings)

    def settings(self, name: str) -> dict[str, Any]:
        """The settings of a recipe on top of those that it extends; SettingsError for a cycle."""
        chain = [name]
        while (below := self.written[chain[-1]].extends) is not None:
            if below not in self.written or below in chain:
                raise SettingsError(
                    f"recipe {chain[-1]}: extends {cut(below)}, which is no other recipe"
                )
            chain.append(below)
        settings: dict[str, Any] = {}
        for each in reversed(chain):
            settings = merged(settings, self.written[each].settings)
        return settings


def read_recipes() -> Recipes:
    """The recipes of all valid files, and the errors of the others."""
    whole, seen = Recipes({}, []), set[str]()
    for path in sorted(FOLDER.glob("*.yaml")):
        try:
            found = _read(path)
        except SettingsError as error:
            whole.errors.append(str(error))
            continue
        for name, recipe in found.items():
            if name in seen:  # ambiguous
                whole.written.pop(name, None)
                whole.errors.append(f"{path}: there is another recipe named {name}")
            else:
                whole.written[name] = recipe
        seen |= found.keys()
    return whole


def _read(path: Path) -> dict[str, _Written]:
    """The recipes of one file by name; SettingsError if it is damaged."""
    content: _Written = validated(
        _WRITTEN, read_yaml(path, SettingsError), str(path), SettingsError
    )
    count = math.prod(len(axis) for axis in content.table.values())
    if count > MAX_RECIPES:
        raise SettingsError(f"{path}: table: {count:,} combinations; at most {MAX_RECIPES:,}")
    found: dict[str, _Written] = {}
    for values in itertools.product(*(axis.items() for axis in content.table.values())):
        filled = {axis: str(value) for axis, (value, _) in zip(content.table, values, strict=True)}
        name = _filled(content.name or path.stem, filled, f"{path}: name")
        if not re.fullmatch(r"[\w.-]+", name):
            raise SettingsError(
                f"{path}: name = {shorten(name)}: letters, digits, '.', '-' and '_' are allowed"
            )
        if name in found:
            raise SettingsError(f"{path}: there is another recipe named {name}")
        settings = content.settings
        for _, own in values:
            settings = merged(settings, own)
        about = _filled(content.about, filled, f"{path}: about")
        found[name] = content.model_copy(update={"about": about, "settings": settings})
    return found


def _filled(text: str, values: Mapping[str, str], where: str) -> str:
    """The text with `{axis}` replaced by its value; SettingsError for other braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            known = ", ".join(values) or "none"
            raise SettingsError(f"{where}: {shorten(match[0])} is no axis of the table ({known})")
        return values[match[1]]

    return re.sub(r"\{([^{}]*)\}|[{}]", value, text)


def run(recipe: Recipe, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Run one experiment per seed; returns their reports, with the seconds of every stage."""
    overrides, reports = recipe.overrides, []
    dvc = [sys.executable, "-m", "dvc", "exp"]
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": beside}  # so that its `python` is this one
    for seed in seeds:
        name = f"{recipe.name}-seed{seed}"
        command = [*dvc, "run", "--temp", "-n", name, *overrides, "-S", f"seed={seed}"]
        with _earlier_kept(name) as ref:
            if subprocess.run(command, check=False, env=environment).returncode:
                raise SecateurError(f"recipe {recipe.name}: seed {seed} failed (see above)")
        reports.append(_report(name, _commit(ref)))
    return reports


@contextlib.contextmanager
def _earlier_kept(name: str) -> Iterator[str]:
    """Make room for an experiment of this name on the current commit; yields its ref.

    An existing experiment is temporarily renamed to `<name>-before`. It is removed if a new one was
    created, and otherwise gets its name back. Experiments on other commits are not touched.
    """
    head = _commit("HEAD")
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    before = f"{ref}-before"
    if not head:
        yield ref  # without a commit there are no experiments; DVC will report that
        return
    if earlier := _commit(ref) or _commit(before):  # `before`: from a process that was killed
        _change_refs(f"update {before} {earlier}", f"delete {ref}")
    try:
        yield ref
    finally:
        if earlier and _commit(ref):
            _change_refs(f"delete {before}")
        elif earlier:
            _change_refs(f"delete {before}", f"update {ref} {earlier}")


def _commit(revision: str) -> str:
    """The commit that a ref names; empty if there is none."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _change_refs(*commands: str) -> None:
    """Change refs of Git atomically; SecateurError if Git refuses."""
    update = ["git", "update-ref", "--stdin"]
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(update, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SecateurError(f"git update-ref: {cut(' '.join(done.stderr.split()), 200)}")


def _report(experiment: str, commit: str) -> dict[str, Any]:
    """The report of stage evaluate in an experiment, with the seconds of its stages."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    try:
        tree = DVCFileSystem(rev=commit)
        report: dict[str, Any] = json.loads(tree.read_bytes("metrics/evaluate.json"))
        report["layers"] = tree.read_bytes("metrics/layers.csv").decode()
        models = chain_of(report).models
        contents = {
            str(model.record): tree.read_bytes(str(model.record)) for model in models.values()
        }
    except (DvcException, OSError, ValueError, sqlite3.Error) as error:
        raise SecateurError(f"experiment {experiment}: {cut(str(error), 200)}") from None
    records = [record.parse(content, path) for path, content in contents.items()]
    report["seconds"] = {found.stage: found.seconds for found in records}
    return report


def show(recipe: Recipe, seeds: Sequence[int], reports: Sequence[dict[str, Any]]) -> None:
    """Print a table with one row per seed, and mean and sample standard deviation below."""
    columns = {
        "dense error %": lambda r: 100 * (1 - r["baseline"]["accuracy"]),
        "error %": lambda r: 100 * (1 - r["finetuned"]["accuracy"]),
        "compression x": lambda r: r["compression"],
        "remaining MACs": lambda r: r["finetuned"]["macs"],
        "MACs, dense kernels": lambda r: r["finetuned"]["macs_dense"],
        "speed-up x": lambda r: r["measured_speedup"],
        "seconds": lambda r: sum(r["seconds"].values()),
    }
    values = {heading: [read(report) for report in reports] for heading, read in columns.items()}
    table = Table(title=Text(f"{recipe.name}: {recipe.about}", "table.title"), title_justify="left")
    for heading in ("seed", *columns, "remaining outputs"):
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
    """Number of living outputs of every layer of the finetuned network."""
    import pandas as pd

    layers = pd.read_csv(io.StringIO(report["layers"]))
    return "-".join(map(str, layers[layers.model == "finetuned"].filters_alive))


def _words(value: float) -> str:
    """Format with about four significant digits, and separators of thousands."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{min(max(digits, 0), 2)}f}"


def apply(recipe: Recipe) -> None:
    """Write the settings into params.yaml; its comments and all other settings are kept."""
    params_file.update(changes(recipe.settings, base_settings.raw()))
    console.say(f"params.yaml has the settings of {recipe.name}; `dvc repro` runs them")


def command(options: argparse.Namespace) -> None:
    """`secateur recipe`: list the recipes, apply one, or run it and print its table."""
    if options.name is None:
        _list()
        return
    recipe = load(options.name)
    if len(set(options.seeds)) < len(options.seeds):
        raise SettingsError(f"--seeds {' '.join(map(str, options.seeds))}: each only once")
    params_check.check_values(merged(base_settings.raw(), recipe.settings))
    if options.apply:
        apply(recipe)
    else:
        show(recipe, options.seeds, run(recipe, options.seeds))


def _list() -> None:
    """Print a line for each recipe, and an error for each file that is damaged."""
    whole = read_recipes()
    errors = list(whole.errors)
    width = max(map(len, whole.names), default=0)
    for name in whole.names:
        try:
            whole.settings(name)
        except SettingsError as error:
            errors.append(str(error))
        else:
            console.say(f"{name:{width}}  {whole.written[name].about}")
    for message in errors[:-1]:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if errors:
        raise SettingsError(errors[-1])
