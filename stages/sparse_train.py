"""sparse-train: train on from the dense network with decay * penalty added to the loss.

Reads   data/<dataset>, models/baseline.
Writes  models/sparse/model.safetensors and history.csv (one row an epoch), and
        models/sparse.run.json, which says which run made them.

A killed training, run again, goes on where it was and ends with the same bytes.
"""

from secateur import chain, console
from secateur.core import plugin


def main() -> None:
    """Load the dense network, train on, save."""
    job = chain.Job("sparse-train")
    job.checkpoint("baseline")
    chain.train_model(job, job.params.sparse_train, train_sparse)


def train_sparse(job: chain.Job) -> chain.Product:
    """The dense network, trained on towards small weights."""
    params, dense = job.params, job.upstream["baseline"]
    model = dense.model()
    penalty = plugin.load("penalties", params.penalty).build(params.chosen("penalties"), model)
    fit = job.fit(model, params.sparse_train, penalty=penalty, decay=params.decay)
    header = job.header(dense, penalty=params.penalty, decay=params.decay)
    return chain.trained(model, header, fit)


if __name__ == "__main__":
    console.main(main, "sparse_train", __doc__)
