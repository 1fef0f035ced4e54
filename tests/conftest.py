"""Fixtures for the tests that run the pipeline, and the order of the test files."""

import contextlib
import functools
import gc
import math
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import documentation
import pytest
import warm
from _pytest.assertion import rewrite
from filelock import FileLock
from workspace import PROGRAMS, Project, fresh_project

from secateur.base import allocator

gc.disable()  # until all tests have been collected
allocator.LARGE_PAGES_AFTER = math.inf  # tests are too short to gain from moving a gigabyte

MEMORY, ROOM = Path("/dev/shm"), 6 * 2**30
"""Where the tests write if there is enough room: a database in memory never waits for a disk."""
LONGEST = [
    "test_pipeline_runs.py",  # makes the fixture `finished`
    "test_channels_zoo.py",  # these two files do not need it
    "test_channels.py",
    "test_studies.py",
    "test_studies_rounds.py",
    "test_studies_page.py",  # in fresh workers: in others it has crashed, for an unknown reason
    "test_processes.py",
    "test_pipeline_tracking.py",
    "test_pipeline_queue.py",
    "test_pipeline_experiments.py",
    "test_pipeline_rounds.py",
    "test_data.py",  # forks to decode images, so it must come before runtimes start threads
    "test_docs.py",
    "test_weights.py",
    "test_mlflow_store.py",
    "test_pipeline_resume.py",
    "test_pipeline_models.py",
    "test_train.py",
    "test_regroup.py",
    "test_growing.py",
    "test_surgery.py",
    "test_recipes.py",
    "test_pipeline_errors.py",
    "test_stage_start.py",
    "test_checkpoint.py",
    "test_settings.py",
]
"""Test files that run first, in the order in which workers receive them."""
LAST = [
    "test_export.py",
    "test_archs.py",
    "test_structured.py",
    "test_hostile_input.py",
    "test_mlflow_model.py",
    "test_latency_targets.py",
    "test_predict.py",
    "test_runtimes.py",
    "test_quantisation.py",
    "test_latency.py",
]
"""Test files that run last: those that use ONNX Runtime or OpenVINO, and some that start no
processes. On processors with AMX, workers have been killed by a signal of the kernel (SIGSEGV with
code SI_KERNEL) while they waited for a process after using these runtimes."""


def usable(folder, room):
    """Whether a folder in memory has `room` bytes free and programs in it may be executed."""
    try:
        found, memory = os.statvfs(folder), Path("/proc/meminfo").read_text()
    except OSError:
        return False
    available = int(re.search(r"MemAvailable: *(\d+)", memory)[1]) * 1024
    free = min(found.f_bavail * found.f_frsize, available)
    return free > room and not found.f_flag & getattr(os, "ST_NOEXEC", 0)


if usable(MEMORY, ROOM):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # pytest reads it


def pytest_xdist_auto_num_workers(config):
    """One more than there are processors: tests of pipelines often wait for their processes."""
    allowed = getattr(os, "sched_getaffinity", None)
    return (len(allowed(0)) if allowed else os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Let workers start warm: otherwise each would spend ten seconds on the imports of the tests.

    Temporary files of the workers and of their processes lie next to those of the tests. If all
    tests are to run, the documentation is built at the same time; this takes about as long and also
    needs one processor.
    """
    base = config._tmp_path_factory.getbasetemp()
    option = config.option
    if not (option.file_or_dir or option.keyword) and option.markexpr == "not slow":
        documentation.start(base / "site")
    (base / "tmp").mkdir()
    os.environ["TMPDIR"] = str(base / "tmp")
    rewriting = threading.Thread(target=rewrite_asserts, args=[config])
    rewriting.start()  # runs while the server imports
    found = warm.start(base / "warm", Project(base).env(), os.getpid())
    rewriting.join()
    os.environ |= {name: value for name, value in found.items() if name == "WARM_SERVER"}
    for spec in specs if found else ():
        spec.python = str(base / "warm/bin/python")


def rewrite_asserts(config):
    """Compile test files as pytest does, if needed; in a fresh clone, every worker would do it."""
    if sys.dont_write_bytecode:
        return
    with contextlib.suppress(Exception):  # pytest has changed, or it will report the error itself
        state = config.stash[rewrite.assertstate_key]
        for file in Path(__file__).parent.glob("test_*.py"):
            folder = rewrite.get_cache_dir(file)
            compiled = folder / (file.stem + rewrite.PYC_TAIL)
            if rewrite.try_makedirs(folder) and rewrite._read_pyc(file, compiled) is None:
                status, code = rewrite._rewrite_test(file, config)
                rewrite._write_pyc(state, code, status, compiled)


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    place |= {name: len(LONGEST) + 1 + number for number, name in enumerate(LAST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """Exempt the hundreds of thousands of permanent objects of the libraries from collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()  # also for stages, which leave the collector to the process that runs them


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Let `python` and `dvc` in the projects start warm: one server for all workers."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if workers else base) / "warm"
    owner = os.getppid() if workers else os.getpid()
    PROGRAMS.update(warm.start(folder, Project(folder).env(), owner))
    PROGRAMS["DVC_SITE_CACHE_DIR"] = str(folder / "dvc")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Folder of the documentation's pages, the exit status of mkdocs, and its output."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    return folder / documentation.PAGES, *documentation.build(folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, programs):
    """A project whose pipeline has run once, with MLflow. Read it or copy it; never change it.

    It is made once for all workers of pytest-xdist; the other workers wait until it is made.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    project, log = Project(folder / "project"), folder / "log.txt"
    with FileLock(f"{folder}.lock"):
        if not log.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed here
            project.path.mkdir(parents=True)
            fresh_project(project.path)
            made = project.dvc("repro", SECATEUR_TRACKING="on")
            project.commit()
            log.write_text(made)
    project.log = log.read_text()
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished project, which the test may change."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def unborn(tmp_path, programs):
    """A project in which no stage has run."""
    (tmp_path / "unborn").mkdir()
    return fresh_project(tmp_path / "unborn")


@pytest.fixture(scope="session")
def one_registry():
    """Cache two tables: ONNX's operators, which every export rebuilds in half a second, and torch's
    list of composite operators, which every export and every load of a program goes through."""
    try:
        import torch._export.utils as listed
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # onnxscript is not installed
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        make = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", make)
        if find := getattr(listed, "_materialize_cpp_cia_ops", None):
            patch.setattr(listed, "_materialize_cpp_cia_ops", functools.cache(find))
        yield
