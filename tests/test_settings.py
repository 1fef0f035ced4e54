"""Settings: each mistake in params.yaml gives one line with place, value and what is allowed."""

import copy
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from workspace import yaml_text

from secateur.base import documents, plugin, sections, settings
from secateur.base.errors import ArgumentError, SettingsError

ROOT = Path(__file__).resolve().parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
TRAININGS = ("baseline", "sparse_train", "finetune")
KINDS = sorted(plugin.KEYS)
PLUGINS = [(kind, name) for kind in KINDS for name in plugin.names(kind)]


def changed(path, value, drop=False):
    """The project's params with one value changed; `path` is a dotted key."""
    params = copy.deepcopy(PARAMS)
    *way, last = path.split(".")
    table = params
    for key in way:
        table = table[key]
    if drop:
        del table[last]
    else:
        table[last] = value
    return params


def complaint(params, tmp_path):
    """The one-line error of `check` for these params."""
    path = tmp_path / "params.yaml"
    path.write_text(params if isinstance(params, str) else yaml_text(params))
    with pytest.raises(SettingsError) as caught:
        settings.check(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [None, "digits", "my-digits.v1@champion", "digits@v1-old"])
def test_a_name_in_mlflows_registry_may_have_an_alias(name):
    assert sections.ExportedFiles(register_as=name).register_as == name


def test_the_projects_own_params_are_sound():
    settings.check(ROOT / "params.yaml")


SECTIONS = {
    key: field.annotation
    for key, field in settings.Params.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, sections.Strict)
}


@pytest.mark.parametrize("key", [*SECTIONS, *(f"{kind}.{name}" for kind, name in PLUGINS)])
def test_a_key_that_is_missing_has_the_value_of_the_projects_params(key):
    kind, _, name = key.partition(".")
    schema = plugin.load(kind, name).Settings if name else SECTIONS[key]
    given = (PARAMS[kind][name] if name else PARAMS[key]) or {}
    required = {key for key, field in schema.model_fields.items() if field.is_required()}
    defaults = schema(**{key: given[key] for key in required})
    assert settings.validate(schema, given, key) == defaults


@pytest.mark.parametrize("text", ["1e-05", "1E-5", "1e-5", "0.00001", "+1e-05"])
def test_a_number_that_yaml_takes_for_text_is_a_number(text):
    raw = yaml.safe_load(f"decay: {text}\nbaseline: {{epochs: '7', lr: {text}}}")
    params = settings.Params.declared(raw)
    assert params.decay == 0.00001
    assert params.baseline.lr == 0.00001
    assert params.baseline.epochs == 7
    assert type(params.decay) is float


@given(value=st.floats(0, 1e300))
@examples(max_examples=50, deadline=None, derandomize=True)
def test_any_number_survives_its_way_through_yaml(value):
    for text in (yaml.safe_dump({"decay": value}), f"decay: {value!r}"):
        assert settings.Params.declared(yaml.safe_load(text)).decay == value


