"""Any classification network of timm, with the weights published for it on request.

Source: R. Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models,
where each network names its paper. Modules keep timm's names. A name with a tag, such as
resnet18.a1_in1k, selects one of several published weights for `baseline.weights: published`.
Needs timm (`pip install '.[timm]'`).
"""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn
from torch.func import functional_call

from secateur.base import optional
from secateur.base.errors import ArgumentError, DataError, cut, did_you_mean
from secateur.base.logs import muted
from secateur.base.sections import Strict, matching
from secateur.base.torchvision_import import import_torchvision
from secateur.nn import weights
from secateur.nn.modes import in_eval_mode
from secateur.nn.weights import Weights


def import_timm() -> Any:
    """Import timm, and torchvision first; SecateurError with the remedy if timm is missing."""
    import_torchvision()
    return optional.load("timm", "for arch: timm")


def _known(name: str) -> str:
    """The name, with or without a weights tag; ValueError unless timm has such a network."""
    if name == "resnet18":  # the default, accepted without an import that takes seconds
        return name
    timm = import_timm()
    base, _, tag = name.partition(".")
    if base not in timm.list_models() or (tag and name not in timm.list_pretrained()):
        names = timm.list_pretrained(f"{base}.*") if tag else timm.list_models()
        raise ValueError(f"timm has no such network{did_you_mean(name, names)}")
    return name


class Settings(Strict):
    """The network."""

    name: Annotated[
        str,
        Field(max_length=100),
        matching(
            r"[a-z0-9_]+(\.[a-z0-9_]+)?", "a name such as resnet18 or resnet18.a1_in1k is needed"
        ),
        AfterValidator(_known),
    ] = "resnet18"
    """A name from timm.list_models() or, with a tag, timm.list_pretrained()."""


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network with random weights and a classifier for `classes`; it returns logits.

    Raises ArgumentError if it does not accept images of this size or number of channels.
    """
    timm = import_timm()
    known = timm.get_pretrained_cfg(settings.name)
    options: dict[str, Any] = {}
    if known is not None and known.fixed_input_size and known.input_size[1:] != shape[1:]:
        options["img_size"] = shape[1:]
    try:
        model: nn.Module = timm.create_model(
            settings.name, pretrained=False, num_classes=classes, in_chans=shape[0], **options
        )
        outputs = _outputs(model, shape)
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        size = "x".join(map(str, shape))
        message = f"{settings.name} cannot take images of {size}: {cut(str(error), 160)}"
        raise ArgumentError("arch", message, "timm") from None
    if outputs != (1, classes):
        message = f"{settings.name} gives {outputs} for one image, needs (1, {classes})"
        raise ArgumentError("arch", message, "timm")
    return model


def _outputs(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Shape of the network's output for one image, computed on the meta device."""
    tensors = {name: t.detach().to("meta") for name, t in model.state_dict().items()}
    training = model.training
    image = torch.empty(1, *shape, device="meta")
    outputs = functional_call(in_eval_mode(model), tensors, image)
    model.train(training)
    return tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else ()


def published(settings: Settings) -> Weights:
    """The weights that timm publishes under this name, from a cache or downloaded.

    The cache of torch.hub is searched first, then that of Hugging Face's hub (HF_HOME). Raises
    DataError if there are none, CheckpointError if the cached file is not the published one.
    """
    known = import_timm().get_pretrained_cfg(settings.name)
    if known is None or not (known.hf_hub_id or known.url):
        raise DataError(f"baseline.weights = published: timm has none for {settings.name}")
    path = _file(settings.name, known)
    found = weights.read(path)
    weights.check_published(path, found, _digest(path))
    source = f"{settings.name} of timm"
    expected = weights.from_config(source, known.mean, known.std, known.input_size)
    return replace(expected, tensors=found.tensors, sha256=found.sha256)


def _file(name: str, known: Any) -> Path:
    """The file with the weights, downloaded if it is not in a cache."""
    url = known.url or ""
    old = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if url and old.is_file():
        return old
    hub = optional.load("huggingface_hub", "to load the weights that timm publishes")
    reason: Exception | None = None
    names = [known.hf_hub_filename, "model.safetensors", "pytorch_model.bin"]
    tries = [(name, local) for local in (True, False) for name in names if name]
    for name_of_file, local in tries if known.hf_hub_id else ():
        try:
            with muted(logging.WARNING):  # a line for each attempt to connect
                path = hub.hf_hub_download(known.hf_hub_id, name_of_file, local_files_only=local)
            return Path(path)
        except Exception as error:  # no network, no such file: each has its own type
            reason = error
            if not local and not isinstance(error, hub.errors.RemoteEntryNotFoundError):
                break  # another file could not be downloaded either
    raise DataError(
        f"baseline.weights = published: those of {name} ({known.hf_hub_id or url}) are in no "
        f"cache and were not downloaded ({cut(str(reason), 120)}); run `hf download "
        f"{known.hf_hub_id}` where there is a network, or set baseline.weights = none"
    )


def _digest(path: Path) -> str:
    """The beginning of the sha256 that the name of a cached file contains; empty if none."""
    blob, part = path.resolve().name, re.search(r"-([a-f0-9]{8,64})\.\w+$", path.name)
    return blob if re.fullmatch("[a-f0-9]{64}", blob) else part[1] if part else ""
