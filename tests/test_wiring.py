"""dvc.yaml names exactly the code that each stage's result depends on, and imports flow one way."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from secateur.core import plugin, settings

ROOT = Path(__file__).resolve().parents[1]
OBSERVERS = {"secateur/track.py", "secateur/console.py", "secateur/rehearsal.py"}
"""No result depends on them."""
WIRING = yaml.safe_load((ROOT / "dvc.yaml").read_text())
APART = yaml.safe_load((ROOT / "stages/sensitivity/dvc.yaml").read_text())
STAGES = WIRING["stages"] | APART["stages"]
CODE = sorted(
    p.relative_to(ROOT).as_posix() for d in ("stages", "secateur") for p in (ROOT / d).rglob("*.py")
)


def module_files(name: str) -> set[str]:
    """The project's file for a dotted module name, if it is one."""
    path = name.replace(".", "/")
    return {path + ".py"} & set(CODE)


def imports(file: str, root: Path = ROOT) -> set[str]:
    """Files of the project that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((root / file).read_text())):
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
    """Everything that importing these files runs, observers left out."""
    seen: set[str] = set()
    todo = start - OBSERVERS
    while todo:
        file = todo.pop()
        seen.add(file)
        todo |= imports(file, root) - OBSERVERS - seen
    return seen


def script(stage: dict) -> str:
    match = re.fullmatch(r"python -m stages\.(\w+)", stage["cmd"])
    assert match, stage["cmd"]
    file = f"stages/{match[1]}.py"
    return file if file in CODE else f"stages/{match[1]}/__main__.py"


def declared_code(stage: dict) -> set[str]:
    """Code among the deps, with every `${...}` standing for any name."""
    files: set[str] = set()
    for dep in stage["deps"]:
        if dep.endswith(".py"):
            pattern = re.sub(r"\\\$\\\{.*?\\\}", r"\\w+", re.escape(dep))
            hits = {f for f in CODE if re.fullmatch(pattern, f) and not f.endswith("__init__.py")}
            assert hits, f"{dep}: no such file"
            files |= hits
    return files


def plugins_used(stage: dict) -> set[str]:
    """Plug-ins by the params that a stage declares: `archs.${arch}` means any architecture."""
    kinds = {p.split(".")[0] for p in stage["params"]} & set(plugin.KEYS)
    return {f"secateur/{kind}/{name}.py" for kind in kinds for name in plugin.names(kind)}


def mistakes(stage: dict) -> tuple[set[str], set[str]]:
    """Code that is missing among the deps, and code that is there for nothing."""
    needed = reached({script(stage)} | plugins_used(stage))
    declared = declared_code(stage)
    return needed - declared, declared - needed


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_exactly_the_imported_code(name):
    missing, superfluous = mistakes(STAGES[name])
    assert not missing, f"{name}: dvc.yaml must name {sorted(missing)}"
    assert not superfluous, f"{name}: dvc.yaml names {sorted(superfluous)} for nothing"


@pytest.mark.parametrize("name", STAGES)
def test_the_keeper_notices_every_dependency_that_is_dropped(name):
    stage = STAGES[name]
    for dep in stage["deps"]:
        if dep.endswith(".py"):
            without = stage | {"deps": [d for d in stage["deps"] if d != dep]}
            assert mistakes(without)[0], f"{name}: nobody would notice that {dep} is missing"


@pytest.mark.parametrize("name", STAGES)
def test_the_keeper_notices_a_dependency_too_many(name):
    stage = STAGES[name]
    unused = next(
        f
        for f in CODE
        if f.startswith("secateur/core/")
        and f not in declared_code(stage)
        and not f.endswith("__init__.py")
    )
    assert mistakes(stage | {"deps": [*stage["deps"], unused]})[1] == {unused}


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
    """What the script says after `params.` is among what dvc.yaml says."""
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
            assert name in ("evaluate", "sensitivity") or options.get("cache", True)


def test_every_plugin_has_its_section_in_params_yaml():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for kind in plugin.KEYS:
        assert sorted(params[kind]) == plugin.names(kind)


@pytest.mark.parametrize("file", [f for f in CODE if not f.endswith("__init__.py")])
def test_imports_flow_one_way(file):
    area = file.split("/")[1]
    found = imports(file)
    assert not {f for f in found if f.startswith("stages/")}, "nothing imports a stage"
    if file.startswith("secateur/core/") or area in plugin.KEYS:
        outside = {f for f in found if not f.startswith("secateur/core/")}
        assert not outside, "core and plug-ins import core only"


@pytest.mark.parametrize("file", [f for f in CODE if f.endswith("__init__.py")])
def test_package_files_hold_nothing_that_a_result_depends_on(file):
    body = ast.parse((ROOT / file).read_text()).body
    allowed = ast.Expr if file.count("/") > 1 else (ast.Expr, ast.Import, ast.If, ast.Assign)
    assert all(isinstance(node, allowed) for node in body)
