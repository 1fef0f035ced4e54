"""sensitivity: accuracy of the dense network on val after pruning outputs of one layer at a time.

Reads   data/<dataset> (its val images), models/baseline.
Writes  metrics/sensitivity.csv (accuracy on val by layer, criterion and ratio) and
        metrics/sensitivity.yaml (ratios by layer for the allowed drop, in the notation of
        pruners.magnitude in params.yaml).

Run it with `dvc repro stages/sensitivity/dvc.yaml`. It trains nothing; section `sensitivity` of
params.yaml lists the criteria and ratios to try.
"""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from torch import nn

from secateur.base import files, machine
from secateur.base.errors import SettingsError
from secateur.base.settings import section
from secateur.data.batches import sequential_batches, stratified_batch
from secateur.nn import norms
from secateur.pipeline import console, runner
from secateur.pruning import sensitivity
from secateur.pruning.decision import PruningContext
from secateur.sparsity import masks
from secateur.sparsity.ratios import NUMBERS

HEAD = """# Ratios by layer with which the dense network loses at most {drop:g} of its accuracy on
# val ({now:.4f}) when that layer alone is pruned. `together`: accuracy on val with all of them.
# To use one, copy its `pruner` and `pruners` into params.yaml.
"""


def main() -> None:
    """Try every layer, criterion and ratio; write table and suggestions."""
    context = runner.open_context("sensitivity")
    table, found = measure(context)
    files.write_text(Path("metrics/sensitivity.csv"), table.to_csv(index=False))
    head = HEAD.format(
        drop=context.params.sensitivity.drop, now=table.accuracy[table.ratio == 0].max()
    )
    body = yaml.safe_dump(found, sort_keys=False, width=100)
    files.write_text(Path("metrics/sensitivity.yaml"), head + body)
    for criterion, suggestion in found.items():
        ratios = suggestion["pruners"]["magnitude"]["ratios"]
        console.say(f"sensitivity: {criterion}: {ratios or 'nothing'}")
        console.say(f"sensitivity: {criterion}: all together {suggestion['together']:.2%} on val")
    console.say("see          metrics/sensitivity.csv, metrics/sensitivity.yaml")


