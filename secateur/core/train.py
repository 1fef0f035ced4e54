"""fit(): the one training loop; accuracy(): the one evaluation."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core import masks as masking
from secateur.core.data import About, Batches, Dataset, Part, in_order
from secateur.core.errors import TrainingError
from secateur.core.machine import device
from secateur.core.masks import Masks
from secateur.core.resume import Work
from secateur.core.settings import Train

Row = dict[str, float]
"""One epoch of history: epoch, lr, losses and accuracies."""


class Watch(Protocol):
    """Someone who is told how the training goes, and has no say in it."""

    def start(self, epochs: int, steps: int, rows: list[Row]) -> None:
        """Training begins, or goes on after `rows`; `steps` is the number of steps an epoch."""

    def step(self, epoch: int, step: int) -> None:
        """A step is done (both counted from 1)."""

    def epoch(self, row: Row) -> None:
        """An epoch is done."""

    def saved(self) -> None:
        """The state up to the last epoch is safe on disk."""


class Penalty(Protocol):
    """One penalty on one model."""

    finished: bool
    """Set by a penalty that ends the training by its own clock."""

    def __call__(self, step: int) -> Tensor:
        """Value at this optimizer step (counted from 0 over all epochs), to be differentiated."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that must survive a restart; empty for a penalty without memory."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` was taken."""


@dataclass(frozen=True)
class Fit:
    """What a training gives beside the weights it leaves in the model."""

    history: list[Row]
    picked: int
    """The epoch whose weights were kept, counted from 1."""


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
    work: Work,
    watchers: Sequence[Watch],
    *,
    penalty: Penalty | None = None,
    decay: float = 0.0,
    masks: Masks | None = None,
) -> Fit:
    """Train `model` in place on `data.train`; the loss is cross-entropy + decay * penalty.

    `masks` are held through every step. The weights that remain are those of the epoch with the
    highest accuracy on `data.val` (ties: the lower loss), or of the last one if `settings.keep`
    says so or there is no val. Goes on from the state that `work` holds, to the same bytes.
    Raises TrainingError when the loss is no longer finite; the last good state stays in `work`.
    """
    torch.use_deterministic_algorithms(True)
    # deterministic mode also fills fresh memory, as a debugging aid: a tenth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    place = device()
    model.to(place)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = Batches(data.train, data.about, settings.batch_size, seed, device=place)
    optimizer = _optimizer(model, settings)
    masking.hold(model, masks or {}, optimizer)
    if decay == 0:
        penalty = None
    run = _State(model, optimizer, penalty)
    if (state := work.state()) is not None:
        run.restore(*state)
    torch.manual_seed(seed * 1_000_003 + len(run.history))
    for watch in watchers:
        watch.start(settings.epochs, len(batches), run.history)
    for epoch in range(len(run.history), settings.epochs):
        if penalty is not None and penalty.finished:  # before the epoch: it may be over on resume
            break
        torch.manual_seed(seed * 1_000_003 + epoch)  # dropout and the like: by epoch, not by past
        row = _epoch(model, optimizer, penalty, decay, batches, settings, epoch, watchers)
        if len(data.val):
            row["val_accuracy"], row["val_loss"] = accuracy(model, data.val, data.about)
        _refuse_broken(model, row, settings.lr)
        run.add(row, keep_best=settings.keep == "best" and len(data.val) > 0)
        saved = work.keep(*run.save())
        for watch in watchers:
            watch.epoch(row)
            if saved:
                watch.saved()
    batches.close()
    run.load_best()
    return Fit(run.history, run.best or len(run.history))


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: Penalty | None,
    decay: float,
    batches: Batches,
    settings: Train,
    epoch: int,
    watchers: Sequence[Watch],
) -> Row:
    """One pass over the training images; gives its row of history."""
    model.train()
    steps = len(batches)
    checks = _Finite(epoch, settings.lr)
    losses = torch.zeros((), device=batches.device)
    right, added = torch.zeros_like(losses), torch.zeros_like(losses)
    lr, half = 0.0, settings.precision == "bfloat16"
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        lr = _rate(settings, epoch * steps + step, settings.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        total = loss
        if penalty is not None:
            extra = decay * penalty(epoch * steps + step)
            total = loss + extra
            added += extra.detach()
        total.backward()
        optimizer.step()
        checks.add(total.detach())
        losses += loss.detach() * len(labels)
        right += (logits.detach().argmax(1) == labels).sum()
        for watch in watchers:
            watch.step(epoch + 1, step + 1)
    checks.finish()
    count = len(batches.split)
    row = {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": float(losses) / count,
        "train_accuracy": float(right) / count,
    }
    if penalty is not None:
        row["penalty"] = float(added) / steps
    return row


@torch.inference_mode()
def accuracy(model: nn.Module, split: Part, about: About) -> tuple[float, float]:
    """Share of the images that are classified right, and the mean cross-entropy."""
    model.eval()
    right, loss = 0, 0.0
    for images, labels in in_order(split, about, device=next(model.parameters()).device):
        logits = model(images)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return right / len(split), loss / len(split)


def _optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """The optimizer that the settings name, in its fused form."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, weight_decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr,
            momentum=settings.momentum,
            weight_decay=weight_decay,
            nesterov=settings.momentum > 0,
            fused=True,
        )
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr, weight_decay=weight_decay, fused=True)


def _rate(settings: Train, step: int, steps: int) -> float:
    """Learning rate at a step of the whole training."""
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * step / steps))


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
