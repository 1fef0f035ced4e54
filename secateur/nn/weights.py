"""Weights that were saved elsewhere: read from any of the usual formats, matched, and loaded.

Formats: safetensors; what `torch.save` writes (.pt, .pth, .pth.tar, .bin), whether it is a state
dict, a dictionary around one, or a whole pickled network; a folder as Hugging Face's hub has it.
No code that a file names is imported or called.
"""

import hashlib
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base import files, tensor_files
from secateur.base.documents import read_json
from secateur.base.errors import CheckpointError, cut
from secateur.base.stage import content_hash
from secateur.nn import checkpoint
from secateur.nn.checkpoint import Checkpoint

ENTRIES = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params",
    "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
"""Keys under which dictionaries keep a state dict; the first that has one is taken."""
MAX_PICKLE = 2**26
"""Bytes of the pickle in a file of torch.save, tensors not counted: 64 MiB."""
MAX_COLLECTIONS = 20
"""Foreign classes of dictionaries and lists in one file; it is read once more for each of them."""
MAX_PARTS, MAX_NAME = 100_000, 1000
"""Modules and tensors of a pickled network, each counted as often as it has a name; characters."""


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what their source says about the images that they expect."""

    source: str
    """The file, folder or published name, for messages."""
    tensors: dict[str, Tensor]
    sha256: str = ""
    """Of the file or files."""
    mean: tuple[float, ...] = ()
    """By channel, of pixels in [0, 1]; empty if the source does not say."""
    std: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    """Height and width of an image."""
    checkpoint: Checkpoint | None = None
    """The whole content, if Secateur has written the file."""


def read(path: Path) -> Weights:
    """Read a file, or a folder in the layout of Hugging Face's hub.

    Raises CheckpointError naming the file if it is missing, damaged, of no known format, or has no
    tensors.
    """
    if files.is_folder(path, CheckpointError):
        return _read_folder(path)
    size = files.file_size(path, CheckpointError)
    if size > files.MEMORY:
        raise CheckpointError(f"{path}: {size:,} bytes; at most {files.MEMORY:,} are read")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _read_torch(path)
    raise CheckpointError(
        f"{path}: neither safetensors nor written by torch.save ({size:,} bytes; another format, "
        "or damaged)"
    )


def _read_safetensors(path: Path) -> Weights:
    found = tensor_files.read(path, CheckpointError)
    if found.header is not None:
        own = checkpoint.parse(path, found)
        height_width = own.header.shape[1:]
        return Weights(
            str(path),
            own.tensors,
            own.sha256,
            tuple(own.header.mean),
            tuple(own.header.std),
            (height_width[0], height_width[1]) if len(height_width) == 2 else None,
            own,
        )
    return Weights(str(path), _plain(path, found.tensors), found.sha256)


def check_published(path: Path, found: Weights, digest: str) -> None:
    """CheckpointError unless the sha256 of a file in a library's cache begins with `digest`."""
    if not found.sha256.startswith(digest):
        raise CheckpointError(
            f"{path}: not the file that was published: its sha256 begins with "
            f"{found.sha256[:8]}, not {digest[:8]}; delete it, and it is downloaded again"
        )


# -- files of torch.save ---------------------------------------------------------------------------


class _Inert:
    """Stands for every class and function that a file names and that is no part of a tensor.

    It accepts what the file gives it and does nothing.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertDict(_Inert):
    """Stands for a class of dictionaries, such as defaultdict: makes ordinary ones."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _InertList(_Inert):
    """Stands for a class of lists, such as deque: makes ordinary ones."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


_FILLED = re.compile(r"Can only (SETITEM|append|extend).* but got <class '[\w.]*\.Inert(\d+)'>")
"""torch's refusal to fill an inert object with items, and the number of its class."""


def _read_torch(path: Path) -> Weights:
    try:
        content = _unpickle(path)
        found = _find_tensors(content)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises errors of many types for damaged files
        raise CheckpointError(
            f"{path}: cannot be read: {_explain(error, zipfile.is_zipfile(path))}"
        ) from None
    if found is None:
        raise CheckpointError(
            f"{path}: no weights in it: neither a dictionary of tensors nor one under "
            f"{', '.join(ENTRIES[:4])}"
        )
    entry, tensors = found
    source = f"{path} ({entry})" if entry else str(path)
    return Weights(source, _plain(path, tensors), content_hash(path))


def _unpickle(path: Path) -> Any:
    """The object in a file of torch.save, read with `weights_only`.

    Classes and functions that torch does not know are replaced by `_Inert` instead of imported, so
    that a state dict beside a pickled network can be read.
    """
    named: list[str] = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        whole = sum(sizes.values())
        if (
            whole > files.MEMORY
            or max((size for name, size in sizes.items() if name.endswith("data.pkl")), default=0)
            > MAX_PICKLE
        ):
            raise CheckpointError(f"{path}: {whole:,} bytes when unpacked; that is too much")
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return _load_inert(path, named)


def _load_inert(path: Path, named: Sequence[str]) -> Any:
    """The object in a file, with an inert class in the place of each of these names.

    Which of them are dictionaries or lists shows when the file fills them with items.
    """
    bases: list[type[_Inert]] = [_Inert] * len(named)
    while True:
        inert: list[Any] = [
            (type(f"Inert{number}", (base,), {}), name)
            for number, (base, name) in enumerate(zip(bases, named, strict=True))
        ]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(inert):
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            filled = _FILLED.search(str(error))
            if filled is None or len(named) - bases.count(_Inert) == MAX_COLLECTIONS:
                raise
            bases[int(filled[2])] = _InertDict if filled[1] == "SETITEM" else _InertList


