"""The project's own modules, imported once by the server and used by its forked processes.

In most tests, a copy of the project has exactly the code of the repository, and importing it takes
longer than most stages run. A process uses the server's module, at the moment at which it would
import its own, if the file of the module and the files of all modules that it imports have the same
content as when the server imported them; otherwise it imports the copy.
"""

import builtins
import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "secateur"


@dataclass
class Module:
    """A module in the state after its import."""

    module: ModuleType
    path: str
    """Path of its file, relative to the project."""
    content: bytes
    written: tuple[int, int]
    """Modification time and size of the file."""
    needs: dict[str, None] = field(default_factory=dict)
    """Names of the project's modules that its import imports, in order."""


def learn(root: Path) -> dict[str, Module]:
    """Import all modules of the package in `root`, and remove them from sys.modules.

    The current folder is one without project files, so that nothing is read from it.
    """
    files = sorted(path for path in (root / PACKAGE).rglob("*.py") if path.stem != "__main__")
    names = {".".join(p.relative_to(root).with_suffix("").parts): p for p in files}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    here = os.getcwd()  # noqa: PTH109  as in client.py
    os.chdir("/")
    sys.path.insert(0, str(root))
    with _recorded_imports() as needs:
        for name in names:
            importlib.import_module(name)
    sys.path.remove(str(root))
    os.chdir(here)
    found = {}
    for name, path in names.items():
        module, state = sys.modules.pop(name), path.stat()
        found[name] = Module(
            module,
            str(path.relative_to(root)),
            path.read_bytes(),
            (state.st_mtime_ns, state.st_size),
            dict.fromkeys(other for other in needs.get(name, ()) if other in names),
        )
    for name, known in found.items():  # as attributes, a package has only imported modules
        parent, _, last = name.rpartition(".")
        if parent and vars(found[parent].module).get(last) is known.module:
            delattr(found[parent].module, last)
    return found


@contextlib.contextmanager
def _recorded_imports() -> Iterator[dict[str, dict[str, None]]]:
    """Name of a module -> names that its code imports within this context, packages first."""
    found: dict[str, dict[str, None]] = {}
    original = builtins.__import__

    def record(
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        result = original(name, globals, locals, fromlist or (), level)
        if level == 0 and globals and name.partition(".")[0] == PACKAGE:
            parts = name.split(".")
            names = [".".join(parts[: count + 1]) for count in range(len(parts))]
            names += [f"{name}.{part}" for part in fromlist or ()]
            found.setdefault(globals["__name__"], {}).update(dict.fromkeys(names))
        return result

    builtins.__import__ = record
    try:
        yield found
    finally:
        builtins.__import__ = original


class Finder:
    """Finder and loader of the server's modules."""

    def __init__(self, modules: dict[str, Module], folder: Path, main: str) -> None:
        self.modules, self.folder = modules, folder
        self._other = {main}
        """Modules not to use: the one that runs as __main__, and those already imported."""
        self._same_files: dict[str, bool] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec with this object as its loader, or None."""
        if name not in self.modules or name in self._other or not self._same(name):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.origin != str(self.folder / self.modules[name].path):
            return None
        spec.loader_state, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, changed as if it had been imported from the copy."""
        self._other.add(spec.name)
        module = self.modules[spec.name].module
        root = module.__file__.removesuffix(self.modules[spec.name].path).rstrip("/")
        for name, value in vars(module).items():
            if isinstance(value, Path) and value.is_relative_to(root):
                setattr(module, name, self.folder / value.relative_to(root))
        module.__file__, module.__cached__ = spec.origin, spec.cached
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Import the modules that its code imports."""
        spec = module.__spec__
        spec.loader, spec.loader_state = spec.loader_state, None
        module.__loader__ = spec.loader
        for name in self.modules[spec.name].needs:
            importlib.import_module(name)

    def _same(self, name: str) -> bool:
        """Whether this module and all modules that it imports have the same code in the copy."""
        todo, seen = [name], {name}
        while todo:
            name = todo.pop()
            if not self._same_file(name):
                return False
            new = self.modules[name].needs.keys() - seen
            seen |= new
            todo += new
        return True

    def _same_file(self, name: str) -> bool:
        if name not in self._same_files:
            module = self.modules[name]
            path = self.folder / module.path
            try:
                state = path.stat()
                same = (state.st_mtime_ns, state.st_size) == module.written
                self._same_files[name] = same or path.read_bytes() == module.content
            except OSError:
                self._same_files[name] = False
        return self._same_files[name]
