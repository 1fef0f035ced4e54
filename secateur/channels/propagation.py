"""Propagates channel ids through a network: the id of every entry of every tensor.

A layer with weights makes new ids, one for each of its outputs. Operations that move entries
(views, permutations, concatenations, padding) move their ids alike. Everything else is reported to
a `Visitor`: which layer reads which ids, which ids are added, and which cannot be removed because
an operation mixes them.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional

from secateur.base.errors import PruningError
from secateur.nn.layers import ChannelSelect
from secateur.sparsity.masks import LAYERS

ZERO = -1  # the atom of entries that are zero whatever happens
BATCH = 2  # images that are walked with, so that batch and channels are never mistaken

ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.SiLU),
    *(nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.LogSigmoid, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout),
)
POOLING = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
    *(nn.Upsample, nn.ReflectionPad2d, nn.ReplicationPad2d),
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)
ZERO_PADS = (nn.ZeroPad2d, nn.ZeroPad3d)
_LEAVES = (*LAYERS, *BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)

UNARY = frozenset({
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "hardtanh", "hardtanh_", "hardswish"),
    *("hardsigmoid", "gelu", "silu", "sigmoid", "sigmoid_", "tanh", "tanh_", "elu", "elu_", "selu"),
    *("celu", "mish", "softplus", "softsign", "logsigmoid", "dropout", "dropout1d", "dropout2d"),
    *("alpha_dropout", "feature_dropout", "stochastic_depth", "drop_path", "contiguous", "clone"),
    *("detach", "float", "double", "half", "bfloat16", "to", "type_as", "neg", "abs", "exp", "log"),
    *("sqrt", "rsqrt", "square", "pow", "clamp", "clamp_min", "clamp_max", "clip", "identity"),
    *("zeros_like", "ones_like"),
})  # fmt: skip
"""Functions and methods that give every entry by itself, whatever the others are."""
BINARY = frozenset({
    *("add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "multiply", "truediv"),
    *("div", "div_", "itruediv", "maximum", "minimum"),
})  # fmt: skip
"""Functions and methods that join two tensors entry by entry."""
_POOLS = frozenset({
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "lp_pool2d"),
    "interpolate",
})  # fmt: skip


class TracedSize(int):
    """A size that was read from a tensor: it follows when the tensor gets smaller."""


def _sized(name: str) -> None:
    plain = getattr(int, name)

    def wrapped(self: int, *others: Any) -> Any:
        result = plain(self, *others)
        return TracedSize(result) if isinstance(result, int) else result

    setattr(TracedSize, name, wrapped)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "neg"):
    _sized(f"__{_name}__")


@dataclass(frozen=True)
class ChannelIds:
    """The atom of every entry of a tensor."""

    ids: Tensor
    """int64; one entry where an axis holds the same throughout, else as long as the tensor."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, ids: Tensor) -> "ChannelIds":
        """From one number for every entry."""
        shape = tuple(ids.shape)
        for axis, size in enumerate(shape):
            if size > 1:
                first = ids.narrow(axis, 0, 1)
                if ids.stride(axis) == 0 or bool((ids == first).all()):
                    ids = first
        return cls(ids, shape)

    @classmethod
    def along(cls, axis: int, ids: Tensor, shape: Sequence[int]) -> "ChannelIds":
        """The same for all positions of the other axes."""
        form = [1] * len(shape)
        form[axis] = -1
        return cls(ids.reshape(form), tuple(shape))

    def full(self) -> Tensor:
        """One number for every entry."""
        return self.ids.expand(self.shape)

    def varies(self, axis: int) -> bool:
        """Whether channels differ along this axis."""
        return self.ids.shape[axis] > 1

    def line(self, axis: int) -> Tensor:
        """The ids along one axis, (size,); PruningError if other axes matter too."""
        axis %= len(self.shape)
        if any(self.varies(other) for other in range(len(self.shape)) if other != axis):
            raise PruningError(f"channels stand along other axes than {axis} as well")
        return self.ids.flatten().expand(self.shape[axis])


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer of the network, as the code names it."""

    name: str
    tensor: Tensor


class Visitor(Protocol):
    """What a walk tells."""

    def fixed(self, count: int, reason: str) -> Tensor:
        """Atoms of the network's input, or of something else that cannot become smaller."""

    def layer(
        self, name: str, weight: NamedTensor, bias: NamedTensor | None, into: Tensor, groups: int
    ) -> Tensor:
        """A convolution or linear layer reads `into`; gives the ids of its outputs."""

    def norm(self, held: Sequence[NamedTensor], kind: str, into: Tensor) -> None:
        """Tensors with one entry for every channel meet the channels."""

    def parameter(self, held: NamedTensor) -> Tensor:
        """Atoms of a tensor that is added or multiplied, one for every entry."""

    def select(self, index: NamedTensor, into: Tensor, owns_channels: bool) -> Tensor:
        """Channels by number; with `owns_channels` the positions are ids of their own."""

    def meet(self, a: Tensor, b: Tensor) -> None:
        """Entries of two tensors are added or multiplied."""

    def lock(self, ids: Tensor, reason: str) -> None:
        """These ids cannot be taken away."""

    def balance(self, where: str, parts: Sequence[Tensor]) -> None:
        """As many ids must be left in each part as in any other."""


