"""Exported files opened in the runtimes that will run them: torch, ONNX Runtime, OpenVINO.

All compute in float32 on the CPU. By default OpenVINO uses bfloat16 if the processor supports it,
and pins its threads to cores, which other processes may be using. Both are switched off, so that
runtimes are compared at equal precision on machines that also do other work.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.base import files, optional
from secateur.base.errors import SecateurError, cut
from secateur.base.optional import RUNTIME_TITLES, RuntimeName
from secateur.deploy import pt2_archive, stack_traces

Runner = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Images (count, channels, height, width), float32 and normalised unless the file normalises them
itself, to logits (count, classes)."""


@dataclass(frozen=True)
class Runtime:
    """A runtime for exported files, and the kind of files that it opens."""

    name: str
    title: str
    suffix: str
    open: Callable[[Path, int], Runner]
    """Path and number of threads, 0 for all -> runner."""


def open_model(path: Path, runtime: str | None = None, threads: int = 0) -> Runner:
    """Open an exported file for inference.

    `runtime` is a key of RUNTIMES, by default the first that opens files of this suffix; `threads`
    is the number of threads, 0 for the default of the runtime. Raises SecateurError, naming the
    file, if it is missing, is of another kind, or cannot be opened, and, with the command to
    install it, if the runtime is missing.

    A .pt2 file that contains a pickle is refused. It still contains a program that torch rebuilds,
    so only open files that you trust. An .onnx file is data.
    """
    able = [name for name in for_file(path) if runtime in (None, name)]
    if not able:
        kinds = " | ".join(f"{r.name} ({r.suffix})" for r in RUNTIMES.values())
        raise SecateurError(f"{path}: no file for {runtime or 'any runtime'}; there are {kinds}")
    files.file_size(path, SecateurError)
    return RUNTIMES[able[0]].open(path, threads)


def check_packages(names: Iterable[str]) -> None:
    """Raise SecateurError, with the command that installs it, if a runtime is missing."""
    for name in names:
        _package(name)


def version(name: str) -> str:
    """The version of an installed runtime."""
    return str(_package(name).__version__)


def for_file(path: Path) -> list[str]:
    """Names of the runtimes that open files of this suffix, in the order of RUNTIMES."""
    return [runtime.name for runtime in RUNTIMES.values() if runtime.suffix == path.suffix]


def tested_in(path: Path, asked: Iterable[str]) -> list[str]:
    """The runtimes in which a file is tested: its default one first, then those `asked` for."""
    first, *others = for_file(path)
    return [first, *(name for name in others if name in set(asked))]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Context in which torch computes with `count` threads (0: the current number).

    The number belongs to the whole process. Changing it for every pass would start and stop threads
    within the measured time, so it is not set again if it is already right.
    """
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open_torch(path: Path, threads: int) -> Runner:
    """A program of torch.export (.pt2)."""
    pt2_archive.check(path)
    try:
        with stack_traces.omitted():
            program = torch.export.load(path)
    except Exception as error:  # whatever the archive's reader raises for a foreign file
        raise _unreadable(path, error) from None
    model = program.module()

    @torch.inference_mode()
    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        with torch_threads(threads):
            logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return logits

    return run


def _open_onnxruntime(path: Path, threads: int) -> Runner:
    """An ONNX file in ONNX Runtime, on the CPU."""
    package = _package("onnxruntime")
    options = package.SessionOptions()
    options.intra_op_num_threads = threads  # 0: its own choice, one per physical core
    options.inter_op_num_threads = 1  # these networks are one operation after the other
    options.log_severity_level = 3  # errors only
    # otherwise its threads would busy-wait after a pass, and slow down whatever runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = package.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _unreadable(path, error) from None
    name = session.get_inputs()[0].name

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {name: images})[0]
        return logits

    return run


def _open_openvino(path: Path, threads: int) -> Runner:
    """An ONNX file in OpenVINO, on the CPU."""
    package = _package("openvino")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }
    try:
        request = package.Core().compile_model(path, "CPU", options).create_infer_request()
    except Exception as error:
        raise _unreadable(path, error) from None

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = request.infer([images])[0]
        return logits

    return run


def _package(name: str) -> Any:
    """The package of a runtime, which has the same name."""
    return optional.load(name, f"to run {RUNTIMES[name].suffix} files in {RUNTIMES[name].title}")


def _unreadable(path: Path, error: Exception) -> SecateurError:
    reason = cut(str(error) or type(error).__name__, 200)
    return SecateurError(f"{path}: cannot be opened: {reason}")


_OPENED: dict[RuntimeName, tuple[str, Callable[[Path, int], Runner]]] = {
    "torch": (".pt2", _open_torch),
    "onnxruntime": (".onnx", _open_onnxruntime),
    "openvino": (".onnx", _open_openvino),
}
RUNTIMES: dict[str, Runtime] = {
    name: Runtime(name, title, *_OPENED[name]) for name, title in RUNTIME_TITLES.items()
}
