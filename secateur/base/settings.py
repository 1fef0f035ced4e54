"""params.yaml -> typed, validated settings; unknown keys and impossible values are refused."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    TypeAdapter,
    ValidationError,
)

from secateur.base import plugin
from secateur.base.documents import read_yaml
from secateur.base.errors import ArgumentError, SettingsError, cut, shorten
from secateur.base.mistakes import first_mistake
from secateur.base.sections import (
    NOTHING,
    Baseline,
    Data,
    Evaluate,
    ExportedFiles,
    Finetune,
    Libraries,
    MeasuredLatency,
    Name,
    NonNegative,
    Prune,
    Round,
    RoundName,
    RoundPrune,
    RoundSparseTrain,
    Seed,
    Sensitivity,
    SettingsByPlugin,
    SparseTrain,
    Strict,
)

FILE = "params.yaml"

RENAMED = {
    "archs.torchvision.weights": "baseline.weights",
    "baseline.accumulate": "baseline.accumulate_grad_batches",
    "sparse_train.accumulate": "sparse_train.accumulate_grad_batches",
    "finetune.accumulate": "finetune.accumulate_grad_batches",
    "prune.export": "prune.group_convolutions",
    "pruners.magnitude.groups": "pruners.magnitude.granularity",
    "penalties.greg1.groups": "penalties.greg1.granularity",
    "penalties.greg2.groups": "penalties.greg2.granularity",
    "penalties.network_slimming.scope": "penalties.network_slimming.coupled",
}
"""Key of an earlier version -> the key that replaces it; the same keys of rounds follow."""
RENAMED_VALUES = {
    "prune.group_convolutions": {
        "none": "prune.group_convolutions: false",
        "gconv": "prune.group_convolutions: true",
    },
    "penalties.network_slimming.coupled": {
        "inner": "penalties.network_slimming.coupled: skip",
        "all": "penalties.network_slimming.coupled: include",
    },
    "pruners.magnitude.scope": {
        "layer": "pruners.magnitude.ranking: layer",
        "global": "pruners.magnitude.ranking: global",
    },
} | {
    f"penalties.{name}.grouping": {"coupled": f"penalties.{name}.grouping: group"}
    for name in ("group_lasso", "group_hoyer", "group_hoyer_square")
}
"""Key -> value of an earlier version -> the key and the value that replace it."""

T = TypeVar("T", bound=BaseModel)


class Params(Strict):
    """All of params.yaml, or, in a stage, only the keys that dvc.yaml declares for it."""

    dataset: Name
    arch: Name
    penalty: Name
    decay: NonNegative
    parametrization: Name
    pruner: Name
    seed: Seed
    data: Data
    baseline: Baseline
    sparse_train: SparseTrain
    prune: Prune
    finetune: Finetune
    rounds: dict[RoundName, Round]
    """Further rounds, each after another one; see `chain`."""
    evaluate: Evaluate
    sensitivity: Sensitivity
    latency: MeasuredLatency
    export: ExportedFiles
    datasets: SettingsByPlugin
    archs: SettingsByPlugin
    penalties: SettingsByPlugin
    parametrizations: SettingsByPlugin
    pruners: SettingsByPlugin
    libraries: Libraries

    @classmethod
    def declared(cls, raw: Mapping[str, Any]) -> Self:
        """Validate only the given keys; reading any other key later is an error of the stage."""
        known = cls.model_fields
        values = {
            key: _convert(known[key].annotation, known[key].metadata, value, key)
            for key, value in _filled(raw).items()
        }
        return cls.model_construct(**values)

    def __getattr__(self, key: str) -> Any:
        """Raise AttributeError naming the key that a stage reads but does not declare."""
        if key in type(self).model_fields:
            raise AttributeError(f"'{key}' is not among the params that dvc.yaml declares here")
        return super().__getattr__(key)  # type: ignore[misc]

    def chosen(self, kind: plugin.Kind) -> Any:
        """Settings of the plug-in in use, as an instance of its `Settings` class."""
        name: str = getattr(self, plugin.KEYS[kind])
        table: SettingsByPlugin = getattr(self, kind)
        return validate(plugin.load(kind, name).Settings, table.get(name) or {}, f"{kind}.{name}")

    def of_round(self, name: str) -> Self:
        """These params with the changes of a round, applied to the sections that are present.

        Raises SettingsError naming the key of the round.
        """
        found, held = self.rounds[name], vars(self)
        _check_files(name, found)
        changed: dict[str, Any] = {}
        if "sparse_train" in held:
            plain = held["sparse_train"].model_dump() | {"decay": self.decay}
            where = f"rounds.{name}.sparse_train"
            table = self._patched(RoundSparseTrain, plain, found.sparse_train, "penalties", where)
            changed |= {"sparse_train": table, "decay": table.decay, "penalties": table.penalties}
        if "prune" in held:
            plain, where = held["prune"].model_dump(), f"rounds.{name}.prune"
            pruning = self._patched(RoundPrune, plain, found.prune, "pruners", where)
            changed |= {"prune": pruning, "pruners": pruning.pruners}
        if "finetune" in held:
            plain = merged(held["finetune"].model_dump(), found.finetune)
            changed["finetune"] = validate(Finetune, plain, f"rounds.{name}.finetune")
        return self.model_copy(update=changed)

    def _patched(
        self,
        schema: type[T],
        plain: dict[str, Any],
        patch: SettingsByPlugin,
        kind: plugin.Kind,
        where: str,
    ) -> T:
        """A section with the changes of a round, together with the settings of the plug-in in use.

        A value of the plug-in's settings is replaced as a whole, even if it is a table, such as a
        target or ratios by layer, whose keys belong together.
        """
        name: str = getattr(self, plugin.KEYS[kind])
        plain |= {kind: {name: getattr(self, kind).get(name) or {}}}
        changed = merged(plain, patch)
        if isinstance(own := patch.get(kind), Mapping):
            changed[kind] = merged(plain[kind], own, depth=2)
        table = validate(schema, changed, where)
        for other, given in getattr(table, kind).items():
            if other != name:
                raise SettingsError(
                    f"{FILE}: {where}.{kind}.{cut(other, 60)}: of no effect, since "
                    f"{plugin.KEYS[kind]} = {name!r}"
                )
            validate(plugin.load(kind, name).Settings, given, f"{where}.{kind}.{name}")
        return table


def read(path: Path | str = FILE) -> Params:
    """Read the whole file without validating the sections of plug-ins.

    Raises SettingsError naming the key, the value and what is allowed.
    """
    return validate(Params, _filled(raw(path)), "")


def raw(path: Path | str = FILE) -> dict[str, Any]:
    """The values of the file, not validated; SettingsError unless it is a table."""
    content = read_yaml(Path(path), SettingsError, "; run from the project's root")
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a table of settings, not {shorten(content)}")
    return content


def check(path: Path | str = FILE) -> Params:
    """Read the whole file and validate every section: see `check_values`."""
    return check_values(raw(path))


def check_values(raw: Mapping[str, Any]) -> Params:
    """Validate every section of these values of params.yaml; imports every plug-in they name.

    A mistake in the section of the last stage, or of a plug-in that is not in use, therefore stops
    the first stage. Raises SettingsError naming the key, the value and what is allowed.
    """
    params = validate(Params, _filled(raw), "")
    for kind, key in plugin.KEYS.items():
        sections: SettingsByPlugin = getattr(params, kind)
        plugin.find(kind, getattr(params, key))
        for name, given in sections.items():
            plugin.find(kind, name, key=f"{kind}.{name}")
            validate(plugin.load(kind, name).Settings, given, f"{kind}.{name}")
        if getattr(params, key) not in sections:
            raise SettingsError(
                f"{FILE}: {kind}.{getattr(params, key)}: missing; write {{}} for the defaults"
            )
    if params.rounds and params.parametrization != "none":
        raise SettingsError(
            f"{FILE}: parametrization = {params.parametrization!r}: with further rounds it must be "
            "'none': weights that are pruned could not be held at zero"
        )
    if params.finetune.rewind_to != NOTHING and params.baseline.keep_epoch is None:
        raise SettingsError(
            f"{FILE}: finetune.rewind_to = {params.finetune.rewind_to!r}: baseline.keep_epoch must "
            "say which epoch's weights the baseline is to keep"
        )
    for name in chain(params.rounds):
        params.of_round(name)
    return params


def chain(rounds: Mapping[str, Round]) -> tuple[str, ...]:
    """The names of the rounds in order.

    Raises SettingsError unless the first round starts from a model of the main chain, and every
    other round from a model of the round before.
    """
    following: dict[str, str] = {}
    for name, found in rounds.items():
        if missing := [key for key in Round.model_fields if key not in found.model_fields_set]:
            raise SettingsError(
                f"{FILE}: rounds.{name}.{missing[0]}: missing; a round has the keys "
                f"{', '.join(Round.model_fields)} ({{}} where nothing differs)"
            )
        before = found.after.rpartition("/")[0].removeprefix("rounds/")
        if before in following:
            what = f"round {before}" if before else "the main chain"
            raise SettingsError(
                f"{FILE}: rounds.{name}.after = {found.after!r}: rounds are a chain, and "
                f"{following[before]} comes after {what} already"
            )
        if before and before not in rounds:
            raise SettingsError(
                f"{FILE}: rounds.{name}.after = {found.after!r}: there is no round {before}; "
                f"there are: {', '.join(rounds)}"
            )
        following[before] = name
    order: list[str] = []
    while (after := order[-1] if order else "") in following:
        order.append(following[after])
    if len(order) < len(rounds):
        name = next(name for name in rounds if name not in order)
        raise SettingsError(
            f"{FILE}: rounds.{name}.after = {rounds[name].after!r}: leads in a circle; the first "
            "round is after 'finetuned' (or 'pruned', the model before finetuning)"
        )
    return tuple(order)


def _check_files(name: str, given: Round) -> None:
    """SettingsError if a round names files of its own, since DVC would not track them."""
    if "rewind_to" in given.finetune:
        raise SettingsError(
            f"{FILE}: rounds.{name}.finetune.rewind_to: the same for all rounds, "
            "finetune.rewind_to, which dvc.yaml makes a dependency; a round may have another init"
        )
    for section, table in (("sparse_train", given.sparse_train), ("finetune", given.finetune)):
        distillation = table.get("distillation")
        for key in ("teacher", "code"):
            if isinstance(distillation, Mapping) and key in distillation:
                raise SettingsError(
                    f"{FILE}: rounds.{name}.{section}.distillation.{key}: all rounds have the "
                    f"teacher of {section}.distillation, which dvc.yaml makes a dependency; a "
                    "round may have another weight (0: no teacher)"
                )


def merged(
    below: Mapping[str, Any], above: Mapping[str, Any], depth: int | None = None
) -> dict[str, Any]:
    """Merge two tables; where they differ, `above` wins. Nested tables are merged likewise.

    `depth` is the number of levels that are merged: with 1, nested tables are replaced.
    """
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        if depth != 1 and isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merged(inner, value, depth and depth - 1)
        result[key] = value
    return result


@contextmanager
def section(name: str) -> Iterator[None]:
    """Context that turns an ArgumentError into a SettingsError with the whole key of params.yaml.

    `name` is the section that the arguments were read from, such as `pruners.magnitude`. The name
    of a top-level value (`decay`, `arch`), or one that begins with a kind of plug-ins
    (`penalties.rigl.interval`), is not changed.
    """
    try:
        yield
    except ArgumentError as error:
        field = Params.model_fields.get(error.key)
        single = field is not None and field.annotation in (str, int, float)
        whole = single or error.key.partition(".")[0] in plugin.KEYS
        prefix = "" if whole else f"{name}."
        raise SettingsError(f"{FILE}: {prefix}{error}") from None


def _filled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of params.yaml, with an empty table for a plug-in whose section is null."""
    return {
        key: {name: {} if section is None else section for name, section in table.items()}
        if key in plugin.KEYS and isinstance(table, dict)
        else table
        for key, table in raw.items()
    }


