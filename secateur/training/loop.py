"""fit(): the one training loop; accuracy(): the one evaluation."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.base.errors import SettingsError, TrainingError
from secateur.base.settings import Train
from secateur.data.dataset import Batches, Dataset, DatasetInfo, Split, in_order
from secateur.sparsity import masks as masking
from secateur.sparsity.masks import Masks
from secateur.training import optim
from secateur.training.engine import Engine
from secateur.training.penalty import Penalty, Row, ScheduledPenalty

FIGURES = ("train_loss", "train_accuracy", "val_accuracy", "val_loss", "penalty")
"""What a row has beside epoch and lr; the last three where they apply."""


class Callback(Protocol):
    """Someone who is told how the training goes, and has no say in it."""

    def start(self, epochs: int, steps: int, rows: list[Row]) -> None:
        """Training begins, or goes on after `rows`; `steps` is the number of steps an epoch."""

    def step(self, epoch: int, step: int) -> None:
        """A step is done (both counted from 1)."""

    def epoch(self, row: Row) -> None:
        """An epoch is done."""

    def saved(self) -> None:
        """The state up to the last epoch is safe on disk."""


class StateStore(Protocol):
    """Where the state of a training survives its process."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier process left, if any."""

    def keep(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Hold the state after an epoch; gives whether it is safe on disk already."""


@dataclass(frozen=True)
class FitResult:
    """What a training gives beside the weights it leaves in the model."""

    history: list[Row]
    best_epoch: int
    """The epoch whose weights were kept, counted from 1; 0 if there were no epochs."""


@contextlib.contextmanager
def _vanishing_is_zero() -> Iterator[None]:
    """Flush numbers below 1e-38 to zero: weights that a penalty shrinks for ever slow a CPU."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@_vanishing_is_zero()
def fit(
    model: nn.Module,
    data: Dataset,
    settings: Train,
    seed: int,
    work: StateStore,
    watchers: Sequence[Callback],
    *,
    engine: Engine | None = None,
    penalty: Penalty | None = None,
    masks: Masks | None = None,
) -> FitResult:
    """Train `model` in place on `data.train`; the loss is cross-entropy + penalty.

    `masks` are held through every step. The weights that remain are those of the epoch with the
    highest accuracy on `data.val` (ties: the lower loss), or of the last one if `settings.keep`
    says so or there is no val. Goes on from the state that `work` holds, to the same bytes. A
    penalty that is finished ends the training after that very step.
    With several processes, every one calls this and ends with the same weights.
    Raises TrainingError when the loss is no longer finite; the last good state stays in `work`.
    SettingsError, before the first step, if the epochs are too few for the penalty's course.
    Without epochs the model stays as it is, but for what the masks take.
    """
    torch.use_deterministic_algorithms(True)
    # deterministic mode also fills fresh memory, as a debugging aid: a tenth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    engine = engine or Engine(settings.precision)
    model.to(engine.device)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = Batches(
        data.train,
        data.info,
        settings.batch_size,
        seed,
        device=engine.device,
        rank=engine.rank,
        world=engine.world,
    )
    optimizer = optim.optimizer(model, settings)
    masking.hold(model, masks or {}, optimizer)
    _refuse_short(penalty, settings, len(batches))
    run = _State(model, optimizer, penalty)
    if (state := engine.broadcast(work.state())) is not None:
        run.restore(*state)
    step = _Step(model, optimizer, penalty, settings, engine, len(batches))
    for watch in watchers:
        watch.start(settings.epochs, len(batches), run.history)
    try:
        for epoch in range(len(run.history), settings.epochs):
            if step.over:
                break
            # dropout and the like: by epoch, not by what came before it
            torch.manual_seed(seed * 1_000_003 + epoch + engine.rank * 7_919)
            row = _epoch(step, batches, len(data.train), epoch, watchers)
            if len(data.val):
                row["val_accuracy"], row["val_loss"] = accuracy(model, data.val, data.info, engine)
            _refuse_broken(model, row, settings.lr)
            run.add(row, keep_best=settings.keep == "best" and len(data.val) > 0)
            saved = engine.is_main and work.keep(*run.save())
            for watch in watchers:
                watch.epoch(row)
                if saved:
                    watch.saved()
    finally:
        batches.close()
    run.load_best()
    return FitResult(run.history, run.best or len(run.history))


class _Step:
    """One step of the optimizer on one batch, and the sums that an epoch is reported by."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Penalty | None,
        settings: Train,
        engine: Engine,
        per_epoch: int,
    ) -> None:
        self.model, self.forward = model, engine.prepare(model, settings.compile)
        self.optimizer, self.penalty = optimizer, penalty
        self.settings, self.engine, self.per_epoch = settings, engine, per_epoch
        self.lr = 0.0

    @property
    def over(self) -> bool:
        """Whether the penalty says that the training is through."""
        return self.penalty is not None and self.penalty.finished

    def begin(self) -> None:
        """A new epoch: training mode, sums at zero."""
        self.model.train()
        self.forward.train()
        zero = torch.zeros((), device=self.engine.device)
        self.losses, self.right, self.added = zero, zero.clone(), zero.clone()

    def __call__(self, images: Tensor, labels: Tensor, count: int, number: int) -> Tensor:
        """Learn from this process's part of a batch of `count` images; gives the loss."""
        self.lr = optim.rate(self.settings, number, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        parts = self.settings.accumulate_grad_batches
        if parts == 1:
            loss = total = self._cross_entropy(images, labels, count)
            if self.penalty is not None:
                total = loss + self._penalty(number)
            total.backward()
        else:
            loss = total = torch.zeros((), device=self.engine.device)
            pairs = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
            for index, (some, theirs) in enumerate(pairs):
                last = index == len(pairs) - 1
                with self.engine.no_sync(self.forward, not last):
                    part = whole = self._cross_entropy(some, theirs, count)
                    if last and self.penalty is not None:
                        whole = part + self._penalty(number)
                    whole.backward()
                loss, total = loss + part.detach(), total + whole.detach()
        self.optimizer.step()
        self.losses += loss.detach() * count
        return total.detach()

    def _cross_entropy(self, images: Tensor, labels: Tensor, count: int) -> Tensor:
        """Cross-entropy of some images, as their share of the mean over a batch of `count`."""
        if not len(labels):  # a last batch smaller than the number of processes
            images = images.new_zeros(1, *images.shape[1:])
            return self.forward(images).sum() * 0.0
        try:
            with self.engine.autocast():
                logits = self.forward(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"batch_size = {self.settings.batch_size} leaves {len(images)} image for the last "
                "pass of an epoch, too few for a batch normalisation of single pixels; choose "
                "another batch size (or accumulate)"
            ) from None
        logits = logits.float()
        self.right += (logits.detach().argmax(1) == labels).sum()
        smooth = self.settings.label_smoothing
        if len(labels) == count and self.engine.world == 1:
            return F.cross_entropy(logits, labels, label_smoothing=smooth)
        summed = F.cross_entropy(logits, labels, label_smoothing=smooth, reduction="sum")
        return summed * (self.engine.world / count)  # the processes' gradients are averaged

    def _penalty(self, number: int) -> Tensor:
        assert self.penalty is not None
        extra = self.penalty(number)
        self.added += extra.detach()
        return extra


def _epoch(
    step: _Step, batches: Batches, images: int, epoch: int, watchers: Sequence[Callback]
) -> Row:
    """One pass over the training images, or what the penalty leaves of it; gives its row."""
    size, steps = step.settings.batch_size, len(batches)
    seen = index = 0
    checks = _Finite(epoch, step.settings.lr)
    step.begin()
    for index, (some, labels) in enumerate(batches.epoch(epoch)):
        count = min(size, images - index * size)
        checks.add(step(some, labels, count, epoch * steps + index))
        seen += count
        for watch in watchers:
            watch.step(epoch + 1, index + 1)
        if step.over:
            break
    checks.finish()
    sums = step.engine.all_reduce(torch.stack([step.losses, step.right]))
    row = {
        "epoch": epoch + 1,
        "lr": step.lr,
        "train_loss": float(sums[0]) / seen / step.engine.world,
        "train_accuracy": float(sums[1]) / seen,
    }
    if step.penalty is not None:
        row["penalty"] = float(step.added) / (index + 1)
    if isinstance(step.penalty, ScheduledPenalty):
        row |= step.penalty.figures()
    return row


@torch.inference_mode()
def accuracy(
    model: nn.Module, split: Split, info: DatasetInfo, engine: Engine | None = None
) -> tuple[float, float]:
    """Share of the images that are classified right, and the mean cross-entropy.

    In float32 on the model's device; with an engine in its precision, divided over its processes.
    """
    model.eval()
    place = next(model.parameters()).device
    sums = torch.zeros(2, device=place)
    rank, world = (engine.rank, engine.world) if engine else (0, 1)
    for images, labels in in_order(split, info, device=place, rank=rank, world=world):
        with engine.autocast() if engine else contextlib.nullcontext():
            logits = model(images)
        logits = logits.float()
        sums[0] += (logits.argmax(1) == labels).sum()
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
    if engine:
        sums = engine.all_reduce(sums)
    return float(sums[0]) / len(split), float(sums[1]) / len(split)


def _refuse_short(penalty: Penalty | None, settings: Train, steps: int) -> None:
    """Raise SettingsError if a penalty's course does not fit into the training."""
    if not isinstance(penalty, ScheduledPenalty):
        return
    if penalty.needs > settings.epochs * steps:
        raise SettingsError(
            f"params.yaml: sparse_train.epochs = {settings.epochs}: the penalty may need "
            f"{penalty.needs:,} steps until it is finished; at {steps:,} steps an epoch that is "
            f"{math.ceil(penalty.needs / steps):,} epochs. It ends by itself, so more do no harm"
        )
    if settings.keep != "last":
        raise SettingsError(
            f"params.yaml: sparse_train.keep = {settings.keep!r}: a penalty that runs a course of "
            "its own is only through at its end; keep must be 'last'"
        )


def _refuse_broken(model: nn.Module, row: Row, lr: float) -> None:
    """Raise TrainingError if the last step of an epoch, whose loss nobody saw, broke weights."""
    whole = torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all()
    if not (bool(whole) and all(math.isfinite(value) for value in row.values())):
        epoch = int(row["epoch"])
        raise TrainingError(
            f"weights or loss are no longer finite after epoch {epoch} (lr {lr:g}): stopped; "
            f"the state after epoch {epoch - 1} is kept. Lower the learning rate or the decay"
        )


class _Finite:
    """Looks at the losses every so often, so that a GPU is not stopped at every step."""

    def __init__(self, epoch: int, lr: float, every: int = 50) -> None:
        self.epoch, self.lr, self.every = epoch, lr, every
        self.first = 0
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.every:
            self.finish()

    def finish(self) -> None:
        """Raise TrainingError at the first loss that is not finite."""
        if not self.losses:
            return
        bad = (~torch.stack(self.losses).isfinite()).nonzero().flatten().tolist()
        if bad:
            value = float(self.losses[bad[0]])
            raise TrainingError(
                f"the loss became {value} at epoch {self.epoch + 1}, step "
                f"{self.first + bad[0] + 1} (lr {self.lr:g}): stopped; the state after epoch "
                f"{self.epoch} is kept. Lower the learning rate or the decay"
            )
        self.first += len(self.losses)
        self.losses = []


class _State:
    """All that a training needs to go on: weights, optimizer, penalty, history, best epoch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Penalty | None
    ) -> None:
        self.model, self.optimizer, self.penalty = model, optimizer, penalty
        self.history: list[Row] = []
        self.best = 0
        self.weights: dict[str, Tensor] = {}

    def add(self, row: Row, keep_best: bool) -> None:
        """Note an epoch, and its weights if they are the best so far."""
        self.history.append(row)
        if not keep_best:
            return
        if self.best:
            before = self.history[self.best - 1]
            rank = (-row["val_accuracy"], row["val_loss"])
            if rank >= (-before["val_accuracy"], before["val_loss"]):
                return
        self.best = len(self.history)
        self.weights = {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def load_best(self) -> None:
        """Put the weights of the best epoch into the model, if epochs were compared."""
        if self.weights:
            self.model.load_state_dict(self.weights)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as named tensors and plain values."""
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"best/{n}": t for n, t in self.weights.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": v for n, v in values.items() if v is not None}
        if self.penalty is not None:
            tensors |= {f"penalty/{n}": t for n, t in self.penalty.state_dict().items()}
        return tensors, {"history": self.history, "best": self.best}

    def restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Take up what `save` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.model.load_state_dict(part("model/"))
        place = next(self.model.parameters()).device
        self.weights = {name: t.to(place) for name, t in part("best/").items()}
        state: dict[int, dict[str, Tensor]] = {}
        laid_out = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in part("optimizer/").items():
            index, key = name.split("/")
            like = laid_out[int(index)]
            if tensor.shape == like.shape:  # fused optimizers want the parameter's memory layout
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor.detach()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.penalty is not None:
            self.penalty.load_state_dict(part("penalty/"))
        self.history, self.best = list(info["history"]), int(info["best"])
