"""Prune image classifiers: find coupled channels, prune, prove equality, save and load.

    model  = secateur.load("models/finetuned")
    graph  = secateur.channel_graph(model, images)
    result = secateur.prune(model, images, secateur.pruners.magnitude(ratios=0.5))
    secateur.save(result, "small.safetensors")

Importing the package does not import torch or any other library: each name is loaded when it is
first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur import pruners as pruners
    from secateur.api import Preprocess as Preprocess
    from secateur.api import PruneResult as PruneResult
    from secateur.api import channel_graph as channel_graph
    from secateur.api import load as load
    from secateur.api import load_latency as load_latency
    from secateur.api import measure_latency as measure_latency
    from secateur.api import prune as prune
    from secateur.api import save as save
    from secateur.base.errors import SecateurError as SecateurError

__version__ = "0.1.0"
__all__ = [
    "Preprocess",
    "PruneResult",
    "SecateurError",
    "channel_graph",
    "load",
    "load_latency",
    "measure_latency",
    "prune",
    "pruners",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "pruners":
        return importlib.import_module("secateur.pruners")
    if name in __all__:
        home = "secateur.base.errors" if name == "SecateurError" else "secateur.api"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'secateur' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