MISTAKES = [  # key, value, text that the message must contain besides both
    ("dataset", "digit", "there is no secateur/datasets/digit.py; there are: "),
    ("arch", "lenet", "; did you mean lenet5?"),
    ("penalty", "hoyer_sqare", "did you mean hoyer_square?"),
    ("penalty", "../chain", "a name of small letters, digits and '_' is needed"),
    ("pruner", "__init__", "a name of small letters, digits and '_' is needed"),
    ("pruner", None, "text is needed"),
    ("decay", -0.1, "greater than or equal to 0"),
    ("decay", "a little", "a number is needed"),
    ("decay", [1], "a number is needed"),
    ("decay", None, "a number is needed"),
    ("decay", True, "a number is needed"),
    ("decay", False, "a number is needed"),
    ("decay", float("nan"), ""),
    ("decay", float("inf"), "finite number"),
    ("seed", True, "a number is needed"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**31, "less than 2147483648"),
    ("seed", 1.5, "a whole number is needed"),
    ("data", 7, "a table of settings is needed"),
    ("data", None, "a table of settings is needed"),
    ("sensitivity.criteria", "l1", "a list is needed"),
    ("data.validation", -0.1, "greater than or equal to 0"),
    ("data.validation", 0.6, "less than or equal to 0.5"),
    ("data.validation", True, "a number is needed"),
    ("data.seed", "x", "a whole number is needed"),
    ("prune.remove_dead", "maybe", "true or false is needed"),
    ("finetune.init", "new", "'inherit', 'scratch', 'orthogonal' or 'rewind'"),
    ("evaluate.latency_batch", 0, "greater than or equal to 1"),
    (
        "export.register_as",
        "my digits",
        "a name or name@alias is needed, such as digits or digits@",
    ),
    ("export.register_as", "digits@", "a name or name@alias is needed"),
    ("export.register_as", "digits@Latest", "allowed is any but latest and v1, v2, ..."),
    ("export.register_as", "digits@v1", "allowed is any but latest and v1, v2, ..."),
    ("evaluate.latency_repeats", 2, "greater than or equal to 3"),
    ("archs.lenet300.hidden", [], "at least one is needed"),
    ("archs.lenet300.hidden", 300, "a list is needed"),
    ("penalties", [], "a table of settings is needed"),
    ("penalties.hoyer_square", 3, "a table of settings is needed"),
    ("penalties.hoyer_square.biases", "perhaps", "true or false is needed"),
    ("pruners.std.sensitivity", -1, "greater than or equal to 0"),
    ("pruners.std.sensitivity", True, "a number is needed"),
    (
        "pruners.magnitude.granularity",
        "filtr",
        "must be 'filter', 'channel', 'weight', 'group' or '2:4'; did you mean filter?",
    ),
    ("pruners.magnitude.skip", {"conv1": 1}, "a list of names, stages or blocks is needed"),
    ("archs.module.target", "mynet.build", "package.module:function is needed"),
    ("archs.lenet5.filters", [1, 2, 3], "at most 2 are allowed"),
    ("export.runtimes", "torch", "a list is needed, such as [torch]"),
    ("libraries.torch", 2.1, "text is needed, such as '2.1' in quotes"),
    ("pruners.std.scope", "biases", "'weights', 'weights_and_biases' or 'weights_and_scales'"),
]
TRAINING_MISTAKES = [
    ("epochs", -1, "greater than or equal to 0"),
    ("epochs", 1.5, "a whole number is needed"),
    ("batch_size", 0, "greater than or equal to 1"),
    ("batch_size", True, "a number is needed"),
    ("optimizer", "rmsprop", "'sgd', 'adam' or 'adamw'"),
    ("lr", 0, "greater than 0"),
    ("lr", "fast", "a number is needed"),
    ("lr", True, "a number is needed"),
    ("lr", float("inf"), "finite number"),
    ("momentum", 1, "less than 1"),
    ("momentum", -0.1, "greater than or equal to 0"),
    ("weight_decay", -1e-4, "greater than or equal to 0"),
    ("schedule", "step", "'constant', 'multistep', 'cosine' or 'one_cycle'"),
    ("keep", "first", "'best' or 'last'"),
]
MISTAKES += [(f"{part}.{key}", *rest) for part in TRAININGS for key, *rest in TRAINING_MISTAKES]


@pytest.mark.parametrize(
    ("key", "value", "allowed"), MISTAKES, ids=[f"{key}={value}" for key, value, _ in MISTAKES]
)
def test_a_wrong_value_is_told_with_its_key_and_what_is_allowed(key, value, allowed, tmp_path):
    line = complaint(changed(key, value), tmp_path)
    written = str(value) if isinstance(value, bool) else repr(value)
    assert line.startswith(f"params.yaml: {key} = {written}: ")
    assert allowed in line
    assert not re.search(r"input|valid |pattern|unable|literal|dictionary", line)


@pytest.mark.parametrize("name", [2, "Round 2", "round1"])
def test_a_round_that_cannot_be_named_so_is_told(name, tmp_path):
    rounds = {name: {"after": "finetuned", "sparse_train": {}, "prune": {}, "finetune": {}}}
    assert complaint(changed("rounds", rounds), tmp_path) == (
        f"params.yaml: rounds: key {name!r}: a name is needed, such as round2: small letters, "
        "digits and '_'"
    )


