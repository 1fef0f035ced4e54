"""Checkpoints: safetensors files with a JSON header, written and read; never a pickle.

Weights and buffers are stored under their own names, boolean masks as `mask:<parameter>`, and what
a penalty has selected for pruning as `choice:<parameter>` (sparsity/choices.py). The header and the
shapes of the tensors suffice to rebuild the network, even a compact one. Equal models give equal
bytes.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor, nn

from secateur.base import files, plugin, settings, tensor_files
from secateur.base.documents import validated
from secateur.base.errors import CheckpointError, SecateurError, cut, shorten
from secateur.base.machine import versions
from secateur.base.tensor_files import MAX_PIXELS, ClassName, Finite, Positive, Shape, TensorFile
from secateur.nn import resizing
from secateur.nn.modes import in_eval_mode
from secateur.sparsity.choices import Choices, fits

FORMAT = 1
MASK, CHOICE = "mask:", "choice:"

OWN_CODE = "module"
"""The architecture whose settings name a function of the user."""
LARGE_SETTING = 256
"""Up to this value of all widths, depths and image sizes, a network is built without first counting
its bytes."""

LayerKey = Annotated[str, Field(pattern=r"^(groups|before|after|removed|size:[A-Za-z]\w*)$")]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


@dataclass(frozen=True)
class Header:
    """Description of a network without its tensors. Its annotations are the schema of the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    arch: str
    """Empty for a network that is not from secateur/archs; it may lack classes, mean and std."""
    arch_settings: dict[str, Any]
    classes: list[ClassName]
    shape: Shape
    """Channels, height and width of one image."""
    mean: list[Finite]
    std: list[Positive]
    """Mean and standard deviation of each channel, which normalise pixels in [0, 1]."""
    split: str
    """Hash of the images and their split into train, val and test."""
    stage: str
    parent: str | None = None
    """sha256 of the checkpoint that the stage started from."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Results of the stage, such as the requested and the reached amount, and the proof."""
    versions: dict[str, str] = field(default_factory=versions)
    format: int = FORMAT
    layers: dict[str, dict[LayerKey, Count]] = field(default_factory=dict)
    """Properties that shapes do not show; see `resizing.describe_layers`. Set by `save`."""
    resize: Annotated[int, Field(ge=1, le=2**16, strict=True)] | None = None
    """Pixels of the shorter side of an image before the centre crop, as in evaluation. None, which
    is not written: images are not resized, or an earlier version did not store it."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of one checkpoint file: a network with its masks."""

    header: Header
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    sha256: str = ""
    """Hash of the file; empty before it is saved."""
    choices: Choices = field(default_factory=dict)
    """What the penalty has selected for pruning, by parameter name of the weight."""
    trusted: bool = False
    """Whether architecture and settings have been compared with params.yaml."""

    def model(self) -> nn.Module:
        """Rebuild the network, in eval mode; CheckpointError if the tensors do not fit it.

        If the architecture is a function of the user (arch `module`), it is called only if
        params.yaml names it too.
        """
        where = f"checkpoint of stage {cut(self.header.stage)}: "
        if self.header.arch == OWN_CODE and not self.trusted:
            target = shorten(self.header.arch_settings.get("target"))
            raise CheckpointError(
                f"{where}its network comes from a function of yours, {target}, and a function that "
                "a file names is not called; give an instance: load(path, into=MyNet())"
            )
        try:
            _check_memory(self.header)
            model = build_architecture(self.header)
        except (SecateurError, RuntimeError, ValueError, MemoryError) as error:
            reason = str(error).removeprefix(f"{settings.FILE}: ")  # here they are the header's
            raise CheckpointError(f"{where}{cut(reason, 300)}") from None
        return self.fill(model, f"{where}its tensors do not fit architecture '{self.header.arch}'")

    def fill(self, model: nn.Module, message: str) -> nn.Module:
        """Resize a dense network to the shapes of the tensors and load them, in place.

        The network is in eval mode afterwards. Raises CheckpointError with `message` and the reason
        if a tensor is unexpected, missing, or does not fit.
        """
        try:
            _check_indices(self.header, self.tensors)
            sizes = {name: tensor.shape for name, tensor in self.tensors.items()}
            resizing.resize(model, sizes, self.header.layers)
            _check_types(model, self.tensors)
            resizing.load_state(model, self.tensors)
            if self.header.shape:
                like = next(model.parameters(), torch.empty(0))
                with torch.no_grad():  # a forward pass checks that layers fit each other
                    outputs = in_eval_mode(model)(like.new_zeros(2, *self.header.shape))
                classes = len(self.header.classes)
                if classes and outputs.shape != (2, classes):
                    raise ValueError(f"{outputs.shape[-1]} outputs for {classes} classes")
        except Exception as error:  # whatever a network's code raises on unsuitable tensors
            reason = cut(str(error) or type(error).__name__, 300)
            raise CheckpointError(f"{message}: {reason}") from error
        return in_eval_mode(model)


