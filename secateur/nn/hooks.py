"""Observe the inputs of layers and weights during a forward pass."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.base.errors import PruningError
from secateur.nn.layers import IndexedConv2d
from secateur.nn.outputs import tensors_of
from secateur.sparsity.masks import LAYERS

Take = Callable[[str, Tensor, nn.Module | None], object]
"""Called with the name of a weight, the input that it is multiplied by, and the layer; None instead
of the layer if a functional call uses the weight."""


@contextlib.contextmanager
def watched_inputs(
    layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call `take` with the name and the first input of each of these layers before it runs.

    The channels of the input are in the order in which the weights read them. Functional calls with
    a layer's weight are not observed; see `watched_weights`.
    """
    hooks = [
        layer.register_forward_pre_hook(lambda m, inputs, n=name: _call(take, n, m, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def watched_weights(model: nn.Module, weights: Mapping[str, Tensor], take: Take) -> Iterator[None]:
    """Call `take` for each of these weights of convolutions and linear maps whenever it is used.

    A weight may be used by its layer or by a functional call, as in a MultiheadAttention. Raises
    PruningError at the end, naming a weight that was only used in other ways.
    """
    names = {id(weight): name for name, weight in weights.items()}
    mode = _WeightMode(names, take)
    hooks = []
    for layer in model.modules():
        weight = layer._parameters.get("weight") if isinstance(layer, LAYERS) else None
        if weight is not None and id(weight) in names:
            enter = partial(mode.enter, names[id(weight)])
            hooks += [
                layer.register_forward_pre_hook(enter),
                layer.register_forward_hook(mode.leave),
            ]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, function in mode.others.items():
        if name not in mode.seen:
            raise PruningError(
                f"the input of {name} is unknown: the network passes this weight to {function}"
            )


class _WeightMode(TorchFunctionMode):
    """Reports the inputs that weights are multiplied by."""

    def __init__(self, names: Mapping[int, str], take: Take) -> None:
        super().__init__()
        self.names = names
        """Names by id() of the weight."""
        self.seen: set[str] = set()
        self.others: dict[str, str] = {}
        """Weight -> an unsupported function that gets the weight and returns a tensor."""
        self._take = take
        self._running: list[str] = []
        """Weights of the layers that are running, the innermost last."""

    def enter(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A layer with this weight starts to run."""
        self._running.append(name)
        _call(partial(self._note, layer=layer), name, layer, inputs[0])

    def leave(self, *_: Any) -> None:
        """The innermost layer is done."""
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            self._attention(inspect.signature(func).bind(*args, **kwargs).arguments)
        elif func in (functional.linear, functional.conv2d):
            x, weight = (*args, *(kwargs[k] for k in ("input", "weight") if k in kwargs))[:2]
            self._function(weight, lambda: x)
        else:
            used = [self.names[id(t)] for t in tensors_of((args, kwargs)) if id(t) in self.names]
            if used and tensors_of(out):
                self.others |= dict.fromkeys(used, getattr(func, "__name__", str(func)))
        return out

    def _attention(self, given: dict[str, Any]) -> None:
        """Report the projections of a MultiheadAttention; the input of the output projection is
        the concatenated heads."""
        for key, source in _PROJECTIONS.items():
            if given.get(key) is not None:
                self._function(given[key], partial(given.__getitem__, source))
        together = given["in_proj_weight"]
        if together is not None and given["query"] is given["key"] is given["value"]:
            self._function(together, lambda: given["query"])
        elif together is not None and id(together) in self.names:
            self.others[self.names[id(together)]] = "attention of one tensor to another"

        def mixed() -> Tensor:
            identity = torch.eye(len(given["out_proj_weight"])).to(given["out_proj_weight"])
            plain = given | {"out_proj_weight": identity, "out_proj_bias": None}
            out: Tensor = functional.multi_head_attention_forward(**plain)[0]
            return out

        self._function(given["out_proj_weight"], mixed)

    def _function(self, weight: Tensor, inputs: Callable[[], Tensor]) -> None:
        """Report a functional use of a weight, unless its own layer has reported it."""
        name = self.names.get(id(weight))
        if name is not None and name not in self._running:
            self._note(name, inputs(), None)

    def _note(self, name: str, inputs: Tensor, layer: nn.Module | None) -> None:
        self.seen.add(name)
        self._take(name, inputs, layer)


_PROJECTIONS = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
"""Weight of a MultiheadAttention with separate projections -> its input."""


def _call(
    take: Callable[[str, Tensor], object], name: str, layer: nn.Module, given: Tensor
) -> None:
    """Call `take` and return None, since a value that a hook returns replaces the input."""
    if isinstance(layer, IndexedConv2d) and layer.before is not None:
        given = given.index_select(1, layer.before)
    take(name, given)
