"""How long a small network may train for the computation that a large one takes."""

from secateur.base.settings import Finetune


def stretched(settings: Finetune, dense: int, pruned: int) -> Finetune:
    """The same training in as many more epochs as the pruned network needs fewer MACs.

    `dense` and `pruned` are multiply-accumulates of one image. At most `budget_limit` times the
    epochs, never fewer than there are; milestones and warm-up keep their place in the course.
    Source: Scratch-B of Z. Liu et al., Rethinking the value of network pruning, ICLR 2019.
    """
    if not settings.epochs:
        return settings
    factor = min(max(dense / pruned, 1.0), settings.budget_limit)
    epochs = round(settings.epochs * factor)
    exact = epochs / settings.epochs
    return settings.model_copy(
        update={
            "epochs": epochs,
            "milestones": tuple(exact * m for m in settings.milestones),
            "warmup": exact * settings.warmup,
        }
    )
