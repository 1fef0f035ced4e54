"""What every layer of a network sees, as far as it is the same for every input.

One pass in which NaN stands for "depends on the input". Known values are computed by the layers
themselves, so that biases, normalisations, activations, pooling and padded borders all count. In a
product a known zero wins.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from secateur.core.graph import BATCH_NORMS, ELEMENTWISE, UNARY
from secateur.core.layers import Take

_WEIGHTED: dict[str, Any] = {"conv2d": functional.conv2d, "linear": functional.linear}
_PRODUCTS = ("mul", "mul_", "imul", "multiply")


class Constants(fx.Interpreter):
    """One run of a traced network, of which the inputs of layers are remembered."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.inputs: dict[str, list[Tensor]] = {}
        """Layer or index buffer -> what it sees at each call, one image, NaN where unknown."""
        self.result: Any = None
        self._names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, graph: fx.Graph, example: Tensor) -> "Constants":
        """Run a network in eval mode; of the example only shape, type and device matter."""
        found = cls(model, graph)
        found.result = found.run(torch.full_like(example[:1], torch.nan))
        return found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """NaN goes through most modules by itself."""
        module, x = self.fetch_attr(target), args[0]
        if isinstance(module, nn.Conv2d):
            self._remember(module.weight, x)
            return _through(module._conv_forward, x, module.weight, module.bias)
        if isinstance(module, nn.Linear):
            self._remember(module.weight, x)
            return _through(functional.linear, x, module.weight, module.bias)
        if isinstance(module, Take):
            self.inputs.setdefault(self._names[id(module.index)], []).append(x)
        if isinstance(module, (*BATCH_NORMS, nn.GroupNorm)):
            out = torch.full_like(x, torch.nan)
            if getattr(module, "running_mean", None) is not None:  # else of what it sees
                out = super().call_module(target, args, kwargs)
            return _where_factors_are_zero(out, module.weight, module.bias)
        out = super().call_module(target, args, kwargs)
        return _unknown_again(x, out) if isinstance(module, ELEMENTWISE) else out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The same for functions, which are also called as methods."""
        name = getattr(target, "__name__", "")
        return self._call(name, super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See call_function."""
        return self._call(str(target), super().call_method, target, args, kwargs)

    def _call(self, name: str, run: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if name in _WEIGHTED and isinstance(args[0], Tensor):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self._remember(weight, args[0])
            rest = args[3:]
            more = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
            return _through(
                lambda x, w, b: _WEIGHTED[name](x, w, b, *rest, **more), args[0], weight, bias
            )
        out = run(target, args, kwargs)
        if name in UNARY and isinstance(args[0], Tensor):
            return _unknown_again(args[0], out)
        if name in _PRODUCTS and isinstance(out, Tensor):
            zero = torch.zeros_like(out, dtype=torch.bool)
            for factor in args[:2]:
                zero = zero | (torch.as_tensor(factor, device=out.device) == 0)
            return out.masked_fill(zero, 0.0)
        return out

    def _remember(self, weight: Tensor, x: Tensor) -> None:
        name = self._names[id(weight)].removesuffix(".weight")
        self.inputs.setdefault(name, []).append(x)


def _through(run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A sum is unknown where an unknown value has a weight that is not zero."""
    unknown = x.isnan()
    known = x.masked_fill(unknown, 0.0)
    if weight.dim() == 2 or weight.shape[1] != x.shape[1]:  # linear, or in groups
        out: Tensor = run(known, weight, bias)
        heard = run(unknown.to(x.dtype), (weight != 0).to(x.dtype), None)
        return out.masked_fill(heard > 0.5, torch.nan)
    some, whole = unknown.any(dim=(0, 2, 3)), unknown.all(dim=0).all(dim=(1, 2))
    says = known.ne(0).any(dim=(0, 2, 3))
    says[0] = True  # so that there is a sum at all
    out = run(known[:, says], weight[:, says], bias)
    reads = torch.zeros_like(out)
    if bool(whole.any()):  # channels that are unknown everywhere: heard where any of them is
        those = weight if bool(whole.all()) else weight[:, whole]
        largest = torch.linalg.vector_norm(those, ord=torch.inf, dim=1, keepdim=True)
        reads = run(torch.ones_like(x[:, :1]), largest.ne(0).to(x.dtype), None)
    if bool((partly := some & ~whole).any()):
        heard = (weight[:, partly] != 0).to(x.dtype)
        reads = reads + run(unknown[:, partly].to(x.dtype), heard, None)
    return out.masked_fill(reads > 0.5, torch.nan)


def _where_factors_are_zero(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A normalisation says its shift where its factor is zero, whatever it sees."""
    if weight is None:
        return out
    form = [1, -1] + [1] * (out.dim() - 2)
    shift = torch.zeros_like(weight) if bias is None else bias
    return torch.where((weight == 0).reshape(form), shift.reshape(form), out)


def _unknown_again(x: Tensor, out: Any) -> Any:
    if isinstance(out, Tensor) and out.shape == x.shape and out.is_floating_point():
        return out.masked_fill(x.isnan(), torch.nan)
    return out
