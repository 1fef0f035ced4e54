"""Times of a network's layers at several widths, measured in the runtime that will run it.

The result is a `pruning.latency.LatencyTable`, from which a pruner predicts the time of narrower
networks. Layers of equal shape are measured once. Weights are random: they do not influence the
time, unless they are denormal numbers.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.base import machine, optional, timing
from secateur.base.optional import RuntimeName
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.deploy import export, runtimes
from secateur.nn import cost
from secateur.nn.hooks import watched_inputs
from secateur.nn.modes import in_eval_mode
from secateur.pruning import removal
from secateur.pruning.latency import LatencyTable, MeasuredLayer, MeasuredNetwork, widths_left
from secateur.sparsity import choices

PARTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Shares of a layer's outputs and inputs at which it is measured."""
NETWORKS = (0.75, 0.5, 0.35, 0.25)
"""Shares of all channel groups that are kept in the networks measured as a whole."""
MULTIPLES = (1, 2, 4, 8, 16)
"""Multiples that widths may be rounded up to; 16 float32 numbers fill the widest registers."""
WASTE = 1.05
"""Factor by which a layer may be slower, on average, with widths rounded up to a multiple."""
LAYER_REPEATS = 15
"""Passes of each layer; for whole networks the number is a setting."""
Pass = Callable[[], object]


@dataclass(frozen=True)
class LayerShape:
    """All that the time of a layer depends on."""

    outputs: int
    inputs: int
    bias: bool
    input_size: tuple[int, ...]
    """Height and width of a convolution's inputs; for a linear layer, its positions if there are
    several."""
    kernel: tuple[int, ...] = ()
    """Empty for a linear layer."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    """Top, left, bottom, right."""
    dilation: tuple[int, ...] = ()
    groups: int = 1
    positions: int = 1
    """Positions of the outputs for one image."""

    @property
    def depthwise(self) -> bool:
        """Whether every input has its own filters."""
        return self.groups > 1 and self.groups == self.inputs

    def narrower(self, outputs: int, inputs: int) -> "LayerShape":
        """This layer with other widths; a depthwise convolution has as many groups as inputs."""
        if not self.depthwise:
            return replace(self, outputs=outputs, inputs=inputs)
        groups = max(1, outputs * self.inputs // self.outputs)
        return replace(self, outputs=outputs, inputs=groups, groups=groups)


def measure(
    model: nn.Module,
    image: Tensor,
    *,
    runtime: RuntimeName,
    batch: int = 1,
    threads: int = 1,
    repeats: int = 100,
    on_step: Callable[[str], object] = lambda _what: None,
) -> LatencyTable:
    """The latency table of a network; `image` is one input, (1, channels, height, width).

    `repeats` is the number of passes of whole networks. `on_step` is called with a description of
    what is measured next. Raises SecateurError if the runtime is not installed or the network
    cannot be exported, PruningError if its channels cannot be followed.
    """
    check_packages([runtime])
    model.eval()
    graph = build_channel_graph(model, image)
    shapes = _shapes(model, graph, image)
    with (
        tempfile.TemporaryDirectory() as folder,
        runtimes.torch_threads(threads),
        torch.random.fork_rng(devices=[]),
    ):
        opener = _Opener(runtime, batch, threads, Path(folder))
        on_step("multiples")
        multiple = _multiple(opener, chain.from_iterable(shapes.values()))
        fixed = _fixed_sides(graph)
        layers: dict[str, MeasuredLayer] = {}
        known: dict[tuple[LayerShape, tuple[bool, bool]], MeasuredLayer] = {}
        for number, (name, calls) in enumerate(shapes.items(), start=1):
            on_step(f"layer {number} of {len(shapes)}")
            for shape in calls:
                key = (shape, fixed[name])
                if key not in known:
                    known[key] = _measure_layer(opener, shape, fixed[name], multiple)
            layers[name] = _together([known[shape, fixed[name]] for shape in calls])
        on_step("whole networks")
        networks = _measure_networks(opener, model, graph, image, multiple, repeats)
    return LatencyTable(
        runtime=runtime,
        batch=batch,
        threads=threads,
        hardware=machine.cpu_name(),
        versions=machine.versions() | {runtime: runtimes.version(runtime)},
        multiple=multiple,
        layers=layers,
        networks=tuple(networks),
    )


def compare(
    networks: Mapping[str, nn.Module],
    image: Tensor,
    *,
    runtime: RuntimeName,
    batch: int,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of each network, taking turns: the shortest of `repeats` passes.

    The shortest, because other work of the machine only makes a pass longer.
    """
    with tempfile.TemporaryDirectory() as folder, runtimes.torch_threads(threads):
        opener = _Opener(runtime, batch, threads, Path(folder))
        passes = {name: opener.network(model, image) for name, model in networks.items()}
        return _shortest(passes, repeats, untimed=1)


