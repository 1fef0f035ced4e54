"""One training step on one batch, and the check that losses stay finite."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.base.errors import TrainingError
from secateur.base.sections import Train
from secateur.training import optim
from secateur.training.averaging import WeightAverage
from secateur.training.distillation import Distiller
from secateur.training.engine import Engine
from secateur.training.penalty import Penalty, SteppingPenalty


class TrainStep:
    """Updates the weights batch by batch, and accumulates the metrics of an epoch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Penalty | None,
        settings: Train,
        engine: Engine,
        steps_per_epoch: int,
        distiller: Distiller | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.model, self.forward = model, engine.prepare(model, settings.compile)
        self.optimizer, self.penalty = optimizer, penalty
        self.distiller, self.average = distiller, average
        self.settings, self.engine, self.steps_per_epoch = settings, engine, steps_per_epoch
        self.stepping = penalty if isinstance(penalty, SteppingPenalty) else None
        self.lr = 0.0
        if distiller is not None:
            distiller.listen()

    @property
    def finished(self) -> bool:
        """Whether the penalty has ended the training."""
        return self.penalty is not None and self.penalty.finished

    def start_epoch(self) -> None:
        """Switch to training mode and reset the sums."""
        self.model.train()
        self.forward.train()
        zero = torch.zeros((), device=self.engine.device)
        self.loss_sum, self.correct, self.penalty_sum = zero, zero.clone(), zero.clone()

    def close(self) -> None:
        """Remove the distillation hooks from the model."""
        if self.distiller is not None:
            self.distiller.close()

    def __call__(self, images: Tensor, labels: Tensor, count: int, number: int) -> Tensor:
        """Take step `number` (from 0, over all epochs); returns the loss including the penalty.

        `images` (n, channels, height, width) and `labels` (n,) are this process's part of a
        batch of `count` images.
        """
        self.lr = optim.rate(self.settings, number, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        if self.settings.accumulate_grad_batches == 1:
            loss = total = self._loss(images, labels, count)
            if self.penalty is not None:
                total = loss + self._penalty(self.penalty, number)
            total.backward()
        else:
            loss, total = self._accumulate(images, labels, count, number)
        if self.distiller is not None:
            self.distiller.average_gradients(self.engine)
        if self.stepping is not None:
            self.stepping.before_step(number, self.optimizer)
        self.optimizer.step()
        if self.stepping is not None:
            self.stepping.after_step(number, self.optimizer)
        if self.average is not None:
            self.average.after_step(number)
        self.loss_sum += loss.detach() * count
        return total.detach()

    def _accumulate(
        self, images: Tensor, labels: Tensor, count: int, number: int
    ) -> tuple[Tensor, Tensor]:
        """Accumulate a batch's gradients part by part; returns loss without and with penalty."""
        # as many parts in every process, since batch norms of several GPUs wait for each other
        most = -(-count // self.engine.world)
        size = -(-most // self.settings.accumulate_grad_batches)
        loss = total = torch.zeros((), device=self.engine.device)
        parts = [slice(start, start + size) for start in range(0, most, size)]
        pairs = [(images[part], labels[part]) for part in parts]
        for index, (part_images, part_labels) in enumerate(pairs):
            last = index == len(pairs) - 1
            with self.engine.no_sync(self.forward, not last):
                part = part_total = self._loss(part_images, part_labels, count)
                if last and self.penalty is not None:
                    part_total = part + self._penalty(self.penalty, number)
                part_total.backward()
            loss, total = loss + part.detach(), total + part_total.detach()
        return loss, total

    def _loss(self, images: Tensor, labels: Tensor, count: int) -> Tensor:
        """Sum of the cross-entropies over these images, divided by the batch size `count`.

        With a teacher, this is the weighted sum of the losses on the labels and on its outputs.
        """
        if not len(labels):  # a last batch, or part, smaller than the number of processes
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
                "another batch_size (or accumulate_grad_batches)"
            ) from None
        if not isinstance(logits, Tensor):
            raise TrainingError(
                f"the network returns a {type(logits).__name__} in training mode, as with "
                "auxiliary classifiers; one tensor (N, classes) is needed in both modes"
            )
        logits = logits.float()
        self.correct += (logits.detach().argmax(1) == labels).sum()
        smooth = self.settings.label_smoothing
        if len(labels) == count and self.engine.world == 1 and self.distiller is None:
            return F.cross_entropy(logits, labels, label_smoothing=smooth)
        summed = F.cross_entropy(logits, labels, label_smoothing=smooth, reduction="sum")
        if self.distiller is not None:
            imitated = self.distiller(images, logits, self.engine)
            summed = (1 - self.distiller.settings.weight) * summed + imitated
        return summed * (self.engine.world / count)  # the processes' gradients are averaged

    def _penalty(self, penalty: Penalty, number: int) -> Tensor:
        """The penalty at a step; it is also added to the sum of the epoch."""
        value = penalty(number)
        self.penalty_sum += value.detach()
        return value


class LossCheck:
    """Checks losses in groups, so that the GPU is not synchronised at every step."""

    def __init__(self, epoch: int, lr: float, interval: int = 50) -> None:
        """`epoch` counts from 0; `interval` is the number of steps between two checks."""
        self.epoch, self.lr, self.interval = epoch, lr, interval
        self.checked = 0
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Note the loss of a step; checks every `interval` steps as `check` does."""
        self.losses.append(loss)
        if len(self.losses) == self.interval:
            self.check()

    def check(self) -> None:
        """Raise TrainingError naming the first step whose loss is not finite."""
        if not self.losses:
            return
        bad = (~torch.stack(self.losses).isfinite()).nonzero().flatten().tolist()
        if bad:
            value = float(self.losses[bad[0]])
            raise TrainingError(
                f"the loss became {value} at epoch {self.epoch + 1}, step "
                f"{self.checked + bad[0] + 1} (lr {self.lr:g}): stopped; the state after epoch "
                f"{self.epoch} is kept. Lower the learning rate or the decay"
            )
        self.checked += len(self.losses)
        self.losses = []