def _check_memory(header: Header) -> None:
    """CheckpointError if the dense network needs more than half of the machine's memory.

    To count its bytes, the network is built on the meta device. That may take longer than building
    it, so it is done only if a setting is large. A network whose code needs values of tensors is
    not checked.
    """
    if all(number <= LARGE_SETTING for number in _numbers([header.arch_settings, header.shape])):
        return
    try:
        with torch.device("meta"):
            dense = build_architecture(header)
    except (SecateurError, RuntimeError, NotImplementedError):
        return
    size = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    if size > files.MEMORY // 2:
        raise CheckpointError(
            f"the dense network has {size / 2**30:,.0f} GiB, more than half of this machine's "
            "memory"
        )


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in nested tables and lists; text, such as a network's name, is skipped."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _check_indices(header: Header, tensors: dict[str, Tensor]) -> None:
    """ValueError unless the indices that the header declares are tensors of that length."""
    for name, known in header.layers.items():
        for end in {"before", "after"} & set(known):
            index = tensors.get(f"{name}.{end}")
            if index is None or index.shape != (known[end],):
                raise ValueError(f"{cut(name)}: no index of length {known[end]:,} {end} the layer")


def _check_types(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """ValueError if a tensor is missing or of another type; floating-point types are converted."""
    for name, own in model.state_dict().items():
        if not isinstance(own, Tensor):  # an extra state, which keeps the network's value
            continue
        if (found := tensors.get(name)) is None:
            raise ValueError(f"{cut(name)} is missing")
        floating = own.is_floating_point() and found.is_floating_point()
        if found.dtype != own.dtype and not floating:
            raise ValueError(f"{name} holds {found.dtype}, needs {own.dtype}")


def build_architecture(header: Header) -> nn.Module:
    """The dense network of the architecture that the header names, with random weights.

    Raises SettingsError if the settings do not fit the images.
    """
    schema = plugin.load("archs", header.arch).Settings
    chosen = settings.validate(schema, header.arch_settings, f"archs.{header.arch}")
    return build(header.arch, chosen, len(header.classes), header.shape)


def build(arch: str, chosen: BaseModel, classes: int, shape: Sequence[int]) -> nn.Module:
    """The dense network of an architecture, with random weights.

    `chosen` is an instance of the `Settings` of `arch`; `shape` is that of one image: channels,
    height, width. Raises SettingsError if the settings do not fit the images.
    """
    channels, height, width = shape
    with settings.section(f"archs.{arch}"):
        model: nn.Module = plugin.load("archs", arch).build(
            chosen, classes, (channels, height, width)
        )
    return model


def classifier(header: Header) -> frozenset[str]:
    """Names of the tensors whose shape depends on the number of classes."""
    headers = header, replace(header, classes=[*header.classes, ""])
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                shapes, others = map(_shapes, headers)
        except (SecateurError, RuntimeError):  # code that needs values of tensors
            shapes, others = map(_shapes, headers)
    return frozenset(name for name, shape in shapes.items() if others.get(name) != shape)


def _shapes(header: Header) -> dict[str, torch.Size]:
    """Shapes of the dense network's tensors, by name."""
    return {name: tensor.shape for name, tensor in build_architecture(header).state_dict().items()}


def save(
    path: Path,
    header: Header,
    model: nn.Module,
    masks: dict[str, Tensor],
    choices: Choices | None = None,
) -> str:
    """Write a checkpoint atomically and return its sha256.

    Masks that prune nothing are left out. Pruned weights are written as positive zeros, so that
    equal models give equal bytes. Raises SecateurError for an extra state that is not a tensor.
    """
    kept = {name: m.detach().cpu() for name, m in masks.items() if not bool(m.all())}
    tensors = _stored(model, kept)
    chosen = {CHOICE + name: c.detach().cpu() for name, c in (choices or {}).items()}
    kept = {MASK + name: mask for name, mask in kept.items()}
    header = replace(header, layers=resizing.describe_layers(model))
    content = safetensors.torch.save(
        tensors | {name: mark.contiguous() for name, mark in (kept | chosen).items()},
        metadata={"secateur": json.dumps(_plain(header), sort_keys=True)},
    )
    files.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _plain(header: Header) -> dict[str, Any]:
    """The header as plain values, without `resize` if it is None, as in earlier versions."""
    plain = asdict(header)
    if header.resize is None:
        del plain["resize"]
    return plain


def _stored(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors by name, masked, none of them sharing memory.

    A tensor with several names is stored under each of them, with the masks of all names. Raises
    SecateurError for an extra state that is not a tensor.
    """
    state = model.state_dict(keep_vars=True)
    by_tensor: dict[int, Tensor] = {}
    for name, mask in masks.items():
        by_tensor[id(state[name])] = mask & by_tensor.get(id(state[name]), mask)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, own in state.items():
        if not isinstance(own, Tensor):
            raise SecateurError(
                f"{name}: get_extra_state returns a {type(own).__name__}, which a file of "
                "safetensors cannot hold; let it return a tensor"
            )
        tensor = own.detach().cpu().contiguous()
        if (both := by_tensor.get(id(own))) is not None:
            tensor = torch.where(both, tensor, torch.zeros_like(tensor))
        if tensor.untyped_storage().data_ptr() in seen:  # safetensors refuses shared memory
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def load(
    path: Path,
    arch: str | None = None,
    arch_settings: dict[str, Any] | None = None,
    split: str | None = None,
) -> Checkpoint:
    """Read a checkpoint; with `arch`, `arch_settings` and `split`, check it against them.

    Raises CheckpointError if the file is missing, truncated, a pickle or not written by Secateur,
    or if the checkpoint belongs to another architecture or to other data.
    """
    found = parse(
        path, tensor_files.read(path, CheckpointError, cure="; run `dvc repro` to make it")
    )
    header = found.header
    if arch is not None and header.arch != arch:
        raise CheckpointError(
            f"{path}: holds architecture '{cut(header.arch)}', params ask for '{arch}'"
        )
    if arch_settings is not None and header.arch_settings != arch_settings:
        raise CheckpointError(
            f"{path}: holds a '{header.arch}' with {shorten(header.arch_settings)}, params.yaml "
            f"has archs.{header.arch} = {shorten(arch_settings)}"
        )
    if split is not None and header.split != split:
        raise CheckpointError(
            f"{path}: was trained on other data or another split ({cut(header.split, 13)[:12]}) "
            f"than the data that is here ({split[:12]}); run `dvc repro` to train it again"
        )
    return replace(found, trusted=arch is not None and arch_settings is not None)


def parse(path: Path, found: TensorFile) -> Checkpoint:
    """The checkpoint in a file's content; CheckpointError if Secateur has not written it."""
    header = _header(path, found.header)
    tensors, masks, choices = _divide(path, found.tensors)
    return Checkpoint(header, tensors, masks, found.sha256, choices)


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
            raise CheckpointError(f"{path}: mask without a tensor of its shape: {cut(name)}")
    for name, choice in choices.items():
        if name not in tensors or not fits(choice, tensors[name]):
            raise CheckpointError(f"{path}: choice without a tensor that it fits: {cut(name)}")
    return tensors, masks, choices


def _header(path: Path, plain: Any) -> Header:
    """The header from its plain values; CheckpointError if this version cannot read it."""
    if plain is None:
        raise CheckpointError(f"{path}: safetensors, but not written by Secateur")
    if isinstance(plain, dict) and plain.get("format", FORMAT) != FORMAT:
        found = shorten(plain["format"])
        raise CheckpointError(f"{path}: format {found}; this version reads {FORMAT}")
    header = validated(_HEADER, plain, f"{path}: its header cannot be read", CheckpointError)
    problem = _problem(header)
    if problem:
        raise CheckpointError(f"{path}: its header cannot be read: {problem}")
    return header


_HEADER = TypeAdapter(Header)


def _problem(header: Header) -> str | None:
    """What is wrong with fields that are valid on their own; None if nothing is."""
    if math.prod(header.shape) > MAX_PIXELS:
        return f"shape = {header.shape}: images of more than {MAX_PIXELS:,} values"
    if len(header.mean) != len(header.std):
        return f"{len(header.mean)} values in mean, {len(header.std)} in std"
    if not header.arch:
        return None
    if not header.classes:
        return "classes = []: at least one is needed"
    if len(header.shape) != 3:
        return f"shape = {header.shape}: channels, height and width are needed"
    if len(header.mean) not in (1, header.shape[0]):
        return f"{len(header.mean)} values in mean for {header.shape[0]} channels"
    return None
