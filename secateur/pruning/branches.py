"""Residual branches: found in a traced network, set to zero, and removed.

A residual block computes x + f(x). The layers of f are its branch if their result goes nowhere but
into this sum, and if all operations between them act on each entry separately. Without the branch
the sum is its other operand: x, or a shortcut of x. Every block of a ResNet has a branch; where the
shortcut has layers too, the branch is the operand with more layers, or, if there are as many, with
more parameters.
"""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.base.errors import ArgumentError
from secateur.channels import operators
from secateur.channels.graph import ChannelGraph
from secateur.channels.rules.elementwise import ADDITIONS
from secateur.nn.layers import Removed
from secateur.sparsity.masks import LAYERS

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_IN_PLACE = ("iadd", "isub", "imul", "itruediv")
_SAME_MEMORY = (
    "contiguous", "to", "float", "double", "half", "type", "detach", "dropout", "dropout1d",
    "dropout2d", "feature_dropout", "alpha_dropout", "stochastic_depth",
)  # fmt: skip
"""Operations that may return their input in eval mode."""
_NO_EFFECT = (nn.Identity, nn.modules.dropout._DropoutNd)
"""Modules that in eval mode return their input."""


@dataclass(frozen=True)
class Branch:
    """One residual branch."""

    name: str
    """Longest common path of its layers (`layer1.2`); where another branch has the same, that of
    its last layer."""
    modules: tuple[str, ...]
    """Modules that only this branch uses, in order of execution."""
    last: str
    """The last layer or normalisation: if its weight and bias are zero, so is the branch."""


@torch.no_grad()
def residual_branches(graph: ChannelGraph, example: Tensor) -> dict[str, Branch]:
    """The residual branches of the graph's network by name, in order of execution.

    `example` is a batch of inputs, (N, C, H, W). Of nested branches, the inner one is found.
    """
    model = graph.model
    shapes = _Shapes(model, graph.fx_graph)
    shapes.run(example[:1].expand(2, *example.shape[1:]).clone())  # one image hides its axis
    network = _Network.of(model, graph.fx_graph)
    found = []
    for node in network.nodes:
        if _adds_equal_shapes(node, shapes.found):
            regions = [_Region(operand, node, network) for operand in node.all_input_nodes]
            shortcut, branch = sorted(regions, key=lambda region: region.size)
            if shortcut.size < branch.size and branch.last is not None:
                found.append(branch)
    paths = [_common_path(region.modules) for region in found]
    named = {}
    for path, region in zip(paths, found, strict=True):
        assert region.last is not None
        name = path if path and paths.count(path) == 1 else region.last
        named[name] = Branch(name, tuple(region.modules), region.last)
    return named


def find_named(
    graph: ChannelGraph, example: Tensor, names: Sequence[str], key: str
) -> list[Branch]:
    """The residual branches with these names, without those that have been removed before.

    Raises ArgumentError (`key`) for a name that the network lacks.
    """
    if not names:
        return []
    branches = residual_branches(graph, example)
    for name in names:
        if name not in branches and not _was_removed(name, graph.model):
            known = ", ".join(branches) or "none"
            raise ArgumentError(key, f"no such residual branch; the network has {known}", name)
    return [branches[name] for name in dict.fromkeys(names) if name in branches]


def _was_removed(name: str, model: nn.Module) -> bool:
    """Whether this is the name of one branch, whose modules have been removed."""
    modules = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Removed) and f"{path}.".startswith(f"{name}.")
    }
    if name in modules:
        return modules[name].last
    one_branch = sum(module.last for module in modules.values()) == 1
    return one_branch and _common_path(list(modules)) == name


@torch.no_grad()
def silence(model: nn.Module, branches: Sequence[Branch]) -> None:
    """Set the weight and bias of the last layer of each branch to zero, in place."""
    for branch in branches:
        for parameter in model.get_submodule(branch.last).parameters(recurse=False):
            parameter.zero_()


