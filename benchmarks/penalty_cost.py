"""Time that a penalty adds to a training step: with and without it, alternately, in one process.

python -m benchmarks.penalty_cost
python -m benchmarks.penalty_cost --net lenet300 --penalty hoyer_square l1
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.train_speed import NETS, made_up, network, settings, task
from secateur.base import plugin
from secateur.base.machine import hardware
from secateur.data.batches import Batches
from secateur.training import optim
from secateur.training.engine import Engine
from secateur.training.penalty import Course, Penalty, SteppingPenalty
from secateur.training.step import TrainStep


class Steps:
    """Training steps of one network with one penalty, or without."""

    def __init__(self, net: str, name: str | None, precision: str) -> None:
        what = task(net, precision=precision)
        data, model, chosen = made_up(what), network(what), settings(what)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        penalty: Penalty | None = None
        if name:
            module = plugin.load("penalties", name)
            penalty = module.build(module.Settings(), model, 1e-6)
        self.batches = Batches(data.train, data.info, what["batch"], 1)
        if isinstance(penalty, SteppingPenalty):
            penalty.start(Course(chosen, 10**6, len(data.train)))
        self.size, self.count = what["batch"], 0
        engine = Engine(precision)
        self.step = TrainStep(
            model, optim.optimizer(model, chosen), penalty, chosen, engine, len(self.batches)
        )
        self.step.start_epoch()
        self.feed = self._forever()

    def _forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            for images, labels in self.batches.epoch(epoch):
                if len(labels) == self.size:
                    yield images, labels

    def __call__(self, steps: int) -> float:
        """Run this number of steps; return the seconds."""
        batches = list(itertools.islice(self.feed, steps))
        began = time.perf_counter()
        for images, labels in batches:
            self.step(images, labels, self.size, self.count)
            self.count += 1
        return time.perf_counter() - began


def main() -> None:
    """Time the penalties named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", default="resnet20", choices=list(NETS))
    parser.add_argument("--penalty", nargs="+", default=["greg1", "greg2", "hoyer_square"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps per round and penalty")
    options = parser.parse_args()
    print(f"{hardware()}; {options.net}, {options.precision}")
    names = [None, *options.penalty]
    variants = {name: Steps(options.net, name, options.precision) for name in names}
    taken: dict[str | None, list[float]] = {name: [] for name in variants}
    for turn in range(options.rounds + 1):
        for name, run in variants.items():
            seconds = run(options.steps)
            if turn:  # the first round warms up
                taken[name].append(seconds)
    plain = taken[None]
    print(f"without penalty {statistics.median(plain) / options.steps * 1e3:.2f} ms per step")
    for name in options.penalty:
        ratio = statistics.median(a / b for a, b in zip(taken[name], plain, strict=True))
        print(f"{name:20} {ratio - 1:+.1%}")


if __name__ == "__main__":
    main()
