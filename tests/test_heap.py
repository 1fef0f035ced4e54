"""Freed memory goes back to the system when it piles up, and only then."""

import subprocess
import sys

import pytest

from secateur.base import allocator as heap

pytestmark = pytest.mark.skipif(not heap._known, reason="another C library")

STEADY = """
import secateur, torch
from secateur.base import allocator as heap
for step in range(20 * heap.EVERY):
    kept = [torch.ones(2**20) for _ in range(8)]
    del kept
    assert not heap.tidy(), step
"""

PILING = """
import secateur, torch
from secateur.base import allocator as heap
for step in range(heap.EVERY):
    torch.ones(2**20)
    heap.tidy()
blocks = [torch.ones(2**20) for _ in range(64)]
del blocks[::2]  # 128 MiB of holes with blocks between them
before = heap.idle()
assert sum(heap.tidy() for _ in range(heap.EVERY)) == 1
assert before - heap.idle() > 100 * 2**20, (before, heap.idle())
assert all((block == 1).all() for block in blocks)
"""


@pytest.mark.parametrize("script", [STEADY, PILING])
def test_holes_are_given_back_and_a_steady_step_is_left_alone(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
