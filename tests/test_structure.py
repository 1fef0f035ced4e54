"""Structure of the code: no import cycles, imports in one direction, nothing too large to read.

`python tests/test_structure.py` lists the rooms, what each imports, and its largest parts.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_wiring import CODE, imports  # noqa: E402

MOST_MODULES, MOST_CLASS_LINES, MOST_FUNCTION_LINES = 15, 200, 60


def folder(file: str) -> str:
    return file.rpartition("/")[0]


def definitions(file: str) -> list[tuple[str, str, int]]:
    """Kind, name and number of lines of every class and function, without decorators."""
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return [
        ("class" if isinstance(node, ast.ClassDef) else "function", node.name,
         node.end_lineno - node.lineno + 1)
        for node in nodes
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]  # fmt: skip


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that import each other, directly or indirectly (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def room(file: str) -> str:
    """The folder below secateur/ that contains a module, directly or in a subfolder."""
    return "/".join(folder(file).split("/")[:2])


def rooms() -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import from."""
    found: dict[str, set[str]] = {}
    for file in CODE:
        others = {room(other) for other in imports(file)} - {room(file)}
        found[room(file)] = found.get(room(file), set()) | others
    return found


def test_modules_do_not_import_in_a_circle():
    assert circles({file: imports(file) for file in CODE}) == []


def test_rooms_do_not_import_in_a_circle():
    graph = {room: others for room, others in rooms().items() if room != "secateur"}
    assert circles({room: others & set(graph) for room, others in graph.items()}) == []


def test_the_search_for_circles_finds_some():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("place", sorted({folder(file) for file in CODE} - {
    f"secateur/{kind}" for kind in ("archs", "datasets", "parametrizations", "penalties", "pruners")
}))  # fmt: skip
def test_no_folder_holds_more_modules_than_one_can_overlook(place):
    modules = [f for f in CODE if folder(f) == place and not f.endswith("__init__.py")]
    assert len(modules) <= MOST_MODULES, modules


@pytest.mark.parametrize("file", CODE)
def test_classes_and_functions_can_be_read_in_one_go(file):
    limits = {"class": MOST_CLASS_LINES, "function": MOST_FUNCTION_LINES}
    large = [item for item in definitions(file) if item[2] > limits[item[0]]]
    assert not large


@pytest.mark.parametrize("file", CODE)
def test_no_code_uses_what_eval_returns(file):
    """Networks of users may override `train` and return nothing: see `nn.modes.in_eval_mode`."""
    nodes = [*ast.walk(ast.parse((ROOT / file).read_text()))]
    statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and not node.args]
    calls = [call for call in calls if ast.unparse(call.func).endswith(".eval")]
    assert not [ast.unparse(call) for call in calls if id(call) not in statements]


@pytest.mark.parametrize("place", [
    "channels", "data", "gconv", "nn", "pipeline", "pruning", "sparsity", "training"
])  # fmt: skip
def test_the_docstring_of_a_room_that_lists_its_modules_names_all(place):
    text = ast.get_docstring(ast.parse((ROOT / f"secateur/{place}/__init__.py").read_text()))
    files = [f for f in CODE if folder(f) == f"secateur/{place}" and not f.endswith("__init__.py")]
    assert [f for f in files if not re.search(rf"[`.]{Path(f).stem}[`.]", text)] == []


def listing() -> str:
    """The rooms as a table: modules, lines, what they import, their longest class and function."""
    rows = ["room                   modules  lines  longest class  longest function  imports from"]
    for place, others in sorted(rooms().items()):
        files = [f for f in CODE if room(f) == place and not f.endswith("__init__.py")]
        lines = sum(len((ROOT / f).read_text().splitlines()) for f in files)
        longest = {"class": 0, "function": 0}
        for file in files:
            for kind, _, length in definitions(file):
                longest[kind] = max(longest[kind], length)
        names = ", ".join(sorted(other.removeprefix("secateur/") for other in others))
        rows.append(
            f"{place:22} {len(files):7} {lines:6} {longest['class']:14} "
            f"{longest['function']:17}  {names}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(listing())
