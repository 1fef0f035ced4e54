"""Before hours of training: what only the network can tell about the settings that come after it.

A ratio for a layer that there is not would otherwise be noticed by the stage that meets it, with
the trainings behind it. No result depends on what is done here.
"""

import copy

import torch
from torch import nn

from secateur.base import plugin, settings
from secateur.base.errors import SecateurError, SettingsError
from secateur.data.dataset import DatasetInfo
from secateur.pruning.decision import PruningContext
from secateur.training import penalty as penalties
from secateur.training.penalty import ScheduledPenalty


def check_network(model: nn.Module, info: DatasetInfo) -> None:
    """Raise SettingsError if penalty or pruner of params.yaml refuse this network.

    `model` is left alone, and so are the random numbers. What depends on weights or images is not
    judged yet.
    """
    params = settings.check()
    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(model).cpu().eval()
        penalty = penalties.build(params.penalty, params.chosen("penalties"), trial, params.decay)
        if params.pruner == "chosen" and not isinstance(penalty, ScheduledPenalty):
            raise SettingsError(
                f"params.yaml: pruner = 'chosen': penalty {params.penalty} chooses nothing that "
                "could go; take greg1 or greg2, or another pruner"
            )
        subject = PruningContext(
            trial, torch.zeros(1, *info.shape), torch.zeros(1, dtype=torch.int64)
        )
        try:
            plugin.load("pruners", params.pruner).prune(params.chosen("pruners"), subject)
        except SettingsError:
            raise
        except SecateurError:
            return  # it may fit once the network is trained
