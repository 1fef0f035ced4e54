"""dvc.yaml lists exactly the code that each stage's result depends on; imports go one way."""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from secateur.base import plugin, sections, settings
from secateur.pipeline import record

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    "base", "sparsity", "nn", "data", "training", "channels", "gconv", "pruning", "deploy",
    "pipeline", "studies",
]  # fmt: skip
"""From top to bottom: a room imports only from the rooms before it."""
OBSERVERS = {
    f"secateur/pipeline/{name}.py"
    for name in (
        "tracking", "mlflow_store", "mlflow_file", "mlflow_model", "console", "preflight",
        "latency_check", "figures",
    )
}  # fmt: skip
"""Files that no result depends on."""
WIRING = yaml.safe_load((ROOT / "dvc.yaml").read_text())
APART = [yaml.safe_load(file.read_text()) for file in sorted(ROOT.glob("stages/*/dvc.yaml"))]
STAGES = WIRING["stages"] | {
    f"{name}@x" if "foreach" in stage else name: stage.get("do", stage)
    for one in APART
    for name, stage in one["stages"].items()
}
"""Stages by name; `prune@x` is the stage of a further round."""
CODE = sorted(
    p.relative_to(ROOT).as_posix() for d in ("stages", "secateur") for p in (ROOT / d).rglob("*.py")
)


def module_files(name: str) -> set[str]:
    """The project's file for a dotted module name, if there is one."""
    path = name.replace(".", "/")
    return {path + ".py"} & set(CODE)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all nodes below it, except those under `if TYPE_CHECKING:`."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from executed(child)


@functools.cache
def imports(file: str, root: Path = ROOT) -> set[str]:
    """Files of the project that a file imports, anywhere in its code."""
    found: set[str] = set()
    for node in executed(ast.parse((root / file).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= module_files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative imports are not followed here"
            found |= module_files(node.module)
            for alias in node.names:
                found |= module_files(f"{node.module}.{alias.name}")
    return found - {file}


def reached(start: set[str], root: Path = ROOT) -> set[str]:
    """All files that run when these files are imported, without observers."""
    seen: set[str] = set()
    todo = start - OBSERVERS
    while todo:
        file = todo.pop()
        seen.add(file)
        todo |= imports(file, root) - OBSERVERS - seen
    return seen


def script(stage: dict) -> str:
    match = re.fullmatch(r"python -m stages\.(\w+)( --round \$\{key\}| \$\{item\})?", stage["cmd"])
    assert match, stage["cmd"]
    file = f"stages/{match[1]}.py"
    return file if file in CODE else f"stages/{match[1]}/__main__.py"


def code_of(dep: str) -> set[str]:
    """Code files that a dependency covers: a file, a room, or `${...}` for any plug-in."""
    if (ROOT / dep).is_dir():
        return {f for f in CODE if f.startswith(f"{dep}/") and not f.endswith("__init__.py")}
    pattern = re.sub(r"\\\$\\\{.*?\\\}", "[a-z]\\\\w*", re.escape(dep))
    return {f for f in CODE if re.fullmatch(pattern, f) and not f.endswith("__init__.py")}


def code_deps(stage: dict) -> dict[str, set[str]]:
    """The deps that are code, with the files that each of them covers."""
    named = [dep for dep in stage["deps"] if dep.startswith(("secateur/", "stages/"))]
    covered = {dep: code_of(dep) for dep in named}
    assert all(covered.values()), f"no such file: {[d for d, f in covered.items() if not f]}"
    return covered


def plugins_used(stage: dict) -> set[str]:
    """Plug-ins, from the params that a stage declares: `archs.${arch}` means any architecture."""
    kinds = {p.split(".")[0] for p in stage["params"]} & set(plugin.KEYS)
    return {f"secateur/{kind}/{name}.py" for kind in kinds for name in plugin.names(kind)}


@functools.cache
def needed(name: str) -> frozenset[str]:
    """All code that a stage's result depends on."""
    stage = STAGES[name]
    return frozenset(reached({script(stage)} | plugins_used(stage)))


def mistakes(name: str, stage: dict) -> tuple[set[str], set[str]]:
    """Code that no dep covers, and deps of which no file is used."""
    covered = code_deps(stage)
    missing = needed(name) - set().union(*covered.values())
    return missing, {dep for dep, files in covered.items() if not files & needed(name)}


@pytest.mark.parametrize("name", STAGES)
def test_deps_cover_the_imported_code_and_all_are_used(name):
    missing, superfluous = mistakes(name, STAGES[name])
    assert not missing, f"{name}: dvc.yaml must cover {sorted(missing)}"
    assert not superfluous, f"{name}: no code of {sorted(superfluous)} is used"


@pytest.mark.parametrize("name", STAGES)
def test_a_dependency_that_is_dropped_is_noticed(name):
    stage = STAGES[name]
    for dep in code_deps(stage):
        without = stage | {"deps": [d for d in stage["deps"] if d != dep]}
        assert mistakes(name, without)[0], f"{name}: removing {dep} is not noticed"


@pytest.mark.parametrize("name", STAGES)
def test_a_dependency_too_many_is_noticed(name):
    stage = STAGES[name]
    others = [f for f in CODE if not f.endswith("__init__.py")]
    unused = next(f for f in others if f not in set().union(*code_deps(stage).values()))
    assert mistakes(name, stage | {"deps": [*stage["deps"], unused]})[1] == {unused}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_the_params_that_choose_its_plugins(name):
    stage = STAGES[name]
    for kind, key in plugin.KEYS.items():
        sections = [p for p in stage["params"] if p.split(".")[0] == kind]
        assert sections in ([], [f"{kind}.${{{key}}}"])
        if sections:
            assert key in stage["params"]
    assert {p.split(".")[0] for p in stage["params"]} <= set(settings.Params.model_fields)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_only_params_that_it_declares(name):
    """All names after `params.` in the script are among the params in dvc.yaml."""
    stage = STAGES[name]
    declared = {p.split(".")[0] for p in stage["params"]}
    source = (ROOT / script(stage)).read_text()
    read = set(re.findall(r"\bparams\.(\w+)", source)) - {"chosen"}
    read |= set(re.findall(r"params\.chosen\(\"(\w+)\"\)", source))
    assert read - {"yaml"} <= declared


def test_costly_outs_are_cached_and_none_persists():
    for name, stage in STAGES.items():
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]:
            options = next(iter(out.values())) if isinstance(out, dict) else {}
            assert not options.get("persist")
            uncached = ("evaluate", "sensitivity", "export", "latency@x")
            assert name in uncached or options.get("cache", True)


PROTOCOLS = {
    "datasets": plugin.DatasetPlugin,
    "archs": plugin.ArchPlugin,
    "penalties": plugin.PenaltyPlugin,
    "parametrizations": plugin.ParametrizationPlugin,
    "pruners": plugin.PrunerPlugin,
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in PROTOCOLS for name in plugin.names(kind)]
)
def test_a_plugin_has_what_the_protocol_of_its_kind_says(kind, name):
    protocol, module = PROTOCOLS[kind], plugin.load(kind, name)
    assert issubclass(module.Settings, sections.Strict)
    (function,) = [f for n, f in vars(protocol).items() if inspect.isfunction(f) and n[0] != "_"]
    own = getattr(module, function.__name__)
    wanted = [*inspect.signature(function).parameters][1:]
    optional = {"penalties": ["shape"]}.get(kind, [])
    assert list(inspect.signature(own).parameters) in (wanted, wanted + optional)


