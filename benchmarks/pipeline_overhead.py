"""Overhead of DVC and MLflow: the stages alone, under DVC, and under DVC with MLflow.

Runs in a temporary copy of the project's tracked files, with the settings of params.yaml, or with
trainings of --epochs. Every run has a different seed, so that no stage is restored from a cache.
CPU seconds, which other programs on the machine disturb least, are those of all processes.

    python -m benchmarks.pipeline_overhead --rounds 3
    python -m benchmarks.pipeline_overhead --rounds 3 --epochs 1
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

STAGES = ["prepare", "baseline", "sparse_train", "prune", "finetune", "evaluate"]


def copy_project(target: Path) -> None:
    """Copy the files tracked by Git into a new repository."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if Path(name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, target / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=target, check=True)


def change(project: Path, seed: int, epochs: int | None) -> None:
    """Set the seed in the copy, so that every training runs, and the length of its trainings."""
    file = project / "params.yaml"
    params: dict[str, Any] = yaml.safe_load(file.read_text()) | {"seed": seed}
    if epochs is not None:
        for section in ("baseline", "sparse_train", "finetune"):
            params[section]["epochs"] = epochs
    file.write_text(yaml.safe_dump(params))


def seconds(project: Path, commands: list[list[str]], tracking: str) -> list[tuple[float, float]]:
    """Wall-clock and CPU time of each of the commands, run one after the other."""
    bin_folder = Path(sys.executable).parent
    path = f"{bin_folder}:{os.environ['PATH']}"
    env = os.environ | {"SECATEUR_TRACKING": tracking, "PATH": path}
    taken = []
    for command in commands:
        start, before = time.perf_counter(), _cpu()
        subprocess.run(command, cwd=project, env=env, check=True, stdout=subprocess.DEVNULL)
        taken.append((time.perf_counter() - start, _cpu() - before))
    return taken


def _cpu() -> float:
    """Seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the three variants alternately and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    options = parser.parse_args()
    alone = [[sys.executable, "-m", f"stages.{name}"] for name in STAGES]
    ways = {
        "stages alone": (alone, "off"),
        "stages and MLflow": (alone, "on"),
        "dvc repro": ([["dvc", "repro", "-q"]], "off"),
        "dvc repro and MLflow": ([["dvc", "repro", "-q"]], "on"),
    }
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        for number in range(options.rounds):
            for place, (name, (commands, tracking)) in enumerate(ways.items()):
                change(project, 100 + number * len(ways) + place, options.epochs)
                taken[name].append(seconds(project, commands, tracking))
        ((idle, idle_cpu),) = seconds(project, [["dvc", "repro", "-q"]], "off")
    print(f"{'':22} {'wall':>7} {'CPU':>7}  by stage, CPU: {' '.join(STAGES)}")
    for name, rounds in taken.items():
        wall, cpu = (statistics.median(sum(c[k] for c in r) for r in rounds) for k in (0, 1))
        each = [statistics.median(r[k][1] for r in rounds) for k in range(len(rounds[0]))]
        stages = " ".join(f"{value:.2f}" for value in each) if len(each) > 1 else ""
        print(f"{name:22} {wall:7.1f} {cpu:7.1f}  {stages}")
    print(f"{'dvc repro, up to date':22} {idle:7.1f} {idle_cpu:7.1f}")


if __name__ == "__main__":
    main()
