"""Policies of a process: threads, memory, garbage, exit; trimming of the heap between steps.

Importing this module changes nothing and does not import torch. `tune_process` must run before
torch is imported; the stages call it from `stages/__init__.py`.

Since freed memory then stays with the process, aligned blocks of tens of megabytes do not always
fit the hole that the previous block left: up to glibc 2.37, memalign requests more than the block
needs and gives the surplus to other allocations (sourceware.org, bug 14581). A loop over batches
can leave a hole at every step. `trim` returns such holes to the system once they exceed what a step
needs.

Every step also goes through all of its activations, and with pages of 4 kB their translations do
not stay in the processor's TLB until they are read again. In a process that runs for a while,
`trim` asks Linux to back the heap with huge pages of 2 MB.
"""

import atexit
import contextlib
import ctypes
import gc
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECK_INTERVAL = 2
"""Steps between two checks of the heap. A check takes 10 µs. An epoch of large images can leave a
hole of 20 MB at every step; with rare checks, holes of the first steps would count as normal."""
SLACK = 64 * 2**20
"""Bytes of idle memory that are always tolerated."""
LARGE_PAGES_AFTER = 20.0
"""Seconds from the start of a process until its heap is moved to huge pages, which takes a second
for 300 MB, and between two looks at its size."""
GROWTH = 1.25
"""Factor by which the heap must have grown before it is moved again."""
RESIDENT = 0.5
"""Share of the heap that must be resident for a move."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def tune_process() -> None:
    """Set the policies of this process; call it before torch is imported.

    - OpenMP workers stop spinning after microseconds instead of milliseconds. With one process on
      the machine this costs a few per cent; with a second busy process (a DVC queue with two
      workers), training has half the speed instead of a hundredth.
    - glibc keeps freed memory: a training step allocates the same tensors as the step before, and
      mapping their pages again takes a quarter of the step of a small convolutional network.
    - After `succeeded`, the process exits without tearing down its modules, which takes 0.3 s with
      torch; exit handlers that were registered after this call still run.

    Existing environment variables (GOMP_SPINCOUNT, OMP_WAIT_POLICY, MALLOC_*) take precedence.
    """
    atexit.register(_exit_fast)  # first, so it is called last
    os.register_at_fork(after_in_child=_state.start)
    _state.start()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap automatically
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD: grow it in large steps
        _state.tuned = True


def pause_collection() -> None:
    """Turn garbage collection off until `resume_collection`, during the imports of a process.

    Imports create hundreds of thousands of permanent objects; collecting among them would take a
    tenth of a stage's start.
    """
    gc.disable()


def resume_collection() -> None:
    """Turn garbage collection on again; it ignores the objects that exist already."""
    gc.freeze()
    gc.enable()


def succeeded() -> None:
    """Note that this process is about to end with status 0, so that it may exit fast."""
    global _succeeded
    _succeeded = True


_succeeded = False


def _exit_fast() -> None:
    if not _succeeded:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # Python reports an error, such as a full disk
    os._exit(0)


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
    ] + [(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")]


@dataclass
class _State:
    steps: int = 0
    baseline: int | None = None
    """Idle bytes between two steps in normal operation; None: to be measured."""
    tuned: bool = False
    """Whether freed memory stays with the process: see `tune_process`."""
    large: int = 0
    """Bytes of the heap when it was last moved to huge pages."""
    looked: float = field(default_factory=time.monotonic)
    """When the size of the heap was last examined."""

    def start(self) -> None:
        """Start the clock of a process: a forked one may be short, however old its parent is."""
        self.looked = time.monotonic()


_state = _State()
_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_supported = all(hasattr(_libc, name) for name in ("mallinfo2", "malloc_trim"))
if _supported:
    _libc.mallinfo2.restype = _Mallinfo


def idle_bytes() -> int:
    """Bytes of resident memory that are not in an allocated block of the heap."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        _, resident, shared, *_ = map(int, file.read().split())
    used = _libc.mallinfo2()
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") - used.uordblks - used.hblkhd


def trim() -> bool:
    """Return idle memory to the system if it has grown; call once per step.

    Trims when the idle memory exceeds that of the first steps by half (at least by `SLACK`), and
    returns whether it did. Does nothing without glibc 2.33 or later. After LARGE_PAGES_AFTER, the
    heap of a process with the policies of `tune_process` is moved to huge pages.
    """
    if not _supported:
        return False
    _state.steps += 1
    if _state.steps % CHECK_INTERVAL:
        return False
    if _state.tuned and time.monotonic() > _state.looked + LARGE_PAGES_AFTER:
        _state.looked = time.monotonic()
        parts = _heap()
        size, resident = sum(p.size for p in parts), sum(p.resident for p in parts)
        whole = resident > RESIDENT * size  # else it has holes, which huge pages would fill
        if whole and size > GROWTH * _state.large and use_large_pages(parts):
            _state.large, _state.baseline = size, None
    now = idle_bytes()
    if _state.baseline is None:
        _state.baseline = now
    if now <= _state.baseline + max(_state.baseline // 2, SLACK):
        return False
    _libc.malloc_trim(0)
    _state.baseline = None  # measured again by the next steps
    return True


@dataclass(frozen=True)
class _Part:
    """A part of the heap: its start address, and sizes in bytes."""

    start: int
    size: int
    resident: int
    """Bytes in memory."""


def _heap() -> list[_Part]:
    """The parts of the heap; empty if the system does not report them."""
    try:
        content = Path("/proc/self/smaps").read_text()
    except OSError:  # another system, or a kernel built without it
        return []
    form = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*\[heap\]\n(?:.+\n)*?Rss: +(\d+) kB", re.M)
    found = ((int(low, 16), int(high, 16), int(kb)) for low, high, kb in form.findall(content))
    return [_Part(low, high - low, 1024 * kb) for low, high, kb in found]


def use_large_pages(parts: Sequence[_Part] | None = None) -> bool:
    """Move the heap to huge pages of 2 MB, if Linux allows programs to; returns whether it did.

    No value changes. Linux 6.1 and later move it at once, earlier versions in the background.
    """
    try:
        if "[never]" in (_THP / "enabled").read_text():
            return False
        page = int((_THP / "hpage_pmd_size").read_text())
    except (OSError, ValueError):  # another system, or a kernel without huge pages
        return False
    parts = _heap() if parts is None else parts
    for part in parts:
        start = -(-part.start // page) * page
        length = (part.start + part.size) // page * page - start
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE) if length > 0 else ():
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
    return bool(parts)
