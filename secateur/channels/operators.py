"""The table of supported operations: what each does to channels.

A new operation is one entry: its module types, and the names of its functions and methods, with a
rule. A type without an entry is covered by the entry of its nearest base class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import fx, nn

from secateur.channels.rules import attention, elementwise, layers, norms, shapes, slices
from secateur.channels.rules.call import Call
from secateur.nn.layers import ChannelSelect
from secateur.sparsity.masks import BatchNorm

OperatorKey = type[nn.Module] | str
"""A type of module, or the `__name__` of a function or method."""


OTHER = ("other", "mat2")
"""Keywords for the second of two tensors."""


@dataclass(frozen=True)
class Operator:
    """One kind of operation: its rule, and properties that other analyses of a network need."""

    rule: Callable[..., Any]
    """See rules/__init__.py."""
    raw: bool = False
    """The rule gets its first argument unchanged. Otherwise it gets channel ids; a parameter or
    buffer as first argument is replaced by the ids of its entries."""
    parametric: bool = False
    """All tensors but the first must be parameters or buffers of the network."""
    weighted: bool = False
    """A layer that sums over its inputs with weights: convolution, linear."""
    scales_channels: bool = False
    """A normalisation that multiplies channels along axis 1 by `weight` and adds `bias`."""
    elementwise: bool = False
    """Each entry of the result depends only on the entry of one tensor at the same position."""
    keeps_nan: bool = False
    """NaN stays NaN. (Some elementwise operations return a number for NaN.)"""
    combines: bool = False
    """Each entry of the result depends on the entries of several tensors at the same position."""
    multiplies: bool = False
    """A zero in either of two tensors gives zero."""
    contracts: bool = False
    """Sums of products of two tensors over axes."""
    averages: bool = False
    """Means of its third tensor over positions, with weights from the first two: attention."""
    moves: bool = False
    """The entries of the result are those of one tensor, in another shape or order."""
    sized: bool = False
    """Its rule reports the sizes among its arguments; for all others, they are numbers."""
    metadata: bool = False
    """The result is about the tensor's shape or type, not its entries."""
    keywords: tuple[tuple[str, ...], ...] = ()
    """Names of the arguments after the first that the rule takes by position: for each argument,
    its names in all functions of the row."""


def _table(*rows: tuple[Operator, tuple[OperatorKey, ...]]) -> dict[OperatorKey, Operator]:
    table = {key: operator for operator, keys in rows for key in keys}
    assert len(table) == sum(len(keys) for _, keys in rows), "a key stands in two rows"
    return table


