"""baseline: train the dense network.

Reads   data/<dataset>.
Writes  models/baseline/model.safetensors, history.csv (one row per epoch) and scales.csv (histogram
        of the scales of batch normalisations), and models/baseline.run.json, which names the run
        that made them.

A killed training, run again, resumes from its last saved epoch and ends with the same bytes.
"""

import torch

from secateur.base.settings import section
from secateur.nn import checkpoint
from secateur.pipeline import console, preflight, runner


def main() -> None:
    """Build, train, save."""
    runner.train("baseline", train_dense)


def train_dense(context: runner.TrainingContext) -> runner.StageResult:
    """Train a new network on cross-entropy alone."""
    header = context.header()
    torch.manual_seed(context.params.seed)
    with section(f"archs.{header.arch}"):
        model = checkpoint.build_architecture(header, pretrained=True)
    preflight.check_network(model, context.data.info)
    fit = context.fit(model, context.params.baseline)
    return runner.trained(model, header, fit)


if __name__ == "__main__":
    console.main(main, "baseline", __doc__)
