"""Definition of a study in studies/<name>.yaml (settings, axes, seeds, controls), and its cells.

    about: two criteria at two ratios
    recipe: mnist-lenet300-element        # optional; its settings come first
    settings: {dataset: digits, baseline: {epochs: 5}}
    axes:
      method:                             # labels with their own settings
        L1: {pruner: magnitude, pruners: {magnitude: {ratios: "{ratio}"}}}
        L2: {pruner: magnitude, pruners: {magnitude: {ratios: "{ratio}", criterion: l2}}}
      ratio: [0.5, 0.7]                   # values of a key of params.yaml, or for "{ratio}"
    seeds: [1, 2, 3]
    exclude: [{method: L2, ratio: 0.7}]
    controls: [dense, random]

With `search`, axes may also be ranges, and a sampler chooses the combinations (`space`).

A cell is one combination of values with one seed, or a control: one run of the whole pipeline.
"""

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, TypeAdapter

from secateur.base.documents import read_yaml, validated
from secateur.base.errors import SettingsError, did_you_mean, shorten
from secateur.base.settings import Params
from secateur.pipeline import recipe
from secateur.pipeline.params_file import label, nested, short_key, with_numbers
from secateur.studies import controls, rounds
from secateur.studies.controls import Combination, Control
from secateur.studies.rounds import merged
from secateur.studies.space import Range, Search

FOLDER = Path("studies")
MAX_CELLS = 20_000

Label = str | int | float
Bundle = dict[str, JsonValue]


def _kind(axis: Any) -> str:
    """The kind of axis; `low` and `high` with settings are labels."""
    if isinstance(axis, list):
        return "values"
    if isinstance(axis, dict):
        ends = [axis[key] for key in ("low", "high") if key in axis]
        return "range" if ends and not any(isinstance(end, dict) for end in ends) else "labels"
    return "range" if isinstance(axis, Range) else "labels"


Axis = Annotated[
    Annotated[list[JsonValue], Tag("values")]
    | Annotated[dict[Label, Bundle], Tag("labels")]
    | Annotated[Range, Tag("range")],
    Discriminator(_kind),
]


class _Written(BaseModel):
    """Schema of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    about: str
    recipe: str | None = None
    settings: Bundle = {}
    axes: dict[str, Axis] = {}
    seeds: Annotated[list[int], Field(min_length=1)] = [1, 2, 3]
    exclude: list[dict[str, JsonValue]] = []
    controls: list[Control] | dict[Control, list[str]] = []
    """Names of controls, for all methods for which they are possible; or control -> methods."""
    method: list[str] | None = None
    """Axes whose labels together name the method; default: `method`, or the axes with labels."""
    search: Search | None = None


_WRITTEN = TypeAdapter(_Written)


@dataclass(frozen=True)
class PlannedCell:
    """One run of the pipeline in a study."""

    name: str
    """Name of its DVC experiment."""
    method: str
    point: str
    """The values of the axes that do not belong to the method."""
    seed: int
    control: str | None
    settings: dict[str, Any]
    """Settings that differ from params.yaml, as nested tables; `rounds`, if present, has all."""


@dataclass(frozen=True)
class Study:
    """A study: its cells, and a description."""

    name: str
    about: str
    cells: tuple[PlannedCell, ...]
    notes: tuple[str, ...]
    """Controls that are not possible for a method, and why."""
    space: "Space | None" = None
    """The search space, if any; the study then has no cells until the search has chosen some."""
    remarks: tuple[str, ...] = ()
    """Sentences for the page."""


@dataclass(frozen=True)
class Space:
    """The axes of a search; makes the cells of a choice of values."""

    study: str
    search: Search
    axes: Mapping[str, Range | tuple[str, ...]]
    """Numbers of a range, or labels."""
    seeds: tuple[int, ...]
    _written: _Written
    _common: Mapping[str, Any]
    _params: Mapping[str, Any]

    def cells(self, name: str, chosen: Mapping[str, str | int | float]) -> list[PlannedCell]:
        """One cell for each seed; `name` becomes part of their experiments' names."""
        written, where = self._written, str(FOLDER / f"{self.study}.yaml")
        values = {axis: self._value(axis, value) for axis, value in chosen.items()}
        settings = _settings(self._common, written.axes, values, self._params, where)
        methods = _method_axes(written, where)
        method = " ".join(label(values[axis]) for axis in methods) or self.study
        point = " ".join(
            f"{short_key(axis, values)} {_rounded(v)}"
            for axis, v in values.items()
            if axis not in methods
        )
        cells = [_cell(self.study, name, "", seed, None, settings) for seed in self.seeds]
        return [replace(cell, method=method, point=f"{name}: {point}") for cell in cells]

    def _value(self, axis: str, chosen: str | int | float) -> Any:
        """The value of a label; a number is its own value."""
        written = self._written.axes[axis]
        if isinstance(written, Range):
            return chosen
        return next(value for value in written if label(value) == chosen)


