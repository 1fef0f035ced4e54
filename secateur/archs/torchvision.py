"""Any classification network of torchvision, with or without its published weights.

Source: torchvision.models, where each network names its paper. ResNet-18 for 224x224x3 images and
1,000 classes: 11,689,512 parameters and 1.814 GMACs. Modules keep torchvision's names. New weights
are drawn as torchvision does; finetune.init = scratch draws those of torch's layers instead, and
refuses networks with parameters outside of layers (vit, swin, maxvit, convnext).
"""

import difflib
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import nn
from torch.func import functional_call

from secateur.base.errors import ArgumentError, DataError
from secateur.base.settings import Strict
from secateur.base.torchvision_import import import_torchvision


def _known(name: str) -> str:
    """The name; ValueError unless it is that of a classification network."""
    if name == "resnet18":  # the usual one, accepted without the second that the import takes
        return name
    models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(names)}"
        raise ValueError(f"torchvision has no such classification network; {hint}")
    return name


class Settings(Strict):
    """The network, and its initial weights."""

    name: Annotated[str, Field(max_length=64), AfterValidator(_known)] = "resnet18"
    """A name from torchvision.models.list_models()."""
    weights: Literal["none", "default"] = "none"
    """none: random. default: the best published ones, without their classifier unless the number of
    classes is equal. They expect images with the normalisation of ImageNet."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network with random weights and a classifier of its own: logits.

    Raises ArgumentError if it cannot take images of this number of channels or size.
    """
    models = import_torchvision().models
    if shape[0] != 3:
        raise ArgumentError(
            "arch", f"its networks need images of 3 channels, these have {shape[0]}", "torchvision"
        )
    try:
        model: nn.Module = models.get_model(
            settings.name, weights=None, num_classes=classes, **_options(settings, shape)
        )
        _use_fixed_pooling(model, _trace_shapes(model, shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"{shape[1]}x{shape[2]}"
        message = f"{settings.name} cannot take images of {size} pixels: {_short(error)}"
        raise ArgumentError("arch", message, "torchvision") from None
    return model


def load_pretrained(settings: Settings, model: nn.Module) -> None:
    """Load published weights into a network from `build`, if the settings demand them.

    They are read from the folder of torch.hub (TORCH_HOME) and downloaded if they are not there.
    Raises DataError if that fails, ArgumentError if they are for images of another size.
    """
    if settings.weights == "none":
        return
    weights = import_torchvision().models.get_model_weights(settings.name).DEFAULT
    try:
        published: dict[str, torch.Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # no network, no such file, a damaged one: each has its own type
        raise DataError(
            f"archs.torchvision.weights = default: those of {settings.name} are not in "
            f"{torch.hub.get_dir()}/checkpoints and were not downloaded ({_short(error)}). Put "
            f"{weights.url} there, or set archs.torchvision.weights = none"
        ) from None
    if settings.name.startswith("densenet"):  # published under the names of an earlier version
        published = {
            re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key): t for key, t in published.items()
        }
    own = model.state_dict()
    fitting = {key: t for key, t in published.items() if key in own and own[key].shape == t.shape}
    classes = len(weights.meta["categories"])
    for key in sorted(own.keys() - fitting.keys()):
        if key in published and published[key].shape == (classes, *own[key].shape[1:]):
            continue  # the classifier, of another number of classes
        if not key.endswith("num_batches_tracked"):
            raise ArgumentError(
                "weights",
                f"{key} of {settings.name} does not fit the published weights; are they for images "
                "of another size?",
                settings.weights,
            )
    own.clear()  # which leaves the version numbers of the modules
    own.update(fitting)
    model.load_state_dict(own, strict=False)


def _options(settings: Settings, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Arguments of some constructors beside the number of classes."""
    if settings.name in ("googlenet", "inception_v3"):
        ported = settings.weights == "default"  # from a network that normalises otherwise
        return {"aux_logits": False, "init_weights": True, "transform_input": ported}
    if settings.name.startswith("vit_"):
        return {"image_size": shape[1]}
    if settings.name.startswith("maxvit"):
        return {"input_size": shape[1:]}
    return {}


def _trace_shapes(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Run one image through the network on the meta device, which computes shapes only.

    Returns height and width of the input of its pooling `avgpool`, (0, 0) if it has none.
    """
    seen = [(0, 0)]
    pool = getattr(model, "avgpool", nn.Identity())
    hook = pool.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    tensors = {name: t.detach().to("meta") for name, t in model.state_dict().items()}
    try:
        functional_call(model.eval(), tensors, torch.empty(1, *shape, device="meta"))
    finally:
        hook.remove()
    model.train()
    height, width = seen[-1]
    return int(height), int(width)


def _use_fixed_pooling(model: nn.Module, size: tuple[int, int]) -> None:
    """Replace the adaptive pooling of AlexNet and VGG by windows of a fixed size, where equal.

    On GPUs the gradient of the adaptive pooling has no deterministic algorithm.
    """
    pool = getattr(model, "avgpool", None)
    if not isinstance(pool, nn.AdaptiveAvgPool2d) or pool.output_size in (1, (1, 1)):
        return
    wanted = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    if any(not out or not has or has % out for has, out in zip(size, wanted, strict=True)):
        return
    model.avgpool = nn.AvgPool2d((size[0] // (wanted[0] or 1), size[1] // (wanted[1] or 1)))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
