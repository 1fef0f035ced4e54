"""Pruners as functions: `secateur.pruners.magnitude(ratios=0.5)`.

`callable_plugins(__name__)` in the `__init__.py` of a package makes its plug-ins callable. The
plug-ins themselves remain plain modules with `Settings` and one function; no result depends on this
module.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from secateur.base import plugin, settings
from secateur.base.errors import SettingsError
from secateur.base.sections import Strict


@dataclass(frozen=True)
class ConfiguredPruner:
    """A pruner with validated settings."""

    name: str
    settings: Strict

    def __str__(self) -> str:
        given = {key: getattr(self.settings, key) for key in sorted(self.settings.model_fields_set)}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in given.items())})"


class CallablePlugin(ModuleType):
    """The module of a pruner; calling it validates its settings."""

    Settings: type[Strict]

    def __call__(self, **arguments: Any) -> ConfiguredPruner:
        """The pruner with these settings, and defaults for all others.

        Raises SettingsError naming the argument, its value and what is allowed.
        """
        name = self.__name__.rpartition(".")[2]
        with arguments_of(name):
            return ConfiguredPruner(
                name, settings.validate(self.Settings, arguments, f"pruners.{name}")
            )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.Settings).replace(return_annotation=ConfiguredPruner)


class PluginPackage(ModuleType):
    """A package of plug-ins, each imported when it is first used, and callable."""

    def __getattr__(self, name: str) -> Any:
        kind: Any = self.__name__.rpartition(".")[2]
        known = plugin.names(kind)
        if name.startswith("_") or name not in known:
            raise AttributeError(
                f"module '{self.__name__}' has no attribute '{name}'; there are: {', '.join(known)}"
            )
        return importlib.import_module(f"{self.__name__}.{name}")

    def __setattr__(self, name: str, value: object) -> None:
        """Make a plug-in callable when the import system sets it as an attribute."""
        if type(value) is ModuleType and not name.startswith("_"):
            value.__class__ = CallablePlugin
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        kind: Any = self.__name__.rpartition(".")[2]
        return sorted({*super().__dir__(), *plugin.names(kind)})


def callable_plugins(package: str) -> None:
    """Make the plug-ins of an imported package callable."""
    sys.modules[package].__class__ = PluginPackage


@contextmanager
def arguments_of(name: str) -> Iterator[None]:
    """A SettingsError raised inside names the pruner's argument, not the key of params.yaml.

    The counterpart of `settings.section`.
    """
    try:
        yield
    except SettingsError as error:
        text = str(error).removeprefix(f"{settings.FILE}: ").replace(f"pruners.{name}.", "")
        text = text.replace("unknown key", "unknown argument")
        raise SettingsError(f"{text} ({name})") from None