def validate(schema: type[T], raw: Any, where: str) -> T:
    """Validate `raw` against `schema`; `where` is the dotted key it was found under."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(_first_line(error, raw, schema, where)) from None


def _convert(annotation: Any, metadata: list[Any], value: Any, where: str) -> Any:
    """Convert and check one top-level value by the type and range of its field."""
    if isinstance(value, bool) and annotation in (int, float):
        raise SettingsError(f"{FILE}: {where} = {value}: a number is needed")
    kind: Any = Annotated[annotation, *metadata] if metadata else annotation
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise SettingsError(_first_line(error, value, annotation, where)) from None


def _first_line(error: ValidationError, raw: Any, schema: Any, where: str) -> str:
    """The first mistake in words: file, dotted key, value, what is allowed."""
    found = first_mistake(error, raw)
    key = ".".join(filter(None, [where, *(cut(part, 60) for part in found.path)]))
    renamed = None if found.is_key else _renamed(key, found.value, found.is_unknown)
    line = renamed or found.sentence(key, schema).replace("a table is", "a table of settings is")
    return f"{FILE}: {line}{found.more}"


def _renamed(key: str, value: Any, is_unknown: bool) -> str | None:
    """What to write instead of a key or value of an earlier version; None for any other.

    Only a key that is unknown now can have been renamed.
    """
    of_a_round = re.match(r"rounds\.\w+\.(\w+\.(?=(penalties|pruners)\.))?", key)
    prefix = of_a_round[0] if of_a_round else ""
    old = key.removeprefix(prefix)
    new = RENAMED.get(old, old) if is_unknown else old
    values = RENAMED_VALUES.get(new, {})
    if isinstance(value, str) and value in values:
        return f"{key} = {value!r}: renamed; write {prefix}{values[value]}"
    return None if new == old else f"{key}: renamed; write {prefix}{new}"
