"""36 experiments on the digits: by `secateur study`, and by DVC's queue with two workers.

The experiments have four criteria, three ratios and three seeds, and run in two temporary clones of
the project. For both ways, the wall time and the CPU seconds of all processes are printed,
including the queue's own workers; CPU seconds hardly depend on other programs. Linux only.

    python -m benchmarks.study_speed
"""

import argparse
import ctypes
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pipeline_overhead import copy_project

CRITERIA, RATIOS, SEEDS = ("l1", "l2", "taylor", "fisher"), (0.5, 0.7, 0.9), (1, 2, 3)
SETTINGS: dict[str, Any] = {
    "pruner": "magnitude",
    "penalty": "none",
    "baseline": {"epochs": 20},
    "sparse_train": {"epochs": 0},
    "finetune": {"epochs": 10},
}


def project(folder: Path) -> None:
    """A clone of the project with the settings and the study, committed."""
    folder.mkdir()
    copy_project(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in SETTINGS.items():
        params[key] = params[key] | value if isinstance(value, dict) else value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    study = {
        "about": "four criteria",
        "axes": {
            "pruners.magnitude.criterion": list(CRITERIA),
            "pruners.magnitude.ratios": list(RATIOS),
        },
        "seeds": list(SEEDS),
    }
    (folder / "studies" / "speed.yaml").write_text(yaml.safe_dump(study))
    for command in (["add", "-A"], ["commit", "-qm", "start"]):
        name = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
        subprocess.run(["git", *name, *command], cwd=folder, check=True)


class Watch:
    """Wall time and CPU seconds of commands and of all processes that they leave running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = {"GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | dict.fromkeys(names, "benchmark") | {"PATH": path}
        self.since, self.cpu = time.monotonic(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def run(self, *command: str) -> None:
        """Run a command without showing its output."""
        nowhere = subprocess.DEVNULL
        subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            check=True,
            stdout=nowhere,
            stderr=nowhere,
        )

    def show(self, name: str) -> tuple[float, float]:
        """Wait for remaining processes, then print both times and the number of experiments."""
        while True:
            try:
                os.wait()
            except ChildProcessError:
                break
        wall, cpu = time.monotonic() - self.since, self._cpu() - self.cpu
        command = ["git", "for-each-ref", "--format=%(refname)", "refs/exps"]
        refs = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        made = [ref for ref in refs.stdout.split() if len(ref.split("/")) == 5]
        print(f"{name:32} {wall:7.1f} s wall {cpu:7.1f} s CPU  {len(made)} experiments", flush=True)
        return wall, cpu


def main() -> None:
    """Run both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--no-queue", action="store_true", help="run only the study")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: queue workers become our children
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        first, second = Path(place, "study"), Path(place, "queue")
        project(first)
        watch = Watch(first)
        watch.run(sys.executable, "-m", "secateur", "study", "speed", "--workers", "2")
        study = watch.show("study, all to be run")
        watch = Watch(first)
        watch.run(sys.executable, "-m", "secateur", "study", "speed", "--workers", "2")
        watch.show("study, all finished")
        if options.no_queue:
            return
        project(second)
        watch = Watch(second)
        for criterion, ratio, seed in itertools.product(CRITERIA, RATIOS, SEEDS):
            values = {"pruners.magnitude.criterion": criterion, "seed": seed}
            values["pruners.magnitude.ratios"] = ratio
            given = [part for key, value in values.items() for part in ("-S", f"{key}={value}")]
            watch.run("dvc", "exp", "run", "--queue", *given)
        watch.run("dvc", "queue", "start", "-j", "2")
        queue = watch.show("dvc queue start -j 2")
        print(f"{queue[0] / study[0]:.1f} times in wall, {queue[1] / study[1]:.1f} times in CPU")


if __name__ == "__main__":
    main()