class _Shapes(fx.Interpreter):
    """Runs a traced network and records the shapes of all tensors."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = result.shape
        return result


def _adds_equal_shapes(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> bool:
    """Whether a node is the sum of two different results of the same shape."""
    if node.op not in ("call_function", "call_method"):
        return False
    if operators.name_of(node.target) not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return False
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return False
    return a in shapes and shapes[a] == shapes.get(b)


@dataclass(frozen=True)
class _Network:
    """A traced network, and how often it uses its modules and parameters."""

    nodes: list[fx.Node]
    modules: dict[str, nn.Module]
    calls: Counter[str]
    """Module -> number of its calls."""
    holders: Counter[int]
    """Parameter, by its id -> number of modules that hold it."""

    @classmethod
    def of(cls, model: nn.Module, graph: fx.Graph) -> "_Network":
        """The counts of this network."""
        nodes = list(graph.nodes)
        modules = dict(model.named_modules())
        held = (id(p) for module in modules.values() for p in module.parameters(recurse=False))
        calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
        return cls(nodes, modules, calls, Counter(held))


class _Region:
    """The nodes whose results go nowhere but into one operand of a sum."""

    modules: list[str]
    """The modules in it that run nowhere else, in order of execution."""
    size: tuple[int, int]
    """Number of layers among them, which pruning of channels does not change, and of parameters."""
    last: str | None = None
    """As `Branch.last`; None if the region is no branch."""

    def __init__(self, operand: fx.Node, into: fx.Node, network: _Network) -> None:
        self.nodes: list[fx.Node] = []
        """In order of execution."""
        users = {into}
        for node in reversed(network.nodes):
            other_operand = into in node.users and node is not operand
            if node.users and set(node.users) <= users and not other_operand:
                self.nodes.insert(0, node)
                users.add(node)
        called = [str(node.target) for node in self.nodes if node.op == "call_module"]
        self.modules = [name for name in called if network.calls[name] == 1]
        own = [p for name in self.modules for p in network.modules[name].parameters()]
        layers = [name for name in self.modules if isinstance(network.modules[name], LAYERS)]
        self.size = len(layers), sum(p.numel() for p in own)
        if self._can_become_zero(network):
            is_number = into.target in (operator.add, operator.iadd) or operand is into.args[1]
            runs_once = network.calls[str(operand.target)] == 1
            self.last = _last_layer(operand, network) if is_number and runs_once else None

    def _can_become_zero(self, network: _Network) -> bool:
        """Whether all else runs on if the modules return single numbers, and nothing else changes.

        Modules that run elsewhere too have to be without parameters; the first operations must not
        write into their inputs, which the shortcut reads.
        """
        inside = set(self.nodes)
        outer: set[fx.Node] = set()
        """Nodes whose result may be a tensor from outside."""
        for node in self.nodes:
            from_outside = any(n not in inside or n in outer for n in node.all_input_nodes)
            if from_outside and _changes_input(node, network.modules):
                return False
            if from_outside and _returns_input(node, network.modules):
                outer.add(node)
            if node.op != "call_module":
                if not _acts_on_entries(node, network.modules):
                    return False
            elif network.calls[str(node.target)] > 1:
                module = network.modules[str(node.target)]
                if any(True for _ in module.parameters()) or not _acts_on_entries(
                    node, network.modules
                ):
                    return False
        return True


def _acts_on_entries(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation acts on each position separately, so that it takes single numbers."""
    known = operators.of_node(node, modules)
    return known.elementwise or known.combines


def _changes_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation writes its result into its input, which the shortcut may read."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = operators.name_of(node.target)
    return bool(node.kwargs.get("inplace")) or name.endswith("_") or name in _IN_PLACE


def _returns_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the result may be the input itself, or a tensor that shares its memory."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _NO_EFFECT)
    return operators.name_of(node.target) in _SAME_MEMORY


def _last_layer(operand: fx.Node, network: _Network) -> str | None:
    """The layer or normalisation whose result this is, if it has a weight of its own.

    Modules after it that do nothing in eval mode are passed over.
    """
    node: Any = operand
    while isinstance(node, fx.Node) and node.op == "call_module":
        name = str(node.target)
        module = network.modules[name]
        if isinstance(module, (*LAYERS, *_NORMS)):
            parameters = list(module.parameters(recurse=False))
            unshared = all(network.holders[id(parameter)] == 1 for parameter in parameters)
            weighted = getattr(module, "weight", None) is not None
            return name if weighted and unshared and network.calls[name] == 1 else None
        if not isinstance(module, _NO_EFFECT):
            return None
        node = node.args[0]
    return None


def _common_path(names: Sequence[str]) -> str:
    """The longest path that all these modules lie in; empty if there is none."""
    return ".".join(_leading([name.split(".")[:-1] for name in names]))


def _leading(paths: Sequence[Sequence[str]]) -> Iterator[str]:
    """The parts with which all paths begin."""
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            return
        yield parts[0]
