"""Comparison of two single models image by image, with the files in DVC's cache."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.base.errors import SecateurError
from secateur.pipeline import record
from secateur.studies.report import artifacts, statistics
from secateur.studies.results import Result

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from secateur.data.dataset import Split


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models on the test images."""

    first_only: int
    """Images that only the first model classifies correctly."""
    second_only: int
    images: int
    p: float
    """p of the exact McNemar test that both models err equally often."""
    low: float
    """95 % bootstrap interval of first - second over the test images, in points of accuracy."""
    high: float


def compare(first: Result, second: Result) -> Comparison:
    """Evaluate both finetuned networks on the test images again, from DVC's cache.

    Raises SecateurError if a model or its data are missing, or if the data differ.
    """
    (one, images), (other, other_images) = correct(first), correct(second)
    if images != other_images:
        raise SecateurError(f"{first.name} and {second.name} have other test images")
    low, high = statistics.bootstrap(one, other)
    won, lost = int((one & ~other).sum()), int((other & ~one).sum())
    return Comparison(won, lost, len(one), statistics.mcnemar(won, lost), 100 * low, 100 * high)


def correct(result: Result) -> "tuple[NDArray[np.bool_], str]":
    """Whether the finetuned network of an experiment classifies each test image correctly.

    Also returns a hash of these images and their labels.
    """
    import torch

    from secateur.data import dataset
    from secateur.data.batches import sequential_batches
    from secateur.nn import checkpoint

    if "dataset" not in result.params:
        raise SecateurError(f"{result.name}: its params.yaml names no dataset")
    with tempfile.TemporaryDirectory() as place:
        data, model = Path(place, "data"), Path(place, "model")
        final = record.chain_of(result.report).last["finetune"]
        wanted = {f"data/{result.params['dataset']}": data, record.model_spec(final).folder: model}
        artifacts.link(result, wanted)
        prepared = dataset.load(data)
        found = checkpoint.load(model / "model.safetensors", split=prepared.info.hash)
        header, network = found.header, found.model()
        info = replace(prepared.info, mean=list(header.mean), std=list(header.std))
        right = []
        with torch.inference_mode():
            cpu = torch.device("cpu")
            for images, labels in sequential_batches(prepared.test, info, device=cpu):
                right.append(network(images).argmax(1) == labels)
        answers: NDArray[np.bool_] = torch.cat(right).numpy()
        return answers, _hash(prepared.test)


def _hash(images: "Split") -> str:
    """Hash of labels and images; for images in files, of their names, sizes and digests."""
    from secateur.data.dataset import InMemoryImages

    parts = [images.labels]
    if isinstance(images, InMemoryImages):
        parts.append(images.images)
    else:
        parts += [images.names.text, images.names.ends, images.sizes, images.digests]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr((part.dtype, part.shape)).encode())
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def words(pair: Sequence[Result]) -> str:
    """The comparison in a sentence."""
    first, second = pair
    found = compare(first, second)
    return (
        f"{first.name} against {second.name} on the same {found.images:,} test images: only the "
        f"first is right on {found.first_only}, only the second on {found.second_only}; "
        f"p = {found.p:.3g} (McNemar's exact test); difference of {found.low:+.2f} to "
        f"{found.high:+.2f} points (95 %, bootstrap over images). This compares two single models, "
        "not their methods, of which each is a single seed"
    )
