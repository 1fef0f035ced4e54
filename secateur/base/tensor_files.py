"""Read safetensors files that Secateur has written: our header, then the tensors.

Everything that the file declares is compared with its length before a tensor is allocated.
Checkpoints, prepared data and resume states use this module; each has its own header schema.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import safetensors
import safetensors.torch
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import Tensor

from secateur.base import files
from secateur.base.documents import parse_json
from secateur.base.errors import SecateurError, cut, shorten

KEY = "secateur"
"""Our header is the JSON text under this key of the file's metadata."""
MAX_HEADER = 2**25
"""Bytes of the file's header, ours included: 32 MiB."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element, by the format's name of the type; other types are rejected."""

MAX_PIXELS = 2**27
"""Limit of values in one image: half a GiB as float32."""

Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
ClassName = Annotated[InstanceOf[str], Field(min_length=1)]
"""Possibly the name of a folder, which need not be valid Unicode."""
Shape = Annotated[list[Annotated[int, Field(ge=1, le=2**27, strict=True)]], Field(max_length=8)]
"""Shape of one image. The schemas of the headers share these types."""

Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """Type, shape and position of a tensor in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: Annotated[list[Size], Field(max_length=8)]
    data_offsets: Annotated[list[Size], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dtype not in BITS:
            raise ValueError(f"elements of type {shorten(self.dtype)}")
        begin, end = self.data_offsets
        if math.prod(self.shape) * BITS[self.dtype] != 8 * (end - begin):
            raise ValueError(
                f"shape {shorten(self.shape)} of {self.dtype} is not {end - begin:,} bytes"
            )
        return self


_ENTRIES = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class TensorFile:
    """Content of a safetensors file."""

    header: Any
    """Our header, parsed but not validated; None if the file does not contain one."""
    tensors: dict[str, Tensor]
    sha256: str
    """Hash of the file."""


def read(
    path: Path, error: type[SecateurError], *, cure: str = "", otherwise: str = ""
) -> TensorFile:
    """Read the whole file into memory and hash it.

    Raises `error` naming the file if it is missing, a pickle, truncated or malformed. `cure` is
    added to the message about a missing file; `otherwise` precedes the reason in other messages.
    """
    content = files.read_bytes(path, error, cure=cure)
    try:
        header = _header(content[: 8 + MAX_HEADER], len(content))
        tensors = safetensors.torch.load(content)
        _check_bools(tensors)
    except Exception as reason:  # safetensors' own types differ between versions
        raise error(f"{path}: {otherwise}{_explain(reason, len(content))}") from None
    return TensorFile(header, tensors, hashlib.sha256(content).hexdigest())


def map_file(
    path: Path, error: type[SecateurError], *, cure: str = "", otherwise: str = ""
) -> TensorFile:
    """Like `read`, but the tensors are mapped from the file, and `sha256` is empty."""
    size = files.file_size(path, error, cure)
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
            beginning += file.read(min(int.from_bytes(beginning, "little"), MAX_HEADER))
        header = _header(beginning, size)
        with safetensors.safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        _check_bools(tensors)
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from None
    except Exception as reason:
        raise error(f"{path}: {otherwise}{_explain(reason, size)}") from None
    return TensorFile(header, tensors, "")


class _HeaderError(ValueError):
    """The file is valid safetensors, but our header in it is not valid."""


def _header(beginning: bytes, size: int) -> Any:
    """Our header, after the format's own header has been compared with the size of the file."""
    is_json = beginning[8:9] == b"{"  # safetensors: eight bytes of length, then JSON
    if not is_json and (beginning[:2] == b"PK" or beginning[:1] == b"\x80"):
        raise _HeaderError(
            "a pickle (torch.save), not safetensors; pickles can run code and are never loaded. "
            "Save the weights with safetensors instead"
        )
    length = int.from_bytes(beginning[:8], "little")
    if size < 8 or length > size - 8:
        raise ValueError("its header is incomplete")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    header = parse_json(beginning[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", None)
    entries = _ENTRIES.validate_python(header)
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length:,} bytes of data, where {end:,} are declared")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        return None
    try:
        return parse_json(metadata[KEY])
    except ValueError as reason:
        raise _HeaderError(f"its header cannot be read: {cut(str(reason), 200)}") from None


def _explain(reason: Exception, size: int) -> str:
    """What is wrong with a file, in words."""
    if isinstance(reason, _HeaderError):
        return str(reason)
    words = str(reason) or type(reason).__name__
    if isinstance(reason, ValidationError):
        first = reason.errors(include_url=False)[0]
        place = ".".join(cut(str(part), 60) for part in first["loc"])
        words = f"{place}: {first['msg'].removeprefix('Value error, ')}"
    whole = f"not a whole safetensors file ({size} bytes; truncated or foreign)"
    return f"{whole}: {cut(words, 200)}"


def _check_bools(tensors: dict[str, Tensor]) -> None:
    """_HeaderError if a boolean has a byte other than 0 and 1, which torch leaves undefined."""
    for name, tensor in tensors.items():
        if (
            tensor.dtype == torch.bool
            and tensor.numel()
            and int(tensor.view(torch.uint8).max()) > 1
        ):
            raise _HeaderError(f"{cut(name)}: bytes that are neither true nor false")
