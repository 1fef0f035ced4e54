"""Check of a latency target, which was predicted: time the network before and after pruning.

No result depends on this module: only the table of measured layers determines what is pruned.
"""

import torch
from torch import nn

from secateur.base import machine
from secateur.pipeline import console
from secateur.pruning.latency import LatencyTable

REPEATS = 100


def check(
    table: LatencyTable, before: nn.Module, after: nn.Module, image: torch.Tensor
) -> dict[str, float]:
    """Measure both networks, taking turns, and print how much of the time is left.

    `before` is the network that the share of the target refers to; `image` is one image,
    (1, C, H, W). Returns the metrics `latency_left_measured`, `latency_ms` and
    `latency_ms_before`. Raises SecateurError if the runtime is not installed.
    """
    from secateur.deploy import layer_times  # takes a while to import

    if machine.cpu_name() != table.hardware:
        console.say(
            f"prune: latency: the layers were measured on {table.hardware}, here is "
            f"{machine.cpu_name()}; `dvc repro -f stages/latency/dvc.yaml:latency@{table.runtime}` "
            "measures them here"
        )
    times = layer_times.compare(
        {"before": before, "after": after},
        image,
        runtime=table.runtime,
        batch=table.batch,
        threads=table.threads,
        repeats=REPEATS,
    )
    left = times["after"] / times["before"]
    console.say(
        f"prune: latency: measured {left:.4f}: {times['after']:.3g} of {times['before']:.3g} ms in "
        f"{table.about}"
    )
    return {
        "latency_left_measured": left,
        "latency_ms": times["after"],
        "latency_ms_before": times["before"],
    }