def test_a_key_that_is_misspelt_is_told_in_place_of_the_one_that_is_missing(tmp_path):
    parts = [{"scal": 0.5, "until": 0.5}]
    line = complaint(changed("baseline.progressive_resizing", parts), tmp_path)
    assert line == (
        "params.yaml: baseline.progressive_resizing.0.scal: unknown key; allowed: scale, until; "
        "did you mean scale? (and 1 more)"
    )


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": "x"}, "f: a = 'x': a number or 'auto' is needed"),
        ({"a": -1}, "f: a = -1: must be greater than 0"),
        ({"a": 1, "b": ["c", 5]}, "f: b.1 = 5: must be 'c' or 'd'"),
        ({"a": 1, "b": {"e": []}}, "f: b: key 'e': must be 'c' or 'd'"),
        ({"a": 1, "b": 7}, "f: b = 7: a list or a table is needed"),
        ({"a": 1, "b": 7, "c": 1}, "f: b = 7: a list or a table is needed (and 1 more)"),
    ],
)
def test_of_several_types_what_each_needs_is_told(value, line):
    class Schema(BaseModel):
        model_config = ConfigDict(extra="forbid")
        a: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] | Literal["auto"]
        b: list[Literal["c", "d"]] | dict[Literal["c", "d"], list[str]] = []

    with pytest.raises(SettingsError) as caught:
        documents.validated(TypeAdapter(Schema), value, "f", SettingsError)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("value", "wrong", "allowed"),
    [
        ([300, 0], 0, "greater than or equal to 1"),
        ([True, 100], True, "number"),
        (["many", 100], "many", "a whole number is needed"),
    ],
)
def test_a_wrong_value_in_a_list_is_told(value, wrong, allowed, tmp_path):
    line = complaint(changed("archs.lenet300.hidden", value), tmp_path)
    assert line.startswith("params.yaml: archs.lenet300.hidden")
    assert repr(wrong) in line
    assert allowed in line


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sed", "did you mean seed?"),
        ("data.validatoin", "did you mean validation?"),
        ("baseline.weightdecay", "did you mean weight_decay?"),
        ("finetune.initial", "did you mean init?"),
        ("prune.removedead", "did you mean remove_dead?"),
        ("evaluate.latency", "did you mean latency_"),
        ("pruners.std.sensitivty", "did you mean sensitivity?"),
        ("archs.lenet300.hiden", "did you mean hidden?"),
        ("penalties.hoyer_square.bias", "did you mean biases?"),
        ("archs.vgg.dept", "did you mean depth?"),
        ("baseline.zzz", "allowed: accumulate_grad_batches, average, batch_size, compile, disti"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_that_was_meant(key, hint, tmp_path):
    line = complaint(changed(key, 1), tmp_path)
    assert line.startswith(f"params.yaml: {key}: unknown key; allowed: ")
    assert hint in line


@pytest.mark.parametrize(
    ("old", "value", "line"),
    [
        *[(f"{part}.accumulate", 2,
           f"{part}.accumulate: renamed; write {part}.accumulate_grad_batches")
          for part in TRAININGS],
        *[(key, "coupled", f"{key} = 'coupled': renamed; write {key}: group")
          for name in ("group_lasso", "group_hoyer", "group_hoyer_square")
          for key in [f"penalties.{name}.grouping"]],
        *[("prune.export", old,
           f"prune.export = '{old}': renamed; write prune.group_convolutions: {new}")
          for old, new in (("none", "false"), ("gconv", "true"))],
        *[(f"{section}.groups", "filter", f"{section}.groups: renamed; write {section}.granularity")
          for section in ("pruners.magnitude", "penalties.greg1", "penalties.greg2")],
        *[("pruners.magnitude.scope", old,
           f"pruners.magnitude.scope = '{old}': renamed; write pruners.magnitude.ranking: {old}")
          for old in ("layer", "global")],
        *[(f"penalties.network_slimming.{key}", old,
           f"penalties.network_slimming.{key} = '{old}': renamed; write "
           f"penalties.network_slimming.coupled: {new}")
          for key in ("scope", "coupled") for old, new in (("inner", "skip"), ("all", "include"))],
    ],
)  # fmt: skip
def test_a_renamed_key_or_value_is_told_with_the_new_one(old, value, line, tmp_path):
    assert complaint(changed(old, value), tmp_path) == f"params.yaml: {line}"


@pytest.mark.parametrize(
    ("prune", "line"),
    [
        ({"export": "gconv"}, "export = 'gconv': renamed; write {}group_convolutions: true"),
        ({"pruners": {"magnitude": {"groups": "filter"}}},
         "pruners.magnitude.groups: renamed; write {}pruners.magnitude.granularity"),
        ({"pruners": {"magnitude": {"scope": "global"}}},
         "pruners.magnitude.scope = 'global': renamed; write {}pruners.magnitude.ranking: global"),
    ],
)  # fmt: skip
def test_a_renamed_key_or_value_of_a_round_is_told_with_the_new_one(prune, line, tmp_path):
    round2 = {"after": "finetuned", "sparse_train": {}, "prune": prune, "finetune": {}}
    params = changed("rounds", {"round2": round2}) | {"pruner": "magnitude"}
    place = "rounds.round2.prune."
    assert complaint(params, tmp_path) == f"params.yaml: {place}{line.format(place)}"


def test_the_new_names_of_renamed_keys_are_there_and_the_old_ones_are_not():
    def exists(key):
        section, _, last = key.rpartition(".")
        return last in reduce(getitem, section.split("."), PARAMS)

    for old, new in settings.RENAMED.items():
        assert exists(new) and not exists(old), old


def test_a_wrong_value_of_a_key_that_has_the_old_name_of_another_one_is_told(tmp_path):
    assert complaint(changed("pruners.magnitude.scope", "weigths"), tmp_path) == (
        "params.yaml: pruners.magnitude.scope = 'weigths': must be 'weights', "
        "'weights_and_biases' or 'weights_and_scales'; did you mean weights?"
    )


@pytest.mark.parametrize("value", ["", "2.x-1", 2.13, None, "latest"])
def test_a_version_that_is_none_is_refused(value, tmp_path):
    assert complaint(changed("libraries.torch", value), tmp_path).startswith(
        f"params.yaml: libraries.torch = {value!r}: "
    )


def test_an_argument_error_gets_the_whole_key_of_its_setting():
    line = r"^params\.yaml: pruners\.std\.scope = 'x': why$"
    with pytest.raises(SettingsError, match=line), settings.section("pruners.std"):
        raise ArgumentError("scope", "why", "x")
    line = r"^params\.yaml: decay: why$"
    with pytest.raises(SettingsError, match=line), settings.section("penalties.greg1"):
        raise ArgumentError("decay", "why")


@pytest.mark.parametrize("name", ["magnitude", "network_slimming"])
def test_an_unknown_key_of_a_table_that_may_be_absent_is_told_too(name, tmp_path):
    line = complaint(changed(f"pruners.{name}.target", {"flops": 0.5}), tmp_path)
    assert line == (
        f"params.yaml: pruners.{name}.target.flops: unknown key; "
        "allowed: bytes, latency, macs, of, params"
    )


def test_a_mistake_in_a_section_that_is_not_in_use_is_found(tmp_path):
    line = complaint(changed("pruners.magnitude.ratios", 1.5), tmp_path)
    assert line.startswith("params.yaml: pruners.magnitude.ratios = 1.5")


@pytest.mark.parametrize("kind", KINDS)
def test_the_section_of_the_plugin_in_use_must_be_there(kind, tmp_path):
    params = changed("seed", 1)
    name = params[plugin.KEYS[kind]]
    del params[kind][name]
    assert complaint(params, tmp_path) == (
        f"params.yaml: {kind}.{name}: missing; write {{}} for the defaults"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_of_a_plugin_that_does_not_exist_is_refused(kind, tmp_path):
    line = complaint(changed(f"{kind}.nonsense", {}), tmp_path)
    assert line.startswith(f"params.yaml: {kind}.nonsense = ")
    assert f"there is no secateur/{kind}/nonsense.py" in line


@pytest.mark.parametrize("key", [*PARAMS, *(f"{part}.epochs" for part in TRAININGS)])
def test_a_missing_key_is_named(key, tmp_path):
    assert complaint(changed(key, None, drop=True), tmp_path) == f"params.yaml: {key}: missing"


def test_one_wrong_item_is_one_mistake(tmp_path):
    line = complaint(changed("sensitivity.ratios", [1.0]), tmp_path)
    assert line.startswith("params.yaml: sensitivity.ratios") and "more" not in line


def test_two_mistakes_are_counted(tmp_path):
    params = changed("decay", -1) | {"seed": "x"}
    assert complaint(params, tmp_path).endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("decay: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\tdecay: 1", "not valid YAML"),
        ("seed: 1\ndecay: 1\nseed: 2", "not valid YAML: seed occurs twice, in lines 1 and 3"),
        ("a:\n  lr: 1\n  lr: 1", "not valid YAML: lr occurs twice, in lines 2 and 3"),
        ("decay: 1\nseed: " + "7" * 5001, "not valid YAML: line 2: 7777777777777777777… (5,001"),
        ("", "must be a table of settings, not None"),
        ("- decay", "must be a table of settings, not ['decay']"),
        ("decay", "must be a table of settings, not 'decay'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content, reason, tmp_path):
    assert f"params.yaml: {reason}" in complaint(content, tmp_path)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"a: \xff\xfe")])