def load(name: str, params: Mapping[str, Any]) -> Study:
    """The study of this name; SettingsError, in one line, if anything is wrong with it.

    `params` are the values of params.yaml, which the study's settings override.
    """
    path = FOLDER / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not path.is_file():
        known = names()
        raise SettingsError(
            f"study {shorten(name)}: there is none in {FOLDER}/; there are: "
            f"{', '.join(known) or 'none'}{did_you_mean(name, known)}"
        )
    written, params = _read(path), with_numbers(params)
    below = recipe.load(written.recipe).settings if written.recipe else {}
    common = merged(merged(rounds.start(params), below), written.settings)
    if written.search is not None:
        space = _space(name, written, written.search, common, params)
        return Study(name, written.about, (), (), space)
    cells, notes = _cells(name, written, common, params, str(path))
    return Study(name, written.about, tuple(cells), tuple(notes), remarks=tuple(notes))


def _space(
    name: str,
    written: _Written,
    search: Search,
    common: Mapping[str, Any],
    params: Mapping[str, Any],
) -> Space:
    """The search space of a study."""
    where = str(FOLDER / f"{name}.yaml")
    for key in ("exclude", "controls"):
        if getattr(written, key):
            raise SettingsError(f"{where}: {key}: not together with search")
    if not written.axes:
        raise SettingsError(f"{where}: search: there are no axes")
    _check_seeds(written, where)
    _check_axes(written, where)
    axes = {
        axis: values if isinstance(values, Range) else tuple(label(value) for value in values)
        for axis, values in written.axes.items()
    }
    space = Space(name, search, axes, tuple(written.seeds), written, common, params)
    _check_names(space.cells("t000", {a: first(v) for a, v in axes.items()}), where)
    return space


def first(axis: Range | tuple[str, ...]) -> str | int | float:
    """The lowest number of an axis, or its first label."""
    return axis.low if isinstance(axis, Range) else axis[0]


def _check_seeds(written: _Written, where: str) -> None:
    if len(set(written.seeds)) < len(written.seeds):
        raise SettingsError(f"{where}: seeds = {written.seeds}: each only once")


