"""A network of your own: a function, or class, that is not part of this repository.

It is called with `arguments` and, unless `classes` is null, with the number of classes, and returns
a network that computes logits (N, classes) from images (N, C, H, W). `source` is the file or folder
with all its code inside the project; baseline depends on it, and all later stages depend on the
output of baseline. A checkpoint is rebuilt by this function only if params.yaml names it, never
only because a file does.
"""

import importlib
import math
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn

from secateur.base.errors import ArgumentError, cut, shorten
from secateur.base.sections import Strict, matching
from secateur.nn.modes import in_eval_mode

NONE = "weights/none"
"""A file that never changes."""
OURS = ("secateur", "stages", "tests", "benchmarks")


def _as_in_files(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments; ValueError unless they can be stored unchanged as JSON in checkpoint headers.

    Keys in JSON are text, and a date, for instance, cannot be stored.
    """
    waiting: list[tuple[str, Any]] = list(arguments.items())
    for where, value in waiting:
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"{where}: its key {key!r} is not text: write '{key}'")
            waiting += [(f"{where}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where}[{place}]", inner) for place, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} = {value}: a finite number is needed")
        elif not isinstance(value, str | int | float | None):
            kind = type(value).__name__
            raise ValueError(f"{where} = {value}: a {kind} is neither text, number, list nor table")
    return arguments


Target = Annotated[
    str,
    Field(max_length=200),
    matching(r"\w+(\.\w+)*:\w+", "package.module:function is needed, such as mynet:build"),
]
Argument = Annotated[
    str, matching(r"[A-Za-z_]\w*", "the name of an argument is needed, such as num_classes")
]


class Settings(Strict):
    """Where the network comes from."""

    target: Target | None = None
    """package.module:function, importable from the project's root."""
    source: Annotated[str, Field(min_length=1)] = NONE
    """File or folder with the function's module and everything it imports from the project."""
    arguments: Annotated[dict[str, Any], AfterValidator(_as_in_files)] = Field(default_factory=dict)
    """Keyword arguments of the function: text, numbers, lists, and tables whose keys are text."""
    classes: Argument | None = "num_classes"
    """The argument for the number of classes; null: the function has no such argument."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network that the function returns, unchanged.

    Raises ArgumentError if its module cannot be imported or is outside of `source`, or if the
    function fails or does not return a network with one output per class, or if an extra state of
    the network (`get_extra_state`) is not a tensor.
    """
    if settings.target is None:
        raise ArgumentError("target", "name the function: package.module:function", None)
    before = set(sys.modules)
    function = _find(settings.target)
    _check_source(settings.target, settings.source, before)
    numbers = {} if settings.classes is None else {settings.classes: classes}
    try:
        model = function(**settings.arguments, **numbers)
    except Exception as error:  # whatever the user's code raises
        raise ArgumentError("target", f"fails: {_explain(error)}", settings.target) from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ArgumentError("target", f"returned a {kind}, not a torch.nn.Module", settings.target)
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            message = f"its network has {cut(name)} = {shorten(value)}; files hold only tensors"
            raise ArgumentError("target", message, settings.target)
    _check_output(model, settings.target, classes, shape)
    _check_source(settings.target, settings.source, before)  # functions may import, too
    return model


def _find(target: str) -> Any:
    """The function; ArgumentError if it cannot be imported."""
    name, _, function = target.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ArgumentError("target", f"cannot be imported: {_explain(error)}", target) from error
    if not callable(getattr(module, function, None)):
        raise ArgumentError("target", f"{name} has no function {cut(function)}", target)
    return getattr(module, function)


def _check_source(target: str, source: str, before: set[str]) -> None:
    """ArgumentError unless `source` covers the target's module and all imported since `before`."""
    names = {target.partition(":")[0]} | (set(sys.modules) - before)
    modules = [sys.modules[name] for name in names if name in sys.modules]
    for path in sorted(filter(None, map(_path_in_project, modules))):
        if not path.is_relative_to(Path(source)):
            raise ArgumentError(
                "source",
                f"does not cover {path}, which {target} runs; name a file or folder with all of "
                "its code, so that a change to it makes the baseline stale",
                source,
            )


def _path_in_project(module: ModuleType) -> Path | None:
    """A module's path relative to the project; None for installed code and Secateur's own."""
    root, file = Path.cwd(), getattr(module, "__file__", None)
    if file is None or "site-packages" in Path(file).parts or not Path(file).is_relative_to(root):
        return None
    path = Path(file).relative_to(root)
    return None if path.parts[0] in OURS else path


def _check_output(model: nn.Module, target: str, classes: int, shape: tuple[int, int, int]) -> None:
    """ArgumentError unless the network returns (1, classes) for one image."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return
    training = model.training
    try:
        # not inference_mode: tensors that the network caches in this pass must work in training too
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs = in_eval_mode(model)(torch.zeros(1, *shape))
    except Exception as error:
        size = "x".join(map(str, shape))
        message = f"its network fails on an image of {size}: {_explain(error)}"
        raise ArgumentError("target", message, target) from error
    finally:
        model.train(training)
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, classes):
        found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs)
        raise ArgumentError(
            "target", f"its network gives {found} for one image, needs (1, {classes})", target
        )


def _explain(error: Exception) -> str:
    """The error, and the file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = cut(f"{type(error).__name__}: {error}", 200)
    return f"{text} ({Path(last.filename).name}, line {last.lineno})"
