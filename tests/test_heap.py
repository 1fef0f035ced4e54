"""Memory policies are set only in processes that ask for them; a growing heap is trimmed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

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
    """Run a script in a process whose environment sets only the given policies."""
    policies = ("GOMP_", "OMP_WAIT", "MALLOC_")
    clean = {key: v for key, v in os.environ.items() if not key.startswith(policies)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_glibc
def test_holes_are_given_back_and_a_steady_step_is_left_alone():
    """Both in one process, one after the other: importing torch takes longer than both."""
    run(STEADY + GROWING)


LARGE = """
import sys
from pathlib import Path
from secateur.base import allocator
allocator.tune_process()
import torch
def large():
    # kB of the heap that lie in large pages
    parts = Path("/proc/self/smaps").read_text().split("[heap]")[1:]
    return sum(int(part.partition("AnonHugePages:")[2].split()[0]) for part in parts)
clock = [0.0]
allocator.time.monotonic = lambda: clock[0]
allocator._state.looked = 0.0
def steps(count):
    for _ in range(count):
        allocator.trim()
kept = [torch.full((2**20,), float(number)) for number in range(24)]
steps(100 * allocator.CHECK_INTERVAL)
assert large() == 0, "not before its time"
clock[0] = allocator.LARGE_PAGES_AFTER + 1
steps(allocator.CHECK_INTERVAL)
found = large()
assert found > 80 * 2**10, found
assert all((block == number).all() for number, block in enumerate(kept))
kept += [torch.full((2**20,), float(number)) for number in range(24, 60)]
assert large() < found + 60 * 2**10, "what is new lies in small pages"
clock[0] *= 2
steps(allocator.CHECK_INTERVAL)
assert large() > found + 100 * 2**10, (found, large())
assert all((block == number).all() for number, block in enumerate(kept))
"""

FORKED = (
    LARGE.partition("steps(100")[0]
    + """
import os
clock[0] = allocator.LARGE_PAGES_AFTER + 1
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
steps(allocator.CHECK_INTERVAL)
assert large() == 0, "it has just started"
clock[0] *= 2
steps(allocator.CHECK_INTERVAL)
assert large() > 80 * 2**10
"""
)


def large_pages_at_once():
    """Whether Linux moves memory into large pages when a program requests it: since 6.1."""
    try:
        asked = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return asked and tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)


@needs_glibc
@pytest.mark.skipif(not large_pages_at_once(), reason="no large pages on request")
def test_a_long_training_gets_large_pages_and_again_when_it_has_grown():
    run(LARGE)


@needs_glibc
@pytest.mark.skipif(not large_pages_at_once(), reason="no large pages on request")
def test_a_forked_process_is_as_old_as_its_own_work():
    """Workers of a study fork one for each training; moving the heap would copy all of theirs."""
    run(FORKED)


@needs_glibc
@pytest.mark.skipif(not large_pages_at_once(), reason="no large pages on request")
def test_a_process_without_the_policies_keeps_its_pages():
    untuned = LARGE.replace("allocator.tune_process()", "").partition("found = large()")[0]
    run(untuned + "assert large() == 0")


@pytest.mark.parametrize("line", ["always madvise [never]", None])
def test_large_pages_that_are_forbidden_or_unknown_are_not_asked_for(line, tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "_THP", tmp_path)
    monkeypatch.setattr(allocator, "_libc", None)  # an error if anything is called
    if line:
        (tmp_path / "enabled").write_text(line)
    assert not allocator.use_large_pages()


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