def names() -> list[str]:
    """All studies, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """The description of a study from its file; SettingsError for a damaged file."""
    return _read(FOLDER / f"{name}.yaml").about


def _read(path: Path) -> _Written:
    return validated(_WRITTEN, read_yaml(path, SettingsError), str(path), SettingsError)


def _cells(
    name: str,
    written: _Written,
    common: Mapping[str, Any],
    params: Mapping[str, Any],
    where: str,
) -> tuple[list[PlannedCell], list[str]]:
    """All cells of the file, those of controls last, and notes on controls that are impossible."""
    _check_seeds(written, where)
    ranges = [axis for axis, kind in written.axes.items() if isinstance(kind, Range)]
    if ranges:
        raise SettingsError(f"{where}: axes.{ranges[0]}: a range is for a search: add `search`")
    count = math.prod(len(list(axis)) for axis in written.axes.values()) * len(written.seeds)
    if count > MAX_CELLS:
        raise SettingsError(f"{where}: axes: {count:,} cells; at most {MAX_CELLS:,}")
    _check_axes(written, where)
    method_axes = _method_axes(written, where)
    combined: list[Combination] = []
    for values in _combinations(written):
        settings = _settings(common, written.axes, values, params, where)
        method = " ".join(label(values[axis]) for axis in method_axes) or name
        point = " ".join(label(v) for axis, v in values.items() if axis not in method_axes)
        combined.append((method, point, settings))
    if not combined:
        raise SettingsError(f"{where}: exclude: it leaves no combination of the axes")
    found = [
        _cell(name, method, point, seed, None, settings)
        for method, point, settings in combined
        for seed in written.seeds
    ]
    if written.controls:
        _check_sections(combined, params, where)
    notes: list[str] = []
    for control, methods in _controls(written, [m for m, _, _ in combined], where).items():
        made, said = controls.make(control, methods, combined, params)
        notes += said
        found += [
            _cell(name, method, point, seed, control, settings)
            for method, point, settings in made
            for seed in written.seeds
        ]
    _check_names(found, where)
    return found, notes


def _check_sections(combined: Sequence[Combination], params: Mapping[str, Any], where: str) -> None:
    """Raise SettingsError for a section that controls could not be made from, such as a number."""
    for method, point, settings in combined:
        whole = rounds.whole(params, settings)
        known = {key: value for key, value in whole.items() if key in Params.model_fields}
        try:
            for name, changed in Params.declared(known).rounds.items():
                rounds.check_pruners(name, changed.prune)
        except SettingsError as error:
            cell, text = f"{method} {point}".strip(), str(error).removeprefix("params.yaml: ")
            raise SettingsError(f"{where}: {cell}: {text}") from None


def _check_axes(written: _Written, where: str) -> None:
    """Raise SettingsError for an axis without values, or with invalid or repeated ones."""
    _check_no_seed(written, where)
    for axis, values in written.axes.items():
        if isinstance(values, Range):
            continue
        if not values:
            raise SettingsError(f"{where}: axes.{axis}: has no values")
        labels = [label(value) for value in values]
        if len(set(labels)) < len(labels):
            raise SettingsError(f"{where}: axes.{axis}: a value is repeated")
    for number, rule in enumerate(written.exclude):
        for axis, named in rule.items():
            _check_excluded(written, axis, named, f"{where}: exclude.{number}.{axis}")


def _check_no_seed(written: _Written, where: str) -> None:
    """Raise SettingsError for a seed among the settings or axes, which `seeds` would replace."""
    tables: dict[str, Mapping[Any, Any]] = {"settings": written.settings, "axes": written.axes}
    for axis, values in written.axes.items():
        if isinstance(values, dict):
            tables |= {f"axes.{axis}.{name}": own for name, own in values.items()}
    for place, table in tables.items():
        if "seed" in table:
            raise SettingsError(f"{where}: {place}.seed: of no effect; `seeds` has the seeds")


def _check_excluded(written: _Written, axis: str, named: JsonValue, where: str) -> None:
    """Raise SettingsError for an exclusion without effect: an unknown axis, or an unknown value."""
    if axis not in written.axes:
        known = ", ".join(written.axes) or "none"
        raise SettingsError(f"{where}: no axis; axes: {known}")
    values = list(written.axes[axis])
    for value in _named(named, values) or [named]:
        if not any(_same(value, other) for other in values):
            allowed = shorten(", ".join(map(label, values)))
            raise SettingsError(
                f"{where} = {shorten(value)}: no value of this axis; it has {allowed}"
            )


def _method_axes(written: _Written, where: str) -> list[str]:
    """The axes whose labels name the method."""
    if written.method is not None:
        for axis in written.method:
            if axis not in written.axes:
                raise SettingsError(f"{where}: method: {shorten(axis)} is no axis")
        return written.method
    if "method" in written.axes:
        return ["method"]
    return [axis for axis, values in written.axes.items() if isinstance(values, dict)]


def _controls(
    written: _Written, methods: Sequence[str], where: str
) -> dict[Control, Sequence[str]]:
    """The requested controls, with the methods of each."""
    asked = written.controls
    if isinstance(asked, list):
        asked = {control: [*dict.fromkeys(methods)] for control in asked}
    for control, of in asked.items():
        for method in of:
            if method not in methods:
                raise SettingsError(f"{where}: controls.{control}: {shorten(method)} is no method")
    both = asked.get("scratch")
    if both is None:
        return dict(asked)
    found: dict[Control, Sequence[str]] = {c: of for c, of in asked.items() if c != "scratch"}
    parts: tuple[Control, ...] = ("scratch_epochs", "scratch_compute")
    return found | {part: [*both, *found.get(part, ())] for part in parts}


def _combinations(written: _Written) -> Iterator[dict[str, Any]]:
    """All combinations of values, one for every axis, except the excluded ones."""
    rules = [
        {axis: _named(named, list(written.axes[axis])) for axis, named in rule.items()}
        for rule in written.exclude
    ]
    for values in itertools.product(*written.axes.values()):
        found = dict(zip(written.axes, values, strict=True))
        if not any(_excluded(found, rule) for rule in rules):
            yield found


def _excluded(values: Mapping[str, Any], rule: Mapping[str, Sequence[Any]]) -> bool:
    """Whether every axis that the rule names has one of the values that it names."""
    return bool(rule) and all(
        any(_same(values[axis], one) for one in named) for axis, named in rule.items()
    )


def _named(named: JsonValue, values: Sequence[Any]) -> list[Any]:
    """The values of an axis that a rule names: one, which may be a list, or a list of them."""
    if isinstance(named, list) and not any(_same(named, value) for value in values):
        return named
    return [named]


def _same(first: Any, second: Any) -> bool:
    """Whether two values of an axis are equal; `true` is not 1, and 1e-4 is 0.0001."""
    first, second = with_numbers(first), with_numbers(second)
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)


def _settings(
    common: Mapping[str, Any],
    axes: Mapping[str, Any],
    values: Mapping[str, Any],
    params: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """The settings of one combination, with the values of its axes filled in."""
    settings = dict(copy.deepcopy(common))
    used: set[str] = set()
    for axis, value in values.items():
        if isinstance(axes[axis], dict):
            settings = merged(settings, axes[axis][value])
            used.add(axis)
    settings = _filled(settings, values, used)
    for axis, value in values.items():
        if axis in used:
            continue
        if not _is_key(axis, rounds.whole(params, settings)):
            raise SettingsError(
                f"{where}: axes.{axis}: neither a key of params.yaml nor used as "
                f"'{{{axis}}}' in the settings"
            )
        settings = merged(settings, nested({axis: value}))
    return with_numbers(settings)


def _is_key(axis: str, table: Any) -> bool:
    """Whether the settings have this key; a section of a round may lack it."""
    for place, part in enumerate(axis.split(".")):
        if not isinstance(table, Mapping) or part not in table:
            return isinstance(table, Mapping) and place > 2 and axis.startswith("rounds.")
        table = table[part]
    return True


def _filled(tree: Any, values: Mapping[str, Any], used: set[str]) -> Any:
    """The tree with every text `{axis}` replaced by the value of that axis."""
    if isinstance(tree, Mapping):
        return {key: _filled(value, values, used) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, values, used) for value in tree]
    match = re.fullmatch(r"\{([\w.]+)\}", tree) if isinstance(tree, str) else None
    if match is not None and match[1] in values:
        used.add(match[1])
        return values[match[1]]
    return tree


def _rounded(value: Any) -> str:
    """A value of an axis in words; numbers with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else label(value)


def _cell(
    study: str, method: str, point: str, seed: int, control: str | None, settings: dict[str, Any]
) -> PlannedCell:
    parts = [study, *([control] if control else []), method, point]
    words = [re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts if part]
    name = "-".join([*dict.fromkeys(words), f"s{seed}"])
    return PlannedCell(name, method, point, seed, control, settings | {"seed": seed})


def _check_names(cells: Sequence[PlannedCell], where: str) -> None:
    """Raise SettingsError if two cells would have the same name, or a name that Git refuses."""
    seen: dict[str, PlannedCell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name, cell)
        if other is not cell:
            raise SettingsError(
                f"{where}: {cell.method} {cell.point} and {other.method} {other.point} would both "
                f"be named {cell.name}; take other labels"
            )
        if ".." in cell.name or cell.name.endswith(".lock") or len(cell.name) > 200:
            raise SettingsError(f"{where}: {shorten(cell.name)}: no name for an experiment")