def check_packages(names: Iterable[str]) -> None:
    """Raise SecateurError, with the command that installs it, if a runtime is missing."""
    others = [name for name in names if name != "torch"]
    if others:
        export.check_packages()
    runtimes.check_packages(others)


class _Opener:
    """Opens layers and networks in one runtime, as functions without arguments."""

    def __init__(self, runtime: RuntimeName, batch: int, threads: int, folder: Path) -> None:
        self.runtime, self.batch, self.threads, self.folder = runtime, batch, threads, folder
        self.opened = 0

    def layer(self, shape: LayerShape) -> Pass:
        """One layer with random weights and inputs."""
        torch.manual_seed(0)
        module = _module(shape)
        if shape.kernel:
            size = (shape.inputs, *shape.input_size)
        else:
            size = (*shape.input_size, shape.inputs)
        images = torch.randn(self.batch, *size)
        if self.runtime == "torch":
            return _inferring(in_eval_mode(module), images)
        return self._file(_onnx_layer(shape, module, tuple(images.shape)), images)

    def network(self, model: nn.Module, image: Tensor) -> Pass:
        """A whole network, exported by `export`."""
        program = export.trace(model, image.shape[1:])
        images = image.expand(self.batch, *image.shape[1:]).contiguous()
        if self.runtime == "torch":
            return _inferring(program.module(), images)
        return self._file(export.onnx_model(program).SerializeToString(), images)

    def _file(self, content: bytes, images: Tensor) -> Pass:
        self.opened += 1  # a runtime may have the file mapped, so it is not written again
        path = self.folder / f"{self.opened}.onnx"
        path.write_bytes(content)
        run = runtimes.open_model(path, self.runtime, self.threads)
        with contextlib.suppress(OSError):  # some systems do not remove a mapped file
            path.unlink()
        return partial(run, images.numpy())


def _inferring(module: Any, images: Tensor) -> Pass:
    @torch.inference_mode()
    def run() -> None:
        module(images)

    return run


def _module(shape: LayerShape) -> nn.Module:
    if not shape.kernel:
        return nn.Linear(shape.inputs, shape.outputs, shape.bias)
    top, left, bottom, right = shape.padding
    return nn.Conv2d(
        shape.inputs,
        shape.outputs,
        shape.kernel,  # type: ignore[arg-type]
        shape.stride,  # type: ignore[arg-type]
        (max(top, bottom), max(left, right)),
        shape.dilation,  # type: ignore[arg-type]
        shape.groups,
        shape.bias,
    )


def _onnx_layer(shape: LayerShape, module: nn.Module, size: tuple[int, ...]) -> bytes:
    """An ONNX model of one layer, written without torch's exporter, which takes a second."""
    onnx = optional.load("onnx", "to time layers in runtimes of .onnx files")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = module.get_parameter("weight").detach().numpy()
    if not shape.kernel:
        weight = np.ascontiguousarray(weight.T)
    tensors = [numpy_helper.from_array(weight, "weight")]
    if shape.bias:
        tensors.append(
            numpy_helper.from_array(module.get_parameter("bias").detach().numpy(), "bias")
        )
    given = ["x", *(tensor.name for tensor in tensors)]
    if shape.kernel:
        options: dict[str, Any] = {
            "strides": shape.stride,
            "pads": shape.padding,
            "dilations": shape.dilation,
        }
        nodes = [helper.make_node("Conv", given, ["y"], group=shape.groups, **options)]
    else:
        product = "product" if shape.bias else "y"
        nodes = [helper.make_node("MatMul", given[:2], [product])]
        if shape.bias:
            nodes.append(helper.make_node("Add", [product, "bias"], ["y"]))
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, size)],
        [helper.make_tensor_value_info("y", kind, None)],
        tensors,
    )
    version = helper.make_opsetid("", export.OPSET)
    made = helper.make_model(graph, opset_imports=[version], ir_version=10)
    content: bytes = made.SerializeToString()
    return content


