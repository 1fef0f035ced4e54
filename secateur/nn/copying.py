"""Copies of networks, as `copy.deepcopy` makes them, in half of the time."""

import copy
import copyreg
from collections import OrderedDict
from functools import partial
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)

_FINAL = (type(None), bool, int, float, complex, str, bytes, type)
"""Types whose values are never copied."""
_TABLES = (dict, OrderedDict)
_SPECIAL = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
"""Methods by which a class decides itself how it is copied."""


def copied(model: Network, known: dict[int, Any] | None = None) -> Network:
    """A deep copy of the network.

    `known` has by id what takes the place of the copies of some objects, as deepcopy's memo does.
    A module has dozens of attributes, nearly all of them numbers, names and empty dictionaries:
    these are not handed to deepcopy one by one.
    """
    return _copied(model, {} if known is None else known)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _FINAL:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module) and _has_plain_copies(value):
        return _copied_module(value, memo)
    if kind in _TABLES and not getattr(value, "__dict__", None):
        memo[id(value)] = new = kind()
        for key, entry in value.items():
            new[_copied(key, memo)] = _copied(entry, memo)
        return new
    if kind is set and not value:
        memo[id(value)] = set()
        return memo[id(value)]
    if kind is tuple and all(type(entry) in _FINAL for entry in value):
        return value
    return copy.deepcopy(value, memo)


def _copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy by way of the state that the module gives and takes, as deepcopy makes it."""
    memo[id(module)] = new = type(module).__new__(type(module))
    state = module.__getstate__()
    memo.setdefault(id(memo), []).append(state)  # no id of what is in it is given to another object
    new.__setstate__({k: v if type(v) in _FINAL else _copied(v, memo) for k, v in state.items()})
    return new


def _has_plain_copies(module: nn.Module) -> bool:
    """Whether nothing but the state is particular about copies of the module."""
    kind = type(module)
    return (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind not in copyreg.dispatch_table
        and not isinstance(module, list | dict)
        and "__deepcopy__" not in vars(module)
        and not any(map(partial(hasattr, kind), _SPECIAL))
    )
