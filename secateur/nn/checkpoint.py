"""Checkpoints: safetensors files with a JSON header, written and read; never a pickle.

Weights and buffers have their own names, boolean masks `mask:<parameter>`, and the weights that a
penalty has selected for pruning `choice:<parameter>` (sparsity/choices.py). Header and shapes of
the tensors suffice to rebuild the network, also one that was made smaller. Equal models give equal
bytes.
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
from secateur.nn import resizing
from secateur.sparsity.choices import Choices, fits

FORMAT = 1
MASK, CHOICE = "mask:", "choice:"


@dataclass(frozen=True)
class Header:
    """Description of a network: all but its tensors."""

    arch: str
    arch_settings: dict[str, Any]
    classes: list[str]
    shape: list[int]
    """Channels, height and width of one image."""
    mean: list[float]
    std: list[float]
    """Mean and standard deviation by channel with which pixels in [0, 1] are normalised."""
    split: str
    """Hash of the images and their division into train, val and test."""
    stage: str
    parent: str | None = None
    """sha256 of the checkpoint that the stage started from."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Results of the stage: requested and reached amounts, proof of equality."""
    versions: dict[str, str] = field(default_factory=versions)
    format: int = FORMAT
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    """Properties that shapes do not contain, see `resizing.describe_layers`; set by `save`."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of one checkpoint file: a network with its masks."""

    header: Header
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    sha256: str = ""
    """Hash of the file; empty before it is saved."""
    choices: Choices = field(default_factory=dict)
    """What the penalty has selected for pruning, by the weight's parameter name."""

    def model(self) -> nn.Module:
        """Rebuild the network, in eval mode; CheckpointError if the tensors do not fit it."""
        model = build_architecture(self.header)
        try:
            sizes = {name: tensor.shape for name, tensor in self.tensors.items()}
            resizing.resize(model, sizes, self.header.layers)
            resizing.load_state(model, self.tensors)
            with torch.inference_mode():  # a forward pass checks that layers fit each other
                model.eval()(torch.zeros(1, *self.header.shape))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"checkpoint of stage {self.header.stage}: its tensors do not fit architecture "
                f"'{self.header.arch}': {reason[:300]}"
            ) from None
        return model


def build_architecture(header: Header, pretrained: bool = False) -> nn.Module:
    """The dense network that the header names, with random weights.

    With `pretrained`, published weights are loaded if the architecture's settings demand them.
    Raises SettingsError if the settings do not fit the images.
    """
    module = plugin.load("archs", header.arch)
    arch = settings.validate(module.Settings, header.arch_settings, f"archs.{header.arch}")
    channels, height, width = header.shape
    with settings.section(f"archs.{header.arch}"):
        built: nn.Module = module.build(arch, len(header.classes), (channels, height, width))
        if pretrained and hasattr(module, "load_pretrained"):
            module.load_pretrained(arch, built)
    return built


def save(
    path: Path,
    header: Header,
    model: nn.Module,
    masks: dict[str, Tensor],
    choices: Choices | None = None,
) -> str:
    """Write a checkpoint atomically and return its sha256.

    Masks that prune nothing are left out. Pruned weights are written as positive zeros, so that
    equal models are equal bytes.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    kept = {name: m.detach().cpu() for name, m in masks.items() if not bool(m.all())}
    for name, mask in kept.items():
        tensors[name] = torch.where(mask, tensors[name], torch.zeros_like(tensors[name]))
    chosen = {CHOICE + name: c.detach().cpu() for name, c in (choices or {}).items()}
    kept = {MASK + name: mask for name, mask in kept.items()}
    header = replace(header, layers=resizing.describe_layers(model))
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
    """Read a checkpoint; with `arch`, `arch_settings` and `split`, check it against them.

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
    tensors, masks, choices = _divide(path, safetensors.torch.load(content))
    return Checkpoint(header, tensors, masks, hashlib.sha256(content).hexdigest(), choices)


def _divide(
    path: Path, stored: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Choices]:
    """Tensors, masks and choices of a file; CheckpointError if they do not fit each other."""
    masks = {k.removeprefix(MASK): t for k, t in stored.items() if k.startswith(MASK)}
    choices = {k.removeprefix(CHOICE): t for k, t in stored.items() if k.startswith(CHOICE)}
    tensors = {k: t for k, t in stored.items() if not k.startswith((MASK, CHOICE))}
    for name, mask in masks.items():
        tensor = tensors.get(name)
        if tensor is None or mask.shape != tensor.shape or mask.dtype != torch.bool:
            raise CheckpointError(f"{path}: mask without a tensor of its shape: {name}")
    for name, choice in choices.items():
        if name not in tensors or not fits(choice, tensors[name]):
            raise CheckpointError(f"{path}: choice without a tensor that it fits: {name}")
    return tensors, masks, choices


def _header(path: Path, content: bytes) -> Header:
    """Header of a checkpoint; CheckpointError if the file is not one that this version reads."""
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
