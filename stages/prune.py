"""prune: select weights or channels, set them to zero, and remove what no longer has an effect.

Reads   data/<dataset> (a batch for the proof, and one of all classes for criteria that use the
        loss; more images with prune.recalibrate), models/sparse; for a latency target the table of
        measured layers, latency/<runtime>.json.
Writes  models/pruned/model.safetensors with its masks, outputs.csv (outputs of every layer before
        and after) and scales.csv (histogram of the scales of batch normalisations), and
        models/pruned.run.json; in a further round the same below models/rounds/<round>/.

A pruner selects single weights, which are set to zero, or whole channels or residual branches,
which are removed; branches that prune.branches names are removed before. Masks that consist of
groups of channels can become group convolutions (prune.group_convolutions). Channels that are dead
afterwards are removed too (prune.remove_dead), and the compact network is proved to compute the
same as the masked network before anything is written. The statistics of batch normalisations can
then be recalibrated (prune.recalibrate).
"""

from dataclasses import replace

from torch import nn

from secateur.base import machine, plugin
from secateur.base.files import Table
from secateur.base.sections import Strict
from secateur.base.settings import section
from secateur.data.batches import example_batch, stratified_batch
from secateur.gconv import conversion
from secateur.nn import checkpoint, cost
from secateur.nn.modes import in_eval_mode
from secateur.pipeline import console, latency_check, runner
from secateur.pruning.apply import PrunedNetwork, apply_decision, without_branches
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.pruning.latency import LatencyTable, load_table
from secateur.sparsity import masks
from secateur.training.evaluation import accuracy
from secateur.training.recalibrate import recalibrate_on

OUTPUTS = ("layer", "outputs", "outputs_left")
"""Columns of outputs.csv."""


def main(round_name: str | None) -> None:
    """Load the sparse-trained network, prune, save."""
    runner.make("prune", prune, round_name)


def prune(context: runner.StageContext) -> runner.StageResult:
    """Apply the pruner's decision to the sparse-trained network, and remove dead channels."""
    params, sparse = context.params, context.start
    model = sparse.model()
    dense = in_eval_mode(checkpoint.build_architecture(sparse.header))
    images, _ = example_batch(context.data.train, context.data.info)
    with section("prune"):
        start = without_branches(model, params.prune.branches, sparse.masks, images)
    with section(f"pruners.{params.pruner}"):
        settings = params.chosen("pruners")
        table = _latencies(context)
        batch = stratified_batch(context.data.train, context.data.info)
        left = start.model.state_dict()  # weights, and indices of channels
        choices = {name: own for name, own in sparse.choices.items() if name in left}
        network = PruningContext(start.model, *batch, choices, table, dense, start.masks)
        decision = plugin.load("pruners", params.pruner).prune(settings, network)
    decision = replace(decision, masks=masks.joined(decision.masks, start.masks))
    named = [f"without {name}" for name in params.prune.branches]
    chosen = [f"{k} {v}" for k, v in settings if v is not None]
    asked = ", ".join([*named, params.pruner, *chosen])
    _report(decision, start, settings)
    with section("prune"):
        pruned = apply_decision(
            start.model,
            decision,
            images,
            remove_dead=params.prune.remove_dead,
            group_convolutions=params.prune.group_convolutions,
            requested=asked,
            held=start.masks,
        )
    outputs = _outputs(model, pruned.model)
    console.outputs(outputs)
    proofs = (start.differences, pruned.differences)
    metrics = dict(decision.notes)
    metrics |= {key: max(own.get(key, 0.0) for own in proofs) for key in {**proofs[0], **proofs[1]}}
    metrics |= _measure(context, pruned, dense, asked)
    metrics["removed_outputs"] = float(sum(before - left for _, before, left in outputs))
    header = context.header(sparse, asked=asked, reached=dict(metrics))
    if table is not None and "latency_left_asked" in metrics:  # after the header: times vary
        whole = dense if settings.target.of == "dense" else start.model
        metrics |= latency_check.check(table, whole, pruned.model, images[:1])
    return runner.StageResult(
        pruned.model,
        header,
        pruned.masks,
        metrics=metrics,
        tables={"outputs": Table.of([dict(zip(OUTPUTS, row, strict=True)) for row in outputs])},
        texts=decision.files,
    )


def _report(decision: PruningDecision, start: PrunedNetwork, settings: Strict) -> None:
    """Print what was asked for and what is reached, and the lines of the pruner."""
    whole = decision.channels or decision.branches
    if start.masks and not whole and not masks.prune_more(decision.masks, start.masks):
        console.say(
            "prune: all weights that were chosen had been pruned before: ratios are shares of all "
            "weights of a layer"
        )
    weights = getattr(settings, "granularity", None) == "weight"
    console.reached(decision.notes, "weights" if weights else "channels")
    for line in decision.lines:
        console.say(f"prune: {line}")
    others = masks.passed_over(start.model, decision.masks) if decision.masks else {}
    if others:
        names = ", ".join(others)
        console.say(
            f"prune: without masks: {sum(others.values()):,} parameters in tensors that are no "
            f"weights of a layer: {names}"
        )


def _latencies(context: runner.StageContext) -> LatencyTable | None:
    """The table of measured layers that the params name, if any."""
    runtime = context.params.prune.latency
    if runtime == "none":
        return None
    return load_table(context.stage.input(f"latency/{runtime}.json"))


def _measure(
    context: runner.StageContext, pruned: PrunedNetwork, dense: nn.Module, asked: str
) -> dict[str, float]:
    """Recalibrate if the params say so, and compare the size with that of the dense network."""
    settings = context.params.prune
    metrics: dict[str, float] = {}
    if settings.group_convolutions:
        metrics |= conversion.group_convolution_counts(pruned.model)
        console.say(
            f"prune: {metrics['group_convolutions']:.0f} group convolutions, "
            f"{metrics['index_layers']:.0f} index layers beside them"
        )
    if settings.recalibrate:
        metrics |= measure_again(context, pruned.model, settings.recalibrate)
    metrics["nonzero"] = float(cost.nonzero(pruned.model, pruned.masks))
    metrics["compression"] = cost.compression(dense, pruned.model, pruned.masks)
    console.say(
        f"prune: {asked}: {int(metrics['nonzero']):,} of {cost.parameters(dense):,} parameters "
        f"left ({metrics['compression']:.1f}x)"
    )
    return metrics


def measure_again(context: runner.StageContext, model: nn.Module, images: int) -> dict[str, float]:
    """Recalibrate on this number of training images, in place; returns accuracies on val."""
    device, data = machine.device(), context.data
    model.to(device)
    metrics: dict[str, float] = {}
    if len(data.val):
        metrics["val_accuracy_before"], _ = accuracy(model, data.val, data.info)
    norms, used = recalibrate_on(model, data, images, device)
    line = f"prune: statistics of {norms} batch normalisations from {used:,} images"
    if len(data.val):
        metrics["val_accuracy_recalibrated"], _ = accuracy(model, data.val, data.info)
        before, after = metrics.values()
        line += f": accuracy on val {before:.2%} before, {after:.2%} after"
    console.say(line)
    model.cpu()
    return metrics


def _outputs(before: nn.Module, after: nn.Module) -> list[tuple[str, int, int]]:
    """Every layer of a network with its number of outputs before and after pruning."""
    left = masks.prunable(after, "weights")
    return [
        (name.removesuffix(".weight"), len(weight), len(left.get(name, ())))
        for name, weight in masks.prunable(before, "weights").items()
    ]


if __name__ == "__main__":
    console.main(main, "prune", __doc__, rounds=True)
