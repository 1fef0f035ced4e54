"""Values in a network that are the same for every input.

One forward pass in which NaN stands for "depends on the input". Known values are computed by the
layers themselves, so that biases, normalisations, activations, pooling and padded borders all
count. In a product a known zero wins.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from secateur.channels import operators
from secateur.channels.groups import by_channel
from secateur.nn.layers import ChannelSelect


class Constants(fx.Interpreter):
    """Runs a traced network in this way, and notes the inputs of its layers.

    How operations treat unknown values follows from their properties in `channels.operators`.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.inputs: dict[str, list[Seen]] = {}
        """Layer or index buffer -> its input at each call."""
        self.result: Any = None
        """What the network returns."""
        self._names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, graph: fx.Graph, example: Tensor) -> "Constants":
        """Run a network in eval mode; of the example only shape, type and device matter."""
        constants = cls(model, graph)
        constants.result = constants.run(torch.full_like(example[:1], torch.nan))
        return constants

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Most modules return NaN for NaN; where they do not, it is restored."""
        module, x = self.submodules[target], args[0]
        operator = operators.find(type(module))
        if isinstance(module, nn.Conv2d):
            return self._through(module._conv_forward, x, module.weight, module.bias)
        if isinstance(module, nn.Linear):
            return self._through(functional.linear, x, module.weight, module.bias)
        if isinstance(module, ChannelSelect):
            self._see(self._names[id(module.index)], x, 1)
        if operator.scales_channels:
            if getattr(module, "running_mean", None) is not None:
                out = super().call_module(target, args, kwargs)
            else:  # statistics of its input
                out = torch.full_like(x, torch.nan)
            return _shift_where_scale_is_zero(out, module.weight, module.bias)
        out = super().call_module(target, args, kwargs)
        return _restore_nan(x, out) if operator.entrywise and not operator.keeps_nan else out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Functions, by the properties of their operators."""
        return self._call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Methods, by the properties of their operators."""
        return self._call(super().call_method, target, args, kwargs)

    def _call(self, run: Any, target: Any, args: Any, kwargs: Any) -> Any:
        operator = operators.find(operators.name_of(target))
        if operator.weighted and isinstance(args[0], Tensor):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            rest = args[3:]
            more = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
            return self._through(
                lambda x, w, b: target(x, w, b, *rest, **more), args[0], weight, bias
            )
        out = run(target, args, kwargs)
        if operator.entrywise and isinstance(args[0], Tensor):
            return _restore_nan(args[0], out)
        if operator.multiplies and isinstance(out, Tensor):
            zero = torch.zeros_like(out, dtype=torch.bool)
            for factor in args[:2]:
                zero = zero | (torch.as_tensor(factor, device=out.device) == 0)
            return out.masked_fill(zero, 0.0)
        return out

    def _through(self, run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        name = self._names[id(weight)].removesuffix(".weight")
        if weight.dim() == 2:
            self._see(name, x, -1)
            return _through_linear(run, x, weight, bias)
        return _through_convolution(run, x, self._see(name, x, 1), weight, bias)

    def _see(self, name: str, x: Tensor, axis: int) -> "Seen":
        seen = Seen.of(x, axis)
        self.inputs.setdefault(name, []).append(seen)
        return seen


@dataclass(frozen=True)
class Seen:
    """What a layer sees of one image, and in short of each channel, bool, (channels,)."""

    x: Tensor | None
    """NaN where it depends on the input; None if nothing is known but zeros."""
    zero: Tensor
    """Zero everywhere."""
    known: Tensor
    """Nowhere dependent on the input."""
    unknown: Tensor
    """Everywhere dependent on it."""

    @classmethod
    def of(cls, x: Tensor, axis: int) -> "Seen":
        """With channels along this axis."""
        rows = by_channel(x, axis)
        high, low = rows.amax(dim=1), rows.amin(dim=1)  # NaN if one entry is
        zero, known = (high == 0) & (low == 0), ~high.isnan()
        kept = x if bool((known & ~zero).any()) else None  # maps of all layers are many
        least = rows.nan_to_num(nan=torch.inf).amin(dim=1)  # finite if one entry is a number
        return cls(kept, zero, known, least.isinf())


def _through_linear(run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A sum is unknown where an unknown value has a weight that is not zero."""
    unknown = x.isnan()
    out: Tensor = run(x.masked_fill(unknown, 0.0), weight, bias)
    heard = run(unknown.to(x.dtype), weight.bool().to(x.dtype), None)
    return out.masked_fill(heard > 0.5, torch.nan)


def _through_convolution(
    run: Any, x: Tensor, seen: Seen, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The same; channels of which nothing or everything is known need no sum over channels."""
    parts = x.shape[1] // weight.shape[1]

    def of(channels: Tensor, weights: Tensor, shift: Tensor | None, holes: bool) -> Tensor:
        """The sum over some channels of what is known, or of 1 where it is not."""
        if parts > 1:  # in a group convolution as many of every group: the k-th if any has it
            channels = channels.reshape(parts, -1).any(dim=0)
        channels[0] = channels[0] | ~channels.any()  # so that there is a sum at all
        if not bool(channels.all()):
            weights = weights[:, channels]
        values = x[:, channels.repeat(parts)]
        hole = values.isnan()
        result: Tensor = run(
            hole.to(x.dtype) if holes else values.masked_fill(hole, 0.0), weights, shift
        )
        return result

    taps = weight.bool()  # not zero; many times as fast as `ne`
    reads: Tensor | None = None  # more than a half where the sum hears something unknown
    if bool(seen.unknown.any()):  # heard where any of them is
        rows = seen.unknown.reshape(parts, 1, -1).expand(-1, len(weight) // parts, -1)
        heard = taps if bool(rows.all()) else taps & rows.reshape(len(weight), -1, 1, 1)
        heard = _any(heard, dim=1).to(x.dtype)
        if bool(heard.all()):  # by all outputs in the same way
            heard = heard[:parts]
        reads = run(torch.ones_like(x[:, :parts]), heard, None)
        if len(heard) < len(weight):
            reads = reads[:, :1].expand(-1, len(weight), -1, -1)
    if bool((partly := ~seen.known & ~seen.unknown).any()):
        more = of(partly, taps.to(x.dtype), None, holes=True)
        reads = more if reads is None else reads + more
    says = ~seen.zero & ~seen.unknown
    if reads is None or bool(says.any()):
        out = of(says, weight, bias, holes=False)
        return out if reads is None else out.masked_fill(reads > 0.5, torch.nan)
    shift = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
    return shift[:, None, None].expand_as(reads).masked_fill(reads > 0.5, torch.nan)


def _any(true: Tensor, dim: int) -> Tensor:
    """Of bool; kept as an axis. Many times as fast as `any`."""
    return true.view(torch.uint8).amax(dim=dim, keepdim=True).view(torch.bool)


def _shift_where_scale_is_zero(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A normalisation with a scale of zero returns its shift for every input; in place."""
    if weight is not None and len(zero := weight.eq(0).nonzero().flatten()):
        shift = torch.zeros_like(weight) if bias is None else bias
        out[:, zero] = shift[zero].reshape(-1, *[1] * (out.dim() - 2))
    return out


def _restore_nan(x: Tensor, out: Any) -> Any:
    """The result of an entrywise operation, NaN where its input is."""
    if isinstance(out, Tensor) and out.shape == x.shape and out.is_floating_point():
        return out.masked_fill(x.isnan(), torch.nan)
    return out
