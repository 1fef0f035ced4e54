"""Traces a network with torch.fx: its operations in the order of execution."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, get_args

from torch import fx, nn

from secateur.base.errors import PruningError
from secateur.channels import operators
from secateur.channels.ids import AttributeSize
from secateur.channels.rules.elementwise import ADDITIONS
from secateur.nn.attention import free_class
from secateur.nn.layers import ChannelSelect, Removed
from secateur.nn.modes import in_eval_mode
from secateur.sparsity.masks import LAYERS, BatchNorm

_LEAVES = (*LAYERS, *get_args(BatchNorm), nn.InstanceNorm2d, nn.LayerNorm, nn.GroupNorm)
"""Types whose plain subclasses, without own methods, are leaves as well."""

_FIRST = ("input", "tensor", "tensors", "query", "x")
"""Keywords of the first argument of functions."""
_ALIASES = {"axis": "dim", "keepdims": "keepdim"}
"""Keywords that torch accepts for numpy's sake -> torch's own keywords."""


class _Proxy(fx.Proxy):
    """Records `x += y` and the like as what they are: every name of x has the result."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, target: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})


class _Tracer(fx.Tracer):
    """Treats Secateur's layers, and plain subclasses of known layers, as leaves.

    Attention modules whose sizes are tied are traced through the code of `nn.attention`.
    """

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value of a node in the network's code."""
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Arguments of the network's forward: the first and all required ones.

        The others keep their defaults, so that code that checks whether they are given finds that
        they are not.
        """
        given = list(signature(root_fn).parameters.values())[1:]
        several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        rest = [p for p in given[1:] if p.default is p.empty and p.kind not in several]
        needed = given[:1] + rest
        if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in needed):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        inputs = [self.create_proxy("placeholder", p.name, (), {}) for p in needed]
        return root_fn, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if free_class(m) is not None:
            return False
        if isinstance(m, ChannelSelect | Removed) or super().is_leaf_module(
            m, module_qualified_name
        ):
            return True
        return isinstance(m, _LEAVES) and type(m).__mro__[1] in _LEAVES and not _has_methods(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the module with the code of the class that can replace its own, if there is one."""
        free = free_class(m)
        if free is not None:
            forward = free.forward.__get__(m)
        return super().call_module(m, forward, args, kwargs)


def _has_methods(module: nn.Module) -> bool:
    return any(callable(v) and k != "__init__" for k, v in vars(type(module)).items())


@contextmanager
def _named_sizes(model: nn.Module) -> Iterator[None]:
    """Context in which sizes that modules hold as attributes are AttributeSizes.

    Layers of torch are excepted: their attributes are not arguments of operations.
    """
    changed: list[tuple[nn.Module, str, int]] = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") and free_class(module) is None:
            continue
        for key, value in vars(module).items():
            if type(value) is int and value > 1 and not key.startswith("_"):
                changed.append((module, key, value))
                vars(module)[key] = AttributeSize.of(value, path, key)
    AttributeSize.tracing = True
    try:
        yield
    finally:
        AttributeSize.tracing = False
        for module, key, value in changed:
            vars(module)[key] = value


def trace(model: nn.Module) -> fx.Graph:
    """The operations of the network in eval mode, with all optional arguments at their defaults.

    Removed residual branches are left out: their sums are the other operands. Where possible,
    buffers are nodes, so that their uses are visible. The modes of the modules are restored. Raises
    PruningError with the reason if torch.fx cannot trace the network.
    """
    training = {m: m.training for m in model.modules()}
    try:
        with _named_sizes(model):
            try:
                graph = _Tracer(buffers=True).trace(in_eval_mode(model))
            except Exception:  # the code depends on the value of a buffer
                graph = _Tracer(buffers=False).trace(model)
    except Exception as error:  # of any type: it is the network's code that fails
        reason = " ".join(str(error).split()) or type(error).__name__
        if "NoneType" in reason and any(isinstance(m, nn.MultiheadAttention) for m in training):
            reason += "; code that uses attention weights of a MultiheadAttention is not covered"
        raise PruningError(f"cannot follow {type(model).__name__}: {reason}") from None
    finally:
        for module, mode in training.items():
            module.training = mode
    modules = dict(model.named_modules())
    _leave_out_removed(graph, modules)
    _normalise_keywords(graph, modules)
    return graph


def _leave_out_removed(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Replace sums with a removed branch by their other operand, in place."""
    removed = [
        node
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], Removed)
    ]
    if not removed:
        return
    unused = {node for node in graph.nodes if not node.users}
    for branch in removed:
        for total in list(branch.users):
            if operators.name_of(total.target) in ADDITIONS:
                total.replace_all_uses_with(next(a for a in total.args if a is not branch))
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in unused:
            graph.erase_node(node)


def _normalise_keywords(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Pass by position the arguments of known operations that rules take by position, in place."""
    for node in graph.nodes:
        known = operators.of_node(node, modules)
        if not node.kwargs or known is operators.UNKNOWN:
            continue
        keywords: list[tuple[str, ...]] = []  # by position
        options = dict(node.kwargs)
        if node.op == "call_module":
            keywords.append(tuple(signature(modules[node.target].forward).parameters)[:1])
        else:
            keywords += [_FIRST, *known.keywords]
            options = {_ALIASES.get(key, key): value for key, value in options.items()}
        args = list(node.args)
        for names in keywords[len(args) :]:
            key = next((key for key in names if key in options), None)
            if key is None:
                break
            args.append(options.pop(key))
        node.args, node.kwargs = tuple(args), options
