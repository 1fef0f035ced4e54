"""sparse-train: continue training the dense network with a penalty added to the loss.

During training the weights may be parametrized; the saved model has plain weights, which are zero
where they are pruned.

Reads   data/<dataset>, models/baseline; in a further round the model that the round starts from.
Writes  models/sparse/model.safetensors, history.csv (one row per epoch) and scales.csv (histogram
        of the scales of batch normalisations), and models/sparse.run.json, which names the run that
        made them. A penalty that chooses what is pruned stores its choice in the model, and the
        trace of its schedule in growth.csv, which is otherwise empty: largest factor or pruned
        share, and mean magnitude of kept and of chosen weights. In a further round the same below
        models/rounds/<round>/; weights that earlier rounds have pruned stay pruned.

A killed training, run again, resumes from its last saved epoch and ends with the same bytes.
"""

from dataclasses import replace

from secateur.base.files import Table
from secateur.base.settings import section
from secateur.pipeline import console, preflight, runner
from secateur.training import parametrization as parametrizations
from secateur.training import penalty as penalties
from secateur.training.penalty import ChoosingPenalty

GROWTH = ["step", "factor", "kept", "chosen"]
"""Columns of a growth.csv without rows; it is written for every penalty because DVC warns about
missing files of plots."""


def main(round_name: str | None) -> None:
    """Load the network, train it with the penalty, save."""
    runner.train("sparse-train", train_sparse, round_name)


def train_sparse(context: runner.TrainingContext) -> runner.StageResult:
    """Train the network with the penalty; weights that are already pruned stay pruned."""
    params, start = context.params, context.start
    model = start.model()
    if params.sparse_train.epochs:
        preflight.check_network(model, context.data.info, context.round_name)
    with section(f"penalties.{params.penalty}"):
        chosen = params.chosen("penalties")
        penalty = penalties.build(
            params.penalty, chosen, model, params.decay, context.data.info.shape
        )
    name = params.parametrization
    with section(f"parametrizations.{name}"):
        own, epochs = params.chosen("parametrizations"), params.sparse_train.epochs
        parametrization = parametrizations.build(name, own, model, epochs)
        term = parametrizations.joined(name, parametrization, penalty)
    fit = context.fit(model, params.sparse_train, penalty=term, masks=start.masks)
    notes = {"penalty": params.penalty, "decay": params.decay}
    if parametrization is None:
        result = runner.trained(model, context.header(start, **notes), fit, start.masks)
    else:
        zeros = parametrization.collapse()
        header = context.header(start, **notes, parametrization=name)
        result = replace(runner.trained(model, header, fit, start.masks), choices=zeros)
    if not isinstance(penalty, ChoosingPenalty):
        return replace(result, tables={"growth": Table(GROWTH, ())})
    rows = [row | {"step": int(row["step"])} for row in penalty.trace_table()]
    growth = Table.of(rows, GROWTH)
    return replace(result, choices=penalty.choices(), tables={"growth": growth})


if __name__ == "__main__":
    console.main(main, "sparse_train", __doc__, rounds=True)
