"""Any classification network of torchvision, with its published weights on request.

Source: torchvision.models, where each network names its paper. ResNet-18 for 224x224x3 images and
1,000 classes: 11,689,512 parameters and 1.814 GMACs. Modules keep torchvision's names. Initial
weights are drawn as torchvision draws them; finetune.init = scratch draws them as torch's layers do
instead, and rejects networks with parameters outside of layers (vit, swin, maxvit, convnext).
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn
from torch.func import functional_call

from secateur.base.errors import ArgumentError, DataError, did_you_mean
from secateur.base.sections import Strict
from secateur.base.torchvision_import import import_torchvision
from secateur.nn import weights
from secateur.nn.modes import in_eval_mode
from secateur.nn.weights import Weights

PORTED = ("googlenet", "inception_v3")
"""Networks whose published weights come from TensorFlow."""


def _known(name: str) -> str:
    """The name; ValueError unless torchvision has a classification network of this name."""
    if name == "resnet18":  # the default, accepted without an import that takes a second
        return name
    models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        hint = did_you_mean(name, names) or f"; allowed: {', '.join(names)}"
        raise ValueError(f"torchvision has no such classification network{hint}")
    return name


class Settings(Strict):
    """The network."""

    name: Annotated[str, Field(max_length=64), AfterValidator(_known)] = "resnet18"
    """A name from torchvision.models.list_models()."""
    transform_input: bool = False
    """For googlenet and inception_v3: convert ImageNet's normalisation to mean 0.5 and standard
    deviation 0.5, which their published weights, ported from TensorFlow, require."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network with random weights and a classifier for `classes`; it returns logits.

    Raises ArgumentError if it does not accept images of this size or number of channels.
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


def published(settings: Settings) -> Weights:
    """The best published weights of the network, and the normalisation and size they expect.

    They are read from the folder of torch.hub (TORCH_HOME), and downloaded if they are not there.
    Raises DataError if that fails, CheckpointError if the file is not the published one.
    """
    if settings.name in PORTED and not settings.transform_input:
        raise ArgumentError(
            "transform_input", f"the published weights of {settings.name} need true", False
        )
    best = import_torchvision().models.get_model_weights(settings.name).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(best.url).name
    digest = best.url.rpartition("-")[2].partition(".")[0]
    if not path.exists():
        _download(best.url, path, digest, settings.name)
    found = weights.read(path)
    weights.check_published(path, found, digest)
    expected = best.transforms()
    side = (3, *expected.crop_size * 2)[:3]
    source = f"{settings.name} of torchvision"
    known = weights.from_config(source, expected.mean, expected.std, side)
    return replace(known, tensors=found.tensors, sha256=found.sha256)


def aliases(settings: Settings) -> dict[str, str]:
    """Names in files of earlier versions, among them the published weights, of densenets."""
    if not settings.name.startswith("densenet"):
        return {}
    return {f"*.{kind}.{n}": f"*.{kind}{n}" for kind in ("norm", "conv") for n in (1, 2)}


def auxiliary(settings: Settings) -> tuple[str, ...]:
    """Prefixes of the names of auxiliary classifiers, which the network does not have."""
    return ("aux", "AuxLogits") if settings.name in PORTED else ()


def _download(url: str, path: Path, digest: str, name: str) -> None:
    """Download a file whose sha256 begins with `digest`; DataError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except Exception as error:  # no network, no such file, a damaged one: each has its own type
        raise DataError(
            f"baseline.weights = published: those of {name} are not in {path.parent} and were not "
            f"downloaded ({_short(error)}). Put {url} there, or set baseline.weights = none"
        ) from None


def _options(settings: Settings, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Further arguments of some constructors, besides the number of classes."""
    if settings.name in PORTED:
        transform = settings.transform_input
        return {"aux_logits": False, "init_weights": True, "transform_input": transform}
    if settings.name.startswith("vit_"):
        return {"image_size": shape[1]}
    if settings.name.startswith("maxvit"):
        return {"input_size": shape[1:]}
    return {}


def _trace_shapes(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Run one image through the network on the meta device, which computes shapes only.

    Returns height and width of the input of its pooling layer `avgpool`, (0, 0) if it has none.
    """
    seen = [(0, 0)]
    pool = getattr(model, "avgpool", nn.Identity())
    hook = pool.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    tensors = {name: t.detach().to("meta") for name, t in model.state_dict().items()}
    try:
        functional_call(in_eval_mode(model), tensors, torch.empty(1, *shape, device="meta"))
    finally:
        hook.remove()
    model.train()
    height, width = seen[-1]
    return int(height), int(width)


def _use_fixed_pooling(model: nn.Module, size: tuple[int, int]) -> None:
    """Replace the adaptive pooling of AlexNet and VGG by pooling of a fixed size, where equal.

    On GPUs, the gradient of adaptive pooling has no deterministic algorithm.
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