def test_a_file_that_cannot_be_read_is_named(spoil, tmp_path):
    path = tmp_path / "params.yaml"
    path.touch()
    spoil(path)
    with pytest.raises(SettingsError, match=f"^{path}: "):
        settings.check(path)


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_a_mistake_in_the_section_of_the_plugin_in_use_is_found(kind, name, tmp_path):
    section = (PARAMS[kind][name] or {}) | {"nonsense": 1}
    chosen = changed(plugin.KEYS[kind], name)
    chosen[kind][name] = section
    assert f"params.yaml: {kind}.{name}.nonsense: unknown key" in complaint(chosen, tmp_path)


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_every_plugin_runs_on_its_section_and_on_none(kind, name, tmp_path):
    params = changed(plugin.KEYS[kind], name)
    path = tmp_path / "params.yaml"
    for section in (PARAMS[kind][name], None, {}):
        params[kind][name] = section
        path.write_text(yaml_text(params))
        settings.check(path)
        raw = {plugin.KEYS[kind]: name, kind: {name: section}}
        chosen = settings.Params.declared(raw).chosen(kind)
        assert chosen == plugin.load(kind, name).Settings(**(section or {}))


def test_reading_a_key_that_the_stage_has_not_declared_is_an_error():
    params = settings.Params.declared({"decay": 0.1})
    assert params.decay == 0.1
    with pytest.raises(AttributeError, match=r"'seed' is not among the params that dvc\.yaml"):
        params.seed  # noqa: B018
    with pytest.raises(AttributeError, match="arch"):
        params.chosen("archs")


