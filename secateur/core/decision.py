"""What a pruner decides: single weights, whole channels, or both."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.core.channels import follow
from secateur.core.masks import Masks


@dataclass(frozen=True)
class Decision:
    """What goes; everything that is named in neither way stays."""

    masks: Masks = field(default_factory=dict)
    """Parameter name -> True where the entry stays."""
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    """Group of channels, as core.channels names it -> numbers of those that go."""


def decide(prune: Callable[..., Any], settings: Any, model: nn.Module, example: Tensor) -> Decision:
    """Ask a pruner: `prune(settings, model)`, or `prune(settings, model, network)`.

    One that takes three arguments is given the network's channels, as `channels.follow` finds
    them. It may give masks alone.
    """
    wants_channels = len(inspect.signature(prune).parameters) > 2
    given = (follow(model, example),) if wants_channels else ()
    decision = prune(settings, model, *given)
    return decision if isinstance(decision, Decision) else Decision(masks=decision)
