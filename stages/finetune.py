"""finetune: train the pruned network on; what was pruned stays exactly zero.

Reads   data/<dataset>, models/pruned.
Writes  models/finetuned/model.safetensors with its masks, history.csv (one row an epoch) and
        scales.csv (how many scales of batch normalisations have which size), and
        models/finetuned.run.json, which says which run made them.

With finetune.init: scratch, the pruned shape is trained from new weights: the control that shows
what the inherited weights are worth. With finetune.budget: compute it trains for as much
computation as the given epochs of the dense network. A killed training, run again, goes on where it
was.
"""

import torch
from torch import nn

from secateur.base.settings import Finetune
from secateur.nn import checkpoint, cost
from secateur.nn.resizing import reset
from secateur.pipeline import console
from secateur.pipeline import runner as chain
from secateur.sparsity import masks
from secateur.training import budget


def main() -> None:
    """Load the pruned network, train on, save."""
    job = chain.StageContext("finetune")
    job.checkpoint("prune")
    chain.train_model(job, job.params.finetune, finetune)


def finetune(job: chain.StageContext) -> chain.StageResult:
    """The pruned network, trained on without a penalty."""
    settings, pruned = job.params.finetune, job.upstream["prune"]
    model = pruned.model()
    if settings.init == "scratch":
        torch.manual_seed(job.params.seed)
        reset(model)
    masks.apply(model, pruned.masks)
    if settings.budget == "compute":
        settings = _by_compute(settings, checkpoint.architecture(pruned.header), model, job)
    fit = job.fit(model, settings, masks=pruned.masks)
    notes = pruned.header.notes | {"init": settings.init, "epochs": settings.epochs}
    return chain.trained(model, job.header(pruned, **notes), fit, pruned.masks)


def _by_compute(
    settings: Finetune, dense: nn.Module, pruned: nn.Module, job: chain.StageContext
) -> Finetune:
    """As many epochs as cost what the given ones of the dense network cost."""
    image = torch.zeros(1, *job.data.info.shape)
    macs = [cost.macs(m, image) for m in (dense, pruned)]
    longer = budget.stretched(settings, *macs)
    if job.engine is None or job.engine.is_main:
        console.say(
            f"finetune: {longer.epochs} epochs instead of {settings.epochs}: an image takes "
            f"{macs[0] / macs[1]:.2f}x fewer MACs than in the dense network "
            f"(finetune.budget_limit: {settings.budget_limit:g}x)"
        )
    return longer


if __name__ == "__main__":
    console.main(main, "finetune", __doc__)