def _find_tensors(
    content: Any, entry: str = "", seen: set[int] | None = None
) -> tuple[str, dict[str, Tensor]] | None:
    """The state dict in what a file held, and the key that it was found under.

    `seen` are the ids of dictionaries that have been searched: one may contain itself.
    """
    if isinstance(content, _Inert):
        tensors = dict(_tensors_of_network(content))
        return (entry or "network", tensors) if tensors else None
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen:
        return None
    seen.add(id(content))
    for key in ENTRIES:  # dict.get, since an attribute that the file gives it may be called `get`
        if (found := _find_tensors(dict.get(content, key), key, seen)) is not None:
            return found
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return (entry, tensors) if tensors else None


def _tensors_of_network(network: _Inert) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a pickled network, by the names of `state_dict`.

    ValueError if it has more than MAX_PARTS parts or longer names than MAX_NAME, as one that
    contains itself.
    """
    waiting, count = [("", network)], 0
    while waiting:
        prefix, module = waiting.pop()
        state = module.state if isinstance(module.state, dict) else {}
        transient = state.get("_non_persistent_buffers_set") or ()
        children = []
        for kind in ("_parameters", "_buffers", "_modules"):
            own = state.get(kind)
            for name, value in own.items() if isinstance(own, dict) else ():
                count += 1
                if count > MAX_PARTS or len(prefix) > MAX_NAME:
                    raise ValueError("the network in it has too many parts, or contains itself")
                if kind == "_modules" and isinstance(value, _Inert):
                    children.append((f"{prefix}{name}.", value))
                elif isinstance(value, Tensor) and name not in transient:
                    yield f"{prefix}{name}", value
        waiting += reversed(children)


def _plain(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, detached; CheckpointError for one that is not an ordinary tensor in memory."""
    for name, tensor in tensors.items():
        kind = ""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = f"{str(tensor.layout).removeprefix('torch.')} on {tensor.device}"
        elif tensor.nbytes > tensor.untyped_storage().nbytes():  # would grow when it is copied
            kind = f"{tensor.numel():,} elements that share memory"
        if kind:
            raise CheckpointError(f"{path}: {cut(name)}: not an ordinary tensor ({kind})")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _explain(error: Exception, is_zip: bool) -> str:
    """What is wrong with a file of torch.save, in words."""
    text = str(error)
    if (isinstance(error, OSError) and error.strerror) or "central directory" in text:
        return "truncated or damaged"  # torch reads beyond the end of an archive without a list
    if text.startswith("Weights only load failed"):  # around the reason: advice to load unchecked
        text = text.partition("WeightsUnpickler error:")[2] or text.partition("\n")[2]
    text = " ".join(text.split())
    for end in (". Please ", "Check the documentation"):
        text = text.partition(end)[0]
    if not is_zip and "Unsupported global" in text:
        name = cut(text.partition("GLOBAL ")[2].partition(" was")[0], 60)
        return (
            f"{name} is pickled in it, in the format of torch before 1.6, where classes cannot be "
            "passed over; with its code at hand, save the state dict alone"
        )
    return cut(text.strip() or type(error).__name__, 200)


# -- folders of Hugging Face's hub -----------------------------------------------------------------


def _read_folder(folder: Path) -> Weights:
    """`model.safetensors`, its parts, or `pytorch_model.bin`, with the expectations of the image
    from `config.json` (timm) or `preprocessor_config.json` (transformers)."""
    index = folder / "model.safetensors.index.json"
    parts = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    if index.is_file():
        listed = read_json(index, CheckpointError)
        names = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(names, dict) or not all(_is_file_name(n) for n in names.values()):
            raise CheckpointError(f"{index}: weight_map: a table of file names is needed")
        parts = [folder / name for name in sorted(set(names.values()))]
    else:
        parts = [part for part in parts if part.is_file()][:1]
    if not parts:
        raise CheckpointError(
            f"{folder}: neither model.safetensors nor pytorch_model.bin is in it; name the file"
        )
    read_parts = [read(part) for part in parts]
    if len(parts) == 1 and read_parts[0].checkpoint is not None:
        return read_parts[0]
    tensors = {name: t for part in read_parts for name, t in part.tensors.items()}
    sha256 = hashlib.sha256("".join(part.sha256 for part in read_parts).encode()).hexdigest()
    return replace(describe(folder), tensors=tensors, sha256=sha256)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name != ".." and 0 < len(name) < 256


def describe(folder: Path) -> Weights:
    """What the configuration files of a hub's folder say about the images; without tensors."""
    config: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name, CheckpointError)
            if not isinstance(found, dict):
                raise CheckpointError(f"{folder / name}: an object is needed")
            config |= found
    known = config.get("pretrained_cfg")
    if isinstance(known, dict):  # timm
        return from_config(
            str(folder), known.get("mean"), known.get("std"), known.get("input_size")
        )
    size = config.get("crop_size") or config.get("size")
    if isinstance(size, dict):
        size = [3, size.get("height"), size.get("width")]
    elif isinstance(size, int):
        size = [3, size, size]
    return from_config(str(folder), config.get("image_mean"), config.get("image_std"), size)


def from_config(source: str, mean: Any, std: Any, size: Any) -> Weights:
    """Weights without tensors, with the expectations that a configuration has, where it is valid.

    `size` is (channels, height, width).
    """

    def numbers(value: Any, least: float) -> tuple[float, ...]:
        good = isinstance(value, list | tuple) and all(
            isinstance(v, int | float) and math.isfinite(v) and v >= least for v in value
        )
        return tuple(float(v) for v in value) if good else ()

    means, stds = numbers(mean, -1e6), numbers(std, 1e-6)
    if len(means) != len(stds):
        means = stds = ()
    sides = numbers(size, 1)[1:]
    fits = len(sides) == 2
    return Weights(source, {}, "", means, stds, (int(sides[0]), int(sides[1])) if fits else None)
