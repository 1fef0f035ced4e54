"""finetune: continue training the pruned network; pruned weights stay exactly zero.

Reads   data/<dataset>, models/pruned.
Writes  models/finetuned/model.safetensors with its masks, history.csv (one row per epoch) and
        scales.csv (histogram of the scales of batch normalisations), and
        models/finetuned.run.json, which names the run that made them; in a further round the same
        below models/rounds/<round>/.

With finetune.init: scratch, the pruned architecture is trained from new weights: the control
that shows what the inherited weights contribute. With finetune.budget: compute it trains for as
much computation as the given epochs take for the dense network. A killed training, run again,
resumes from its last saved epoch.
"""

import torch
from torch import nn

from secateur.base.sections import Finetune
from secateur.nn import checkpoint, cost
from secateur.nn.resizing import reset_parameters
from secateur.pipeline import console, runner
from secateur.sparsity import masks
from secateur.training import budget


def main(round_name: str | None) -> None:
    """Load the pruned network, train it on, save."""
    runner.train("finetune", finetune, round_name)


def finetune(context: runner.TrainingContext) -> runner.StageResult:
    """Train the pruned network on without a penalty."""
    settings, pruned = context.params.finetune, context.start
    model = pruned.model()
    if settings.init == "scratch":
        torch.manual_seed(context.params.seed)
        reset_parameters(model)
    masks.apply(model, pruned.masks)
    if settings.budget == "compute":
        settings = _by_compute(context, checkpoint.build_architecture(pruned.header), model)
    fit = context.fit(model, settings, masks=pruned.masks)
    notes = pruned.header.notes | {"init": settings.init, "epochs": settings.epochs}
    return runner.trained(model, context.header(pruned, **notes), fit, pruned.masks)


def _by_compute(context: runner.TrainingContext, dense: nn.Module, pruned: nn.Module) -> Finetune:
    """Settings whose epochs cost what the given ones cost for the dense network."""
    settings = context.params.finetune
    image = torch.zeros(1, *context.data.info.shape)
    macs = [cost.macs(model, image) for model in (dense, pruned)]
    longer = budget.extend_epochs(settings, *macs)
    if context.engine.is_main:
        console.say(
            f"finetune: {longer.epochs} epochs instead of {settings.epochs}: an image takes "
            f"{macs[0] / macs[1]:.2f}x fewer MACs than in the dense network "
            f"(finetune.budget_limit: {settings.budget_limit:g}x)"
        )
    return longer


if __name__ == "__main__":
    console.main(main, "finetune", __doc__, rounds=True)
