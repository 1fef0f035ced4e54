"""Time that a penalty or parametrization adds to a training step: with and without it, in turns.

python -m benchmarks.penalty_cost
python -m benchmarks.penalty_cost --net lenet300 --penalty hoyer_square --parametrization str
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
from secateur.training import optim, parametrization
from secateur.training.engine import Engine
from secateur.training.penalty import Penalty, SteppingPenalty, TrainingPlan
from secateur.training.step import TrainStep


class TrainingSteps:
    """Training steps of one network with a penalty or parametrization, or with neither."""

    def __init__(self, kind: str, name: str, net: str, **more: str) -> None:
        what = task(net, **more)
        data, model, chosen = made_up(what), network(what), settings(what)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if kind == "penalties":
            plug = plugin.load("penalties", name)
            penalty: Penalty | None = plug.build(plug.Settings(), model, 1e-6)
        else:
            defaults = plugin.load("parametrizations", name).Settings()
            built = parametrization.build(name, defaults, model)
            penalty = parametrization.joined(name, built, None)
        self.batches = Batches(data.train, data.info, what["batch"], 1)
        if isinstance(penalty, SteppingPenalty):
            penalty.start(TrainingPlan(chosen, 10**6, len(data.train)))
        self.size, self.count = what["batch"], 0
        engine = Engine(what["precision"])
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
    """Time the penalties and parametrizations named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", default="resnet20", choices=list(NETS))
    parser.add_argument("--penalty", nargs="+", default=["greg1", "greg2", "hoyer_square"])
    parser.add_argument("--parametrization", nargs="+", default=[])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--optimizer", help="default: that of the original scripts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps per round and penalty")
    options = parser.parse_args()
    print(f"{hardware()}; {options.net}, {options.precision}")
    names = [("penalties", "none")]
    names += [("penalties", name) for name in options.penalty]
    names += [("parametrizations", name) for name in options.parametrization]
    more = {"precision": options.precision} | (
        {"optimizer": options.optimizer} if options.optimizer else {}
    )
    variants = [TrainingSteps(kind, name, options.net, **more) for kind, name in names]
    taken: list[list[float]] = [[] for _ in names]
    for turn in range(options.rounds + 1):
        for run, seconds in zip(variants, taken, strict=True):
            spent = run(options.steps)
            if turn:  # the first round is the warm-up
                seconds.append(spent)
    plain = taken[0]
    print(f"without penalty {statistics.median(plain) / options.steps * 1e3:.2f} ms per step")
    for (_, name), seconds in zip(names[1:], taken[1:], strict=True):
        ratio = statistics.median(a / b for a, b in zip(seconds, plain, strict=True))
        print(f"{name:20} {ratio - 1:+.1%}")


if __name__ == "__main__":
    main()
