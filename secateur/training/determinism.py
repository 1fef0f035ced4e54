"""Global torch state of a training: deterministic kernels, flushed denormals, random numbers."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

_LAYER_STREAM = 0x64726F70
"""Separates the random numbers of layers (dropout) from those that shuffle and augment."""


@contextlib.contextmanager
def deterministic(device: torch.device, compiled: bool = False) -> Iterator[None]:
    """Set the global torch state that a training needs; restore it on return and on errors.

    Inside, only deterministic kernels are allowed and denormal numbers are flushed to zero. On
    exit, both settings and the states of the global random number generators (of Python, numpy, the
    CPU, and of `device` if it is a GPU) are restored. `compiled`: whether torch.compile is used.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    flushed, drawn = _denormals_are_flushed(), (random.getstate(), np.random.get_state())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.set_deterministic_debug_mode("error")
            if compiled:  # informs the compiler too, whose import takes more than a second
                torch.use_deterministic_algorithms(True)
            # deterministic mode also fills fresh memory, as a debugging aid: a tenth of a step
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            # weights that a penalty keeps shrinking would become denormal, which is slow on a CPU
            torch.set_flush_denormal(True)
            yield
        finally:
            if compiled:
                torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.set_flush_denormal(flushed)
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])


def _denormals_are_flushed() -> bool:
    """Whether this thread flushes denormal numbers to zero; torch has no query for it."""
    return float(torch.tensor([1e-38]) * 1e-2) == 0.0


def seed_weights(seed: int) -> None:
    """Seed the global generators from which the weights of a new network are drawn, for good: those
    of torch, and those of Python and numpy, from which a user's code may draw."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_layers(seed: int, epoch: int, device: torch.device, rank: int = 0) -> None:
    """Seed the global generators of the CPU and of `device`, from which dropout and other random
    layers draw, for one epoch; also those of Python and numpy, from which a user's layer may.

    The stream depends on the arguments alone, so that a training can resume at any epoch, and it
    is independent of the one that shuffles and augments images (`data.augment.plan_epoch`).
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(_LAYER_STREAM, epoch, rank))
    number = int(sequence.generate_state(1, np.uint64)[0])
    random.seed(number)
    np.random.seed(number % 2**32)
    if device.type == "cpu":  # torch.manual_seed also records its call stack, for other devices
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)
