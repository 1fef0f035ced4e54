"""Prune image classifiers in one tracked pipeline.

Two things are done on import, before torch is loaded, because both are decided only once:

- OpenMP workers give up spinning after microseconds instead of milliseconds. Alone on the machine
  this costs a few per cent; beside a second busy process (a DVC queue with two workers) it is the
  difference between half the speed and a hundredth of it.
- glibc keeps freed memory instead of giving it back: a training step allocates the same tensors as
  the one before, and fetching their pages anew takes a quarter of a small convolutional network's
  step.

Whoever sets the environment variables of either (GOMP_SPINCOUNT or OMP_WAIT_POLICY, MALLOC_*_) is
obeyed.
"""

import contextlib
import ctypes
import os
import sys

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD: it grows in large steps
        del mallopt
