"""finetune: train the pruned network on; what was pruned stays exactly zero.

Reads   data/<dataset>, models/pruned.
Writes  models/finetuned/model.safetensors with its masks and history.csv (one row an epoch), and
        models/finetuned.run.json, which says which run made them.

With finetune.init: scratch, the pruned shape is trained from new weights: the control that shows
what the inherited weights are worth. A killed training, run again, goes on where it was.
"""

import torch

from secateur import chain, console
from secateur.core import masks
from secateur.core.shapes import reset


def main() -> None:
    """Load the pruned network, train on, save."""
    job = chain.Job("finetune")
    job.checkpoint("prune")
    chain.train_model(job, job.params.finetune, finetune)


def finetune(job: chain.Job) -> chain.Product:
    """The pruned network, trained on without a penalty."""
    settings, pruned = job.params.finetune, job.upstream["prune"]
    model = pruned.model()
    if settings.init == "scratch":
        torch.manual_seed(job.params.seed)
        reset(model)
    masks.apply(model, pruned.masks)
    fit = job.fit(model, settings, masks=pruned.masks)
    notes = pruned.header.notes | {"init": settings.init}
    return chain.trained(model, job.header(pruned, **notes), fit, pruned.masks)


if __name__ == "__main__":
    console.main(main, "finetune", __doc__)