OPERATORS: dict[OperatorKey, Operator] = _table(
    # layers
    (Operator(layers.conv2d_module, weighted=True), (nn.Conv2d,)),
    (Operator(layers.conv2d, raw=True, parametric=True, weighted=True), ("conv2d",)),
    (Operator(layers.linear_module, weighted=True), (nn.Linear,)),
    (Operator(layers.linear, raw=True, parametric=True, weighted=True), ("linear",)),
    (Operator(layers.channel_select), (ChannelSelect,)),
    # normalisations, and others that have entries for channels
    (
        Operator(norms.batch_norm_module, scales_channels=True),
        (*get_args(BatchNorm), nn.InstanceNorm2d),
    ),
    (Operator(norms.batch_norm, raw=True, parametric=True), ("batch_norm",)),
    (Operator(norms.layer_norm_module), (nn.LayerNorm,)),
    (Operator(norms.layer_norm, raw=True, parametric=True), ("layer_norm",)),
    (Operator(norms.group_norm_module, scales_channels=True), (nn.GroupNorm,)),
    (Operator(norms.group_norm, raw=True, parametric=True), ("group_norm",)),
    (Operator(norms.rms_norm_module), (nn.RMSNorm,)),
    (Operator(norms.rms_norm, raw=True, parametric=True), ("rms_norm",)),
    (Operator(norms.local_response_norm_module), (nn.LocalResponseNorm,)),
    (Operator(norms.local_response_norm), ("local_response_norm",)),
    (Operator(norms.normalize), ("normalize",)),
    (Operator(norms.prelu_module), (nn.PReLU,)),
    (Operator(norms.prelu, raw=True, parametric=True), ("prelu",)),
    (Operator(norms.softmax_module), (nn.Softmax, nn.LogSoftmax)),
    (Operator(norms.softmax), ("softmax", "log_softmax")),
    # one tensor, entry by entry
    (
        Operator(elementwise.unchanged_module, elementwise=True, keeps_nan=True),
        (nn.ReLU, nn.Identity, nn.Dropout, nn.Dropout2d),
    ),
    (
        Operator(elementwise.unchanged_module, elementwise=True),
        (
            *(nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.SiLU),
            *(nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign),
            *(nn.LogSigmoid, nn.Dropout1d, nn.AlphaDropout, nn.Threshold, nn.Hardshrink),
            *(nn.Softshrink, nn.Tanhshrink),
        ),
    ),
    (
        Operator(elementwise.unchanged, elementwise=True),
        (
            *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "hardtanh", "hardtanh_"),
            *("hardswish", "hardsigmoid", "gelu", "silu", "sigmoid", "sigmoid_", "tanh", "tanh_"),
            *("elu", "elu_", "selu", "celu", "mish", "softplus", "softsign", "log_sigmoid"),
            *("dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout"),
            *("stochastic_depth", "drop_path", "contiguous", "clone", "detach", "identity"),
            *("float", "double", "half", "bfloat16", "to", "type_as", "neg", "abs", "exp", "log"),
            *("sqrt", "rsqrt", "square", "reciprocal", "absolute", "erf", "log1p", "expm1"),
            *("zeros_like", "ones_like", "_threshold", "hardshrink", "softshrink"),
        ),
    ),
    # two tensors or more, entry by entry
    (
        Operator(elementwise.combine, raw=True, combines=True, keywords=(OTHER,)),
        (
            *(*elementwise.SUMS, "subtract", "truediv", "div", "div_", "divide", "true_divide"),
            *("itruediv", "maximum", "minimum"),
        ),
    ),
    (
        Operator(elementwise.combine_all, raw=True, combines=True),
        ("pow", "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip"),
    ),
    (Operator(elementwise.combine_all, raw=True), ("addcmul", "lerp")),
    (
        Operator(elementwise.combine, raw=True, combines=True, multiplies=True, keywords=(OTHER,)),
        elementwise.PRODUCTS,
    ),
    # two tensors, summed over axes, and windows of attention
    (Operator(attention.matmul, contracts=True, keywords=(OTHER,)), ("matmul", "bmm")),
    (Operator(attention.einsum, raw=True, contracts=True), ("einsum",)),
    (
        Operator(
            attention.scaled_dot_product_attention,
            averages=True,
            keywords=(("key",), ("value",)),
        ),
        ("scaled_dot_product_attention",),
    ),
    (Operator(attention.mask_of_scores, sized=True), ("mask_of_scores",)),
    (Operator(attention.split_windows), ("split_windows",)),
    (Operator(attention.join_windows), ("join_windows",)),
    (Operator(elementwise.unchanged, elementwise=True), ("separate_regions",)),
    (Operator(attention.patch_merging_pad), ("_patch_merging_pad",)),
    # over pixels, or over axes
    (
        Operator(elementwise.pool_module),
        (
            *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
            *(nn.LPPool2d, nn.Upsample, nn.ReflectionPad2d, nn.ReplicationPad2d),
            *(nn.ConstantPad2d, nn.CircularPad2d),
        ),
    ),
    (
        Operator(elementwise.pool),
        (
            *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
            *("lp_pool2d", "interpolate"),
        ),
    ),
    (Operator(elementwise.reduce), ("mean", "sum", "amax", "amin")),
    (Operator(elementwise.deviation), ("std", "var")),
    (
        Operator(elementwise.extremum, keywords=(("dim", *OTHER[:1]), ("keepdim",))),
        ("max", "min"),
    ),
    # shapes
    (
        Operator(shapes.reshape, moves=True, sized=True, keywords=(("shape", "size"),)),
        ("view", "reshape"),
    ),
    (Operator(shapes.reshape_as, sized=True), ("view_as", "reshape_as")),
    (Operator(shapes.unflatten, moves=True, sized=True), ("unflatten",)),
    (Operator(shapes.flatten_module), (nn.Flatten,)),
    (Operator(shapes.flatten, moves=True), ("flatten",)),
    (Operator(shapes.permute, moves=True, keywords=(("dims",),)), ("permute",)),
    (
        Operator(shapes.transpose, moves=True, keywords=(("dim0", "axis0"), ("dim1", "axis1"))),
        ("transpose", "swapaxes", "swapdims"),
    ),
    (Operator(shapes.flip, moves=True, keywords=(("dims",),)), ("flip",)),
    (Operator(shapes.repeat, moves=True, keywords=(("repeats",),)), ("repeat",)),
    (Operator(shapes.squeeze, moves=True, keywords=(("dim",),)), ("squeeze",)),
    (Operator(shapes.unsqueeze, moves=True), ("unsqueeze",)),
    (Operator(shapes.expand, moves=True, sized=True, keywords=(("size",),)), ("expand",)),
    (Operator(shapes.expand_as), ("expand_as",)),
    (Operator(shapes.unbind), ("unbind",)),
    (Operator(shapes.roll), ("roll",)),
    (Operator(shapes.channel_shuffle_module), (nn.ChannelShuffle,)),
    (Operator(shapes.channel_shuffle), ("channel_shuffle",)),
    (Operator(shapes.pixel_shuffle_module), (nn.PixelShuffle,)),
    (Operator(shapes.pixel_shuffle), ("pixel_shuffle",)),
    (Operator(shapes.pad_module), (nn.ZeroPad2d, nn.ZeroPad3d)),
    (Operator(shapes.pad), ("pad",)),
    (Operator(shapes.new_zeros, keywords=(("size",),)), ("new_zeros",)),
    (Operator(shapes.size, metadata=True), ("size",)),
    (Operator(shapes.dim, metadata=True), ("dim",)),
    (Operator(shapes.attribute, metadata=True), ("getattr",)),
    # along an axis
    (Operator(slices.cat, raw=True), ("cat", "concat", "concatenate")),
    (Operator(slices.stack, raw=True), ("stack",)),
    (Operator(slices.chunk), ("chunk",)),
    (Operator(slices.glu_module), (nn.GLU,)),
    (Operator(slices.glu), ("glu",)),
    (Operator(slices.split, sized=True, keywords=(("split_size",),)), ("split",)),
    (Operator(slices.index_select), ("index_select",)),
    (Operator(slices.getitem, raw=True), ("getitem",)),
)


def _refuse(call: Call, *_: Any, **__: Any) -> Any:
    raise call.unknown()


UNKNOWN = Operator(_refuse)
"""The entry of all operations that are not in the table."""


def find(key: OperatorKey) -> Operator:
    """The entry for a function's name, or a module type (or its nearest base); else UNKNOWN."""
    if isinstance(key, str):
        return OPERATORS.get(key, UNKNOWN)
    return next((OPERATORS[base] for base in key.__mro__ if base in OPERATORS), UNKNOWN)


def name_of(target: Any) -> str:
    """The name of a function or method in the table."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def of_node(node: fx.Node, modules: dict[str, nn.Module]) -> Operator:
    """The operator of a traced node; UNKNOWN for inputs, outputs and attributes as well."""
    if node.op == "call_module":
        return find(type(modules[str(node.target)]))
    called = node.op in ("call_function", "call_method")
    return find(name_of(node.target)) if called else UNKNOWN
