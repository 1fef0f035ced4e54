"""Checkpoints: safetensors with a JSON header, in and out; never a pickle.

Weights and buffers stand under their own names, masks under `mask:<parameter>` as booleans, what
a penalty has chosen to go under `choice:<parameter>` (sparsity/choices.py). The header says how to
rebuild the network; its shapes come from the tensors, so that a network that was made smaller loads
without the code that made it smaller. Equal models are equal bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from secateur.base import files, plugin, settings
from secateur.base.errors import CheckpointError
from secateur.base.machine import versions
from secateur.nn import resizing as shapes
from secateur.sparsity.choices import Choices, fits

FORMAT = 1
MASK, CHOICE = "mask:", "choice:"


@dataclass(frozen=True)
class Header:
    """What is known of a network beside its tensors."""

    arch: str
    arch_settings: dict[str, Any]
    classes: list[str]
    shape: list[int]
    """Channels, height and width of one image."""
    mean: list[float]
    std: list[float]
    """Normalisation by channel that the network expects, of pixels in [0, 1]."""
    split: str
    """Hash of the images and of their division into train, val and test."""
    stage: str
    parent: str | None = None
    """sha256 of the checkpoint it came from."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the stage found out: asked and reached, proof of equality."""
    versions: dict[str, str] = field(default_factory=versions)
    format: int = FORMAT
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the shapes of the tensors do not tell; written by `save`."""


@dataclass(frozen=True)
class Checkpoint:
    """A network with its masks, as one file holds it."""

    header: Header
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    sha256: str = ""
    """Of the file; empty before it is saved."""
    choices: Choices = field(default_factory=dict)
    """What the penalty has chosen to go, by the weight's parameter name."""

    def model(self) -> nn.Module:
        """The network, rebuilt from header and shapes, with these weights."""
        model = architecture(self.header)
        try:
            sizes = {name: tensor.shape for name, tensor in self.tensors.items()}
            shapes.resize(model, sizes, self.header.layers)
            shapes.load(model, self.tensors)
            with torch.inference_mode():  # one image through, so that layers fit each other
                model.eval()(torch.zeros(1, *self.header.shape))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"checkpoint of stage {self.header.stage}: its tensors do not fit architecture "
                f"'{self.header.arch}': {reason[:300]}"
            ) from None
        return model


def architecture(header: Header, published: bool = False) -> nn.Module:
    """The unpruned network that the header names, with new weights.

    With `published`, weights that the architecture's settings ask for take their place; whoever
    has weights of his own to load spares himself that.
    """
    module = plugin.load("archs", header.arch)
    arch = settings.validate(module.Settings, header.arch_settings, f"archs.{header.arch}")
    channels, height, width = header.shape
    built: nn.Module = module.build(arch, len(header.classes), (channels, height, width))
    if published and hasattr(module, "publish"):
        module.publish(arch, built)
    return built


def save(
    path: Path,
    header: Header,
    model: nn.Module,
    masks: dict[str, Tensor],
    choices: Choices | None = None,
) -> str:
    """Write one checkpoint in one step; gives its sha256.

    Masks that keep everything are left out. Pruned weights are written as positive zeros, so that
    equal models are equal bytes.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    kept = {name: m.detach().cpu() for name, m in masks.items() if not bool(m.all())}
    for name, mask in kept.items():
        tensors[name] = torch.where(mask, tensors[name], torch.zeros_like(tensors[name]))
    chosen = {CHOICE + name: c.detach().cpu() for name, c in (choices or {}).items()}
    kept = {MASK + name: mask for name, mask in kept.items()}
    header = replace(header, layers=shapes.describe(model))
    content = safetensors.torch.save(
        tensors | {name: mark.contiguous() for name, mark in (kept | chosen).items()},
        metadata={"secateur": json.dumps(asdict(header), sort_keys=True)},
    )
    files.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def load(
    path: Path,
    arch: str | None = None,
    arch_settings: dict[str, Any] | None = None,
    split: str | None = None,
) -> Checkpoint:
    """Read and check one checkpoint, and that it is what is asked for, as far as that is given.

    Raises CheckpointError for a missing, truncated or foreign file, for a pickle, and for a
    checkpoint of another architecture or of other data.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; run `dvc repro` to make it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    header = _header(path, content)
    if arch is not None and header.arch != arch:
        raise CheckpointError(
            f"{path}: holds architecture '{header.arch}', params ask for '{arch}'"
        )
    if arch_settings is not None and header.arch_settings != arch_settings:
        raise CheckpointError(
            f"{path}: holds a '{header.arch}' with {header.arch_settings}, params.yaml has "
            f"archs.{header.arch} = {arch_settings}"
        )
    if split is not None and header.split != split:
        raise CheckpointError(
            f"{path}: was trained on other data or another split ({header.split[:12]}) than the "
            f"data that is here ({split[:12]}); run `dvc repro` to train it again"
        )
    everything = safetensors.torch.load(content)
    masks = {k.removeprefix(MASK): t for k, t in everything.items() if k.startswith(MASK)}
    choices = {k.removeprefix(CHOICE): t for k, t in everything.items() if k.startswith(CHOICE)}
    tensors = {k: t for k, t in everything.items() if not k.startswith((MASK, CHOICE))}
    strangers = [k for k in masks if k not in tensors or masks[k].shape != tensors[k].shape]
    strangers += [k for k in masks if masks[k].dtype != torch.bool]
    if strangers:
        raise CheckpointError(f"{path}: mask without a tensor of its shape: {strangers[0]}")
    for name, choice in choices.items():
        if name not in tensors or not fits(choice, tensors[name]):
            raise CheckpointError(f"{path}: choice without a tensor that it fits: {name}")
    return Checkpoint(header, tensors, masks, hashlib.sha256(content).hexdigest(), choices)


def _header(path: Path, content: bytes) -> Header:
    """Header of a file that has been found to be a checkpoint of ours."""
    is_json = content[8:9] == b"{"  # safetensors: eight bytes of length, then JSON
    if not is_json and (content[:2] == b"PK" or content[:1] == b"\x80"):
        raise CheckpointError(
            f"{path}: a pickle (torch.save), not a checkpoint; pickles can run code and are never "
            "loaded. Save the weights with safetensors instead"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # its own exception types differ between versions
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({len(content)} bytes; truncated or foreign): "
            f"{error}"
        ) from None
    try:
        header = Header(**json.loads(metadata["secateur"]))
    except KeyError:
        raise CheckpointError(f"{path}: safetensors, but not written by Secateur") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header cannot be read: {error}") from None
    if header.format != FORMAT:
        raise CheckpointError(f"{path}: format {header.format}; this version reads {FORMAT}")
    return header
