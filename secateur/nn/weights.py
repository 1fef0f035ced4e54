"""Read weights that other programs have saved, in any of the usual formats.

Formats: safetensors; files of `torch.save` (.pt, .pth, .pth.tar, .bin) with a state dict, a
dictionary that contains one, or a whole pickled network; a folder in the layout of Hugging Face's
hub. No code that a file names is imported or called.
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
from secateur.base.files import content_hash
from secateur.nn import checkpoint
from secateur.nn.checkpoint import Checkpoint

ENTRIES = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params",
    "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
"""Keys under which dictionaries may contain a state dict; the first that does is used."""
MAX_PICKLE = 2**26
"""Limit for the pickle in a file of torch.save, without the tensors: 64 MiB."""
MAX_COLLECTIONS = 20
"""Limit of unknown dictionary and list classes in one file, which is read once more for each."""
MAX_PARTS, MAX_NAME = 100_000, 1000
"""Limits for a pickled network: names of modules and tensors; characters of a name."""


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what their source says about the images that the network expects."""

    source: str
    """The file, folder or published name, for messages."""
    tensors: dict[str, Tensor]
    sha256: str = ""
    """Hash of the file or files."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, for pixels in [0, 1]; empty if the source does not say."""
    std: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    """Height and width of an image."""
    checkpoint: Checkpoint | None = None
    """The whole checkpoint, if Secateur has written the file."""


def read(path: Path) -> Weights:
    """Read a file, or a folder in the layout of Hugging Face's hub.

    Raises CheckpointError naming the file if it is missing, damaged, of an unknown format, or
    contains no tensors.
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
    """Replaces every class and function that a file names, except those that make up tensors.

    It accepts any arguments and state, and does nothing.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertDict(_Inert):
    """Replaces a dictionary class, such as defaultdict, by an ordinary one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _InertList(_Inert):
    """Replaces a list class, such as deque, by an ordinary list."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


_FILLED = re.compile(r"Can only (SETITEM|append|extend).* but got <class '[\w.]*\.Inert(\d+)'>")
"""torch's error if an inert object is to be filled with items; it has the number of the class."""


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

    Classes and functions that torch does not allow are not imported but replaced by `_Inert`, so
    that a state dict can be read even if the file contains other pickled objects.
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
    """The object in a file, with an inert class in place of each of these names.

    Whether a class is a dictionary or a list is only known once the file fills it with items.
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
    """The state dict in the content of a file, and the key under which it was found.

    `seen` has the ids of the dictionaries already searched, since one may contain itself.
    """
    if isinstance(content, _Inert):
        tensors = dict(_tensors_of_network(content))
        return (entry or "network", tensors) if tensors else None
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen:
        return None
    seen.add(id(content))
    for key in ENTRIES:  # dict.get, since the file may give it an attribute called `get`
        if (found := _find_tensors(dict.get(content, key), key, seen)) is not None:
            return found
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return (entry, tensors) if tensors else None


def _tensors_of_network(network: _Inert) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a pickled network, by the names of `state_dict`.

    ValueError if it has more than MAX_PARTS parts or names longer than MAX_NAME, as a network that
    contains itself has.
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
        elif tensor.nbytes > tensor.untyped_storage().nbytes():  # would grow if copied
            kind = f"{tensor.numel():,} elements that share memory"
        if kind:
            raise CheckpointError(f"{path}: {cut(name)}: not an ordinary tensor ({kind})")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _explain(error: Exception, is_zip: bool) -> str:
    """What is wrong with a file of torch.save, in words."""
    text = str(error)
    if (isinstance(error, OSError) and error.strerror) or "central directory" in text:
        return "truncated or damaged"  # torch reads past the end of an archive without a directory
    if text.startswith("Weights only load failed"):  # the rest is advice to load without checks
        text = text.partition("WeightsUnpickler error:")[2] or text.partition("\n")[2]
    text = " ".join(text.split())
    for end in (". Please ", "Check the documentation"):
        text = text.partition(end)[0]
    if not is_zip and "Unsupported global" in text:
        name = cut(text.partition("GLOBAL ")[2].partition(" was")[0], 60)
        return (
            f"{name} is pickled in it, in the format of torch before 1.6, where classes cannot be "
            "skipped; where its code is installed, save the state dict alone"
        )
    return cut(text.strip() or type(error).__name__, 200)


# -- folders of Hugging Face's hub -----------------------------------------------------------------


def _read_folder(folder: Path) -> Weights:
    """Read `model.safetensors`, its parts, or `pytorch_model.bin`; what images are expected comes
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
    """What the configuration files of a hub folder say about the images; without tensors."""
    config: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name, CheckpointError)
            if not isinstance(found, dict):
                raise CheckpointError(f"{folder / name}: an object is needed")
            config |= found
    before = config if "architecture" in config else None  # timm's first form
    known = config.get("pretrained_cfg", before)
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
    """Weights without tensors, with mean, std and image size of a configuration if they are valid.

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
