"""Export of networks to ONNX and to torch.export programs, both from one trace.

Equal networks with equal metadata give equal bytes: the files contain no paths of this machine, no
times and no example inputs.
"""

import copy
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur.base import optional
from secateur.base.errors import SecateurError, cut
from secateur.base.logs import muted
from secateur.data.batches import scale_and_shift
from secateur.deploy import stack_traces
from secateur.deploy.metadata import PT2_FILE, Metadata
from secateur.nn.modes import in_eval_mode

INPUT, OUTPUT = "images", "logits"
"""Names in the ONNX graph: float32 (batch, channels, height, width) and (batch, classes)."""
ONNX, PT2 = "model.onnx", "model.pt2"
"""Names of the files in an exported model's folder."""
OPSET = 20
"""Version of ONNX's operators: the one that torch's exporter writes without a conversion."""
MAX_ONNX = 2**31 - 1
"""Largest size of a protobuf message in bytes."""


class PixelNetwork(nn.Module):
    """A network that takes decoded pixels, from 0 to 255, and normalises them itself.

    The arithmetic is that of `data.batches.Normalise`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std`, one value per channel or one for all, are those of pixels in [0, 1]."""
        super().__init__()
        self.network = network
        scale, shift = scale_and_shift(mean, std)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) -> (N, classes)."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return logits


def check_packages() -> None:
    """Raise SecateurError, with the command that installs it, if a package is missing."""
    for name in ("onnx", "onnxscript"):
        optional.load(name, "to write .onnx files")
    optional.load("onnxruntime", "to prove that an .onnx file computes what the network computes")


def write(
    model: nn.Module, shape: Sequence[int], metadata: Metadata, folder: Path
) -> dict[str, Path]:
    """Write `model.onnx` and `model.pt2` into an existing folder; returns suffix -> path.

    `shape` is that of one image: channels, height, width. Raises SecateurError if the network
    cannot be traced, or is larger than 2 GiB.
    """
    program = trace(model, shape)
    content = {ONNX: onnx_bytes(program, metadata), PT2: pt2_bytes(program, metadata)}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return {Path(name).suffix: folder / name for name in content}


def trace(model: nn.Module, shape: Sequence[int]) -> ExportedProgram:
    """The network's operations for any number of images, on the CPU, in eval mode and float32.

    The example has two images: with a single image, torch would treat the batch size as a constant.
    Raises SecateurError with torch's reason if the network cannot be traced.
    """
    example, network = torch.zeros(2, *shape), in_eval_mode(copy.deepcopy(model)).cpu().float()
    network.requires_grad_(False)  # or the exporter prepares for gradients, which takes time
    batch = torch.export.Dim("batch")
    try:
        with muted(logging.WARNING, warn=False), stack_traces.omitted():
            program = torch.export.export(
                network, (example,), dynamic_shapes=({0: batch},), strict=False
            )
    except Exception as error:  # whatever tracing raises for code that it cannot follow
        reason = cut(str(error) or type(error).__name__, 300)
        raise SecateurError(f"the network cannot be exported: {reason}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    program._example_inputs = None  # would be a pickle within the archive
    return program


def pt2_bytes(program: ExportedProgram, metadata: Metadata) -> bytes:
    """The archive of torch.export, which holds tensors as plain bytes and JSON: no pickles."""
    archive = io.BytesIO()
    with muted(logging.WARNING, warn=False):
        torch.export.save(program, archive, extra_files={PT2_FILE: metadata.to_json()})
    return archive.getvalue()


def onnx_bytes(program: ExportedProgram, metadata: Metadata) -> bytes:
    """The ONNX model, with `metadata` among its properties, one key for each field."""
    model = onnx_model(program)
    model.producer_name, model.producer_version = "secateur", metadata.secateur
    for key, value in metadata.to_text().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    if model.ByteSize() > MAX_ONNX:
        raise SecateurError("the network has more than 2 GiB, which one ONNX file cannot hold")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def onnx_model(program: ExportedProgram) -> Any:
    """The ONNX model (a ModelProto) without metadata."""
    check_packages()
    with muted(logging.WARNING, warn=False), stack_traces.omitted():
        converted: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    model = converted.model_proto
    for part in _parts(model.graph):
        del part.metadata_props[:]  # details of the trace, with paths of this machine
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # intermediate shapes, which runtimes infer themselves
    return model


def _parts(graph: Any) -> Iterator[Any]:
    """The graph and all its parts that may have properties."""
    yield graph
    for part in (graph.node, graph.initializer, graph.input, graph.output):
        yield from part
