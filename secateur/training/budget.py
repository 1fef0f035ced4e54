"""Training epochs of a pruned network for the computation of the dense one."""

from secateur.base.sections import Finetune


def extend_epochs(settings: Finetune, dense_macs: int, pruned_macs: int) -> Finetune:
    """Increase the epochs to the computation that the given epochs take with the dense network.

    The MACs are multiply-accumulates for one image. Epochs are multiplied by their ratio, at least
    1 and at most `settings.budget_limit`; milestones and warm-up are scaled alike. Source:
    Scratch-B of Z. Liu et al., Rethinking the value of network pruning, ICLR 2019.
    """
    if not settings.epochs:
        return settings
    factor = min(max(dense_macs / pruned_macs, 1.0), settings.budget_limit)
    epochs = round(settings.epochs * factor)
    exact = epochs / settings.epochs
    return settings.model_copy(
        update={
            "epochs": epochs,
            "milestones": tuple(exact * m for m in settings.milestones),
            "warmup": exact * settings.warmup,
            "schedule_after": exact * settings.schedule_after,
        }
    )
