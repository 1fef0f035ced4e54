"""fit: the one training loop."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.base.errors import StateError, TrainingError
from secateur.base.sections import Train
from secateur.data import progressive_resizing
from secateur.data.batches import Batches
from secateur.data.dataset import Dataset
from secateur.data.progressive_resizing import ProgressiveResizing
from secateur.sparsity import masks as masking
from secateur.sparsity.masks import Masks
from secateur.training import averaging, determinism, optim
from secateur.training import penalty as penalties
from secateur.training.averaging import WeightAverage
from secateur.training.callbacks import Callback, Row
from secateur.training.distillation import Distiller
from secateur.training.engine import Engine
from secateur.training.evaluation import accuracy
from secateur.training.penalty import MeasuredPenalty, Penalty
from secateur.training.state import StateStore, TrainingState
from secateur.training.step import LossCheck, TrainStep


@dataclass(frozen=True)
class FitResult:
    """History of a training, and the epoch whose weights the model has now."""

    history: list[Row]
    kept_epoch: int
    """The epoch whose weights the model has, counted from 1; 0 if there were no epochs."""
    weights_to_rewind_to: dict[str, Tensor] = field(default_factory=dict)
    """The weights after `keep_epoch` epochs; empty if that is None."""


def fit(
    model: nn.Module,
    data: Dataset,
    settings: Train,
    seed: int,
    store: StateStore,
    callbacks: Sequence[Callback],
    *,
    engine: Engine | None = None,
    penalty: Penalty | None = None,
    masks: Masks | None = None,
    distiller: Distiller | None = None,
    keep_epoch: int | None = None,
) -> FitResult:
    """Train `model` in place on `data.train`; the loss is cross-entropy + penalty.

    With a `distiller` for the same model, the loss of imitating its teacher is added. With
    `settings.average`, the average of the weights is evaluated and kept. The result also contains
    the weights after `keep_epoch` epochs.

    Weights that `masks` prune stay zero. The final weights are those of the epoch with the highest
    accuracy on `data.val` (ties: the lower loss), or of the last epoch if `settings.keep` is "last"
    or val is empty. With 0 epochs, only the masks are applied. A training that resumes from `store`
    ends with the same bytes as one without interruption. A finished penalty ends the training after
    that step. With several processes, each of them calls `fit` and ends with the same weights.

    Raises TrainingError if the loss is no longer finite; the last good state is kept. Raises
    ArgumentError before the first step if the penalty or the network rejects the settings.
    """
    engine = engine or Engine(settings.precision)
    with determinism.deterministic(engine.device, settings.compile):
        _place(model, engine.device)
        maps = distiller.on(engine.device) if distiller else ()
        optimizer = optim.optimizer(model, settings, maps)
        masking.hold(model, masks or {}, optimizer)
        batches = _batches(data, settings, seed, engine)
        average = averaging.build(settings, model, len(batches), penalty)
        parts = {"penalty": penalty, "distillation": distiller, "average": average}
        state = TrainingState(model, optimizer, parts, keep_epoch)
        how = (settings, engine, len(batches), distiller, average)
        step = TrainStep(model, optimizer, penalty, *how)
        try:
            _start(model, penalty, distiller, settings, data, len(batches), masks or {})
            _resume(state, store, engine)
            for callback in callbacks:
                callback.on_train_start(settings.epochs, len(batches), state.history)
            for epoch in range(len(state.history), settings.epochs):
                if step.finished:
                    break
                determinism.seed_layers(seed, epoch, engine.device, engine.rank)
                row = _train_epoch(step, batches, epoch, callbacks)
                evaluated = average.network(data) if average else model
                _evaluate_epoch(row, evaluated, data, settings, engine)
                state.record(row, settings.keep == "best" and len(data.val) > 0, evaluated)
                _save(state, store, callbacks, engine)
        finally:
            batches.close()
            step.close()
        _load_best(state, average, data, engine)
    return FitResult(state.history, state.best_epoch or len(state.history), state.kept_weights)


def _place(model: nn.Module, device: torch.device) -> None:
    """Move the model to the device; networks with convolutions become channels-last, for speed."""
    model.to(device)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:  # `model.to` would try it on five axes too
                tensor.data = tensor.data.to(memory_format=torch.channels_last)


def _batches(data: Dataset, settings: Train, seed: int, engine: Engine) -> Batches:
    """This process's batches of the training images."""
    return Batches(
        data.train,
        data.info,
        settings.batch_size,
        seed,
        device=engine.device,
        rank=engine.rank,
        world=engine.world,
    )


