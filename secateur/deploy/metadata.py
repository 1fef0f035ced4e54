"""Metadata of exported files: classes, normalisation, and origin."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from secateur import __version__
from secateur.base import files, optional
from secateur.base.documents import parse_json, validated
from secateur.base.errors import CheckpointError, cut
from secateur.base.tensor_files import ClassName, Finite, Positive, Shape
from secateur.deploy import pt2_archive
from secateur.nn.checkpoint import Header

PT2_FILE = "secateur.json"
"""Name of the metadata in a .pt2 archive, below `extra/`."""
LISTS = ("classes", "shape", "mean", "std", "resize")
"""Fields that are JSON in an .onnx file, where every property is text."""

Preprocessing = Literal["outside", "inside"]


@dataclass(frozen=True)
class Metadata:
    """Metadata of an exported file. The annotations are the schema; it contains no times."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    classes: list[ClassName]
    """Names in the order of the logits."""
    shape: Shape
    """Channels, height and width of an image."""
    mean: list[Finite]
    std: list[Positive]
    """Mean and standard deviation by channel, or one for all, of pixels in [0, 1]."""
    preprocessing: Preprocessing
    """outside: the input is (pixel / 255 - mean) / std; inside: pixels from 0 to 255, as float32.
    """
    sha256: str
    """Hash of the safetensors file that the network comes from."""
    arch: str
    resize: int | None
    """Pixels of a picture's shorter side before the centre is cut out; None: size of the image."""
    split: str
    """Hash of the images and their division into train, val and test."""
    fingerprint: str = ""
    """Fingerprint of the stage that made the safetensors file, from its run record."""
    experiment: str = ""
    """DVC experiment in which the safetensors file was made."""
    revision: str = ""
    """Git commit on which the safetensors file was made."""
    secateur: str = __version__

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self), sort_keys=True)

    def to_text(self) -> dict[str, str]:
        """Key -> text, in alphabetic order; lists as JSON."""
        plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(self).items()}
        return dict(sorted(plain.items()))


_METADATA = TypeAdapter(Metadata)


def from_header(
    header: Header,
    sha256: str,
    preprocessing: Preprocessing,
    *,
    resize: int | None = None,
    **origin: str,
) -> Metadata:
    """Metadata of the network of a checkpoint; `origin` has fields from its run record.

    `resize` defaults to that of the checkpoint.
    """
    return Metadata(
        classes=header.classes,
        shape=header.shape,
        mean=header.mean,
        std=header.std,
        preprocessing=preprocessing,
        sha256=sha256,
        arch=header.arch,
        resize=header.resize if resize is None else resize,
        split=header.split,
        **origin,
    )


def read(path: Path) -> Metadata:
    """Metadata of an .onnx or .pt2 file.

    Raises CheckpointError, naming the file, if it is missing or was not written by Secateur.
    """
    files.file_size(path, CheckpointError)
    plain = pt2_archive.read_extra(path, PT2_FILE) if path.suffix == ".pt2" else _from_onnx(path)
    if plain is None:
        raise CheckpointError(f"{path}: it has no metadata of Secateur, which did not export it")
    return validated(_METADATA, plain, f"{path}: its metadata cannot be read", CheckpointError)


def _from_onnx(path: Path) -> Any:
    package = optional.load("onnxruntime", "to read .onnx files")
    options = package.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = package.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = package.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = dict(session.get_modelmeta().custom_metadata_map)
    except Exception as error:  # ONNX Runtime's own types
        raise CheckpointError(f"{path}: cannot be opened: {cut(str(error), 200)}") from None
    if "secateur" not in found:
        return None
    try:
        return found | {key: parse_json(found[key]) for key in LISTS}
    except (KeyError, ValueError) as error:
        reason = f"{error}: missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: its metadata cannot be read: {reason}") from None
