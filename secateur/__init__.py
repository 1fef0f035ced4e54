"""Prune image classifiers in one tracked pipeline.

The one thing done on import: OpenMP workers give up spinning after some microseconds instead of
milliseconds. Alone on the machine this costs a few per cent; beside a second busy process (a DVC
queue with two workers) it is the difference between half the speed and a hundredth of it. It must
be set before torch is imported, and whoever sets either variable is obeyed.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
