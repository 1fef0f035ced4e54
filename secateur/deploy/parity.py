"""Proof that an exported file computes what the network computes, on real images."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.base.errors import SecateurError
from secateur.data.batches import example_batch, sequential_batches
from secateur.data.dataset import DatasetInfo, Split
from secateur.deploy.runtimes import Runner
from secateur.nn.modes import in_eval_mode

TOLERANCE = 1e-5
"""Difference from float64, over the largest output, that rounding in float32 may cause."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Parity:
    """Results for one file in one runtime."""

    difference: float
    """Largest difference of any output from float64, for some images, over the largest output."""
    accuracy: float
    """Fraction of all images that the file classifies correctly."""
    ties: int
    """Images whose two highest outputs are equal up to rounding: either class is right."""


@torch.inference_mode()
def verify(
    model: nn.Module,
    opened: Mapping[str, Runner],
    split: Split,
    info: DatasetInfo,
    *,
    pixels: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Parity]:
    """Compare opened files with the network that they were exported from.

    The outputs for `data.batches.example_batch`, as one batch and for a single image, must be
    within TOLERANCE of the network's outputs in float64; the classes of all images must be those
    that the network predicts in float32. With `pixels`, network and files take pixels from 0 to
    255. `tick` is called after every batch. Raises SecateurError naming the file that differs, and
    by how much.
    """
    exact = in_eval_mode(copy.deepcopy(model).cpu().double())
    model = in_eval_mode(copy.deepcopy(model).cpu().float())
    images, _ = example_batch(split, info)
    images = as_input(images, info, pixels)
    wanted = exact(images.double())
    largest = max(float(wanted.abs().max()), 1e-30)
    differences = {name: _difference(run, images, wanted) / largest for name, run in opened.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # true for NaN
            raise SecateurError(
                f"{name}: outputs differ from the network's by {difference:.2g} of the largest "
                f"(allowed: {TOLERANCE:g}); nothing was written"
            )
    right, ties = dict.fromkeys(opened, 0), dict.fromkeys(opened, 0)
    for images, labels in _batches(split, info, pixels):
        expected = model(images)
        for name, run in opened.items():
            found = torch.from_numpy(_run(run, images))
            right[name] += int((found.argmax(1) == labels).sum())
            other = (found.argmax(1) != expected.argmax(1)).nonzero().flatten()
            if len(other):
                ties[name] += _count_ties(name, exact, images[other], found[other])
        tick()
    return {
        name: Parity(differences[name], right[name] / len(split), ties[name]) for name in opened
    }


def accuracy(run: Runner, split: Split, info: DatasetInfo, *, pixels: bool = False) -> float:
    """Fraction of the images that an exported file classifies correctly."""
    right = 0
    for images, labels in _batches(split, info, pixels):
        right += int((torch.from_numpy(_run(run, images)).argmax(1) == labels).sum())
    return right / len(split)


def _difference(run: Runner, images: Tensor, wanted: Tensor) -> float:
    """Largest difference for all images as a batch, and for the first alone; NaN if one is NaN."""
    together = torch.from_numpy(_run(run, images)).double() - wanted
    alone = torch.from_numpy(_run(run, images[:1])).double() - wanted[:1]
    return float(torch.cat([together, alone]).abs().max())


def _count_ties(name: str, exact: nn.Module, images: Tensor, found: Tensor) -> int:
    """Number of these images, for which the file and the network predict different classes.

    Raises SecateurError unless rounding explains it: in float64 the class that the file predicts
    must be as likely as the highest, up to twice the tolerance.
    """
    logits = exact(images.double())
    highest = logits.max(1).values
    chosen = logits.gather(1, found.argmax(1, keepdim=True)).flatten()
    worst = float(((highest - chosen) / logits.abs().max(1).values.clamp(min=1e-30)).max())
    if not worst <= 2 * TOLERANCE:
        raise SecateurError(
            f"{name}: predicts another class than the network for {len(images)} images of one "
            f"batch, whose outputs differ by {worst:.2g} of the largest; nothing was written"
        )
    return len(images)


def _run(run: Runner, images: Tensor) -> NDArray[np.float32]:
    return run(images.contiguous().numpy())


def _batches(split: Split, info: DatasetInfo, pixels: bool) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in sequential_batches(split, info, device=_CPU):
        yield as_input(images, info, pixels), labels


def as_input(images: Tensor, info: DatasetInfo, pixels: bool) -> Tensor:
    """The input of a file: the normalised images or, with `pixels`, their original pixels."""
    if not pixels:
        return images
    std, mean = (torch.tensor(v).view(1, -1, 1, 1) for v in (info.std, info.mean))
    return ((images * std + mean) * 255).round()
