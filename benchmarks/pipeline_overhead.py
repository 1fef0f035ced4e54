"""Overhead of DVC and MLflow: the stages alone, under DVC, and under DVC with MLflow.

Runs in a temporary copy of the project's tracked files, with the settings of params.yaml. Every run
has a different seed, so that no stage is restored from a cache.

    python -m benchmarks.pipeline_overhead --rounds 3
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def with_seed(project: Path, seed: int) -> None:
    """Set the seed in the copy, so that every training runs."""
    file = project / "params.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"seed": seed}))


def seconds(project: Path, commands: list[list[str]], tracking: str) -> float:
    """Wall-clock time of the commands, run one after the other."""
    bin_folder = Path(sys.executable).parent
    path = f"{bin_folder}:{os.environ['PATH']}"
    env = os.environ | {"SECATEUR_TRACKING": tracking, "PATH": path}
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, cwd=project, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run the three variants alternately and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    alone = [[sys.executable, "-m", f"stages.{name}"] for name in STAGES]
    ways = {
        "stages alone": (alone, "off"),
        "dvc repro": ([["dvc", "repro", "-q"]], "off"),
        "dvc repro and MLflow": ([["dvc", "repro", "-q"]], "on"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        seed = 100
        for _ in range(rounds):
            for name, (commands, tracking) in ways.items():
                seed += 1
                with_seed(project, seed)
                taken[name].append(seconds(project, commands, tracking))
        idle = seconds(project, [["dvc", "repro", "-q"]], "off")
    base = statistics.median(taken["stages alone"])
    for name, values in taken.items():
        middle = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:22} {middle:6.1f} s ({spread}), {middle - base:+.1f} s")
    print(f"{'dvc repro, up to date':22} {idle:6.1f} s")


if __name__ == "__main__":
    main()
