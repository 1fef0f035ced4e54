"""baseline: train the dense network.

Reads   data/<dataset>.
Writes  models/baseline/model.safetensors, history.csv (one row an epoch) and scales.csv (how many
        scales of batch normalisations have which size), and models/baseline.run.json, which says
        which run made them.

A killed training, run again, goes on where it was and ends with the same bytes.
"""

import torch

from secateur.nn import checkpoint
from secateur.pipeline import console
from secateur.pipeline import preflight as rehearsal
from secateur.pipeline import runner as chain


def main() -> None:
    """Build, train, save."""
    job = chain.StageContext("baseline")
    chain.train_model(job, job.params.baseline, train_dense)


def train_dense(job: chain.StageContext) -> chain.StageResult:
    """A new network, trained on cross-entropy alone."""
    header = job.header()
    torch.manual_seed(job.params.seed)
    model = checkpoint.architecture(header, published=True)
    rehearsal.check_network(model, job.data.info)
    fit = job.fit(model, job.params.baseline)
    return chain.trained(model, header, fit)


if __name__ == "__main__":
    console.main(main, "baseline", __doc__)
