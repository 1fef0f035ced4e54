"""prune: choose what goes, set it to zero, and take out what no longer matters.

Reads   data/<dataset> (a batch for the proof), models/sparse.
Writes  models/pruned/model.safetensors with its masks, and models/pruned.run.json.

A pruner decides about weights, which are set to zero, or about whole channels, which are taken out.
Masks made of groups of channels may become group convolutions (prune.export). Channels that are
dead then go too (prune.remove_dead), and the smaller network is proved to compute the same as the
masked one before anything is written.
"""

import copy

import torch

from secateur import chain, console
from secateur.core import cost, masks, plugin, regroup, surgery
from secateur.core.data import sample
from secateur.core.decision import Decision, Subject


def main() -> None:
    """Load the sparse-trained network, prune, save."""
    job = chain.Job("prune")
    job.checkpoint("sparse-train")
    chain.make(job, prune)


def prune(job: chain.Job) -> chain.Product:
    """The sparse-trained network without its small weights and without its dead outputs."""
    params, sparse = job.params, job.upstream["sparse-train"]
    settings = params.chosen("pruners")
    model = sparse.model().eval()
    before = cost.parameters(model)
    about = job.data.about
    batch = sample(job.data.train, about, _proof_images(about.shape))
    subject = Subject(model, batch, job.data.train.labels[: len(batch)], sparse.choices)
    choice: Decision = plugin.load("pruners", params.pruner).prune(settings, subject)
    asked = ", ".join([params.pruner, *(f"{k} {v}" for k, v in settings)])
    for line in choice.lines:
        console.say(f"prune: {line}")
    mask = choice.masks
    masks.refuse_empty(model, mask, asked)
    masks.apply(model, mask)
    notes: dict[str, object] = {"asked": asked}
    metrics: dict[str, float] = {"removed_outputs": 0.0, **choice.notes}
    export = params.prune.export
    if params.prune.remove_dead or choice.channels or export != "none":
        whole = copy.deepcopy(model).double()
        dead = params.prune.remove_dead
        exact = surgery.compact(whole, choice.channels, mask, batch[:1].double(), dead, export)
        model = surgery.mask(model, choice.channels, batch)
        double = copy.deepcopy(model).double()
        metrics["difference_float64"] = surgery.verify(double, exact, batch.double(), surgery.EXACT)
        small = exact.to(torch.float32)
        metrics["difference_float32"] = surgery.verify(model, small, batch, surgery.ROUNDING)
        outputs = {name: layer.weight.shape[0] for name, layer in masks.layers(model).items()}
        left = {name: len(kept) for name, kept in small.kept.items()}
        metrics["removed_outputs"] = float(sum(outputs[n] - count for n, count in left.items()))
        for name, count in left.items():
            console.say(f"prune: {name}: {count} of {outputs[name]} outputs left")
        model, mask = small.model, small.masks
        notes["export"] = export
        if export == "gconv":
            metrics |= regroup.count(model)
            console.say(
                f"prune: {metrics['group_convolutions']:.0f} group convolutions, "
                f"{metrics['index_layers']:.0f} index layers beside them"
            )
    metrics["nonzero"] = float(masks.nonzero(model))
    metrics["compression"] = before / metrics["nonzero"]
    notes["reached"] = dict(metrics)
    console.say(
        f"prune: {asked}: {int(metrics['nonzero']):,} of {before:,} parameters left "
        f"({metrics['compression']:.1f}x)"
    )
    header = job.header(sparse, **notes)
    return chain.Product(model, header, mask, metrics=metrics, texts=choice.files)


def _proof_images(shape: list[int]) -> int:
    """As many as fit into the memory of 256 images of 32x32 pixels, at least 8."""
    return max(8, min(256, 256 * 32 * 32 // (shape[1] * shape[2])))


if __name__ == "__main__":
    console.main(main, "prune", __doc__)
