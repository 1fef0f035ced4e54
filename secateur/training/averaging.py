"""Averages of the weights over a training (EMA, SWA), which are evaluated and kept."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.base.sections import Train
from secateur.data.dataset import Dataset
from secateur.sparsity.masks import BatchNorm
from secateur.training.recalibrate import recalibrate_on


def build(settings: Train, model: nn.Module, steps_per_epoch: int) -> "WeightAverage | None":
    """The average that the settings ask for; None if they ask for none."""
    if settings.average.kind == "none":
        return None
    return WeightAverage(settings, model, steps_per_epoch)


class WeightAverage:
    """The average of a network's weights over the steps of one training.

    ema: after every step, `decay` times the average plus (1 - decay) times the weights; from the
    step `start` on. swa: the plain mean of the weights after every epoch that ends at `start` or
    later (P. Izmailov et al., Averaging weights leads to wider optima and better generalization,
    UAI 2018). Zeros that are held stay zero. Buffers are the network's; statistics of batch
    normalisations do not belong to averaged weights, and are measured again for them.
    """

    def __init__(self, settings: Train, model: nn.Module, steps_per_epoch: int) -> None:
        """Nothing is averaged before the first step; the network itself is not changed."""
        self.settings, self.model = settings.average, model
        self.steps_per_epoch = steps_per_epoch
        steps, start = settings.epochs * steps_per_epoch, self.settings.start
        self.start = int(start * steps) if start < 1 else int(start)
        ema = get_ema_multi_avg_fn(self.settings.decay) if self.settings.kind == "ema" else None
        self.averaged = AveragedModel(model, multi_avg_fn=ema)
        self.averaged.requires_grad_(False)

    @property
    def begun(self) -> bool:
        """Whether anything has been averaged."""
        return bool(self.averaged.n_averaged)

    def after_step(self, number: int) -> None:
        """Take the weights after step `number` (from 0, over all epochs) into the average."""
        done = number + 1
        last = done % self.steps_per_epoch == 0
        if done >= self.start and (last or self.settings.kind == "ema"):
            self.averaged.update_parameters(self.model)

    def network(self, data: Dataset) -> nn.Module:
        """The network with averaged weights, ready to be evaluated; as long as nothing has been
        averaged, the network that is trained."""
        if not self.begun:
            return self.model
        network: nn.Module = self.averaged.module
        if self.settings.recalibrate and any(isinstance(m, BatchNorm) for m in network.modules()):
            device = next(network.parameters()).device
            recalibrate_on(network, data, self.settings.recalibrate, device)
        return network

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, and how many were averaged."""
        return dict(self.averaged.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; RuntimeError if it does not fit."""
        self.averaged.load_state_dict(dict(state))
