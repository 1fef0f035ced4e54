"""baseline: train the dense network, or load it from existing weights.

Reads   data/<dataset>, and the weights that baseline.weights names: a file or folder in weights/,
        or the weights that torchvision or timm publish for the architecture.
Writes  models/baseline/model.safetensors, history.csv (one row per epoch) and scales.csv (histogram
        of the scales of batch normalisations), and models/baseline.run.json, which names the run
        that made them; with baseline.keep_epoch also epoch.safetensors, the weights of that epoch.

With baseline.epochs: 0 the weights are used unchanged; otherwise they are trained further. Images
are normalised as the source of the weights specifies, if it does. A killed training, run again,
resumes from its last saved epoch and ends with the same bytes.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur.base import plugin
from secateur.base.errors import CheckpointError, SettingsError, shorten
from secateur.base.settings import section
from secateur.nn import checkpoint, matching, weights
from secateur.nn.checkpoint import Header
from secateur.nn.weights import Weights
from secateur.pipeline import console, preflight, runner
from secateur.training import determinism
from secateur.training.evaluation import accuracy


def main() -> None:
    """Build, load or train, save."""
    runner.train("baseline", make_dense)


def make_dense(context: runner.TrainingContext) -> runner.StageResult:
    """Train a network with cross-entropy only, from random or given weights."""
    settings, header = context.params.baseline, context.header()
    determinism.seed_weights(context.params.seed)
    model = checkpoint.build_architecture(header)
    notes = _notes(context)
    if (found := _find_weights(context)) is not None:
        _fill(model, header, found, context)
        context = context.normalised(found.mean, found.std)
        notes |= {"weights": found.source, "weights_sha256": found.sha256}
        if context.engine.is_main:
            console.say(f"baseline: {_describe(found, header)}")
    preflight.check_network(model, context.data.info)
    fit = context.fit(model, settings, keep_epoch=settings.keep_epoch)
    result = runner.trained(model, context.header(**notes), fit)
    if fit.weights_to_rewind_to:
        early = copy.deepcopy(model)
        early.load_state_dict(fit.weights_to_rewind_to)
        result = replace(result, more={"epoch": early})
    if found is not None and not settings.epochs and len(context.data.val):
        values = accuracy(model, context.data.val, context.data.info, context.engine)
        result.metrics.update(zip(("val_accuracy", "val_loss"), values, strict=True))
        if context.engine.is_main:
            console.say(f"baseline: accuracy on val {values[0]:.2%}")
    return result


def _notes(context: runner.TrainingContext) -> dict[str, Any]:
    """The user's own code that the network depends on; later stages read it from the model."""
    if context.params.arch != checkpoint.OWN_CODE:
        return {}
    source = context.params.chosen("archs").source
    return {"source": source, "source_sha256": context.stage.inputs[source]}


def _find_weights(context: runner.TrainingContext) -> Weights | None:
    """The weights that baseline.weights names; None if the network starts from random ones."""
    wanted, arch = context.params.baseline.weights, context.params.arch
    if wanted == "none":
        return None
    if wanted != "published":
        return weights.read(Path("weights", wanted))
    module = plugin.load("archs", arch)
    if not hasattr(module, "published"):
        raise SettingsError(
            f"params.yaml: baseline.weights = 'published': there are none for arch {arch!r}; "
            "torchvision and timm have some"
        )
    with section(f"archs.{arch}"):
        return module.published(context.params.chosen("archs"))


def _fill(
    model: nn.Module, header: Header, found: Weights, context: runner.TrainingContext
) -> None:
    """Load the weights into the network; CheckpointError if they do not fit it or its classes."""
    settings, module = context.params.baseline, plugin.load("archs", header.arch)
    reset, ends = settings.head == "reset", checkpoint.classifier(header)
    classes = found.checkpoint.header.classes if found.checkpoint else header.classes
    if not reset and classes != header.classes and len(classes) == len(header.classes):
        raise CheckpointError(
            f"{found.source}: its classes are {shorten(classes)}, those of the data "
            f"{shorten(header.classes)}; set baseline.head = reset for a new classifier"
        )
    if found.mean and len(found.mean) not in (1, header.shape[0]):
        raise CheckpointError(
            f"{found.source}: for images of {len(found.mean)} channels, these have "
            f"{header.shape[0]}"
        )
    if reset and not ends:
        raise SettingsError(
            "params.yaml: baseline.head = 'reset': the network has no layer whose size follows "
            "the number of classes"
        )
    arch = context.params.chosen("archs")
    matching.fill(
        model,
        found,
        rename=settings.rename,
        aliases=module.aliases(arch) if hasattr(module, "aliases") else {},
        auxiliary=module.auxiliary(arch) if hasattr(module, "auxiliary") else (),
        fresh=ends if reset else (),
        classifier=ends,
        hint=f" (the data has {len(header.classes)} classes; baseline.head = reset makes a new "
        "classifier)",
    )


def _describe(found: Weights, header: Header) -> str:
    """One line about the weights: their source, and the images that they expect."""
    text = f"{found.source}, sha256 {found.sha256[:12]}"
    if not found.mean:
        text += ", names no normalisation: images are normalised as the data set's settings say"
    elif [*found.mean] == header.mean and [*found.std] == header.std:
        text += "; normalisation as in the data set's settings"
    else:
        text += f"; images are normalised by its mean {_numbers(found.mean)}, std "
        text += f"{_numbers(found.std)}, not by the data set's {_numbers(header.mean)}, "
        text += f"{_numbers(header.std)}"
    if found.size is not None and [*found.size] != header.shape[1:]:
        height, width = header.shape[1:]
        text += f"; made for images of {found.size[0]}x{found.size[1]} pixels, these have "
        text += f"{height}x{width}"
    return text


def _numbers(values: tuple[float, ...] | list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


if __name__ == "__main__":
    console.main(main, "baseline", __doc__)
