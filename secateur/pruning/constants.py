"""Values in a network that are the same for every input.

They are found by one forward pass in which NaN stands for "depends on the input". Known values are
computed by the layers themselves, so that biases, normalisations, activations, pooling and padded
borders are all included. In a product, a known zero wins over NaN.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from secateur.channels import operators
from secateur.channels.groups import by_channel
from secateur.nn.layers import ChannelSelect
from secateur.nn.outputs import tensors_of


class ConstantPropagation(fx.Interpreter):
    """Runs a traced network with NaN as its input, and records the inputs of its layers.

    The properties of operations in `channels.operators` determine how they treat unknown values.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.inputs: dict[str, list[LayerInput]] = {}
        """Layer or index buffer -> its input at each call."""
        self.result: Any = None
        """What the network returns."""
        self.least_factor = 2
        """How much larger an image must be for every kernel to fit into its input; 2 at least."""
        self._names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, graph: fx.Graph, example: Tensor) -> "ConstantPropagation":
        """Run a network in eval mode; of the example only shape, type and device matter."""
        propagation = cls(model, graph)
        two = example.new_full((2, *example.shape[1:]), torch.nan)  # one image hides its axis
        propagation.result = propagation.run(two)
        return propagation

    @classmethod
    def at_two_sizes(
        cls, model: nn.Module, graph: fx.Graph, example: Tensor
    ) -> list["ConstantPropagation"]:
        """As `of` at the size of the example, and at a larger one if the network takes it.

        In a small image, inputs of a few pixels hide most weights of a padded kernel, and means
        over pixels have another value. The second is left out if no layer has a constant input at
        the first.
        """
        first = cls.of(model, graph, example)
        constant = [call.constant for calls in first.inputs.values() for call in calls]
        if example.dim() != 4 or not any(bool(channels.any()) for channels in constant):
            return [first]
        (height, width), by = example.shape[2:], first.least_factor
        # an odd size has other borders at strides; some networks take multiples of a size only
        for size in ((by * height + 1, by * width + 1), ((by + 1) * height, (by + 1) * width)):
            try:
                second = cls.of(model, graph, example.new_empty(1, example.shape[1], *size))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # of any type: flattened images that do not fit, assertions
                continue
            if _lengths(second.result) == _lengths(first.result):
                return [first, second]  # otherwise a view has made a batch of the larger image
        return [first]

    def run_node(self, n: fx.Node) -> Any:
        """Run a node without the traces that fx keeps for it, which cost as much as most rules."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module. Most return NaN for NaN; where a module does not, NaN is restored."""
        module, x = self.submodules[target], args[0]
        operator = operators.find(type(module))
        if isinstance(module, nn.Conv2d):
            return self._through(module._conv_forward, x, module.weight, module.bias)
        if isinstance(module, nn.Linear):
            return self._through(functional.linear, x, module.weight, module.bias)
        if isinstance(module, ChannelSelect):
            self._note(self._names[id(module.index)], x, 1)
        if operator.scales_channels:
            if getattr(module, "running_mean", None) is not None:
                out = super().call_module(target, args, kwargs)
            else:  # it normalises by statistics of its input
                out = torch.full_like(x, torch.nan)
            return _shift_where_scale_is_zero(out, module.weight, module.bias)
        varies = x.isnan() if operator.elementwise and not operator.keeps_nan else None
        out = super().call_module(target, args, kwargs)
        return out if varies is None else _restore_nan(x, varies, out)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a function by the properties of its operator."""
        return self._call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a method by the properties of its operator."""
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
        if operator.contracts:
            return _products(lambda *operands: run(target, operands, kwargs), args)
        if operator.averages:
            return _averages(lambda *operands: run(target, operands, kwargs), args)
        if operator.elementwise and isinstance(args[0], Tensor):
            varies = args[0].isnan()
            return _restore_nan(args[0], varies, run(target, args, kwargs))
        if operator.multiplies:
            zeros = [torch.as_tensor(factor) == 0 for factor in args[:2]]
            out = run(target, args, kwargs)
            if isinstance(out, Tensor):
                for zero in zeros:
                    out = _filled(args[0], out, zero.to(out.device).expand(out.shape), 0.0)
            return out
        return run(target, args, kwargs)

    def _through(self, run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A convolution or linear layer; `run(x, weight, bias)` computes it."""
        name = self._names[id(weight)].removesuffix(".weight")
        if weight.dim() == 2:
            self._note(name, x, -1)
            return _through_linear(run, x, weight, bias)
        for kernel, side in zip(weight.shape[2:], x.shape[2:], strict=True):
            self.least_factor = max(self.least_factor, -(-kernel // side))
        return _through_convolution(run, x, self._note(name, x, 1), weight, bias)

    def _note(self, name: str, x: Tensor, axis: int) -> "LayerInput":
        found = LayerInput.of(x, axis)
        self.inputs.setdefault(name, []).append(found)
        return found


@dataclass(frozen=True)
class LayerInput:
    """What is known about the input of a layer, by channel: bool, (channels,)."""

    values: Tensor | None
    """The input for two images, NaN where it varies; None if only zeros are known."""
    zero: Tensor
    """Channels that are zero in every position."""
    constant: Tensor
    """Channels with one value, whatever the network's input and the position."""
    varying: Tensor
    """Channels that depend on the network's input in every position."""

    @classmethod
    def of(cls, x: Tensor, axis: int) -> "LayerInput":
        """From an input with NaN where it varies; `axis` is that of the channels."""
        rows = by_channel(x, axis)
        high, low = rows.amax(dim=1), rows.amin(dim=1)  # NaN if one entry is
        zero, constant = (high == 0) & (low == 0), ~high.isnan()
        # a copy, since an in-place operation may follow; copies of all inputs would fill the memory
        values = x.clone() if bool((constant & ~zero).any()) else None
        least = rows.nan_to_num(nan=torch.inf).amin(dim=1)  # finite if one entry is a number
        return cls(values, zero, constant, least.isinf())


def _lengths(result: Any) -> list[int]:
    """Number of images in each tensor that a network returns."""
    return [len(tensor) if tensor.dim() else 0 for tensor in tensors_of(result)]


def _through_linear(run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An output varies where a varying input meets a non-zero weight."""
    varying = x.isnan()
    out: Tensor = run(x.masked_fill(varying, 0.0), weight, bias)
    count = run(varying.to(x.dtype), weight.bool().to(x.dtype), None)
    return out.masked_fill(count > 0.5, torch.nan)


def _products(run: Any, args: Any) -> Tensor:
    """Sums of products vary where a varying entry meets a non-zero one."""
    a, b = (number for number, value in enumerate(args) if isinstance(value, Tensor))

    def of(x: Tensor, y: Tensor) -> Tensor:
        operands = list(args)
        operands[a], operands[b] = x, y
        result: Tensor = run(*operands)
        return result

    x, y = args[a], args[b]
    varies = x.isnan(), y.isnan()
    counts = varies[0].to(x.dtype), varies[1].to(x.dtype)
    out = of(x.masked_fill(varies[0], 0.0), y.masked_fill(varies[1], 0.0))
    count = of(counts[0], y.ne(0).to(y.dtype)) + of(x.ne(0).to(x.dtype), counts[1])  # NaN != 0
    return out.masked_fill(count > 0.5, torch.nan)


def _averages(run: Any, args: Any) -> Tensor:
    """Attention varies, except where values are equal at all positions, as weights sum to one."""
    if not any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in args):
        out: Tensor = run(*args)
        return out
    query, value = args[0], args[2]
    first = value[..., :1, :]
    equal = (value == first).all(dim=-2, keepdim=True) & (len(args) < 4 or args[3] is None)
    known = torch.where(equal, first, torch.nan)
    return known.expand(*query.shape[:-1], value.shape[-1]).clone()  # it may change in place


def _through_convolution(
    run: Any, x: Tensor, found: LayerInput, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """As `_through_linear`, but only channels that are known in part need their own convolution.

    Channels that vary everywhere make an output vary wherever its filter has a weight for one of
    them, so that one convolution of ones is enough; only constant channels are convolved with
    values.
    """
    groups = x.shape[1] // weight.shape[1]
    nonzero = weight.bool()  # many times faster than `ne`
    count: Tensor | None = None  # varying inputs that each output sums over, above 0.5 if any
    if bool(found.varying.any()):
        count = _varying_outputs(run, x, found.varying, nonzero)
    if bool((mixed := ~found.constant & ~found.varying).any()):
        inputs, columns = _of_channels(x, nonzero.to(x.dtype), mixed, groups)
        more = run(inputs.isnan().to(x.dtype), columns, None)
        count = more if count is None else count + more
    known = ~found.zero & ~found.varying
    if count is None or bool(known.any()):
        inputs, columns = _of_channels(x, weight, known, groups)
        out: Tensor = run(inputs.masked_fill(inputs.isnan(), 0.0), columns, bias)
        return out if count is None else out.masked_fill(count > 0.5, torch.nan)
    shift = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
    return shift[:, None, None].expand_as(count).masked_fill(count > 0.5, torch.nan)


def _varying_outputs(run: Any, x: Tensor, varying: Tensor, nonzero: Tensor) -> Tensor:
    """Above 0.5 where an output has a weight for a channel that varies everywhere.

    `varying` is bool, (channels,); `nonzero` bool, in the weight's shape.
    """
    filters, groups = len(nonzero), x.shape[1] // nonzero.shape[1]
    rows = varying.reshape(groups, 1, -1).expand(-1, filters // groups, -1)
    taps = nonzero if bool(rows.all()) else nonzero & rows.reshape(filters, -1, 1, 1)
    taps = _any(taps, dim=1).to(x.dtype)
    alike = bool(taps.all())  # all filters give the same result
    if alike:
        taps = taps[:groups]
    count: Tensor = run(torch.ones_like(x[:, :groups]), taps, None)
    return count[:, :1].expand(-1, filters, -1, -1) if alike and groups < filters else count


def _of_channels(x: Tensor, weight: Tensor, channels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The input and the weight of a convolution reduced to some channels, bool, (channels,).

    With several groups, all keep the k-th channel if one does. At least the first channel is kept.
    """
    channels = channels.reshape(groups, -1).any(dim=0)
    channels[0] = channels[0] | ~channels.any()
    if not bool(channels.all()):
        weight = weight[:, channels]
    return x[:, channels.repeat(groups)], weight


def _any(x: Tensor, dim: int) -> Tensor:
    """`x.any(dim, keepdim=True)` for bool, many times faster."""
    return x.view(torch.uint8).amax(dim=dim, keepdim=True).view(torch.bool)


def _shift_where_scale_is_zero(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Set channels of a normalisation whose scale is zero to their shift, in place."""
    if weight is not None and len(zero := weight.eq(0).nonzero().flatten()):
        shift = torch.zeros_like(weight) if bias is None else bias
        out[:, zero] = shift[zero].reshape(-1, *[1] * (out.dim() - 2))
    return out


def _restore_nan(x: Tensor, varies: Tensor, out: Any) -> Any:
    """The result of an elementwise operation, with NaN where its input `x` was NaN."""
    if isinstance(out, Tensor) and out.shape == x.shape and out.is_floating_point():
        return _filled(x, out, varies & ~out.isnan(), torch.nan)
    return out


def _filled(x: Any, out: Tensor, where: Tensor, value: float) -> Tensor:
    """The result of an operation with other entries; in place if it shares the memory of `x`."""
    if not bool(where.any()):
        return out
    shared = isinstance(x, Tensor) and x.untyped_storage()._cdata == out.untyped_storage()._cdata
    return out.masked_fill_(where, value) if shared else out.masked_fill(where, value)
