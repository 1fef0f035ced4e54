"""Check before data are written, and before a training, that later stages accept the network.

A ratio for a layer that does not exist would otherwise only be found by the stage that reads it,
after hours of training. No result depends on this module.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.base import machine, plugin, sections, settings
from secateur.base.errors import ArgumentError, SecateurError, SettingsError
from secateur.data import progressive_resizing
from secateur.data.dataset import DatasetInfo
from secateur.nn import checkpoint
from secateur.nn.modes import in_eval_mode
from secateur.pruning.apply import without_branches
from secateur.pruning.decision import PruningContext
from secateur.training import averaging, distillation
from secateur.training import parametrization as parametrizations
from secateur.training import penalty as penalties
from secateur.training.penalty import ChoosingPenalty, Penalty


def check_settings(info: DatasetInfo) -> None:
    """Raise SettingsError if architecture, penalty or pruner of params.yaml do not fit the images.

    The architecture is built for these images, then checked by `check_network`. Nothing that it
    downloads is needed, and the state of the random number generator is not changed.
    """
    params = settings.read()
    model = build_network(params, info)
    if params.baseline.weights != "none":  # they may name another normalisation than the data
        info = replace(info, mean=[], std=[])
    check_network(model, info)


def build_network(params: settings.Params, info: DatasetInfo) -> nn.Module:
    """The network of params.yaml, built for these images, with random weights.

    Raises SettingsError if its settings do not fit the images. The state of the random number
    generator is not changed.
    """
    with torch.random.fork_rng(devices=[]):
        return checkpoint.build(params.arch, params.chosen("archs"), len(info.classes), info.shape)


def check_network(model: nn.Module, info: DatasetInfo, round_name: str | None = None) -> None:
    """Raise SettingsError if the penalty or the pruner of params.yaml refuses this network.

    It is also refused if it has operations through which channels to be removed cannot be followed.
    Neither `model` nor the state of the random number generator is changed. Settings that depend on
    trained weights or on images are not checked, nor is a teacher's normalisation if `info` has
    none. `round_name` is the round whose settings are checked; without it, the settings of all
    rounds are.
    """
    params = settings.read()
    if round_name is not None:
        _check(model, info, params.of_round(round_name))
        return
    _check(model, info, params)
    for name in settings.chain(params.rounds):
        try:
            _check(model, info, params.of_round(name))
        except SettingsError as error:
            raise SettingsError(f"{error} (in {name})") from None


def _check(model: nn.Module, info: DatasetInfo, params: settings.Params) -> None:
    """Check the network for one round."""
    _check_pooling(model, params)
    with torch.random.fork_rng(devices=[]):
        trial = in_eval_mode(copy.deepcopy(model).cpu())
        with settings.section(f"penalties.{params.penalty}"):
            chosen = params.chosen("penalties")
            penalty = penalties.build(params.penalty, chosen, trial, params.decay, info.shape)
        name = params.parametrization
        with settings.section(f"parametrizations.{name}"):
            own = params.chosen("parametrizations")
            epochs = params.sparse_train.epochs
            parametrization = parametrizations.build(name, own, trial, epochs)
            term = parametrizations.joined(name, parametrization, penalty)
        for key in ("baseline", "sparse_train", "finetune"):
            training: sections.Train = getattr(params, key)
            with settings.section(key):
                _check_length(term, key, training, info.counts.get("train", 0))
                progressive_resizing.check(trial, training.progressive_resizing, info.shape)
        if parametrization is not None:
            parametrization.collapse()
        elif params.pruner == "chosen" and not isinstance(penalty, ChoosingPenalty):
            idle = "" if name == "none" else f", nor does {name} with sparse_train.epochs = 0"
            raise SettingsError(
                f"params.yaml: pruner = 'chosen': penalty {params.penalty} chooses no weights to "
                f"prune{idle}; take one that does (greg1, greg2, gradual, rigl, gsm), a "
                "parametrization, or another pruner"
            )
        chosen = _without_latency(params)
        images, labels = torch.zeros(1, *info.shape), torch.zeros(1, dtype=torch.int64)
        for key in ("baseline", "sparse_train"):
            with settings.section(key):
                _check_teacher(getattr(params, key), trial, info, params)
        with settings.section("prune"):
            trial = without_branches(trial, params.prune.branches, {}, images).model
        with settings.section("finetune"):
            _check_teacher(params.finetune, trial, info, params)
        context = PruningContext(trial, images, labels, dense=trial)
        if params.prune.remove_dead or params.prune.group_convolutions:
            _check_removal(context)
        try:
            with settings.section(f"pruners.{params.pruner}"):
                plugin.load("pruners", params.pruner).prune(chosen, context)
        except SettingsError:
            raise
        except SecateurError as error:
            _check_followed(context, error)  # otherwise the trained network may pass


def _check_pooling(model: nn.Module, params: settings.Params) -> None:
    """SettingsError if a network with an adaptive pooling is to be trained on a GPU.

    The gradient of this pooling has no deterministic algorithm on GPUs, except for global averages.
    """
    pools = {n: m for n, m in model.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d)}
    names = [name for name, pool in pools.items() if pool.output_size not in (1, (1, 1))]
    trained = any(getattr(params, key).epochs for key in ("baseline", "sparse_train", "finetune"))
    if names and trained and machine.device().type == "cuda":
        raise SettingsError(
            f"params.yaml: arch = {params.arch!r}: {names[0]} is an adaptive pooling, which cannot "
            "be trained deterministically on a GPU; take images whose size it divides evenly "
            "(vgg and alexnet of torchvision then have a fixed pooling), another network, or "
            "SECATEUR_DEVICE=cpu"
        )


def _without_latency(params: settings.Params) -> Any:
    """The pruner's settings, without a latency target, whose table only stage prune can read.

    Raises SecateurError if the runtime for the measurement is not installed.
    """
    chosen, runtime = params.chosen("pruners"), params.prune.latency
    target = getattr(chosen, "target", None)
    if runtime == "none" or target is None or target.latency is None:
        return chosen
    from secateur.deploy import layer_times  # takes a while to import

    layer_times.check_packages([runtime])
    return chosen.model_copy(update={"target": None})


def _check_length(term: Penalty | None, key: str, training: sections.Train, images: int) -> None:
    """ArgumentError if a training is too short for its penalty or its weight averaging."""
    if not images:
        return
    steps_per_epoch = -(-images // training.batch_size)
    if key == "sparse_train":
        penalties.begin(term, training, steps_per_epoch, images)
    if isinstance(training, sections.Finetune) and training.budget == "compute":
        epochs = round(training.epochs * training.budget_limit)
        training = training.model_copy(update={"epochs": epochs})
    averaging.check(training, steps_per_epoch, term if key == "sparse_train" else None)


def _check_teacher(
    training: sections.Train,
    model: nn.Module,
    info: DatasetInfo,
    params: settings.Params,
) -> None:
    """Raise ArgumentError for a teacher that is missing or does not take the sizes of the images,
    or layers that the network does not have, and CheckpointError for one that cannot teach this
    network."""
    wanted = training.distillation
    if wanted.teacher not in (sections.NOTHING, sections.DENSE_PARENT):
        file = Path(wanted.teacher)
        if not file.exists():
            why = "no such file; copies of the project have it only if it is tracked (`dvc add`)"
            raise ArgumentError("distillation.teacher", why, wanted.teacher)
        arch = params.arch
        file, found = distillation.load_teacher(file, wanted.code, arch, params.archs.get(arch))
        known = ("mean", "std") if info.mean else ()
        distillation.check_data(file, found.header, info, "classes", "shape", *known)
        teacher, sizes = found.model(), training.progressive_resizing
        distillation.check_layers(wanted.features, teacher, "the teacher")
        progressive_resizing.check(teacher, sizes, info.shape, "teacher")
    distillation.check_layers(wanted.features, model)


def _check_followed(context: PruningContext, error: SecateurError) -> None:
    """SettingsError if a pruner refused the network because its channels cannot be followed."""
    try:
        _ = context.graph
    except SecateurError as reason:
        if str(reason) == str(error):
            raise SettingsError(f"params.yaml: pruner: {error}") from None


def _check_removal(context: PruningContext) -> None:
    """SettingsError if channels of the network cannot be followed, which `prune` needs."""
    try:
        _ = context.graph
    except SecateurError as error:
        raise SettingsError(
            f"params.yaml: prune.remove_dead: {error}; set prune.remove_dead = false (and "
            "prune.group_convolutions = false) to prune single weights only"
        ) from None