@pytest.mark.parametrize("value", [-1, "x", True, None])
def test_declared_keys_are_validated_as_the_whole_file_is(value):
    with pytest.raises(SettingsError, match=f"params.yaml: decay = {value!r}: "):
        settings.Params.declared({"decay": value})


def test_settings_cannot_be_changed_afterwards():
    params = settings.Params.declared({"data": {"validation": 0.2}})
    with pytest.raises(ValueError, match="frozen"):
        params.data.validation = 0.3


class Nested(sections.Strict):
    """Settings of a plug-in."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    levels: tuple[float, ...] = ()
    maximum: float | None = None


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"ratio": 1}, "penalties.nested.ratio = 1: must be less than 1"),
        ({"ratio": "1e-1x"}, "penalties.nested.ratio = '1e-1x': a number is needed"),
        ({"levels": [0.5, True]}, "penalties.nested.levels"),
        ({"maximum": True}, "penalties.nested.maximum = True: a number is needed"),
        ([], "penalties.nested = []: a table of settings is needed"),
    ],
)
def test_the_settings_of_a_plugin_are_held_to_the_same(raw, line):
    with pytest.raises(SettingsError) as caught:
        settings.validate(Nested, raw, "penalties.nested")
    assert f"params.yaml: {line}" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_of_their_folder_are_plugins(kind):
    assert (Path(plugin.__file__).parents[1] / "base/plugin.py").exists()
    for name in ("", ".", "../base/plugin", "__init__", "nonsense", "os"):
        with pytest.raises(SettingsError, match=f"{plugin.KEYS[kind]} = "):
            plugin.load(kind, name)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: " + "1" * 5001, "params.yaml: not valid YAML: "),
        ("arch: " + "a" * 300, "params.yaml: "),
        ("x: " + "[" * 2000 + "]" * 2000, "params.yaml: not valid YAML: nested "),
        ("x: " + "{a: " * 2000 + "1" + "}" * 2000, "params.yaml: not valid YAML: nested "),
    ],
)
def test_a_value_of_excessive_length_is_told_in_a_short_line(text, line, tmp_path):
    told = complaint(text, tmp_path).removeprefix(f"{tmp_path}/")
    assert told.startswith(line) and len(told) < 300


def test_a_network_that_torchvision_lacks_is_told_although_it_is_not_in_use(tmp_path):
    line = complaint(changed("archs.torchvision.name", "resnet19"), tmp_path)
    assert line.startswith("params.yaml: archs.torchvision.name = 'resnet19': torchvision has no ")
