"""Averages of the weights over a training (EMA, SWA), evaluated and kept in their place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.base.errors import ArgumentError
from secateur.base.sections import Train, in_steps
from secateur.data.dataset import Dataset
from secateur.sparsity.masks import BatchNorm
from secateur.training.penalty import ChoosingPenalty, MaskingPenalty, Penalty
from secateur.training.recalibrate import recalibrate_on


def build(
    settings: Train, model: nn.Module, steps_per_epoch: int, penalty: Penalty | None = None
) -> "WeightAverage | None":
    """The average that the settings ask for; None if they ask for none."""
    if settings.average.kind == "none":
        return None
    return WeightAverage(settings, model, steps_per_epoch, penalty)


def check(settings: Train, steps_per_epoch: int, penalty: Penalty | None = None) -> None:
    """ArgumentError if the training ends before weights are averaged.

    A penalty that chooses what is pruned may end the training before the last epoch.
    """
    end = settings.epochs * steps_per_epoch
    if settings.average.kind == "none" or not end:
        return
    if isinstance(penalty, ChoosingPenalty) and penalty.max_steps:
        end = min(end, penalty.max_steps)
    start = _first_step(settings, steps_per_epoch)
    if settings.average.kind == "swa":  # of whole epochs
        end -= end % steps_per_epoch
    if start >= end:
        raise ArgumentError(
            "average.start",
            f"the average would begin at step {start:,}, and the last step that it could take in "
            f"is {end:,}; allowed: fewer steps than that, or below 1 a share of all "
            f"{settings.epochs * steps_per_epoch:,}",
            settings.average.start,
        )


def _first_step(settings: Train, steps_per_epoch: int) -> int:
    """Number of steps before the average begins."""
    return in_steps(settings.average.start, settings.epochs * steps_per_epoch)


class WeightAverage:
    """The average of a network's weights over the steps of one training.

    ema: after every step from `start` on, `decay` times the average plus (1 - decay) times the
    weights. swa: the plain mean of the weights after every epoch that ends at `start` or later
    (P. Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI
    2018). Masked weights stay zero, and weights that the penalty prunes during the training are
    zero in the average from then on. Buffers are those of the network, except that batch-norm
    statistics, which do not fit averaged weights, are measured again.
    """

    def __init__(
        self,
        settings: Train,
        model: nn.Module,
        steps_per_epoch: int,
        penalty: Penalty | None = None,
    ) -> None:
        """Nothing is averaged before the first step; the network itself is not changed."""
        self.settings, self.model = settings.average, model
        self.steps_per_epoch = steps_per_epoch
        self.penalty = penalty if isinstance(penalty, MaskingPenalty) else None
        self.start = _first_step(settings, steps_per_epoch)
        ema = get_ema_multi_avg_fn(self.settings.decay) if self.settings.kind == "ema" else None
        self.averaged = AveragedModel(model, multi_avg_fn=ema)
        self.averaged.requires_grad_(False)

    @property
    def begun(self) -> bool:
        """Whether any weights have been averaged yet."""
        return bool(self.averaged.n_averaged)

    def after_step(self, number: int) -> None:
        """Add the weights after step `number` (from 0, over all epochs) to the average."""
        done = number + 1
        last = done % self.steps_per_epoch == 0
        if done >= self.start and (last or self.settings.kind == "ema"):
            self.averaged.update_parameters(self.model)
            self._mask()

    @torch.no_grad()
    def _mask(self) -> None:
        """Set to zero what the penalty holds at zero."""
        if self.penalty is not None and (factors := self.penalty.held_factors()):
            averages = [self.averaged.module.get_parameter(name) for name in factors]
            torch._foreach_mul_(averages, list(factors.values()))

    def network(self, data: Dataset) -> nn.Module:
        """The network with averaged weights, ready to be evaluated; before the first average, the
        network that is trained."""
        if not self.begun:
            return self.model
        network: nn.Module = self.averaged.module
        if self.settings.recalibrate and any(isinstance(m, BatchNorm) for m in network.modules()):
            device = next(network.parameters()).device
            recalibrate_on(network, data, self.settings.recalibrate, device)
        return network

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, and how many have been averaged."""
        return dict(self.averaged.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; RuntimeError if it does not fit."""
        self.averaged.load_state_dict(dict(state))