def _shapes(
    model: nn.Module, graph: ChannelGraph, image: Tensor
) -> dict[str, tuple[LayerShape, ...]]:
    """The shapes of every layer of the channel graph, one for each of its calls, in order."""
    modules = dict(model.named_modules())
    convolutions = {name: m for name, m in modules.items() if isinstance(m, nn.Conv2d)}
    calls: dict[int, list[tuple[nn.Conv2d, Tensor]]] = {}  # by the id() of the weight

    def note(name: str, given: Tensor) -> None:
        layer = convolutions[name]
        calls.setdefault(id(layer.weight), []).append((layer, given))

    with watched_inputs(convolutions, note):
        positions = cost.positions_by_call(model, image)
    found = {}
    for name, layer in graph.layers.items():
        counts = positions[layer.weight.removesuffix(".weight")]
        widths = (len(layer.outputs), len(layer.inputs), layer.bias is not None)
        own = calls.get(id(getattr(modules.get(name), "weight", None)), [])
        if len(own) == len(counts):
            found[name] = tuple(
                LayerShape(
                    *widths,
                    tuple(given.shape[2:]),
                    tuple(module.kernel_size),
                    tuple(module.stride),
                    _padding(module),
                    tuple(module.dilation),
                    layer.groups,
                    positions=count,
                )
                for (module, given), count in zip(own, counts, strict=True)
            )
        else:
            found[name] = tuple(
                LayerShape(*widths, (count,) if count > 1 else (), positions=count)
                for count in counts
            )
    return found


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Top, left, bottom, right."""
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (total[0] // 2, total[1] // 2, -(-total[0] // 2), -(-total[1] // 2))
    if isinstance(layer.padding, str):
        return (0, 0, 0, 0)
    return (layer.padding[0], layer.padding[1], layer.padding[0], layer.padding[1])


def _fixed_sides(graph: ChannelGraph) -> dict[str, tuple[bool, bool]]:
    """For each layer, whether all of its outputs, and all of its inputs, are locked."""
    free = torch.zeros(len(graph.canonical), dtype=torch.bool)
    for group in graph.groups:
        free[group.ids] = group.locked is None

    def fixed(ids: Tensor) -> bool:
        return not bool(free[graph.canonical[ids[ids >= 0]]].any())

    return {name: (fixed(own.outputs), fixed(own.inputs)) for name, own in graph.layers.items()}


def _multiple(opener: _Opener, shapes: Iterable[LayerShape]) -> int:
    """The largest multiple that widths can be rounded up to at hardly any cost in time.

    It is measured on the two most expensive convolutions or linear layers and the most expensive
    depthwise convolution, at 32 consecutive numbers of outputs.
    """
    span = 2 * MULTIPLES[-1]
    wide = [shape for shape in dict.fromkeys(shapes) if shape.outputs >= 2 * span]
    work = sorted(wide, key=_work)
    probed = [s for s in work if s.groups == 1][-2:] + [s for s in work if s.depthwise][-1:]
    allowed = set(MULTIPLES if probed else MULTIPLES[:1])
    for shape in probed:
        top = min(shape.outputs // 2, 2 * span) // span * span
        widths = range(top - span + 1, top + 1)
        passes = {w: opener.layer(shape.narrower(w, shape.inputs)) for w in widths}
        times = _shortest(passes, 2 * LAYER_REPEATS)
        for multiple in MULTIPLES[1:]:
            waste = [times[-(-width // multiple) * multiple] / times[width] for width in widths]
            if sum(waste) / len(waste) > WASTE:
                allowed.discard(multiple)
    return max(allowed)


def _work(shape: LayerShape) -> int:
    """Multiply-accumulates, up to a stride."""
    per_output = shape.inputs // shape.groups * math.prod(shape.kernel)
    return shape.outputs * per_output * math.prod(shape.input_size)


def _measure_layer(
    opener: _Opener,
    shape: LayerShape,
    fixed: tuple[bool, bool],
    multiple: int,
) -> MeasuredLayer:
    """Times of one layer at all combinations of widths."""
    outputs = _widths(shape.outputs, fixed[0], multiple, 1 if shape.depthwise else shape.groups)
    inputs = _widths(shape.inputs, fixed[1], multiple, shape.groups)
    if shape.depthwise:
        inputs = [shape.inputs]
    passes = {
        (out, into): opener.layer(shape.narrower(out, into)) for out in outputs for into in inputs
    }
    times = _shortest(passes, LAYER_REPEATS)
    ms = tuple(tuple(times[out, into] for into in inputs) for out in outputs)
    return MeasuredLayer(
        outputs=tuple(outputs), inputs=tuple(inputs), ms=ms, positions=shape.positions
    )


def _together(calls: Sequence[MeasuredLayer]) -> MeasuredLayer:
    """The sum over all calls of one layer, which are measured at equal widths."""
    times = torch.tensor([call.ms for call in calls], dtype=torch.float64).sum(0)
    return calls[0].model_copy(
        update={
            "ms": tuple(map(tuple, times.tolist())),
            "positions": sum(call.positions for call in calls),
        }
    )


def _widths(width: int, fixed: bool, multiple: int, groups: int) -> list[int]:
    """Widths at which a side of a layer is measured, ascending."""
    if fixed:
        return [width]
    step = math.lcm(_fine(multiple, width), groups)
    found = {min(width, max(step, round(part * width / step) * step)) for part in PARTS}
    return sorted({*found, width})  # the whole width, which need not be a multiple


def _fine(multiple: int, width: int) -> int:
    """The multiple or, for a narrow side, a quarter of its width."""
    return max(1, min(multiple, width // 4))


def _measure_networks(
    opener: _Opener,
    model: nn.Module,
    graph: ChannelGraph,
    image: Tensor,
    multiple: int,
    repeats: int,
) -> list[MeasuredNetwork]:
    """The given network, and networks that keep a share of all channel groups."""
    widths = [widths_left(graph, {})]
    passes = {0: opener.network(model, image)}
    for share in NETWORKS:
        selection = _narrower(graph, share, multiple)
        own = widths_left(graph, selection)
        if own not in widths:
            small = in_eval_mode(removal.remove(model, selection, image, {}, graph).model)
            passes[len(widths)] = opener.network(small, image)
            widths.append(own)
    times = _shortest(passes, repeats, untimed=1)
    return [MeasuredNetwork(widths=own, ms=times[number]) for number, own in enumerate(widths)]


def _narrower(graph: ChannelGraph, share: float, multiple: int) -> dict[str, Tensor]:
    """A selection that keeps this share of the channels of every group."""
    chosen = {}
    for group in graph.groups:
        if group.locked is None:
            order = torch.arange(group.size, dtype=torch.float32)
            lost = choices.choose_smallest(order, choices.number_pruned(1 - share, group.size))
            lost = choices.keep_at_least(lost, order, multiple=_fine(multiple, group.size))
            chosen[group.name] = lost.nonzero().flatten()
    return graph.removable({name: index for name, index in chosen.items() if len(index)})


def _shortest(passes: Mapping[Any, Pass], repeats: int, untimed: int = 0) -> dict[Any, float]:
    """Milliseconds of the shortest pass of each, taking turns; see `timing.take_turns`.

    For whole networks an untimed pass precedes each timed one, as if the network were the only one
    in use. Otherwise the content of the caches would depend on how many networks take turns.
    """
    times = timing.take_turns(passes, repeats, untimed)
    return {key: min(taken) for key, taken in times.items()}