@pytest.mark.parametrize("name", STAGES)
def test_the_table_of_stages_agrees_with_dvc_yaml(name):
    """Names, scripts, inputs and models of record.STAGES."""
    spec, stage = record.stage_spec(name), STAGES[name]
    first, _, round_name = name.partition("@")
    by_runtime = " ${item}" if first == "latency" else " --round ${key}"
    argument = by_runtime if round_name else ""
    assert stage["cmd"] == f"python -m stages.{record.STAGES[first].module}{argument}"
    assert (name in WIRING["stages"]) == (spec.pipeline == "dvc.yaml")
    read = [record.model_spec(maker).folder for maker in spec.inputs]
    read += ["models/rounds"] if spec.rounds else []
    deps = [d.replace("${item.after}", "finetuned").replace("${key}", "x") for d in stage["deps"]]
    assert [dep for dep in deps if dep.startswith("models/") and "." not in dep] == read
    outs = [str(out).replace("${key}", "x") for out in stage.get("outs", [])]
    written = [out for out in outs if out.startswith("models/")]
    written = [out for out in written if out != "models/export"]  # files for others, no checkpoint
    assert written == ([spec.model.folder, str(spec.model.record)] if spec.model else [])


def test_every_plugin_has_its_section_in_params_yaml():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for kind in plugin.KEYS:
        assert sorted(params[kind]) == plugin.names(kind)


@pytest.mark.parametrize("file", [f for f in CODE if not f.endswith("__init__.py")])
def test_imports_flow_one_way(file):
    """Rooms import upstream rooms only; plug-ins import rooms, and shared bases of their kind."""
    area, found = file.split("/")[1], imports(file)
    assert not {f for f in found if f.startswith("stages/")}, "stages are never imported"
    allowed = {"pipeline": ROOMS, **{room: ROOMS[: k + 1] for k, room in enumerate(ROOMS)}}
    if area in plugin.KEYS:
        own = f"secateur/{area}/_"
        rooms = {f.split("/")[1] for f in found if not f.startswith(own)}
        assert rooms <= set(ROOMS) - {"pipeline", "studies"}, (
            "plug-ins import rooms, never each other"
        )
    elif area in allowed:
        assert {f.split("/")[1] for f in found} <= set(allowed[area]), "no imports from lower rooms"


PACKAGE_CODE = {
    "secateur/__init__.py": {"__getattr__", "__dir__", "__version__", "__all__"},
    "secateur/pruners/__init__.py": {"callable_plugins"},
    "stages/__init__.py": {"tune_process", "pause_collection"},
}
"""Names that package files may define or call: lazy names of the API, and process setup."""


@pytest.mark.parametrize("file", [f for f in CODE if f.endswith("__init__.py")])
def test_package_files_hold_nothing_that_a_result_depends_on(file):
    allowed = PACKAGE_CODE.get(file, set())
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If):  # `if TYPE_CHECKING`
            assert allowed, "only these package files import modules"
        elif isinstance(node, ast.FunctionDef):
            assert node.name in allowed
        elif isinstance(node, ast.Assign):
            assert {target.id for target in node.targets} <= allowed
        else:
            assert isinstance(node, ast.Expr)
            if isinstance(node.value, ast.Call):
                assert (
                    getattr(node.value.func, "attr", getattr(node.value.func, "id", "")) in allowed
                )
            else:
                assert isinstance(node.value, ast.Constant), "must be a docstring"
