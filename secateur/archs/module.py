"""A network of your own: a function, or class, that is not part of this repository.

It is called with the keyword arguments given and, unless it takes none, the number of classes, and
returns the network: logits (N, classes) from images (N, C, H, W). `source` is the file or folder
with all its code inside the project; baseline depends on it, and all later stages on what baseline
makes. A checkpoint is rebuilt by this function only where params.yaml names it, never because a
file does.
"""

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from secateur.base.errors import ArgumentError, cut
from secateur.base.sections import Strict

NONE = "weights/none"
"""A file that never changes."""
OURS = ("secateur", "stages", "tests", "benchmarks")


class Settings(Strict):
    """Where the network comes from."""

    target: Annotated[str, Field(pattern=r"^\w+(\.\w+)*:\w+$", max_length=200)] | None = None
    """package.module:function, as seen from the project's root."""
    source: Annotated[str, Field(min_length=1)] = NONE
    """File or folder with the function's module and whatever it imports from the project."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the function, by name."""
    classes: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = "num_classes"
    """The argument that gets the number of classes; null: the function takes none."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """What the function returns, as it is.

    Raises ArgumentError if its module cannot be imported, lies outside of `source`, or the function
    fails or returns no network with an output for each class.
    """
    if settings.target is None:
        raise ArgumentError("target", "name the function: package.module:function", None)
    function = _find(settings.target, settings.source)
    numbers = {} if settings.classes is None else {settings.classes: classes}
    try:
        model = function(**settings.arguments, **numbers)
    except Exception as error:  # whatever the user's code raises
        raise ArgumentError("target", f"fails: {_explain(error)}", settings.target) from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ArgumentError("target", f"returned a {kind}, not a torch.nn.Module", settings.target)
    _check_output(model, settings.target, classes, shape)
    return model


def _find(target: str, source: str) -> Any:
    """The function; ArgumentError if it cannot be imported or `source` does not cover its code."""
    name, _, function = target.partition(":")
    before = set(sys.modules)
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ArgumentError("target", f"cannot be imported: {_explain(error)}", target) from error
    if not callable(getattr(module, function, None)):
        raise ArgumentError("target", f"{name} has no function {cut(function)}", target)
    imported = [sys.modules[new] for new in set(sys.modules) - before if new in sys.modules]
    for path in sorted(filter(None, map(_path_in_project, [module, *imported]))):
        if not path.is_relative_to(Path(source)):
            raise ArgumentError(
                "source",
                f"does not cover {path}, which {target} runs; name a file or folder with all of "
                "its code, so that a change to it makes the baseline stale",
                source,
            )
    return getattr(module, function)


def _path_in_project(module: ModuleType) -> Path | None:
    """Where a module lies, relative to the project; None for installed code and for ours."""
    root, file = Path.cwd(), getattr(module, "__file__", None)
    if file is None or "site-packages" in Path(file).parts or not Path(file).is_relative_to(root):
        return None
    path = Path(file).relative_to(root)
    return None if path.parts[0] in OURS else path


def _check_output(model: nn.Module, target: str, classes: int, shape: tuple[int, int, int]) -> None:
    """ArgumentError unless an image gives one row of as many numbers as there are classes."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            outputs = model.eval()(torch.zeros(1, *shape))
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
    """The error and the line that it comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = cut(f"{type(error).__name__}: {error}", 200)
    return f"{text} ({Path(last.filename).name}, line {last.lineno})"