class _Tracer(fx.Tracer):
    """Stops at our own layers, and at known ones that were only given another name."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ChannelSelect) or super().is_leaf_module(m, module_qualified_name):
            return True
        return isinstance(m, _LEAVES) and type(m).__mro__[1] in _LEAVES and not _own_methods(m)


def _own_methods(module: nn.Module) -> bool:
    return any(callable(v) and k != "__init__" for k, v in vars(type(module)).items())


def trace(model: nn.Module) -> fx.Graph:
    """The operations of the network in eval mode; PruningError saying why it cannot be traced."""
    training = {m: m.training for m in model.modules()}
    try:
        try:  # buffers as such, so that it is seen where the code uses them
            return _Tracer(buffers=True).trace(model.eval())
        except Exception:  # unless it looks into them
            return _Tracer(buffers=False).trace(model)
    except Exception as error:  # what the tracer raises depends on what it stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PruningError(f"cannot follow {type(model).__name__}: {reason}") from None
    finally:
        for module, mode in training.items():
            module.training = mode


class Propagation:
    """One walk through a traced network; it computes shapes and ids, never activations."""

    def __init__(
        self,
        model: nn.Module,
        fx_graph: fx.Graph,
        visitor: Visitor,
        spread: dict[str, tuple[bool, bool]] | None = None,
    ) -> None:
        self.model, self.fx_graph, self.visitor = model, fx_graph, visitor
        self.spread = {} if spread is None else spread
        """Operation -> whether its first and its second operand meet all channels of the other;
        once a single channel is left, that can no longer be seen."""
        self.modules = dict(model.named_modules())
        self.names = {
            id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        self.dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())

    @torch.no_grad()
    def run(self, shape: Sequence[int]) -> None:
        """Walk with images of this shape: (channels, height, width), or (features,)."""
        values: dict[fx.Node, Any] = {}
        for node in self.fx_graph.nodes:
            try:
                arguments = map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = self._node(node, arguments[0], arguments[1], shape)
            except PruningError as error:
                raise PruningError(f"{_place(node)}: {error}") from None
            except Exception as error:  # shapes that do not fit, arguments of an unknown form
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise PruningError(f"{_place(node)}: {reason}") from None

    def _node(self, node: fx.Node, args: Any, kwargs: Any, shape: Sequence[int]) -> Any:
        if node.op == "placeholder":
            return self._input(node, args, shape)
        if node.op == "output":
            map_aggregate(args, lambda v: self._lock(v, "an output of the network"))
            return None
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return self._module(str(node.target), module, *args, **kwargs)
        followed: list[Any] = []
        map_aggregate((args, kwargs), followed.append)
        if node.target is operator.getitem and isinstance(
            args[0], list | tuple
        ):  # of what a split gave
            return args[0][args[1]]
        if not any(isinstance(v, ChannelIds | NamedTensor) for v in followed):
            return _known(_plain(node, args, kwargs), self.visitor)
        name, module_name = str(node.target), "torch"
        if callable(node.target):
            name = getattr(node.target, "__name__", name)
            module_name = getattr(node.target, "__module__", None) or "torch"
        if module_name.split(".")[0] not in ("torch", "_operator", "torchvision", "builtins"):
            raise PruningError(f"do not know what {module_name}.{name} does to channels")
        return self._call(name, node.name, *args, **kwargs)

    def _input(self, node: fx.Node, args: Any, shape: Sequence[int]) -> Any:
        if args:
            return args[0]
        if any(n.op == "placeholder" and n is not node and not n.args for n in self.fx_graph.nodes):
            raise PruningError("the network has more than one input")
        ids = self.visitor.fixed(shape[0], "an input of the network")
        return ChannelIds.along(1, ids, (BATCH, *shape))

    def _attribute(self, name: str) -> Any:
        value: Any = self.model
        for part in name.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            return value
        return float(value) if value.numel() == 1 and value.dim() == 0 else self._held(name, value)

    def _held(self, name: str, tensor: Tensor) -> NamedTensor:
        return NamedTensor(self.names.get(id(tensor), name), tensor)

    def _lock(self, value: Any, reason: str) -> Any:
        if isinstance(value, ChannelIds):
            self.visitor.lock(value.ids.flatten(), reason)
        return value

    def _opaque(self, shape: Sequence[int], reason: str) -> ChannelIds:
        """A tensor in which channels are no longer told apart."""
        atom = self.visitor.fixed(1, reason)
        return ChannelIds(atom.reshape([1] * len(shape)), tuple(shape))

    # ---- modules -----------------------------------------------------------------------------

    def _module(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        own = {k: self._held(f"{name}.{k}", t) for k, t in module.named_parameters(recurse=False)}
        own |= {k: self._held(f"{name}.{k}", t) for k, t in module.named_buffers(recurse=False)}
        if isinstance(x, NamedTensor):
            x = self._elements(x)
        if not isinstance(x, ChannelIds):
            raise PruningError("its input holds no channels")
        if isinstance(module, nn.Conv2d):
            sizes = (module.stride, module.padding, module.dilation, module.groups)
            return self._conv(x, own["weight"], own.get("bias"), *sizes)
        if isinstance(module, nn.Linear):
            return self._linear(x, own["weight"], own.get("bias"))
        if isinstance(module, ChannelSelect):
            ids = self.visitor.select(own["index"], x.line(1), owns_channels=True)
            return ChannelIds.along(1, ids, (x.shape[0], len(ids), *x.shape[2:]))
        if isinstance(module, BATCH_NORMS):
            return self._batch_norm(x, *(own.get(k) for k in _NORM_TENSORS))
        if isinstance(module, nn.LayerNorm):
            return self._layer_norm(x, module.normalized_shape, own.get("weight"), own.get("bias"))
        if isinstance(module, nn.GroupNorm):
            return self._group_norm(x, module.num_groups, own.get("weight"), own.get("bias"))
        if isinstance(module, nn.PReLU):
            return self._prelu(x, own["weight"])
        if isinstance(module, ELEMENTWISE):
            return x
        if isinstance(module, POOLING):
            return self._pool(x, module)
        if isinstance(module, ZERO_PADS):
            return self._pad(x, module.padding)
        if isinstance(module, nn.Flatten):
            return self._flatten(x, module.start_dim, module.end_dim)
        if isinstance(module, nn.Softmax | nn.LogSoftmax):
            return self._softmax(x, module.dim)
        if isinstance(module, nn.ChannelShuffle):
            return self._shuffle(name, x, module.groups)
        raise PruningError(f"do not know what a {type(module).__name__} does to channels")

    def _conv(
        self, x: ChannelIds, weight: NamedTensor, bias: NamedTensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> ChannelIds:  # fmt: skip
        name = weight.name.removesuffix(".weight")
        owner = self.modules.get(name)
        if groups > 1 and not isinstance(owner, nn.Conv2d):
            self._lock(x, f"read by {name}, whose groups stand in the code")
        into = x.line(1)
        out = self.visitor.layer(name, weight, bias, into, groups)
        kernel = weight.tensor.shape[2:]
        side = [
            _side(size, kernel[k], _each(stride, k), _each(padding, k), _each(dilation, k))
            for k, size in enumerate(x.shape[2:])
        ]
        return ChannelIds.along(1, out, (x.shape[0], len(out), *side))

    def _linear(
        self, x: ChannelIds, weight: NamedTensor, bias: NamedTensor | None = None
    ) -> ChannelIds:
        name = weight.name.removesuffix(".weight")
        out = self.visitor.layer(name, weight, bias, x.line(-1), 1)
        return ChannelIds.along(len(x.shape) - 1, out, (*x.shape[:-1], len(out)))

    def _batch_norm(self, x: ChannelIds, *tensors: NamedTensor | None) -> ChannelIds:
        weight, bias, *statistics = tensors
        into = x.line(1)
        self.visitor.norm([h for h in (weight, bias) if h], "norm", into)
        self.visitor.norm([h for h in statistics if h], "statistic", into)
        return x

    def _layer_norm(
        self,
        x: ChannelIds,
        shape: Sequence[int],
        weight: NamedTensor | None = None,
        bias: NamedTensor | None = None,
    ) -> ChannelIds:
        if any(x.varies(len(x.shape) - 1 - k) for k in range(len(shape))):
            where = f" by {weight.name.removesuffix('.weight')}" if weight else ""
            self._lock(x, f"normalised together with all channels{where} (LayerNorm)")
        if len(shape) == 1:
            self.visitor.norm([h for h in (weight, bias) if h], "norm", x.line(-1))
        return x

    def _group_norm(
        self,
        x: ChannelIds,
        groups: int,
        weight: NamedTensor | None = None,
        bias: NamedTensor | None = None,
    ) -> ChannelIds:
        name = weight.name.removesuffix(".weight") if weight else ""
        if groups != x.shape[1] or not isinstance(self.modules.get(name), nn.GroupNorm):
            self._lock(x, f"normalised together with other channels by {name or 'GroupNorm'}")
        self.visitor.norm([h for h in (weight, bias) if h], "norm", x.line(1))
        return x

    def _prelu(self, x: ChannelIds, weight: NamedTensor) -> ChannelIds:
        if weight.tensor.numel() > 1:
            self.visitor.norm([weight], "scale", x.line(1))
        return x

    def _pool(self, x: ChannelIds, pool: Callable[..., Any]) -> ChannelIds:
        out = pool(torch.zeros(1, 1, *x.shape[2:]))
        if not isinstance(out, Tensor):
            raise PruningError("gives more than one tensor")
        shape = (*x.shape[:2], *out.shape[2:])
        if x.varies(len(x.shape) - 1) or x.varies(len(x.shape) - 2):
            self._lock(x, "pooled together with other channels")
            return self._opaque(shape, "pooled from several channels")
        return ChannelIds(x.ids, shape)

    # ---- functions and methods ---------------------------------------------------------------

    def _call(self, name: str, node: str, *args: Any, **kwargs: Any) -> Any:
        if name in BINARY and len(args) > 1:
            return self._binary(node, args[0], args[1])
        weighted = {"conv2d": self._conv, "linear": self._linear, "layer_norm": self._layer_norm}
        if name in weighted or name in ("batch_norm", "group_norm", "prelu"):
            return self._functional(name, weighted, args, kwargs)
        if name in ("cat", "concat", "concatenate"):
            return self._cat(*args, **kwargs)
        x = self._elements(args[0]) if isinstance(args[0], NamedTensor) else args[0]
        rest = args[1:]
        if not isinstance(x, ChannelIds):
            raise PruningError(f"do not know what {name} does to channels")
        if name in UNARY:
            return x
        if name in _POOLS:
            function: Any = getattr(functional, name)
            return self._pool(x, lambda t: function(t, *rest, **kwargs))
        own = getattr(self, f"_op_{name}", None)
        if own is None:
            raise PruningError(f"do not know what {name} does to channels")
        return own(node, x, *rest, **kwargs)

    def _functional(
        self, name: str, weighted: dict[str, Any], args: Any, kwargs: Any
    ) -> ChannelIds:
        held = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, ChannelIds)]
        if held or not isinstance(args[0], ChannelIds):
            raise PruningError(f"{name} with weights that are computed on the way")
        if name == "batch_norm":
            order = ("running_mean", "running_var", "weight", "bias")
            given = dict(zip(order, args[1:5], strict=False)) | kwargs
            return self._batch_norm(args[0], *(given.get(k) for k in _NORM_TENSORS))
        if name in ("layer_norm", "group_norm"):
            kwargs = {k: v for k, v in kwargs.items() if k != "eps"}
            run = self._layer_norm if name == "layer_norm" else self._group_norm
            return run(*args[:4], **kwargs)
        if name == "prelu":
            return self._prelu(*args, **kwargs)
        return weighted[name](*args, **kwargs)

    def _elements(self, held: NamedTensor) -> ChannelIds:
        return ChannelIds.of(self.visitor.parameter(held))

    def _binary(self, node: str, a: Any, b: Any) -> Any:
        sides = [self._elements(v) if isinstance(v, NamedTensor) and v.tensor.numel() > 1 else v
                 for v in (a, b)]  # fmt: skip
        both = [v for v in sides if isinstance(v, ChannelIds)]
        if len(both) == 1:
            return both[0]
        if not both:
            return a
        shape = torch.broadcast_shapes(both[0].shape, both[1].shape)
        x, y = (v.ids.reshape([1] * (len(shape) - v.ids.dim()) + list(v.ids.shape)) for v in both)
        sizes = [(1,) * (len(shape) - len(v.shape)) + tuple(v.shape) for v in both]
        first, second = (
            any(mine[k] == 1 and other.shape[k] > 1 for k in range(len(shape)))
            for mine, other in ((sizes[0], y), (sizes[1], x))
        )
        spread = self.spread.setdefault(node, (first, second))
        for wide, ids in zip(spread, (x, y), strict=True):
            if wide:
                self.visitor.lock(ids.flatten(), "meets every channel of another tensor at once")
        if all(spread):
            return self._opaque(shape, "an outer product of channels")
        if any(spread):
            return ChannelIds(y if spread[0] else x, tuple(shape))
        if x.numel() > y.numel():  # a parameter with an entry for every position, perhaps
            x, y = y, x
        x, y = torch.broadcast_tensors(x, y)
        self.visitor.meet(x.flatten(), y.flatten())
        return ChannelIds(ChannelIds.of(torch.where(x >= 0, x, y)).ids, tuple(shape))

    def _cat(self, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> ChannelIds:
        parts = [self._elements(t) if isinstance(t, NamedTensor) else t for t in tensors]
        if not all(isinstance(p, ChannelIds) for p in parts):
            raise PruningError("joins channels with something that is none")
        dim = (dim if axis is None else axis) % len(parts[0].shape)
        ids = []
        for part in parts:
            form = [
                part.shape[k] if k == dim or any(p.varies(k) for p in parts) else 1
                for k in range(len(part.shape))
            ]
            ids.append(part.ids.expand(form))
        shape = list(parts[0].shape)
        shape[dim] = sum(p.shape[dim] for p in parts)
        for part in parts:
            rest = [
                (s, t) for k, (s, t) in enumerate(zip(part.shape, shape, strict=True)) if k != dim
            ]
            if any(s != t for s, t in rest):
                raise PruningError(f"sizes {tuple(part.shape)} do not fit")
        return ChannelIds(torch.cat(ids, dim), tuple(shape))

    def _pad(
        self, x: ChannelIds, pad: Sequence[int], mode: str = "constant", value: Any = None
    ) -> ChannelIds:
        ids, shape = x.ids, list(x.shape)
        for k in range(len(pad) // 2):
            axis, (before, after) = len(shape) - 1 - k, pad[2 * k : 2 * k + 2]
            shape[axis] += before + after
            if not (x.varies(axis) or axis == 1) or before == after == 0:
                continue
            if mode != "constant" or value not in (None, 0, 0.0) or min(before, after) < 0:
                self._lock(x, "padded among the channels with something else than zeros")
                return self._opaque(shape, "padded among the channels")
            if ids.shape[axis] == 1:
                ids = ids.expand([x.shape[i] if i == axis else n for i, n in enumerate(ids.shape)])
            width = [0, 0] * (ids.dim() - 1 - axis) + [before, after]
            ids = functional.pad(ids, width, value=ZERO)
        return ChannelIds(ids, tuple(shape))

    def _op_pad(
        self, _: str, x: ChannelIds, pad: Sequence[int], *args: Any, **kwargs: Any
    ) -> ChannelIds:
        return self._pad(x, pad, *args, **kwargs)

    def _flatten(self, x: ChannelIds, start: int = 0, end: int = -1) -> ChannelIds:
        return ChannelIds.of(torch.flatten(x.full(), start, end))

    def _op_flatten(
        self, _: str, x: ChannelIds, start_dim: int = 0, end_dim: int = -1
    ) -> ChannelIds:
        return self._flatten(x, start_dim, end_dim)

    def _softmax(self, x: ChannelIds, dim: int | None) -> ChannelIds:
        if dim is None or x.varies(dim):
            self._lock(x, "weighed against other channels (softmax)")
        return x

    def _op_softmax(self, _: str, x: ChannelIds, dim: int | None = None, **__: Any) -> ChannelIds:
        return self._softmax(x, dim)

    _op_log_softmax = _op_softmax

    def _shuffle(self, node: str, x: ChannelIds, groups: int) -> ChannelIds:
        count, size = x.shape[:2]
        split = self._view(
            node, x, (count, groups, TracedSize(size // groups), *map(TracedSize, x.shape[2:]))
        )
        turned = ChannelIds(
            split.ids.transpose(1, 2), (count, size // groups, groups, *x.shape[2:])
        )
        return self._view(node, turned, (count, TracedSize(size), *map(TracedSize, x.shape[2:])))

    def _op_channel_shuffle(self, node: str, x: ChannelIds, groups: int) -> ChannelIds:
        return self._shuffle(node, x, groups)

    def _view(self, node: str, x: ChannelIds, shape: Sequence[int]) -> ChannelIds:
        out = ChannelIds.of(x.full().reshape(tuple(shape)))
        fixed = [
            axis
            for axis, size in enumerate(shape)
            if out.varies(axis) and size != -1 and not isinstance(size, TracedSize)
        ]
        follows = any(out.varies(axis) for axis in range(len(shape)) if axis not in fixed)
        if fixed and not follows:
            self._lock(x, f"{node} views them in a shape that stands in the code")
        elif fixed:
            parts = out.ids.movedim(fixed, tuple(range(len(fixed))))
            self.visitor.balance(node, list(parts.flatten(0, len(fixed) - 1).flatten(1)))
        return out

    def _op_view(self, node: str, x: ChannelIds, *shape: Any) -> ChannelIds:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        return self._view(node, x, sizes)

    _op_reshape = _op_view

    def _op_unflatten(self, node: str, x: ChannelIds, dim: int, sizes: Sequence[int]) -> ChannelIds:
        dim %= len(x.shape)
        others = [TracedSize(s) for s in x.shape]
        return self._view(node, x, (*others[:dim], *sizes, *others[dim + 1 :]))

    def _op_permute(self, _: str, x: ChannelIds, *dims: Any) -> ChannelIds:
        order = dims[0] if isinstance(dims[0], tuple | list) else dims
        return ChannelIds(x.ids.permute(order), tuple(x.shape[k] for k in order))

    def _op_transpose(self, _: str, x: ChannelIds, a: int, b: int) -> ChannelIds:
        return ChannelIds.of(x.full().transpose(a, b))

    def _op_squeeze(self, _: str, x: ChannelIds, *dims: Any) -> ChannelIds:
        return ChannelIds.of(x.full().squeeze(*dims))

    def _op_unsqueeze(self, _: str, x: ChannelIds, dim: int) -> ChannelIds:
        return ChannelIds.of(x.full().unsqueeze(dim))

    def _op_expand_as(self, _: str, x: ChannelIds, other: ChannelIds) -> ChannelIds:
        return ChannelIds.of(x.full().expand(other.shape))

    def _op_size(self, _: str, x: ChannelIds, dim: int | None = None) -> Any:
        sizes = tuple(TracedSize(s) for s in x.shape)
        return sizes if dim is None else sizes[dim]

    def _op_new_zeros(self, _: str, x: ChannelIds, *size: Any, **__: Any) -> ChannelIds:
        shape = size[0] if isinstance(size[0], tuple | list) else size
        return ChannelIds(torch.full([1] * len(shape), ZERO), tuple(shape))

    def _op_dim(self, _: str, x: ChannelIds) -> int:
        return len(x.shape)

    def _op_getattr(self, _: str, x: ChannelIds, name: str) -> Any:
        known = {"shape": tuple(TracedSize(s) for s in x.shape), "ndim": len(x.shape)}
        known |= {"dtype": self.dtype, "device": torch.device("cpu")}
        if name not in known:
            raise PruningError(f"do not know what .{name} does to channels")
        return known[name]

    def _op_chunk(self, node: str, x: ChannelIds, chunks: int, dim: int = 0) -> list[ChannelIds]:
        parts = x.full().chunk(chunks, dim)
        if x.varies(dim):
            self.visitor.balance(node, [ChannelIds.of(p).ids.flatten() for p in parts])
        return [ChannelIds.of(p) for p in parts]

    def _op_split(self, node: str, x: ChannelIds, size: Any, dim: int = 0) -> list[ChannelIds]:
        parts = x.full().split(size, dim)
        if x.varies(dim) and isinstance(size, TracedSize):
            self.visitor.balance(node, [ChannelIds.of(p).ids.flatten() for p in parts])
        elif x.varies(dim):
            self._lock(x, f"{node} splits them where the code says")
        return [ChannelIds.of(p) for p in parts]

    def _op_mean(
        self, node: str, x: ChannelIds, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> ChannelIds:
        axes = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
        axes = sorted(k % len(x.shape) for k in axes)
        shape = [1 if k in axes else s for k, s in enumerate(x.shape)]
        left = [s for k, s in enumerate(x.shape) if k not in axes]
        if any(x.varies(k) for k in axes):
            self._lock(x, f"{node} sums over them")
            return self._opaque(shape if keepdim else left, "made of several channels")
        ids = (
            x.ids
            if keepdim
            else x.ids.reshape([s for k, s in enumerate(x.ids.shape) if k not in axes])
        )
        return ChannelIds(ids, tuple(shape if keepdim else left))

    _op_sum = _op_amax = _op_amin = _op_mean

    def _op_index_select(self, _: str, x: ChannelIds, dim: int, index: Any) -> ChannelIds:
        return self._index(x, dim % len(x.shape), index)

    def _index(self, x: ChannelIds, dim: int, index: Any) -> ChannelIds:
        if isinstance(index, NamedTensor) and (x.varies(dim) or x.shape[dim] == 1):
            ids = self.visitor.select(index, x.line(dim), owns_channels=False)
            shape = [len(ids) if k == dim else s for k, s in enumerate(x.shape)]
            return ChannelIds.along(dim, ids, shape)
        self._lock(x, "chosen by numbers that stand in the code")
        where = index.tensor if isinstance(index, NamedTensor) else torch.as_tensor(index)
        return ChannelIds.of(x.full().index_select(dim, where.cpu()))

    def _op_getitem(self, node: str, x: ChannelIds, index: Any) -> ChannelIds:
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [p for p in parts if not isinstance(p, NamedTensor | list | ChannelIds)]:
            at = next(k for k, p in enumerate(parts) if p is Ellipsis)
            missing = len(x.shape) - sum(p is not None for p in parts) + 1
            parts[at : at + 1] = [slice(None)] * missing
        axis = 0
        for part in parts:
            if part is None:
                continue
            if isinstance(part, NamedTensor | list):
                if sum(isinstance(p, slice) and p == slice(None) for p in parts) != len(parts) - 1:
                    raise PruningError("do not know what this index does to channels")
                return self._index(x, axis, part)
            if x.varies(axis) and part != slice(None):
                self._lock(x, f"{node} takes some of them, by numbers that stand in the code")
            axis += 1
        return ChannelIds.of(x.full()[tuple(parts)])


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _each(value: Any, axis: int) -> Any:
    """Of what is given once, or for every axis."""
    return value[axis] if isinstance(value, tuple | list) else value


def _side(size: int, kernel: int, stride: int, padding: Any, dilation: int) -> int:
    """Outputs of a convolution along one axis."""
    reach = dilation * (kernel - 1)
    border = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * padding
    if size + border <= reach:
        raise PruningError(f"{size} pixels are too few for a kernel of {kernel}")
    return (size + border - reach - 1) // stride + 1


def _plain(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """An operation on numbers alone."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _known(value: Any, visitor: Visitor) -> Any:
    """Tensors that the code makes itself: zeros, or something that stays as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if not bool(value.any()):
        return ChannelIds(torch.full([1] * value.dim(), ZERO), tuple(value.shape))
    atom = visitor.fixed(1, "made by the code")
    return ChannelIds(atom.reshape([1] * value.dim()), tuple(value.shape))


def _place(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else node.target.__name__
    return f"cannot follow channels through '{node.name}' ({node.op} {target})"
