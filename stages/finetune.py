"""finetune: continue training the pruned network; pruned weights stay exactly zero.

Reads   data/<dataset>, models/pruned.
Writes  models/finetuned/model.safetensors with its masks, history.csv (one row per epoch) and
        scales.csv (histogram of the scales of batch normalisations), and
        models/finetuned.run.json, which names the run that made them; in a further round the same
        below models/rounds/<round>/.

With finetune.init: scratch or orthogonal, the pruned architecture is trained from new weights: the
control that shows what the inherited weights contribute. With rewind, it is trained from the dense
network's weights of an early epoch. With finetune.budget: compute, the training takes as much
computation as the given epochs take for the dense network. A killed training, run again, resumes
from its last saved epoch.
"""

import torch
from torch import nn

from secateur.base.errors import PruningError
from secateur.base.sections import Finetune
from secateur.nn import checkpoint, cost
from secateur.nn.resizing import orthogonalise, reset_parameters
from secateur.pipeline import console, runner
from secateur.sparsity import masks
from secateur.training import budget, determinism


def main(round_name: str | None) -> None:
    """Load the pruned network, train it further, save."""
    runner.train("finetune", finetune, round_name)


def finetune(context: runner.TrainingContext) -> runner.StageResult:
    """Train the pruned network further, without a penalty."""
    settings, pruned = context.params.finetune, context.start
    model = pruned.model()
    if settings.init in ("scratch", "orthogonal"):
        determinism.seed_weights(context.params.seed)
        reset_parameters(model)
    if settings.init == "orthogonal":
        orthogonalise(model)
    elif settings.init == "rewind":
        rewind(model, context)
    masks.apply(model, pruned.masks)
    if settings.budget == "compute":
        settings = _by_compute(context, checkpoint.build_architecture(pruned.header), model)
    fit = context.fit(model, settings, masks=pruned.masks)
    notes = pruned.header.notes | {"init": settings.init, "epochs": settings.epochs}
    return runner.trained(model, context.header(pruned, **notes), fit, pruned.masks)


def rewind(model: nn.Module, context: runner.TrainingContext) -> None:
    """Load the weights that the dense network had after an early epoch, in place.

    Raises PruningError if channels have been removed: weights of that epoch no longer fit.
    """
    path = context.stage.input(context.params.finetune.rewind_to) / "epoch.safetensors"
    early = checkpoint.load(path, context.params.arch, split=context.data.info.hash).tensors
    for name, tensor in model.state_dict().items():
        if name not in early or early[name].shape != tensor.shape:
            was = f"{[*early[name].shape]}" if name in early else "not there"
            raise PruningError(
                f"finetune.init = 'rewind': {name} is {[*tensor.shape]}, at the epoch to rewind to "
                f"it was {was}: only networks of their first shape can be rewound; set "
                "prune.remove_dead = false, and prune single weights"
            )
    model.load_state_dict({name: early[name] for name in model.state_dict()})


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
