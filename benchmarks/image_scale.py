"""Time of an epoch with smaller images (`progressive_resizing`), compared with full size.

A network is trained on random images at scales 0.5, 0.75 and 1 in one run. For each scale, the
shortest epoch counts, since other programs may run on the machine.

    OMP_NUM_THREADS=1 python -m benchmarks.image_scale
    OMP_NUM_THREADS=1 python -m benchmarks.image_scale --net densenet100
"""

import argparse
import time

from benchmarks import train_speed
from secateur.base.machine import hardware
from secateur.base.sections import Train
from secateur.training import loop
from secateur.training.callbacks import Callback, Row

EPOCHS = 4
"""Epochs per scale; the first one of each scale is not counted."""
PARTS = [{"scale": 0.5, "until": 1 / 3}, {"scale": 0.75, "until": 2 / 3}]


class Seconds(Callback):
    """Seconds of every epoch except the first one of each scale."""

    def __init__(self) -> None:
        self.by_scale: dict[float, list[float]] = {}
        self.last = 0.0

    def on_epoch_end(self, row: Row) -> None:
        """Record the time since the previous epoch."""
        now = time.perf_counter()
        if row["image_scale"] in self.by_scale:
            self.by_scale[row["image_scale"]].append(now - self.last)
        else:
            self.by_scale[row["image_scale"]] = []
        self.last = now


def main() -> None:
    """Train, and print the seconds per epoch for each scale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", default="resnet20", choices=["resnet20", "densenet100"])
    what = train_speed.task(parser.parse_args().net)
    usual = train_speed.settings(what).model_dump()
    settings = Train(**usual | {"epochs": 3 * EPOCHS, "progressive_resizing": PARTS})
    model, data, seconds = train_speed.network(what), train_speed.made_up(what), Seconds()
    loop.fit(model, data, settings, 1, train_speed.Discard(), [seconds])
    print(hardware())
    least = {scale: min(taken) for scale, taken in seconds.by_scale.items()}
    for scale, taken in least.items():
        print(f"scale {scale:4}: {taken:6.2f} s an epoch, {taken / least[1.0]:.2f} of full size")


if __name__ == "__main__":
    main()
