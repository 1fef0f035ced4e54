"""Resize the layers of a network to given tensor shapes, as when a compact network is rebuilt."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from secateur.base.errors import SettingsError
from secateur.nn.attention import free_class
from secateur.nn.layers import IndexedConv2d, Removed
from secateur.sparsity.masks import BatchNorm

SIZE = "size:"
"""Prefix of the name of an attribute that counts channels or heads."""
REMOVED = "removed"
"""Key of `describe_layers` for the modules of removed residual branches."""
LAST = 2
"""Value of this key for the last module of a branch; for the others it is 1."""
_CHANGED = "_secateur_sizes"
"""Attribute of a module with the names and values of its attributes that have changed."""


def resize(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    layers: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Resize every parameter and buffer to the shape that `shapes` has for its name, in place.

    `layers` complements the shapes as returned by `describe_layers`; a convolution that it does not
    name has one group, and any other module keeps its sizes. If `layers` is None, depthwise
    convolutions get as many groups as they have filters, and other convolutions keep their groups.
    The values of resized tensors are lost. Raises ValueError if `shapes` lacks a tensor of the
    model, or has another number of axes for it, or another kernel for a convolution.
    """
    gone = {name: known[REMOVED] for name, known in (layers or {}).items() if REMOVED in known}
    remove_layers(model, gone)
    _insert_indexed(model, layers or {})
    fresh: dict[int, torch.Tensor] = {}  # tensors that several modules share stay shared
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        for path, old in _named_tensors(name, module):
            if path not in shapes:
                raise ValueError(f"{path} is missing")
            shape = tuple(shapes[path])
            if len(shape) != old.dim():
                raise ValueError(f"{path} has {len(shape)} axes, needs {old.dim()}")
            if isinstance(module, nn.Conv2d) and shape[2:] != tuple(old.shape[2:]):
                kernels = (" x ".join(map(str, sizes[2:])) for sizes in (shape, old.shape))
                raise ValueError("{} has a kernel of {}, needs {}".format(path, *kernels))
            if id(old) not in fresh:
                fresh[id(old)] = old if shape == tuple(old.shape) else _empty(shape, old)
            tensors[path] = fresh[id(old)]
    if layers is not None:
        convolutions = (name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
        layers = {
            **layers,
            **{name: {"groups": 1, **layers.get(name, {})} for name in convolutions},
        }
    _assign(model, tensors, layers or {})


def remove_layers(model: nn.Module, modules: Mapping[str, int]) -> None:
    """Replace modules by `layers.Removed`, in place; `LAST` for the last module of its branch.

    A module that has several names is replaced under all of them.
    """
    names = list(model.named_modules(remove_duplicate=False))
    for name, place in modules.items():
        old = model.get_submodule(name)
        made = Removed(place == LAST).train(old.training)
        for other, module in names:
            if module is old:
                model.set_submodule(other, made)


def assign(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, Mapping[str, int]],
) -> None:
    """Replace the network's tensors by `tensors`, without copying, in place.

    `tensors` has all names of `state_dict`, with the same numbers of axes; `layers` has new
    `groups`, as in `resize`. For modules that override or hook the loading of a state dict, that
    loading runs as well.
    """
    _assign(model, tensors, layers)
    for name, module in _outermost(model, _customises_loading):
        start = f"{name}." if name else ""
        own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        load_state(module, own, assign=True)


def load_state(model: nn.Module, tensors: Mapping[str, torch.Tensor], assign: bool = False) -> None:
    """Copy tensors into a network with the same shapes; RuntimeError if they do not fit.

    With `assign`, they replace the network's tensors instead. Unlike `load_state_dict` with a plain
    dictionary, this passes the current version of the state to the modules, and leaves extra states
    that are not tensors as they are.
    """
    own = model.state_dict()
    extra = {name: value for name, value in own.items() if not isinstance(value, torch.Tensor)}
    state = OrderedDict({**extra, **tensors})
    versions = getattr(own, "_metadata", None)
    state._metadata = versions  # type: ignore[attr-defined]  # where torch looks for it
    model.load_state_dict(state, assign=assign)