def _resume(state: TrainingState, store: StateStore, engine: Engine) -> None:
    """Restore the saved state if there is one that fits; otherwise training starts from scratch."""
    saved = engine.broadcast(store.load())
    if saved is None:
        return
    try:
        state.load_state_dict(*saved)
    except StateError as error:
        if engine.is_main:
            _warn(f"{error}; training starts again")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _train_epoch(
    step: TrainStep, batches: Batches, epoch: int, callbacks: Sequence[Callback]
) -> Row:
    """One pass over the training images, unless the penalty ends it earlier; returns its row."""
    seen = index = 0
    losses, sizes = LossCheck(epoch, step.settings.lr), ProgressiveResizing(step.settings)
    step.start_epoch()
    if step.distiller is not None:
        step.distiller.start_epoch(batches, epoch, bool(sizes.parts), step.engine)
    for index, (images, labels) in enumerate(batches.epoch(epoch)):
        count = min(batches.batch_size, len(batches.split) - index * batches.batch_size)
        images = sizes(images, epoch)
        losses.add(step(images, labels, count, epoch * len(batches) + index))
        seen += count
        for callback in callbacks:
            callback.on_step_end(epoch + 1, index + 1)
        if step.finished:
            break
    losses.check()
    sums = step.engine.all_reduce(torch.stack([step.loss_sum, step.correct]))
    row = {
        "epoch": epoch + 1,
        "lr": step.lr,
        "train_loss": float(sums[0]) / seen / step.engine.world,
        "train_accuracy": float(sums[1]) / seen,
    }
    if sizes.parts:
        row["image_scale"] = sizes.scale(epoch)
    if step.penalty is not None:
        row["penalty"] = float(step.penalty_sum) / (index + 1)
    if isinstance(step.penalty, MeasuredPenalty):
        row |= step.penalty.metrics()
    return row


def _evaluate_epoch(
    row: Row, model: nn.Module, data: Dataset, settings: Train, engine: Engine
) -> None:
    """Add accuracy and loss on val to the row, unless val is empty.

    Raises TrainingError if a value or a weight is not finite: the last step of the epoch may have
    broken the weights, and no loss has been computed since.
    """
    engine.share_buffers(model)  # all processes judge, and keep, the same network
    if len(data.val):
        row["val_accuracy"], row["val_loss"] = accuracy(model, data.val, data.info, engine)
    finite = torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all()
    if not (bool(finite) and all(math.isfinite(value) for value in row.values())):
        epoch = int(row["epoch"])
        raise TrainingError(
            f"weights or loss are no longer finite after epoch {epoch} (lr {settings.lr:g}): "
            f"stopped; the state after epoch {epoch - 1} is kept. Lower the learning rate or the "
            "decay"
        )


def _save(
    state: TrainingState, store: StateStore, callbacks: Sequence[Callback], engine: Engine
) -> None:
    """Hand the state after an epoch to the store, and report the epoch."""
    saved = engine.is_main and store.save(*state.state_dict())
    for callback in callbacks:
        callback.on_epoch_end(state.history[-1])
        if saved:
            callback.on_state_saved()


def _load_best(
    state: TrainingState, average: WeightAverage | None, data: Dataset, engine: Engine
) -> None:
    """Load the weights that are kept into the network; tells if no weights were averaged."""
    if average is not None and not average.begun and state.history and engine.is_main:
        _warn("the penalty ended the training before weights were averaged (average.start)")
    state.load_best(average.network(data) if average else state.model)


def _start(
    model: nn.Module,
    penalty: Penalty | None,
    distiller: Distiller | None,
    settings: Train,
    data: Dataset,
    steps_per_epoch: int,
    masks: Masks,
) -> None:
    """Tell the penalty about the training; ArgumentError if its schedule does not fit.

    Also ArgumentError if the network or its teacher does not accept one of the image sizes, or if
    averaging of the weights begins too late.
    """
    sizes, shape = settings.progressive_resizing, data.info.shape
    progressive_resizing.check(model, sizes, shape)
    if distiller is not None:
        progressive_resizing.check(distiller.teacher, sizes, shape, "teacher")
    penalties.begin(penalty, settings, steps_per_epoch, len(data.train), masks)
    averaging.check(settings, steps_per_epoch, penalty)
