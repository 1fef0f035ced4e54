"""latency: measure the network's layers at several widths, for pruners with target {latency: ...}.

Reads   data/<dataset> (the shape of its images); the network is built for it, with new weights.
Writes  latency/<runtime>.json: hardware, versions, times of every layer by outputs and inputs, and
        of the whole network at several widths.

`dvc repro` runs it before `prune` if prune.latency in params.yaml names the runtime; to run it by
hand: `dvc repro stages/latency/dvc.yaml:latency@onnxruntime`. Measure on an idle machine; `-f`
measures again.
"""

from pathlib import Path
from typing import get_args

import torch

from secateur.base.optional import RuntimeName
from secateur.deploy import layer_times
from secateur.nn import checkpoint
from secateur.pipeline import console, runner


def main(runtime: RuntimeName) -> None:
    """Measure, write the table, and print a summary."""
    layer_times.check_packages([runtime])
    context = runner.open_context(f"latency@{runtime}")
    params, info = context.params, context.data.info
    model = checkpoint.build_architecture(context.header())
    settings = params.latency
    table = layer_times.measure(
        model,
        torch.randn(1, *info.shape),
        runtime=runtime,
        batch=settings.batch,
        threads=settings.threads,
        repeats=settings.repeats,
        on_step=lambda what: console.say(f"latency: {runtime}: {what}"),
    )
    path = Path(f"latency/{runtime}.json")
    table.save(path)
    dense, *others = table.networks
    times = ", ".join(f"{network.ms:.3g}" for network in others)
    console.say(
        f"latency: {table.about}: {dense.ms:.3g} ms"
        + (f"; with narrower groups {times} ms" if others else "")
    )
    console.say(f"latency: widths in multiples of {table.multiple}")
    console.say(f"see          {path}")


if __name__ == "__main__":
    console.main(main, "latency", __doc__, choices=get_args(RuntimeName))
