"""The Python API behind `import secateur`: load, channel_graph, prune, save and latency tables.

The pipeline's stages and these functions use the same code: `prune` returns the network that the
stage `prune` writes for the same network, images and settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from secateur.base import machine, plugin
from secateur.base.errors import CheckpointError, PruningError, SettingsError, shorten
from secateur.base.optional import RuntimeName
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.data.batches import scale_and_shift
from secateur.nn import checkpoint, cost, matching, weights
from secateur.nn.checkpoint import Checkpoint, Header
from secateur.nn.copies import copied
from secateur.nn.matching import Names
from secateur.nn.modes import in_eval_mode
from secateur.nn.weights import Weights
from secateur.pruning.apply import PrunedNetwork, apply_decision
from secateur.pruning.callable_pruners import ConfiguredPruner, arguments_of
from secateur.pruning.decision import PruningContext
from secateur.pruning.latency import LatencyTable, load_table
from secateur.pruning.target import Target
from secateur.sparsity import masks
from secateur.sparsity.choices import Choices
from secateur.sparsity.masks import Masks


@dataclass(frozen=True)
class Preprocess:
    """The normalisation that a network expects, as a function of images.

    Without `mean` and `std` (the network's file has none), pixels are only scaled to [0, 1].
    """

    mean: tuple[float, ...] = ()
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, for pixels in [0, 1]."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (N, C, H, W), uint8 or floats in [0, 1]; returns float32 images.

        Raises ValueError for images of another dtype, or with the wrong number of axes or channels.
        """
        if images.dim() != 4:
            raise ValueError(f"images: {images.dim()} axes; (N, C, H, W) is needed")
        if self.mean and images.shape[1] != len(self.mean):
            raise ValueError(f"images: {images.shape[1]} channels; {len(self.mean)} are needed")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images: {images.dtype}; uint8 or floats in [0, 1] are needed")
        white = 255 if images.dtype == torch.uint8 else 1
        if not self.mean:
            return images.to(torch.float32) / white
        scale, shift = scale_and_shift(self.mean, self.std, white, device=images.device)
        return images.to(torch.float32) * scale + shift


@dataclass(frozen=True)
class Origin:
    """What is known of a loaded or pruned network besides its weights: attribute `origin`."""

    header: Header
    masks: Masks
    """Parameter name -> mask, True for entries that are kept; apply them in further training, as
    `prune` does when the network is pruned again."""
    choices: Choices
    """What the penalty has chosen, for the pruner `chosen`."""
    sha256: str = ""
    """Hash of the file; empty if the network was not loaded from a file."""


@dataclass(frozen=True, kw_only=True)
class PruneResult(PrunedNetwork):
    """A pruned network that has been proved equal to the masked network."""

    notes: Mapping[str, float]
    """Figures that the pruner reports, such as the ratio that was reached."""
    parameters: tuple[int, int]
    """All parameters before pruning, and those not pruned afterwards (see `nn.cost.nonzero`)."""
    pruner: str
    header: Header = field(repr=False)
    """What `save` writes besides the weights."""

    @property
    def compression(self) -> float:
        """Number of parameters before pruning, divided by the number not pruned afterwards."""
        return self.parameters[0] / self.parameters[1]

    def __str__(self) -> str:
        before, after = self.parameters
        return (
            f"{self.pruner}: {after:,} of {before:,} parameters left "
            f"({self.compression:.1f}x fewer), outputs differ by at most {self.max_difference:.1g} "
            "of the largest"
        )


def load(path: str | Path, into: nn.Module | None = None, rename: Names | None = None) -> nn.Module:
    """Load a network from a file; it is returned in eval mode.

    `path` is a checkpoint of Secateur, or a folder that contains one as model.safetensors. The
    network, compact or dense, is rebuilt from the architecture that the file names. If the file
    names no architecture, as for a network of your own, pass `into`: an instance of the dense
    network, which is resized to the file's shapes, filled and returned, on its own device.

    With `into`, weights from other programs can be loaded too: safetensors files, files of
    torch.save (.pt, .pth, .pth.tar) and folders in the layout of Hugging Face's hub. No code in a
    file is executed. Prefixes such as `module.` in the file's names are recognised; `rename` maps
    other names in the file to names in the network, of tensors or modules; * matches any text.

    The network gets three attributes, unless it uses these names for something else: `classes`, the
    names of its classes in the order of its outputs; `preprocess`, a `Preprocess`; and `origin`, an
    `Origin`.

    Raises CheckpointError if the file is missing, damaged or of another format, if it requires
    `into` or does not allow `rename`, or if the tensors do not fit; `into` then stays unchanged.
    Raises SettingsError if `into` is not a network or is on the device meta, or if `rename` is not
    a mapping of names.
    """
    _check_load(into, rename)
    file = Path(path)
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")
    found = weights.read(file)
    if rename and found.checkpoint is not None:
        raise CheckpointError(
            f"{file}: written by Secateur, with the names of the network; rename is for weights "
            "that others have saved"
        )
    model, origin = (
        _fill_with_weights(found, into, rename or {})
        if found.checkpoint is None
        else _rebuild(found.checkpoint, into, found.source)
    )
    header = origin.header
    _attach(
        model,
        classes=list(header.classes),
        preprocess=Preprocess(tuple(header.mean), tuple(header.std)),
        origin=origin,
    )
    return in_eval_mode(model)


def _rebuild(found: Checkpoint, into: nn.Module | None, file: str) -> tuple[nn.Module, Origin]:
    """The network stored in a checkpoint of Secateur."""
    if into is not None:
        trial = copied(into, "into", SettingsError)
        fill(trial, found, file)  # on an error, `into` itself stays unchanged
        model = fill(into, found, file)
    elif not found.header.arch:
        raise CheckpointError(
            f"{file}: names no architecture, since the network was not one of Secateur's; give an "
            "instance of the dense network: load(path, into=MyNet())"
        )
    else:
        model = found.model()
    return model, Origin(found.header, found.masks, found.choices, found.sha256)


def _fill_with_weights(
    found: Weights, into: nn.Module | None, rename: Names
) -> tuple[nn.Module, Origin]:
    """A network filled with weights from another program."""
    if into is None:
        raise CheckpointError(
            f"{found.source}: weights without an architecture, not written by Secateur; give an "
            "instance of the network: load(path, into=MyNet())"
        )
    matching.fill(into, found, rename=rename)
    header = Header("", {}, [], [], list(found.mean), list(found.std), split="", stage="")
    return into, Origin(header, {}, {}, found.sha256)


def fill(model: nn.Module, found: Checkpoint, file: str | Path) -> nn.Module:
    """Resize a network to the shapes of a checkpoint and fill it, in place.

    Raises CheckpointError unless file and network have tensors of the same names that fit.
    """
    message = f"{file}: its tensors do not fit into = {type(model).__name__}"
    return found.fill(model, message)


def _attach(model: nn.Module, **attributes: object) -> None:
    """Set attributes, except those that the network itself uses for something else."""
    free = [
        name
        for name in attributes
        if not hasattr(type(model), name)  # such as a property
        and (not hasattr(model, name) or _was_attached(model, name))
    ]
    for name in free:
        setattr(model, name, attributes[name])


def _was_attached(model: nn.Module, name: str) -> bool:
    """Whether `_attach` has set this attribute of the network."""
    value, origin = getattr(model, name), getattr(model, "origin", None)
    if isinstance(value, list) and isinstance(origin, Origin):
        return value == list(origin.header.classes)
    return isinstance(value, Preprocess | Origin)


def channel_graph(model: nn.Module, images: Tensor) -> ChannelGraph:
    """Find the channel groups of a network, and the channels that cannot be removed, with reasons.

    A channel group is a set of channels that can only be removed together. `images` is a batch of
    inputs, (N, C, H, W); only its shape matters. `print(graph)` shows the groups. `model` is not
    changed. Raises PruningError naming the first unknown operation, or a layer that never runs.
    """
    _check_model(model)
    _check_batch(images)
    return build_channel_graph(in_eval_mode(copied(model)), images[:1])


@torch.inference_mode(False)
def prune(
    model: nn.Module,
    images: Tensor,
    pruner: ConfiguredPruner,
    *,
    labels: Tensor | None = None,
    latency: LatencyTable | None = None,
    remove_dead: bool = True,
    group_convolutions: bool = False,
) -> PruneResult:
    """Prune a network that torch.fx can trace, and prove that the compact network is equivalent.

    `images` (N, C, H, W) are some normalised training images, and `labels` (N,), int64, their
    labels, which the criteria taylor and fisher and the pruners oracle and branches need, since
    they use the loss. The pruner decides which weights are set
    to zero and which channels are removed; masks of earlier prunings, in this session or in the
    file that the network was loaded from, stay in force. A latency target needs the table of
    `measure_latency` as `latency`. With `remove_dead`, channels that no longer affect the output
    are removed too; with `group_convolutions`, masks made of groups of channels become group
    convolutions. The compact network is compared with the masked network on `images`, in float64
    and in float32, before it is returned. `model` is not changed.

    Raises SettingsError naming the argument that does not fit the network, and PruningError if the
    network cannot be traced, if a layer would be left empty, or if the two networks differ.
    """
    _check_prune(model, images, pruner, labels)
    _check_options(pruner, latency, remove_dead=remove_dead, group_convolutions=group_convolutions)
    dense, images = in_eval_mode(copied(model)), _usable(images)
    origin = getattr(model, "origin", None)
    choices = origin.choices if isinstance(origin, Origin) else {}
    labels = None if labels is None else _usable(labels)
    earlier = _masks_of(origin, dense)
    masks.apply(dense, earlier)  # the weights may have been trained without them
    context = PruningContext(dense, images, labels, choices, latency, masks=earlier)
    with arguments_of(pruner.name):
        decision = plugin.load("pruners", pruner.name).prune(pruner.settings, context)
    pruned = apply_decision(
        dense,
        replace(decision, masks=masks.joined(decision.masks, earlier)),
        images,
        remove_dead=remove_dead,
        group_convolutions=group_convolutions,
        requested=str(pruner),
        held=earlier,
    )
    counts = cost.parameters(dense), cost.nonzero(pruned.model, pruned.masks)
    header = _header(origin, pruned, pruner, images)
    _attach(pruned.model, origin=Origin(header, dict(pruned.masks), {}))
    return PruneResult(
        model=pruned.model,
        masks=dict(pruned.masks),
        differences=dict(pruned.differences),
        notes=dict(decision.notes),
        parameters=counts,
        pruner=str(pruner),
        header=header,
    )


def measure_latency(
    model: nn.Module,
    images: Tensor,
    runtime: RuntimeName = "torch",
    *,
    batch: int = 1,
    threads: int = 1,
    repeats: int = 100,
) -> LatencyTable:
    """Measure a network's layers at several widths on this machine, for latency targets.

    `images` is a batch of inputs, (N, C, H, W); only the shape of one image matters. `batch` is the
    number of images per pass, `repeats` the number of timed passes of whole networks. Write the
    table with its method `save`, and read it with `secateur.load_latency`. Raises SettingsError for
    an invalid argument, SecateurError if the runtime is not installed or the network cannot be
    exported, and PruningError if it cannot be traced.
    """
    from secateur.deploy import layer_times  # takes a while to import

    _check_model(model)
    _check_batch(images)
    _check_values("model", model, images=images)
    _check_precision(images)
    _check_types(model)
    if runtime not in get_args(RuntimeName):
        raise SettingsError(
            f"runtime = {runtime!r}: must be one of {', '.join(get_args(RuntimeName))}"
        )
    for name, value, least in (
        ("batch", batch, 1), ("threads", threads, 1), ("repeats", repeats, 3)
    ):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SettingsError(
                f"{name} = {shorten(value)}: must be a whole number of at least {least}"
            )
    return layer_times.measure(
        in_eval_mode(copied(model)),
        images[:1],
        runtime=runtime,
        batch=batch,
        threads=threads,
        repeats=repeats,
    )


def load_latency(path: str | Path) -> LatencyTable:
    """Read the table written by `measure_latency(...).save` or by the stage `latency`.

    Raises SecateurError naming the file if it is missing or damaged.
    """
    return load_table(Path(path))


def save(result: PruneResult, path: str | Path) -> None:
    """Write a pruned network as one safetensors file, which `load` reads.

    The current weights of `result.model` are written, so it may be finetuned first. Masked weights
    are written as zeros. Raises TypeError for anything but a PruneResult, SettingsError if a mask
    no longer fits its layer, and SecateurError if the file cannot be written, or cannot hold what
    the network's modules store.
    """
    if not isinstance(result, PruneResult):
        raise TypeError(f"result: a {type(result).__name__}; what `prune` returned is needed")
    _check_masks(result)
    checkpoint.save(Path(path), result.header, result.model, result.masks)


def _masks_of(origin: object, model: nn.Module) -> Masks:
    """The masks that the network was pruned with before, if their shapes still fit."""
    if not isinstance(origin, Origin):
        return {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: mask for name, mask in origin.masks.items() if mask.shape == shapes.get(name)}


def _check_masks(result: PruneResult) -> None:
    """Raise SettingsError naming a mask that `result.model` has no tensor for."""
    tensors = result.model.state_dict()
    for name, mask in result.masks.items():
        if bool(mask.all()):
            continue
        cure = f"if the layer is a new one, delete its mask: del result.masks[{name!r}]"
        if (tensor := tensors.get(name)) is None:
            raise SettingsError(f"result: its masks name {name}, which result.model lacks; {cure}")
        if tensor.shape != mask.shape:
            raise SettingsError(
                f"result: the mask of {name} is {tuple(mask.shape)}, but result.model has "
                f"{tuple(tensor.shape)}; {cure}"
            )


def _check_batch(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dim() < 2 or not len(images):
        raise SettingsError("images: a batch of inputs is needed, as a tensor (N, C, H, W)")
    if not images.is_floating_point():
        raise SettingsError(
            f"images: {images.dtype}; normalised floats are needed (model.preprocess makes them)"
        )


def _check_values(argument: str, model: nn.Module, **others: object) -> None:
    """Raise SettingsError for tensors on the meta device, which have shapes but no values."""
    held = [*model.named_parameters(), *model.named_buffers()]
    named = {f"{argument}: {name}": tensor for name, tensor in held}
    for name, tensor in {**named, **others}.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise SettingsError(f"{name}: a tensor on the device meta; one with values is needed")


def _check_network(argument: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        found = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
        raise SettingsError(f"{argument}: {found}; an instance of torch.nn.Module is needed")


def _check_load(into: nn.Module | None, rename: object) -> None:
    """Raise SettingsError naming the first argument of `load` that is not valid."""
    if into is not None:
        _check_network("into", into)
        _check_values("into", into)
    names = [*rename.keys(), *rename.values()] if isinstance(rename, Mapping) else [None]
    if rename is not None and not all(isinstance(name, str) for name in names):
        raise SettingsError(
            f"rename: {shorten(rename)}; a dict of names in the file -> names in the network is "
            "needed"
        )


_WRAPPERS = {
    **{"OptimizedModule": "_orig_mod", "DataParallel": "module"},
    **{"DistributedDataParallel": "module", "FullyShardedDataParallel": "module"},
}
"""Wrapper types -> the submodule with the network; by name, as torch.compile is slow to import."""


def _check_model(model: nn.Module) -> None:
    """Raise SettingsError if it is not a network, PruningError if it cannot be copied."""
    _check_network("model", model)
    if (key := _WRAPPERS.get(type(model).__name__)) in model._modules:
        raise PruningError(
            f"model: {type(model).__name__} wraps a network; pass model.{key} instead"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise PruningError(f"model: {name} has no shape yet; call model(images) once first")
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if not isinstance(value, Tensor):
                continue
            name = f"{path}.{key}".lstrip(".")
            if not {f"{key}_g", f"{key}_orig"}.isdisjoint(module._parameters):
                raise PruningError(
                    f"model: {name} is computed by a hook of torch.nn.utils; remove it first "
                    "(torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove)"
                )
            if not value.is_leaf:
                raise PruningError(
                    f"model: {name} is a result with gradients, which cannot be copied; detach or "
                    "delete it first"
                )


def _check_prune(model: nn.Module, images: Tensor, pruner: Any, labels: Tensor | None) -> None:
    """Raise SettingsError or PruningError naming the first argument that is not valid."""
    _check_model(model)
    _check_batch(images)
    _check_values("model", model, images=images, labels=labels)
    _check_precision(images)
    if not bool(images.isfinite().all()):
        raise SettingsError("images: some values are NaN or infinite")
    if not isinstance(pruner, ConfiguredPruner):
        raise SettingsError(
            "pruner: one with its settings is needed, such as "
            "secateur.pruners.magnitude(ratios=0.5)"
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise SettingsError(f"labels: a {type(labels).__name__}; an int64 tensor (N,) is needed")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
        raise SettingsError(
            f"labels: {labels.dtype} {tuple(labels.shape)}; int64 ({len(images)},) is needed"
        )
    _check_types(model)
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise PruningError(f"model: {name} has entries that are NaN or infinite")


def _check_precision(images: Tensor) -> None:
    """Raise SettingsError unless the images are float32."""
    if images.dtype != torch.float32:
        raise SettingsError(f"images: {images.dtype}; float32 is needed (images.float())")


def _check_types(model: nn.Module) -> None:
    """Raise PruningError naming a parameter that is not float32, if there is one."""
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if not types:
        raise PruningError("model: has no parameters")
    for name, dtype in types.items():
        if not dtype.is_floating_point:
            raise PruningError(f"model: {name} is {dtype}; make it a buffer (register_buffer)")
    for name, dtype in types.items():
        if dtype != torch.float32:
            raise PruningError(f"model: {name} is {dtype}; call model.float() first")


def _check_options(pruner: ConfiguredPruner, latency: object, **switches: object) -> None:
    """Raise SettingsError naming the first of these arguments of `prune` that is not valid."""
    if latency is not None and not isinstance(latency, LatencyTable):
        raise SettingsError(
            f"latency: a {type(latency).__name__}; the table of measure_latency or load_latency is "
            "needed"
        )
    target = getattr(pruner.settings, "target", None)
    if latency is None and isinstance(target, Target) and target.latency is not None:
        raise SettingsError(f"latency: target = {target} needs the table of measure_latency")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise SettingsError(f"{name} = {shorten(value)}: must be True or False")


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was created in inference mode, which autograd does not accept."""
    return tensor.clone() if tensor.is_inference() else tensor


def _header(
    origin: object, pruned: PrunedNetwork, pruner: ConfiguredPruner, images: Tensor
) -> Header:
    """The header of a loaded network, or one without an architecture."""
    reached = {k: v for k, v in pruned.differences.items() if math.isfinite(v)}
    notes = {"asked": str(pruner), "reached": reached}
    shape = list(images.shape[1:])
    if not isinstance(origin, Origin):
        return Header("", {}, [], shape, [], [], split="", stage="prune", notes=notes)
    known = origin.header
    return replace(
        known,
        shape=known.shape or shape,
        stage="prune",
        parent=origin.sha256 or None,
        notes=known.notes | notes,
        versions=machine.versions(),
        layers={},  # those of the network before pruning
    )
