"""Where the work runs: by what the machine has, never by a setting."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from secateur.base.errors import SettingsError


def device() -> torch.device:
    """The GPU if there is one, else the CPU; SECATEUR_DEVICE (cpu, cuda, mps, ...) overrides."""
    wanted = os.environ.get("SECATEUR_DEVICE")
    if not wanted:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"SECATEUR_DEVICE = {wanted!r}: not usable here: {reason}") from None
    return torch.device(wanted)


def hardware() -> str:
    """Name of the device in words, for reports."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def workers(world: int = 1) -> int:
    """Processes that decode pictures; SECATEUR_WORKERS overrides, 0 being none but this one.

    By default one for each processor that may be used, sixteen at most, shared by `world` ranks.
    """
    wanted = os.environ.get("SECATEUR_WORKERS")
    if not wanted:
        usable = getattr(os, "sched_getaffinity", None)  # Linux: what a container leaves us
        count = len(usable(0)) if usable else os.cpu_count() or 1
        return max(1, min(count, 16) // world)
    if not wanted.isdecimal() or int(wanted) > 512:
        raise SettingsError(f"SECATEUR_WORKERS = {wanted!r}: a whole number from 0 to 512")
    return int(wanted)


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, of those that are installed."""
    found: dict[str, str] = {}
    for name in ("torch", "torchvision", "lightning-fabric", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):  # the Python API needs neither in between
            found[name] = version(name)
    return found


def library_versions() -> dict[str, str]:
    """Installed versions of torch and torchvision, without the build's suffix (+cpu, +cu130)."""
    found = versions()
    return {name: found[name].split("+")[0] for name in ("torch", "torchvision") if name in found}


def processes() -> tuple[int, int, int]:
    """Processes in all, processes on this machine, machines: as torchrun or srun has set them."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        return world, local, world // local
    world = int(environment.get("SLURM_STEP_NUM_TASKS", 1))  # set within srun, not by sbatch
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    return world, world // nodes, nodes
