"""int8: static post-training quantisation of an ONNX file, calibrated on training images.

The result is an ONNX file with pairs of QuantizeLinear and DequantizeLinear (QDQ), which ONNX
Runtime and OpenVINO replace by integer kernels. Weights are quantised per output channel,
activations per tensor (R. Krishnamoorthi, Quantizing deep convolutional networks for efficient
inference, arXiv 1806.08342, 2018).

Activations are unsigned: with signed activations, which have zero points, ONNX Runtime's kernels
for x86 are slower than float32, and OpenVINO refuses some networks and computes others wrongly.
Weights use seven of the eight bits, since processors without integer dot products (VNNI) add two
products in 16 bits, which would overflow.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.base import files, optional
from secateur.base.errors import SecateurError, cut
from secateur.base.logs import muted

CALIBRATION_BATCH = 64
"""Images in one pass through the network during calibration."""


def quantise(source: Path, target: Path, images: NDArray[np.float32]) -> None:
    """Write the int8 version of the float32 network in `source` to `target`, in one step.

    `images` are training images, (count, channels, height, width), prepared for the network; they
    determine the smallest and the largest value of every activation. The metadata of the file is
    copied. Raises SecateurError if the file cannot be quantised, and, with the command to install
    it, if onnx or onnxruntime is missing.
    """
    onnx = optional.load("onnx", "to quantise .onnx files")
    package = optional.load("onnxruntime.quantization", "to quantise .onnx files")
    shapes = optional.load("onnxruntime.quantization.shape_inference", "to quantise .onnx files")
    parts = np.array_split(images, -(-len(images) // CALIBRATION_BATCH))
    advice = logging.WARNING  # the quantiser advises a step that is done here already
    with tempfile.TemporaryDirectory() as scratch, muted(advice):
        prepared, quantised = Path(scratch, "prepared.onnx"), Path(scratch, "int8.onnx")
        try:
            shapes.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            package.quantize_static(
                prepared,
                quantised,
                _Reader(onnx.load(prepared).graph.input[0].name, parts),
                quant_format=package.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,  # seven bits
                activation_type=package.QuantType.QUInt8,
                weight_type=package.QuantType.QInt8,
                calibrate_method=package.CalibrationMethod.MinMax,
            )
            model = onnx.load(quantised)
        except Exception as error:  # whatever the quantiser raises for an unsuitable network
            reason = cut(str(error) or type(error).__name__, 200)
            raise SecateurError(f"{source}: cannot be quantised: {reason}") from None
        del model.metadata_props[:]
        model.metadata_props.extend(onnx.load(source).metadata_props)
        files.write_bytes(target, model.SerializeToString())


class _Reader:
    """Feeds ONNX Runtime's calibration with batches of images."""

    def __init__(self, name: str, parts: Sequence[NDArray[np.float32]]) -> None:
        self.name, self.parts = name, iter(parts)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next batch by the name of the network's input; None at the end."""
        part = next(self.parts, None)
        return None if part is None else {self.name: part}
