"""Propagates channel ids through a traced network: the id of every entry of every tensor.

A layer with weights creates new ids, one for each of its outputs. Operations that move entries
(views, permutations, concatenations, padding) move the ids in the same way. Everything else is
reported to a `Visitor`: which layer reads which ids, which ids are added, and which cannot be
removed because an operation mixes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from secateur.base.errors import PruningError
from secateur.channels import operators
from secateur.channels.ids import ChannelIds, NamedTensor
from secateur.channels.rules.call import Broadcasts, Call
from secateur.channels.visitor import Visitor

BATCH_SIZE = 2  # not 1, so that the batch is never mistaken for a broadcast axis
_LIBRARIES = ("torch", "_operator", "torchvision", "builtins", "secateur")
"""Packages whose functions the table finds by name only."""


class Propagation(fx.Interpreter):
    """Runs a traced network with channel ids in place of activations; nothing is computed."""

    def __init__(
        self,
        model: nn.Module,
        fx_graph: fx.Graph,
        visitor: Visitor,
        shape: Sequence[int],
        broadcasts: Broadcasts | None = None,
    ) -> None:
        super().__init__(model, garbage_collect_values=False, graph=fx_graph)
        self.extra_traceback = False  # errors name the node themselves
        self.visitor, self.shape = visitor, tuple(shape)
        self.broadcasts: Broadcasts = {} if broadcasts is None else broadcasts
        """Broadcasts found by this propagation, for later ones."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}
        self._dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
        self._node = ""
        self._within: list[str] = []

    @torch.no_grad()
    def run(self, *args: Any, **options: Any) -> Any:
        """Run all nodes; takes no arguments. Raises PruningError naming the node that fails."""
        return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; errors of any type become a PruningError that names the node.

        The traces that fx keeps for each node are left out: they cost as much as most rules.
        """
        self._node = n.name
        self._within = [path for path, _ in n.meta.get("nn_module_stack", {}).values()]
        try:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return getattr(self, n.op)(n.target, args, kwargs)
        except PruningError as error:
            raise PruningError(f"{_place(n)}: {error}") from None
        except Exception as error:  # sizes that do not fit, arguments that no rule expects
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise PruningError(f"{_place(n)}: {reason}") from None

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The network's input is a batch of `shape`; other arguments have defaults.

        In an input with two axes beside the batch, such as a sequence, it is not known which axis
        is that of the channels; since they are locked, they count as one channel.
        """
        if args:
            return args[0]
        required = [n for n in self.graph.nodes if n.op == "placeholder" and not n.args]
        if len(required) > 1:
            raise PruningError("the network has more than one input")
        if len(self.shape) == 2:
            return self._call("input").opaque((BATCH_SIZE, *self.shape), "an input of the network")
        ids = self.visitor.fixed(self.shape[0], "an input of the network")
        return ChannelIds.along(1, ids, (BATCH_SIZE, *self.shape))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Channels that the network returns are locked."""
        call = self._call("output")
        for value in _flat(args):
            if isinstance(value, ChannelIds):
                call.lock(value, "an output of the network")

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor with its name; a single number is returned as such."""
        value = self.fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0:
            return float(value)
        return NamedTensor(self._names.get(id(value), target), value)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply the rule for the module's type."""
        module = self.submodules[target]
        if not isinstance(args[0], ChannelIds | NamedTensor):
            raise PruningError("its input holds no channels")
        call = self._call(f"a {type(module).__name__}")
        x = call.channels(args[0])
        return operators.find(type(module)).rule(call, module, x, *args[1:], **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply the rule for the function's name, or call it if it is given no channels."""
        if not _has_channels(args, kwargs):
            call, created = self._call(operators.name_of(target)), target(*args, **kwargs)
            return call.created(created, _flat((args, kwargs)))
        package = getattr(target, "__module__", None) or "torch"
        name = operators.name_of(target)
        if package.split(".")[0] not in _LIBRARIES:
            raise PruningError(f"do not know what {package}.{name} does to channels")
        return self._apply(name, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply the rule for the method's name, or call it if it is given no channels."""
        if not _has_channels(args, kwargs):
            created = super().call_method(target, args, kwargs)
            return self._call(target).created(created, _flat((args, kwargs)))
        return self._apply(target, args, kwargs)

    def _call(self, name: str) -> Call:
        return Call(
            self._node,
            name,
            self.visitor,
            self.submodules,
            self._names,
            self._dtype,
            self.broadcasts,
            self._within,
        )

    def _apply(self, name: str, args: Any, kwargs: Any) -> Any:
        call, operator = self._call(name), operators.find(name)
        if operator.moves and isinstance(args[0], NamedTensor) and _counts(args[0].tensor):
            moved = getattr(args[0].tensor, name)(*args[1:], **kwargs)
            return NamedTensor(f"{args[0].name} ({self._node})", moved)
        if operator.parametric:
            _check_parameters(call, args, kwargs)
            if operator.weighted:
                _check_kernels(call, args, kwargs)
        if not operator.sized:
            call.calculates(*_flat((args[1:], kwargs)))
        if not operator.raw:
            args = (call.channels(args[0]), *args[1:])
        return operator.rule(call, *args, **kwargs)


def _counts(tensor: Tensor) -> bool:
    """Whether the entries are integers, such as those of an index, which are not channels."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_parameters(call: Call, args: Any, kwargs: Any) -> None:
    others = (*args[1:], *kwargs.values())
    computed = any(isinstance(value, ChannelIds) for value in others)
    if computed or not isinstance(args[0], ChannelIds):
        raise PruningError(f"{call.name} with weights that are computed on the way")


def _check_kernels(call: Call, args: Any, kwargs: Any) -> None:
    """PruningError for a weight that is a plain attribute, which another precision would miss."""
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, NamedTensor) and value.name not in call.names.values():
            raise PruningError(f"{value.name} is no parameter of the network; make it a buffer")


def _flat(values: Any) -> list[Any]:
    """The values in nested lists, tuples and dictionaries."""
    found: list[Any] = []
    map_aggregate(values, found.append)
    return found


def _has_channels(args: Any, kwargs: Any) -> bool:
    return any(isinstance(value, ChannelIds | NamedTensor) for value in _flat((args, kwargs)))


def _place(node: fx.Node) -> str:
    target = operators.name_of(node.target)
    return f"cannot follow channels through '{node.name}' ({node.op} {target})"
