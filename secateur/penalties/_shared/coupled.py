"""Channels with everything that is coupled to them, and penalties on these weights.

To a channel belong its filters, the weights that read it, and its scales in normalisations, in all
layers (`channels.graph`). `group_penalty` builds penalties that offer coupled channels beside the
filters and channels of single layers.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from secateur.base.errors import ArgumentError
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.channels.groups import by_channel
from secateur.nn.modes import in_eval_mode
from secateur.penalties._shared.formula import GroupPenalty, GroupSettings, root


class CoupledWeights:
    """The channels of a network that can be removed, and all weights that are coupled to each.

    Channels are numbered from 0 over all channel groups, in their order.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int] | None) -> None:
        """`shape` is that of one image. Raises PruningError if the network cannot be traced."""
        if shape is None:
            raise ArgumentError("coupled groups", "the shape of an image is needed to find them")
        device = next(model.parameters()).device
        example = torch.zeros(1, *shape, device=device)
        self.graph: ChannelGraph = build_channel_graph(in_eval_mode(copy.deepcopy(model)), example)
        free = [group for group in self.graph.groups if group.locked is None]
        sizes = torch.tensor([group.size for group in free])
        self.owner = torch.arange(len(free)).repeat_interleave(sizes)
        """int64, (channels,): number of the group that each channel belongs to."""
        self.number = torch.full((len(self.graph.canonical),), -1)
        """By canonical id: number of the channel, -1 if it cannot be removed."""
        if free:
            self.number[torch.cat([group.ids for group in free])] = torch.arange(int(sizes.sum()))
        axes: dict[tuple[str, int, int], Tensor] = {}
        for group in free:
            for member in group.weights:
                size = model.get_parameter(member.tensor).shape[member.axis] * member.groups
                key = (member.tensor, member.axis, member.groups)
                own = axes.setdefault(key, torch.full((size,), len(self.owner)))
                own[member.index] = self.number[group.ids].unsqueeze(1).expand(member.index.shape)
        self.axes = [(key, own.to(device)) for key, own in axes.items()]
        """Weight, axis and groups of a convolution, and the channel of each entry along the axis;
        entries without a channel have the number of channels in its place."""
        self.weights: dict[str, Tensor] = {
            name: model.get_parameter(name) for name in dict.fromkeys(key[0] for key in axes)
        }

    def sums(self, entries: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of an elementwise function over all weights of each channel: (channels,)."""
        values = {name: entries(weight) for name, weight in self.weights.items()}
        first = next(iter(values.values()))
        total = first.new_zeros(len(self.owner) + 1)
        for place, ((name, axis, groups), own) in enumerate(self.axes):
            if own.device != total.device:  # the network was moved
                own = own.to(total.device)
                self.axes[place] = (name, axis, groups), own
            total = total.index_add(0, own, by_channel(values[name], axis, groups).sum(1))
        return total[:-1]

    def by_weight(self, factors: Tensor) -> dict[str, Tensor]:
        """Name of a weight -> factor of each entry, broadcastable to the weight: the sum of the
        factors of the channels that it belongs to. `factors` is by channel, (channels,)."""
        padded = torch.cat((factors, factors.new_zeros(1)))
        found: dict[str, Tensor] = {}
        for (name, axis, groups), own in self.axes:
            weight = self.weights[name]
            along = padded[own.to(padded.device)]
            if groups > 1:
                rows = along.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
                along = rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            else:
                along = along.view([-1 if k == axis else 1 for k in range(weight.dim())])
            found[name] = found[name] + along if name in found else along
        return found


class CoupledPenalty:
    """A stateless penalty on channels with everything coupled to them, summed over groups."""

    finished = False

    def __init__(
        self, weights: CoupledWeights, formula: Callable[[Tensor, Tensor], Tensor], decay: float
    ) -> None:
        """`formula` gives the penalty of each group, (groups,), from the sum of the norms of its
        channels and the norm of all of them together, both (groups,)."""
        self.coupled, self.formula, self.decay = weights, formula, decay
        if not len(weights.owner):
            raise ArgumentError("grouping", "no channel of this network can be removed", "group")

    def __call__(self, step: int) -> Tensor:
        """`decay` times the sum over all groups."""
        squares = self.coupled.sums(torch.square)
        owner = self.coupled.owner = self.coupled.owner.to(squares.device)
        zeros = squares.new_zeros(int(owner[-1]) + 1)
        norms = zeros.index_add(0, owner, root(squares))
        return self.decay * self.formula(norms, root(zeros.index_add(0, owner, squares))).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


def group_penalty(
    settings: GroupSettings,
    model: nn.Module,
    decay: float,
    shape: Sequence[int] | None,
    value: Callable[[Tensor, bool, int], Tensor],
    gradient: Callable[[Tensor, bool, int], Tensor],
    coupled: Callable[[Tensor, Tensor], Tensor],
) -> GroupPenalty | CoupledPenalty:
    """The penalty with the grouping of the settings.

    `value` and `gradient` take one tensor, `by_position`, and the number of groups of its
    convolution; `coupled` is the formula of a CoupledPenalty. `shape` is the shape of one image,
    which grouping `group` needs.
    """
    if settings.grouping == "group":
        return CoupledPenalty(CoupledWeights(model, shape), coupled, decay)
    by_position = settings.grouping == "position"
    return GroupPenalty(
        model,
        lambda w, groups: value(w, by_position, groups),
        lambda w, groups: gradient(w, by_position, groups),
        settings.biases,
        decay,
    )
