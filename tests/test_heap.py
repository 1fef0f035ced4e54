"""The policies of a process are set on request only; the heap is trimmed when it grows."""

import os
import subprocess
import sys

import pytest

from secateur.base import allocator

needs_glibc = pytest.mark.skipif(not allocator._supported, reason="another C library")

STEADY = """
from secateur.base import allocator
allocator.tune_process()
import torch
for step in range(20 * allocator.CHECK_INTERVAL):
    kept = [torch.ones(2**20) for _ in range(8)]
    del kept
    assert not allocator.trim(), step
"""

GROWING = """
for step in range(allocator.CHECK_INTERVAL):
    torch.ones(2**20)
    allocator.trim()
blocks = [torch.ones(2**20) for _ in range(64)]
del blocks[::2]  # 128 MiB of holes with blocks between them
before = allocator.idle_bytes()
assert sum(allocator.trim() for _ in range(allocator.CHECK_INTERVAL)) == 1
assert before - allocator.idle_bytes() > 100 * 2**20, (before, allocator.idle_bytes())
assert all((block == 1).all() for block in blocks)
"""


def run(script, **environment):
    """Run a script in a process whose environment has no policy but the given one."""
    policies = ("GOMP_", "OMP_WAIT", "MALLOC_")
    clean = {key: v for key, v in os.environ.items() if not key.startswith(policies)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_glibc
def test_holes_are_given_back_and_a_steady_step_is_left_alone():
    """One after the other in one process: importing torch takes longer than both."""
    run(STEADY + GROWING)


UNTOUCHED = """
import ctypes, os, sys
calls = []
ctypes.CDLL = lambda name: calls.append(name)  # whoever wants mallopt has to ask for it
before = dict(os.environ)
import secateur, secateur.base
assert dict(os.environ) == before
assert not calls and "torch" not in sys.modules
"""


def test_importing_the_package_changes_no_environment_and_no_allocator():
    run(UNTOUCHED)


@pytest.mark.parametrize("package", ["stages", "benchmarks"])
def test_stages_and_benchmarks_set_the_policy_before_torch_is_imported(package):
    script = f"import sys, os, {package}; assert 'torch' not in sys.modules; "
    assert run(script + "print(os.environ['GOMP_SPINCOUNT'])") == "30000\n"


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_a_thread_policy_that_is_set_already_is_kept(given):
    script = "import stages, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(script, **given).strip() == given.get("GOMP_SPINCOUNT", "None")


@needs_glibc
@pytest.mark.parametrize("given", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_mallopt_is_called_unless_the_environment_tunes_malloc(given):
    script = """
from secateur.base import allocator
calls = []
class Library:
    mallopt = staticmethod(lambda *arguments: calls.append(arguments))
allocator.ctypes.CDLL = lambda name: Library
allocator.tune_process()
print(len(calls))
"""
    assert int(run(script, **given)) == (0 if given else 3)
