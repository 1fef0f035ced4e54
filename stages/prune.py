"""prune: choose what goes, set it to zero, and take out what no longer matters.

Reads   data/<dataset> (a batch for the proof and for criteria that look at the loss; with
        prune.recalibrate more of it), models/sparse.
Writes  models/pruned/model.safetensors with its masks, outputs.csv (what is left of every layer)
        and scales.csv (how many scales of batch normalisations have which size), and
        models/pruned.run.json.

A pruner decides about weights, which are set to zero, or about whole channels, which are taken out.
Masks made of groups of channels may become group convolutions (prune.export). Channels that are
dead then go too (prune.remove_dead), and the smaller network is proved to compute the same as the
masked one before anything is written. Statistics of batch normalisations may then be measured again
(prune.recalibrate).
"""

from itertools import islice

import pandas as pd
from torch import nn

from secateur.base import machine, plugin
from secateur.data.dataset import Batches, few
from secateur.gconv import export as regroup
from secateur.nn import cost
from secateur.pipeline import console
from secateur.pipeline import runner as chain
from secateur.pruning.apply import apply_decision
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks
from secateur.training.evaluation import accuracy
from secateur.training.recalibrate import recalibrate

BATCH = 128
"""Images over which statistics are averaged at once."""


def main() -> None:
    """Load the sparse-trained network, prune, save."""
    job = chain.StageContext("prune")
    job.checkpoint("sparse-train")
    chain.make(job, prune)


def prune(job: chain.StageContext) -> chain.StageResult:
    """The sparse-trained network without what the pruner decided, and without dead channels."""
    params, sparse = job.params, job.upstream["sparse-train"]
    settings = params.chosen("pruners")
    model = sparse.model().eval()
    before, outputs = cost.parameters(model), _outputs(model)
    batch, labels = few(job.data.train, job.data.info)
    subject = PruningContext(model, batch, labels, sparse.choices)
    decision: PruningDecision = plugin.load("pruners", params.pruner).prune(settings, subject)
    asked = ", ".join([params.pruner, *(f"{k} {v}" for k, v in settings if v is not None)])
    console.reached(decision.notes)
    for line in decision.lines:
        console.say(f"prune: {line}")
    pruned = apply_decision(
        model,
        decision,
        batch,
        remove_dead=params.prune.remove_dead,
        export=params.prune.export,
        requested=asked,
    )
    left = _outputs(pruned.model)
    rows = [(name, count, left[name]) for name, count in outputs.items()]
    table = pd.DataFrame(rows, columns=["layer", "outputs", "outputs_left"])
    console.outputs(rows)
    metrics = {**decision.notes, **pruned.differences}
    if params.prune.export == "gconv":
        metrics |= regroup.group_convolution_counts(pruned.model)
        console.say(
            f"prune: {metrics['group_convolutions']:.0f} group convolutions, "
            f"{metrics['index_layers']:.0f} index layers beside them"
        )
    metrics["removed_outputs"] = float(sum(outputs.values()) - sum(left.values()))
    if params.prune.recalibrate:
        metrics |= measure_again(job, pruned.model, params.prune.recalibrate)
    metrics["nonzero"] = float(masks.nonzero(pruned.model))
    metrics["compression"] = before / metrics["nonzero"]
    console.say(
        f"prune: {asked}: {int(metrics['nonzero']):,} of {before:,} parameters left "
        f"({metrics['compression']:.1f}x)"
    )
    header = job.header(sparse, asked=asked, reached=dict(metrics))
    return chain.StageResult(
        pruned.model,
        header,
        pruned.masks,
        metrics=metrics,
        tables={"outputs": table},
        texts=decision.files,
    )


def measure_again(job: chain.StageContext, model: nn.Module, images: int) -> dict[str, float]:
    """Recalibrate on so many training images, in place; accuracy on val before and after."""
    place, data = machine.device(), job.data
    model.to(place)
    metrics: dict[str, float] = {}
    if len(data.val):
        metrics["val_accuracy_before"], _ = accuracy(model, data.val, data.info)
    size = min(BATCH, images, len(data.train))
    batches = Batches(data.train, data.info, size, 0, device=place)
    whole = max(1, min(images, len(data.train)) // size)  # of one size, so that all count alike
    try:
        norms = recalibrate(model, (x for x, _ in islice(batches.epoch(0), whole)))
    finally:
        batches.close()
    said = f"prune: statistics of {norms} batch normalisations from {whole * size:,} images"
    if len(data.val):
        metrics["val_accuracy_recalibrated"], _ = accuracy(model, data.val, data.info)
        before, after = metrics.values()
        said += f": accuracy on val {before:.2%} before, {after:.2%} after"
    console.say(said)
    model.cpu()
    return metrics


def _outputs(model: nn.Module) -> dict[str, int]:
    """Outputs of every layer, by name."""
    return {name: layer.weight.shape[0] for name, layer in masks.layers(model).items()}


if __name__ == "__main__":
    console.main(main, "prune", __doc__)
