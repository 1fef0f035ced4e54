"""Make the layers of a network as small as given tensors: how compact networks are rebuilt."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.base.errors import SettingsError
from secateur.nn.layers import IndexedConv2d


def resize(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    layers: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Give every parameter and buffer named in `shapes` that shape, in place.

    `layers` has what shapes do not tell, as `describe` gives it: a convolution that it does not name
    has one group. Without it depthwise convolutions get as many groups as they have filters, and
    other convolutions keep the groups they have.
    Values of resized tensors are lost. Raises ValueError if a tensor's number of axes differs,
    or if a parameter of the model is not named.
    """
    _index(model, layers or {})
    fresh: dict[int, torch.Tensor] = {}  # what stands in several places still does
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        for path, old in _named_tensors(name, module):
            if path not in shapes:
                raise ValueError(f"{path} is missing")
            shape = tuple(shapes[path])
            if len(shape) != old.dim():
                raise ValueError(f"{path} has {len(shape)} axes, needs {old.dim()}")
            if id(old) not in fresh:
                fresh[id(old)] = old if shape == tuple(old.shape) else _empty(shape, old)
            tensors[path] = fresh[id(old)]
    if layers is not None:
        convolutions = (name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
        layers = {name: {"groups": 1, **layers.get(name, {})} for name in convolutions}
    _place(model, tensors, layers or {})


def put(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, Mapping[str, int]],
) -> None:
    """Make given tensors the network's own, of other sizes along the same axes, in place.

    `tensors` has all that `state_dict` has; `layers` has new `groups`, as in `resize`. Modules with
    code of their own that runs when tensors are loaded hear of it.
    """
    _place(model, tensors, layers)
    if any(map(_listens, model.modules())):  # costs as much as all the rest
        load(model, tensors, assign=True)


def load(model: nn.Module, tensors: Mapping[str, torch.Tensor], assign: bool = False) -> None:
    """Copy tensors into a network of their shapes; RuntimeError if they do not fit.

    With `assign` they become the network's own, in place of copies. Unlike load_state_dict alone,
    it also works for modules that ask which version wrote a tensor: it is the present one.
    """
    versions = getattr(model.state_dict(), "_metadata", None)
    state = OrderedDict(tensors)
    state._metadata = versions  # type: ignore[attr-defined]  # where torch looks for it
    model.load_state_dict(state, assign=assign)


def describe(model: nn.Module) -> dict[str, dict[str, int]]:
    """What the shapes of a network's tensors do not tell, by layer.

    Of convolutions: `groups` if there are several, and the lengths of the indices `before` and
    `after`, if they have them.
    """
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            found[name] = {"groups": module.groups}
        if isinstance(module, IndexedConv2d):
            ends = {"before": module.before, "after": module.after}
            lengths = {end: len(index) for end, index in ends.items() if index is not None}
            found[name] = found.get(name, {}) | lengths
    return found


def _index(model: nn.Module, layers: Mapping[str, Mapping[str, int]]) -> None:
    """Put convolutions with indices where `layers` has them, in place; values come later."""
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
            made = IndexedConv2d.of(module, *tensors, module.groups, *indices)
            model.set_submodule(name, made)


def reset(model: nn.Module) -> None:
    """New random weights for every layer, in the shape it has now, in place.

    Layers draw first, then the modules that hold them, so that a network with a
    `reset_parameters()` of its own has the last word. Raises SettingsError naming a module that
    holds parameters and cannot draw them, before anything is changed.
    """
    for name, module in model.named_modules():
        if not _can_draw(module) and next(module.parameters(recurse=False), None) is not None:
            raise SettingsError(
                f"cannot draw new weights for {name or 'the network'} "
                f"({type(module).__name__} has no reset_parameters); finetune.init = scratch "
                "needs an architecture that can"
            )
    _draw(model)


def _can_draw(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _draw(module: nn.Module) -> None:
    for child in module.children():
        _draw(child)
    if _can_draw(module):
        module.reset_parameters()  # type: ignore[operator]


def _place(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, Mapping[str, int]],
) -> None:
    for name, module in model.named_modules():
        before = {own: p.shape for own, p in module.named_parameters(recurse=False)}
        changed = False
        for path, old in _named_tensors(name, module):
            if (new := tensors[path]) is not old:
                setattr(module, path.removeprefix(f"{name}."), new)
                changed |= new.shape != old.shape
        if changed:
            _describe(module, before, layers.get(name, {}))


def _listens(module: nn.Module) -> bool:
    """Whether anybody but torch wants to know when its tensors are loaded."""
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(hooks) or (own and not type(module).__module__.startswith("torch.nn."))


def _named_tensors(name: str, module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's own, with their whole names; not the buffers that checkpoints do not have."""
    own: list[tuple[str, torch.Tensor]] = [*module.named_parameters(recurse=False)]
    for key, buffer in module.named_buffers(recurse=False):
        if key not in module._non_persistent_buffers_set:  # those stay as the code makes them
            own.append((key, buffer))
    return [(f"{name}.{key}" if name else key, tensor) for key, tensor in own]


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
    return nn.Parameter(fresh, like.requires_grad) if isinstance(like, nn.Parameter) else fresh


def _describe(
    module: nn.Module, before: Mapping[str, torch.Size], known: Mapping[str, int]
) -> None:
    """Bring a layer's own account of its sizes in line with its tensors.

    `before` has the shapes that its parameters had. Modules that are not torch's keep no account.
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
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.InstanceNorm2d):
        tensor = module.running_mean if module.weight is None else module.weight
        assert tensor is not None
        module.num_features = tensor.numel()
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = module.weight.numel()
        module.num_channels = module.weight.numel()
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif type(module).__module__.startswith("torch.nn."):
        raise ValueError(f"do not know how to resize a {type(module).__name__}")
