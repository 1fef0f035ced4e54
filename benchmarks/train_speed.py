"""Images per second of training: this project's loop against the usual research script.

The usual script: a DataLoader that opens every image with PIL and turns it into a tensor, NCHW
float32, an optimizer that is not fused, the penalty as a Python loop over tensors. Both train the
same network on the same images in batches of the same size, in turns, in one process.

    python -m benchmarks.train_speed --arch lenet300 lenet5
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secateur.core import checkpoint, plugin, raw, train
from secateur.core.checkpoint import Header
from secateur.core.data import About, Dataset, Split
from secateur.core.machine import hardware
from secateur.core.resume import Work
from secateur.core.settings import Train

IMAGES, BATCH = 12_000, 100


class OneByOne(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images as torchvision hands them out: one at a time, through PIL and a transform."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images[:, 0], split.labels
        self.transform = raw.torchvision().transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].numpy())
        return self.transform(image), int(self.labels[index])


def usual(model: nn.Module, split: Split, decay: float, workers: int) -> float:
    """Seconds of one epoch of the usual script."""
    loader = DataLoader(OneByOne(split), batch_size=BATCH, shuffle=True, num_workers=workers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=False)
    model.train()
    start = time.perf_counter()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(F.log_softmax(model(images), dim=1), labels)
        if decay:
            penalty = torch.zeros(())
            for parameter in model.parameters():
                if parameter.requires_grad and torch.sum(torch.abs(parameter)) > 0:
                    penalty = penalty + torch.sum(torch.abs(parameter)) ** 2 / torch.sum(
                        parameter**2
                    )
            loss = loss + decay * penalty
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def ours(model: nn.Module, data: Dataset, decay: float, precision: str = "float32") -> float:
    """Seconds of one epoch of `fit`, as the stages run it."""
    settings = Train.model_validate(
        {"epochs": 1, "batch_size": BATCH, "schedule": "constant", "precision": precision}
    )
    module = plugin.load("penalties", "hoyer_square")
    penalty = module.build(module.Settings(biases=True), model) if decay else None
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), [])
        start = time.perf_counter()
        train.fit(model, data, settings, 1, work, [], penalty=penalty, decay=decay)
        return time.perf_counter() - start


def random_data() -> Dataset:
    """Made-up images: the time does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    about = About("made up", [*map(str, range(10))], [1, 28, 28], [0.0], [1.0], "", {})
    return Dataset(
        about, Split(images, labels), Split(images[:0], labels[:0]), Split(images, labels)
    )


def network(arch: str, data: Dataset) -> nn.Module:
    """A new network of the given architecture."""
    about = data.about
    return checkpoint.architecture(
        Header(arch, {}, about.classes, about.shape, about.mean, about.std, "", "benchmark")
    )


def measure(arch: str, data: Dataset, repeats: int) -> None:
    """Print one line for each way of training, with the ratio pair by pair."""
    split = data.train
    assert isinstance(split, Split)
    ways: dict[str, Callable[[], float]] = {
        "usual": lambda: usual(network(arch, data), split, 0.0, 0),
        "usual, 2 workers": lambda: usual(network(arch, data), split, 0.0, 2),
        "ours": lambda: ours(network(arch, data), data, 0.0),
        "ours, bfloat16": lambda: ours(network(arch, data), data, 0.0, "bfloat16"),
        "usual + penalty": lambda: usual(network(arch, data), split, 1e-6, 0),
        "ours + penalty": lambda: ours(network(arch, data), data, 1e-6),
        "ours + penalty, bf16": lambda: ours(network(arch, data), data, 1e-6, "bfloat16"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            taken = way()
            if turn:  # the first round warms up
                seconds[name].append(taken)
    for name, values in seconds.items():
        print(f"{arch:10} {name:22} {IMAGES / statistics.median(values):10,.0f} images/s")

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    for slow, fast in (
        ("usual", "ours"),
        ("usual, 2 workers", "ours"),
        ("usual", "ours, bfloat16"),
        ("usual + penalty", "ours + penalty"),
        ("usual + penalty", "ours + penalty, bf16"),
    ):
        print(f"{arch:10} {fast} against {slow}: {ratio(slow, fast):.1f}x")
    added = [ratio(f"{way} + penalty", way) - 1 for way in ("ours", "usual")]
    print(
        f"{arch:10} hoyer_square adds {added[0]:.0%} to our step, {added[1]:.0%} to the usual one"
    )


def main() -> None:
    """Measure the architectures named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--arch", nargs="+", default=["lenet300", "lenet5"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{hardware()}; torch {torch.__version__}; batch {BATCH}, {IMAGES:,} images an epoch")
    for arch in options.arch:
        measure(arch, random_data(), options.repeats)


if __name__ == "__main__":
    main()
