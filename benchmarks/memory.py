"""Peak resident memory of training on CIFAR, and of reading images from files.

Two things are measured: one epoch of ResNet-20 with batch size 128 on 50,000 random images of 32x32
pixels, and one pass over a folder of JPEG files, which are decoded into memory or listed and
decoded on demand. Each runs in a separate process; the figure is the peak minus the memory of the
imported libraries.

    python -m benchmarks.memory
    python -m benchmarks.memory --precision bfloat16
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import train_speed
from secateur.base import plugin
from secateur.base.machine import hardware
from secateur.data.batches import Batches
from secateur.data.dataset import prepare
from secateur.data.image_files import ImageFileList
from secateur.training import loop

CIFAR_LIMIT = 2048  # MiB
PICTURES, SIDE = 6000, 160


def resident(key: str) -> float:
    """Memory of this process in MiB; `key` is VmRSS (current) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def cifar(precision: str) -> None:
    """Train one epoch; print the MiB of the libraries, the peak MiB and the seconds."""
    what = train_speed.task("resnet20", images=50_000, precision=precision, epochs=0)
    libraries = resident("VmRSS")
    data, model = train_speed.made_up(what), train_speed.network(what)
    settings = train_speed.settings(what)
    start = time.perf_counter()
    loop.fit(model, data, settings, 1, train_speed.Discard(), [])
    print(libraries, resident("VmHWM"), time.perf_counter() - start)


def folder(root: Path) -> None:
    """Write random JPEG images of two classes."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (PICTURES, 10, 10, 3), dtype=np.uint8)
    for number, pixels in enumerate(coarse):
        part = "test" if number < 10 else "train"
        place = root / "images" / part / f"class{number % 2}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(place)


def pictures(root: Path, memory_mb: int) -> None:
    """Prepare a folder and read every image once; print the MiB of the libraries and the peak."""
    module = plugin.load("datasets", "image_folder")
    libraries = resident("VmRSS")
    found = module.read(module.Settings(memory_mb=memory_mb), root)
    data = prepare("made up", found, 0, 0)
    for images, _ in Batches(data.train, data.info, 32, 1).epoch(0):
        assert images.shape[1:] == (3, SIDE, SIDE)
    print(libraries, resident("VmHWM"), isinstance(data.train, ImageFileList))


def apart(*arguments: str) -> list[str]:
    """The words on the last line that a separate process prints."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1].split()


def main() -> None:
    """Measure each case in a separate process, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, *rest = options.one
        cifar(*rest) if kind == "cifar" else pictures(Path(rest[0]), int(rest[1]))
        return
    print(f"{hardware()}; torch {torch.__version__}")
    libraries, peak, seconds = map(float, apart("--one", "cifar", options.precision))
    extra = peak - libraries
    print(
        f"resnet20, batch 128, 50,000 images, {options.precision}: {extra:,.0f} MiB in addition "
        f"to the libraries' {libraries:,.0f} ({seconds:.0f} s); the limit is {CIFAR_LIMIT:,}"
    )
    whole = PICTURES * SIDE * SIDE * 3 / 2**20
    print(f"{PICTURES:,} JPEG images of {SIDE}x{SIDE}, {whole:,.0f} MiB decoded:")
    with tempfile.TemporaryDirectory() as place:
        folder(Path(place))
        taken = {}
        for name, limit in (("in memory", "4096"), ("from files", "0")):
            before, most, listed = apart("--one", "pictures", place, limit)
            assert listed == str(name == "from files")
            taken[name] = float(most) - float(before)
            print(f"    {name}: {taken[name]:,.0f} MiB in addition to the libraries")
    if extra > CIFAR_LIMIT or taken["from files"] > whole / 2:
        raise SystemExit("peak memory above the limit")


if __name__ == "__main__":
    main()
