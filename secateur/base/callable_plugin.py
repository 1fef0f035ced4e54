"""Plug-ins as functions: `secateur.pruners.magnitude(ratios=0.5)`.

A package of plug-ins becomes callable by `callable_plugins(__name__)` in its `__init__.py`. The
plug-ins themselves stay plain modules with `Settings` and their one function; no result depends on
what is here.
"""

import importlib
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from secateur.base import plugin, settings
from secateur.base.errors import SecateurError
from secateur.base.settings import Strict


@dataclass(frozen=True)
class ConfiguredPruner:
    """A pruner with its settings, validated."""

    name: str
    settings: Strict

    def __str__(self) -> str:
        given = {key: getattr(self.settings, key) for key in sorted(self.settings.model_fields_set)}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in given.items())})"


class CallablePlugin(ModuleType):
    """The module of a pruner; calling it validates its settings."""

    Settings: type[Strict]

    def __call__(self, **arguments: Any) -> ConfiguredPruner:
        """The pruner with these settings; those not given have their defaults.

        Raises SettingsError naming the argument, its value and what is allowed.
        """
        name = self.__name__.rpartition(".")[2]
        try:
            return ConfiguredPruner(name, settings.validate(self.Settings, arguments, ""))
        except SecateurError as error:
            raise type(error)(in_arguments(str(error), name)) from None

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
        """The import system sets every plug-in that it has imported as an attribute."""
        if type(value) is ModuleType and not name.startswith("_"):
            value.__class__ = CallablePlugin
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        kind: Any = self.__name__.rpartition(".")[2]
        return sorted({*super().__dir__(), *plugin.names(kind)})


def callable_plugins(package: str) -> None:
    """Make the plug-ins of an imported package callable."""
    sys.modules[package].__class__ = PluginPackage


def in_arguments(message: str, name: str) -> str:
    """An error message about params.yaml in terms of the arguments of plug-in `name`."""
    text = message.removeprefix("params.yaml: ").removeprefix(f"pruner = '{name}': ")
    text = text.removeprefix(f"pruner {name}: ").replace("params.yaml: ", "")
    text = text.replace(f"pruners.{name}.", "").replace("unknown key", "unknown argument")
    return text if f"({name})" in text else f"{text} ({name})"
