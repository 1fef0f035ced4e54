"""Where the work runs: decided by the machine and the environment, never by a setting."""

import functools
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from secateur.base.errors import SettingsError, cut, shorten

DEVICES = ("cpu", "cuda", "mps")
"""Types of devices on which trainings can run."""


def device() -> torch.device:
    """The CUDA GPU if there is one, else the CPU; SECATEUR_DEVICE (cpu, cuda, mps) overrides."""
    wanted = os.environ.get("SECATEUR_DEVICE")
    if not wanted:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = f"SECATEUR_DEVICE = {shorten(wanted)}: "
    try:
        found = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"{where}not usable here: {cut(str(error).splitlines()[0])}") from None
    if found.type not in DEVICES:
        raise SettingsError(f"{where}trainings cannot run there; allowed: {', '.join(DEVICES)}")
    return torch.device(wanted)


def hardware() -> str:
    """Name of the device in words, for reports."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The model of the processor."""
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def processors() -> int:
    """Processors that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)  # Linux; respects the limits of a container
    return len(usable(0)) if usable else os.cpu_count() or 1


def workers(world: int = 1) -> int:
    """Number of processes that decode images; SECATEUR_WORKERS overrides, 0: this process decodes.

    By default one per usable processor, at most sixteen, divided among `world` ranks.
    """
    wanted = os.environ.get("SECATEUR_WORKERS")
    if not wanted:
        return max(1, min(processors(), 16) // world)
    if not re.fullmatch("[0-9]{1,3}", wanted) or int(wanted) > 512:
        raise SettingsError(f"SECATEUR_WORKERS = {shorten(wanted)}: a whole number from 0 to 512")
    return int(wanted)


def save_interval() -> float:
    """Seconds between two saved states of a training: 1, or the value of SECATEUR_SAVE_SECONDS.

    A larger value spares a slow disk, but as many seconds are lost if the process is killed; 0
    saves after every epoch.
    """
    wanted = os.environ.get("SECATEUR_SAVE_SECONDS")
    if not wanted:
        return 1.0
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", wanted):
        raise SettingsError(
            f"SECATEUR_SAVE_SECONDS = {shorten(wanted)}: seconds from 0 to 99999, such as 0.5 or 60"
        )
    return float(wanted)


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, if they are installed."""
    names = ("torch", "torchvision", "lightning-fabric", "safetensors")
    return {name: found for name in names if (found := _version(name))}


@functools.cache
def _version(name: str) -> str | None:
    """The installed version, read once per process; None for a package that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:  # the Python API needs neither lightning-fabric nor torchvision
        return None


def installed_versions() -> dict[str, str]:
    """Installed versions of torch and torchvision, without the build's suffix (+cpu, +cu130)."""
    found = versions()
    return {name: found[name].split("+")[0] for name in ("torch", "torchvision") if name in found}


def processes() -> tuple[int, int, int]:
    """Number of all processes, of processes on this machine, and of machines (torchrun or srun).

    Raises SettingsError for a variable of torchrun or srun that is missing or not a valid number.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world, local = _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE")
        for name, count in (("RANK", world), ("LOCAL_RANK", local)):
            _number(name, 0, count - 1)
        _check_multiple("WORLD_SIZE", world, "LOCAL_WORLD_SIZE", local)
        return world, local, world // local
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        if name in os.environ:  # Fabric reads these variables outside of srun too
            _number(name, 0)
    if "SLURM_STEP_NUM_TASKS" not in os.environ:  # set within srun, not by sbatch
        return 1, 1, 1
    world = _number("SLURM_STEP_NUM_TASKS")
    nodes = _number("SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in os.environ else 1
    _check_multiple("SLURM_STEP_NUM_TASKS", world, "SLURM_STEP_NUM_NODES", nodes)
    return world, world // nodes, nodes


def _number(name: str, least: int = 1, most: int = 10**6) -> int:
    """The whole number in an environment variable; SettingsError unless it is within the bounds."""
    text = os.environ.get(name, "")
    if not re.fullmatch("[0-9]{1,7}", text) or not least <= int(text) <= most:
        raise SettingsError(
            f"{name} = {shorten(text)}: a whole number from {least} to {most} is needed, as "
            f"{'srun' if name.startswith('SLURM') else 'torchrun'} sets it"
        )
    return int(text)


def _check_multiple(name: str, count: int, by: str, divisor: int) -> None:
    if count % divisor:
        raise SettingsError(f"{name} = {count}: must be a multiple of {by} = {divisor}")
