"""sparse-train: train on from the dense network with a penalty added to the loss.

Reads   data/<dataset>, models/baseline.
Writes  models/sparse/model.safetensors, history.csv (one row an epoch) and scales.csv (how many
        scales of batch normalisations have which size), and models/sparse.run.json, which says
        which run made them. A penalty that runs a course of its own leaves its choice in the model
        and its course in growth.csv, which is empty otherwise.

A killed training, run again, goes on where it was and ends with the same bytes.
"""

from dataclasses import replace

import pandas as pd

from secateur.pipeline import console
from secateur.pipeline import preflight as rehearsal
from secateur.pipeline import runner as chain
from secateur.training import penalty as penalties
from secateur.training.penalty import ScheduledPenalty

GROWTH = ["step", "factor", "kept", "chosen"]
"""Of growth.csv; without a course it has this line alone, since DVC complains about what is not
there when it draws plots."""


def main() -> None:
    """Load the dense network, train on, save."""
    job = chain.StageContext("sparse-train")
    job.checkpoint("baseline")
    chain.train_model(job, job.params.sparse_train, train_sparse)


def train_sparse(job: chain.StageContext) -> chain.StageResult:
    """The dense network, trained on towards small weights."""
    params, dense = job.params, job.upstream["baseline"]
    model = dense.model()
    if params.sparse_train.epochs:
        rehearsal.check_network(model, job.data.info)
    chosen = params.chosen("penalties")
    penalty = penalties.build(params.penalty, chosen, model, params.decay)
    fit = job.fit(model, params.sparse_train, penalty=penalty)
    header = job.header(dense, penalty=params.penalty, decay=params.decay)
    product = chain.trained(model, header, fit)
    if not isinstance(penalty, ScheduledPenalty):
        return replace(product, tables={"growth": pd.DataFrame(columns=GROWTH)})
    growth = pd.DataFrame(penalty.growth_table()).astype({"step": int})
    return replace(product, choices=penalty.choices(), tables={"growth": growth})


if __name__ == "__main__":
    console.main(main, "sparse_train", __doc__)
