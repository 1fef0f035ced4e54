"""Checks archives of torch.export (.pt2) before torch reads them, and refuses pickles.

torch.export writes tensors as plain bytes and the program as JSON, but example inputs, tensors of
special types and custom objects as pickles, which `torch.export.load` loads without restriction.
Files written by Secateur contain no pickles.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

from secateur.base import files
from secateur.base.documents import parse_json
from secateur.base.errors import CheckpointError, cut, shorten

MAX_JSON = 2**28
"""Largest size of a JSON file in an archive: 256 MiB."""
KNOWN = re.compile(
    r"data/(weights|constants)/(weight_\d+|tensor_\d+|model_(weights|constants)_config\.json)|"
    r"data/sample_inputs/model\.pt|models/model\.json|extra/[^/]+|archive_format|archive_version|"
    r"byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
"""Files of an archive with one program, without the archive's own folder."""


def check(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless it is an archive without pickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive)
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {cut(str(error), 200)}") from None


def read_extra(path: Path, name: str) -> Any:
    """The JSON value in the archive's extra file `name`; None if there is no such file.

    Raises CheckpointError, naming the file, if it is not an archive or the value cannot be read.
    """
    files.file_size(path, CheckpointError)
    try:
        with zipfile.ZipFile(path) as archive:
            found = [item for item in archive.infolist() if _inner(item) == f"extra/{name}"]
            return _json(archive, found[0]) if found else None
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {cut(str(error), 200)}") from None


def _inner(item: zipfile.ZipInfo) -> str:
    """A file's name without the archive's top folder."""
    return item.filename.partition("/")[2]


def _check(archive: zipfile.ZipFile) -> None:
    names = [item.filename for item in archive.infolist()]
    if len({name.partition("/")[0] for name in names}) != 1 or len(set(names)) != len(names):
        raise ValueError("not an archive of torch.export")
    if "archive_format" not in {name.partition("/")[2] for name in names}:
        raise ValueError("not an archive of torch.export, or of an old version")
    for item in archive.infolist():
        name = _inner(item)
        if not KNOWN.fullmatch(name):
            raise ValueError(f"it holds {shorten(name)}, which may be a pickle and is not loaded")
        if name.startswith("data/sample_inputs/") and item.file_size:
            raise ValueError("it holds example inputs as a pickle; pickles are never loaded")
        if name.endswith("_config.json"):
            _check_entries(_json(archive, item))


def _check_entries(config: Any) -> None:
    """ValueError if an entry of a table of tensors says that its file is a pickle."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise ValueError("its table of tensors cannot be read")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise ValueError(f"{cut(str(name))} is a pickle; pickles are never loaded")


def _json(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> Any:
    if item.file_size > MAX_JSON:
        raise ValueError(f"{shorten(item.filename)}: {item.file_size:,} bytes of JSON")
    return parse_json(archive.read(item))
