"""Keep glibc's heap from growing where freed blocks do not fit the next ones.

Freed memory stays with the process (see secateur/__init__.py), and aligned blocks of tens of
megabytes then do not always find the hole that the last one of them left: up to glibc 2.37 its
memalign asks for a little more than the block, and gives the surplus to others (sourceware.org, bug
14581). A loop over batches may so leave a hole at every step. `tidy` gives such holes back to the
system once they are more than what a step needs.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Any

EVERY = 16
"""Steps between two looks."""
SLACK = 64 * 2**20
"""Bytes of holes that are not worth the while."""


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
    ] + [(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")]


@dataclass
class _State:
    steps: int = 0
    usual: int | None = None
    """Bytes that lie idle between two steps in the ordinary way; None: to be measured."""


_state = _State()
_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_known = all(hasattr(_libc, name) for name in ("mallinfo2", "malloc_trim"))
if _known:
    _libc.mallinfo2.restype = _Mallinfo


def idle() -> int:
    """Bytes of memory that the process holds and that no block of its heap uses."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        _, resident, shared, *_ = map(int, file.read().split())
    used = _libc.mallinfo2()
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") - used.uordblks - used.hblkhd


def tidy() -> bool:
    """To be called at every step; True if pages went back to the system.

    They do when half as much again lies idle as after the first steps. Without glibc 2.33 or later
    nothing happens.
    """
    if not _known:
        return False
    _state.steps += 1
    if _state.steps % EVERY:
        return False
    now = idle()
    if _state.usual is None:
        _state.usual = now
    if now <= _state.usual + max(_state.usual // 2, SLACK):
        return False
    _libc.malloc_trim(0)
    _state.usual = None  # the next steps say what they need
    return True