def describe_layers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Properties of layers that do not follow from the shapes of their tensors, by layer name.

    For convolutions: `groups` if there are several, and the lengths of the indices `before` and
    `after` if they exist (see `layers.IndexedConv2d`). For any module: `size:<attribute>` for
    attributes that count channels or heads and have changed, and `removed` if it is
    `layers.Removed`.
    """
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Removed):
            found[name] = {REMOVED: LAST if module.last else 1}
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            found[name] = {"groups": module.groups}
        if isinstance(module, IndexedConv2d):
            ends = {"before": module.before, "after": module.after}
            lengths = {end: len(index) for end, index in ends.items() if index is not None}
            found[name] = found.get(name, {}) | lengths
        if changed := vars(module).get(_CHANGED):
            found[name] = found.get(name, {}) | {SIZE + key: n for key, n in changed.items()}
    return found


def _insert_indexed(model: nn.Module, layers: Mapping[str, Mapping[str, int]]) -> None:
    """Replace convolutions for which `layers` has indices, in place; values are filled in later."""
    for name, known in layers.items():
        module = model.get_submodule(name) if "before" in known or "after" in known else None
        if isinstance(module, nn.Conv2d) and not isinstance(module, IndexedConv2d):
            indices = [
                torch.zeros(known[end], dtype=torch.int64, device=module.weight.device)
                if end in known
                else None
                for end in ("before", "after")
            ]
            tensors = (
                module.weight.detach(),
                None if module.bias is None else module.bias.detach(),
            )
            made = IndexedConv2d.from_conv(module, *tensors, module.groups, *indices)
            model.set_submodule(name, made)


def reset_parameters(model: nn.Module) -> None:
    """Draw new random weights for every layer in its current shape, in place.

    Inner modules are reset before the modules that contain them, so the `reset_parameters()` of a
    network overrides those of its layers. Raises SettingsError naming a module that has parameters
    but no such method, before anything is changed.
    """
    for name, module in model.named_modules():
        if not _can_reset(module) and next(module.parameters(recurse=False), None) is not None:
            raise SettingsError(
                f"cannot draw new weights for {name or 'the network'} "
                f"({type(module).__name__} has no reset_parameters); finetune.init other "
                "than inherit needs an architecture that can"
            )
    _reset(model)


@torch.no_grad()
def orthogonalise(model: nn.Module) -> None:
    """Draw orthogonal weights for convolutions and linear layers, in place; biases become 0.

    The rows of a weight, flattened to (outputs, inputs x kernel), are orthonormal, or its columns
    if there are fewer of them (A. Saxe, J. McClelland, S. Ganguli, Exact solutions to the nonlinear
    dynamics of learning in deep linear neural networks, ICLR 2014). In grouped convolutions this
    holds for each group. This is the re-initialisation of GReg's code (`--reinit orth`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for part in module.weight.chunk(getattr(module, "groups", 1)):
                nn.init.orthogonal_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _can_reset(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _reset(module: nn.Module) -> None:
    for child in module.children():
        _reset(child)
    if _can_reset(module):
        module.reset_parameters()  # type: ignore[operator]


def _assign(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, Mapping[str, int]],
) -> None:
    """Set the tensors of every module, and update the sizes that modules store as attributes."""
    for module in _around_changed(model, tensors):
        if (free := free_class(module)) is not None:
            module.__class__ = free
    for name, known in layers.items():
        _set_sizes(name, model.get_submodule(name), known)
    for name, module in model.named_modules():
        before = {own: p.shape for own, p in module._parameters.items() if p is not None}
        changed = False
        for path, old in _named_tensors(name, module):
            if (new := tensors[path]) is not old:
                setattr(module, path.removeprefix(f"{name}."), new)
                changed |= new.shape != old.shape
        if changed:
            _update_sizes(module, before, layers.get(name, {}))


def _around_changed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[nn.Module]:
    """Modules in which a tensor, or a tensor of one of their submodules, gets another shape."""
    inside: set[str] = set()
    for name, module in model.named_modules():
        if any(tensors[path].shape != old.shape for path, old in _named_tensors(name, module)):
            parts = name.split(".")
            inside |= {".".join(parts[:count]) for count in range(len(parts) + 1)}
    return [module for name, module in model.named_modules() if name in inside]


def _set_sizes(name: str, module: nn.Module, known: Mapping[str, int]) -> None:
    """Set attributes that count channels or heads.

    Raises ValueError for an attribute that the module lacks, or that would grow.
    """
    changed = dict(vars(module).get(_CHANGED, {}))
    for key, size in known.items():
        if not key.startswith(SIZE):
            continue
        key = key.removeprefix(SIZE)
        before = vars(module).get(key)
        if type(before) is not int or not 1 <= size <= before:
            raise ValueError(f"{name} has no size {key} of {size} or more")
        setattr(module, key, size)
        changed[key] = size
    if changed:
        vars(module)[_CHANGED] = changed


def _outermost(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> list[tuple[str, nn.Module]]:
    """Modules for which `wanted` is true, with names, but not modules inside such a module."""
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside and wanted(module):
            found.append((name, module))
            inside.update(module.modules())
    return found


def _customises_loading(module: nn.Module) -> bool:
    """Whether a module hooks the loading of its state dict, or overrides it outside of torch.nn."""
    overridden = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(hooks) or (overridden and not type(module).__module__.startswith("torch.nn."))


def _named_tensors(name: str, module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own parameters and persistent buffers, with their full names."""
    unsaved = module._non_persistent_buffers_set  # these keep the values that the code gives them
    buffers = {key: tensor for key, tensor in module._buffers.items() if key not in unsaved}
    own: dict[str, torch.Tensor | None] = {**module._parameters, **buffers}
    start = f"{name}." if name else ""
    return [(start + key, tensor) for key, tensor in own.items() if tensor is not None]


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
    return nn.Parameter(fresh, like.requires_grad) if isinstance(like, nn.Parameter) else fresh


def _update_sizes(
    module: nn.Module, before: Mapping[str, torch.Size], known: Mapping[str, int]
) -> None:
    """Set attributes such as `out_channels` according to the shapes of the module's tensors.

    `before` has the previous shapes of its parameters. Modules that are not from torch are assumed
    to have no such attributes. Raises ValueError for an unknown layer of torch.
    """
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        filters, inputs = before["weight"][:2]
        if inputs == 1 and module.groups > 1:  # depthwise
            module.groups = module.weight.shape[0] * module.groups // filters
        module.groups = known.get("groups", module.groups)
        module.out_channels, module.in_channels = module.weight.shape[:2]
        module.in_channels *= module.groups
    elif isinstance(module, BatchNorm | nn.InstanceNorm2d):
        tensor = module.running_mean if module.weight is None else module.weight
        assert tensor is not None
        module.num_features = tensor.numel()
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = module.weight.numel()
        module.num_channels = module.weight.numel()
    elif isinstance(module, nn.MultiheadAttention):
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.ParameterList | nn.ParameterDict):
        pass  # has no size attributes
    elif type(module).__module__.startswith("torch.nn."):
        raise ValueError(f"do not know how to resize a {type(module).__name__}")
