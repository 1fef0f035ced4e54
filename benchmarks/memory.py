"""Peak resident memory: of training on CIFAR, and of pictures that stay in their files.

ResNet-20 with batches of 128 on 50,000 made-up images of 32x32 pixels, and a folder of JPEG files
once decoded into memory and once as a list of names. Each in a process of its own; counted is what
comes on top of the imported libraries.

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
from secateur.data.dataset import Batches, prepare
from secateur.data.image_files import ImageFileList
from secateur.training import loop

CIFAR_LIMIT = 2048  # MiB
PICTURES, SIDE = 6000, 160


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def cifar(precision: str) -> None:
    """Be one process: train an epoch, and print what the libraries and the rest take."""
    what = train_speed.task("resnet20", images=50_000, precision=precision, epochs=0)
    libraries = resident("VmRSS")
    data, model = train_speed.made_up(what), train_speed.network(what)
    settings = train_speed.settings(what)
    start = time.perf_counter()
    loop.fit(model, data, settings, 1, train_speed.Discard(), [])
    print(libraries, resident("VmHWM"), time.perf_counter() - start)


def folder(root: Path) -> None:
    """Made-up pictures of two classes in files."""
    chance = np.random.default_rng(0)
    coarse = chance.integers(0, 256, (PICTURES, 10, 10, 3), dtype=np.uint8)
    for number, pixels in enumerate(coarse):
        part = "test" if number < 10 else "train"
        place = root / "images" / part / f"class{number % 2}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(place)


def pictures(root: Path, memory_mb: int) -> None:
    """Be one process: prepare a folder, see every picture once, and print what it took."""
    module = plugin.load("datasets", "image_folder")
    libraries = resident("VmRSS")
    found = module.read(module.Settings(memory_mb=memory_mb), root)
    data = prepare("made up", found, 0, 0)
    for images, _ in Batches(data.train, data.info, 32, 1).epoch(0):
        assert images.shape[1:] == (3, SIDE, SIDE)
    print(libraries, resident("VmHWM"), isinstance(data.train, ImageFileList))


def apart(*arguments: str) -> list[str]:
    """What a process of its own prints last."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1].split()


def main() -> None:
    """Command line."""
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
        f"resnet20, batch 128, 50,000 images, {options.precision}: {extra:,.0f} MiB beyond the "
        f"libraries' {libraries:,.0f} ({seconds:.0f} s); the limit is {CIFAR_LIMIT:,}"
    )
    whole = PICTURES * SIDE * SIDE * 3 / 2**20
    print(f"{PICTURES:,} JPEG pictures of {SIDE}x{SIDE}, {whole:,.0f} MiB decoded:")
    with tempfile.TemporaryDirectory() as place:
        folder(Path(place))
        taken = {}
        for name, limit in (("in memory", "4096"), ("as a list", "0")):
            before, most, listed = apart("--one", "pictures", place, limit)
            assert listed == str(name == "as a list")
            taken[name] = float(most) - float(before)
            print(f"    {name}: {taken[name]:,.0f} MiB beyond the libraries")
    if extra > CIFAR_LIMIT or taken["as a list"] > whole / 2:
        raise SystemExit("more than it should be")


if __name__ == "__main__":
    main()