def measure(context: runner.StageContext) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row per layer, criterion and ratio, and the suggested ratios by criterion."""
    settings, data, place = context.params.sensitivity, context.data, machine.device()
    if not len(data.val):
        raise SettingsError(
            "params.yaml: data.validation = 0: sensitivity needs validation images to measure on"
        )
    model = context.upstream["baseline"].model()
    images, labels = stratified_batch(data.train, data.info)
    pruning_context = PruningContext(model, images, labels)
    how = _criteria(settings.criteria, model)
    with section("sensitivity"):
        made = _ablations(context, pruning_context, how)
    model.to(place)
    ablation_runner = sensitivity.AblationRunner(pruning_context)
    wanted = settings.images or len(data.val)
    size = min(ablation_runner.batch_size(images[:1].to(place)), wanted)
    steps = -(-min(wanted, len(data.val)) // size)

    def batches() -> Any:
        left = wanted
        for images, labels in sequential_batches(data.val, data.info, device=place, size=size):
            if left <= 0:
                return
            yield images[:left], labels[:left]
            left -= len(labels)

    with console.StepProgress("sensitivity", len(made) * steps) as bar:
        right = ablation_runner.count_correct(batches(), made, bar.tick)
    count = min(wanted, len(data.val))
    rows = [
        {"layer": name, "criterion": criterion, "ratio": 0.0, "accuracy": right[0] / count}
        for name, criterion in dict.fromkeys((t.layer, t.criterion) for t in made)
    ]
    rows += [
        {"layer": t.layer, "criterion": t.criterion, "ratio": t.ratio, "accuracy": got / count}
        for t, got in zip(made, right[1:], strict=True)
    ]
    table = pd.DataFrame(rows).sort_values(["criterion", "layer", "ratio"], kind="stable")
    table["drop"] = right[0] / count - table.accuracy
    least = least_accuracy(right[0], count, settings.drop)
    found = {}
    for criterion in how:
        ratios = suggest(table[table.criterion == criterion], least)
        together = _together(context, pruning_context, made, criterion, ratios)
        right_together = ablation_runner.count_correct(batches(), [together], lambda: None)[1]
        suggestion = as_params(criterion, settings.granularity, ratios, context.params.seed)
        found[criterion] = suggestion | {"together": right_together / count}
    return table, found


def _criteria(wanted: Sequence[str], model: nn.Module) -> list[str]:
    """The criteria that are defined for the network; SettingsError if there are none."""
    if "bn_scale" not in wanted or norms.scaled_norms(model):
        return list(wanted)
    found = [criterion for criterion in wanted if criterion != "bn_scale"]
    if not found:
        raise SettingsError(
            "params.yaml: sensitivity.criteria = ['bn_scale']: the network has no scales; "
            "name another criterion"
        )
    console.say("sensitivity: bn_scale is left out: the network has no scales")
    return found


def _ablations(
    context: runner.StageContext, pruning_context: PruningContext, how: list[str]
) -> list[sensitivity.Ablation]:
    """All ablations to try, at the granularity of the settings."""
    settings, seed = context.params.sensitivity, context.params.seed
    if settings.granularity == "group":
        return sensitivity.group_ablations(pruning_context, how, settings.ratios, seed)
    names = sensitivity.independent_layers(pruning_context)
    for criterion in how:
        without = sensitivity.layers_without(pruning_context, names, criterion)
        if without:
            console.say(f"sensitivity: {criterion} is left out for {', '.join(without)}: no scales")
    return sensitivity.ablations(pruning_context, names, how, settings.ratios, seed)


def _together(
    context: runner.StageContext,
    pruning_context: PruningContext,
    made: Sequence[sensitivity.Ablation],
    criterion: str,
    ratios: dict[str, float],
) -> sensitivity.Ablation:
    """One ablation of all layers with a suggested ratio; `made` has one of each.

    Random outputs depend on which layers are pruned together, so they are drawn anew, as pruner
    magnitude draws them for these layers.
    """
    seed, values = context.params.seed, sorted(set(ratios.values()))
    if criterion == "random" and ratios:
        if context.params.sensitivity.granularity == "group":
            made = sensitivity.group_ablations(pruning_context, [criterion], values, seed, ratios)
        else:
            names = [name for name in masks.layers(pruning_context.model) if name in ratios]
            made = sensitivity.ablations(pruning_context, names, [criterion], values, seed)
    return sensitivity.combined(made, ratios, criterion)


def least_accuracy(right: int, count: int, drop: float) -> float:
    """The lowest accuracy that is allowed, if `right` of `count` images are correct now.

    Computed by images, as the accuracies are: 0.8 - 0.1 is more than 0.7.
    """
    return (right - int(Decimal(repr(drop)) * count)) / count


def suggest(table: pd.DataFrame, least: float) -> dict[str, float]:
    """The highest ratio of each layer that keeps this accuracy; layers without one are left out."""
    found = {
        str(name): sensitivity.largest_ratio(zip(rows.ratio, rows.accuracy, strict=True), least)
        for name, rows in table.groupby("layer", sort=False)
    }
    return {name: ratio for name, ratio in found.items() if ratio > 0}


def as_params(
    criterion: str, granularity: str, ratios: dict[str, float], seed: int
) -> dict[str, Any]:
    """The suggestion as `pruner` and `pruners.magnitude` of params.yaml."""
    own: dict[str, Any] = {"granularity": granularity, "criterion": criterion, "pick": "min"}
    if granularity == "group" and criterion == "lamp":
        own |= {"criterion": "l2", "normalise": "lamp"}
    if criterion == "random":
        own |= {"criterion": "l1", "pick": "random", "seed": seed}
    pairs = [
        f"{_pattern(name)}: {ratio}"
        for names, ratio in ratios.items()
        for name in names.split(sensitivity.JOIN)
    ]
    own["ratios"] = ", ".join(pairs) or 0  # an empty text has no ratios
    return {"pruner": "magnitude", "pruners": {"magnitude": own}}


def _pattern(name: str) -> str:
    """The name of a layer as a pattern of ratios, where a number alone counts the layers."""
    return f"[{name[0]}]{name[1:]}" if NUMBERS.fullmatch(name) else name


if __name__ == "__main__":
    console.main(main, "sensitivity", __doc__)
