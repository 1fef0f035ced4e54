"""Longer trainings: a schedule stretched over more epochs, and the epochs of a pruned network that
take as much computation as those of the dense network."""

from typing import Any

from secateur.base.sections import Finetune, Train


def stretched(settings: Train, epochs: int) -> dict[str, Any]:
    """The settings that change if the same schedule takes this number of epochs, by key.

    Milestones, warm-up, skipped epochs, and the steps before an average begins, are scaled like the
    epochs, of which there is at least one before.
    """

    def scaled(value: float) -> float:
        return value * epochs / settings.epochs  # in this order, 45 of 90 epochs is 55 of 110

    changed = {
        "epochs": epochs,
        "milestones": tuple(map(scaled, settings.milestones)),
        "warmup": scaled(settings.warmup),
        "schedule_after": scaled(settings.schedule_after),
    }
    if settings.average.start >= 1:  # otherwise a share, which grows by itself
        start = float(round(scaled(settings.average.start)))
        changed["average"] = settings.average.model_copy(update={"start": start})
    return changed


def extend_epochs(settings: Finetune, dense_macs: int, pruned_macs: int) -> Finetune:
    """Increase the epochs to the computation that `settings.epochs` take with the dense network.

    The MACs are those of one image. The epochs are multiplied by their ratio, limited to between 1
    and `settings.budget_limit`; milestones and warm-up are scaled alike. Source: Scratch-B of
    Z. Liu et al., Rethinking the value of network pruning, ICLR 2019.
    """
    if not settings.epochs:
        return settings
    factor = min(max(dense_macs / pruned_macs, 1.0), settings.budget_limit)
    return settings.model_copy(update=stretched(settings, round(settings.epochs * factor)))
