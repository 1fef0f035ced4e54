"""Input and result of a pruner: a context, and a decision on weights, whole channels, or both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.base.errors import PruningError
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.nn.outputs import class_scores
from secateur.pruning.latency import LatencyTable
from secateur.sparsity.choices import Choices, Granularity, masks_from_choices, validate_choices
from secateur.sparsity.masks import Masks

Side = Literal["outputs", "inputs"]
"""A side of a layer: filters are its outputs, channels are its inputs."""
COUPLED = "granularity group removes such channels from all layers at once"


@dataclass(frozen=True)
class PruningDecision:
    """What is pruned; all parameters and channels that are not named are kept."""

    masks: Masks = field(default_factory=dict)
    """Parameter name -> True where the entry is kept."""
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    """Group of the channel graph -> indices of the channels to remove, int64."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures for the log, such as the ratio asked for and the ratio reached."""
    lines: tuple[str, ...] = ()
    """Lines of text for the user."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name -> its new values; other parameters do not change."""
    branches: Sequence[str] = ()
    """Names of the residual branches to remove; see pruning/branches.py."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> text that is written beside the model."""


class PruningContext:
    """A network that is to be pruned, and the data that a pruner may use; all are read-only."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None = None,
        choices: Choices | None = None,
        latency: LatencyTable | None = None,
        dense: nn.Module | None = None,
        masks: Masks | None = None,
    ) -> None:
        """`images` (N, C, H, W) are some of the training images, normalised; `labels` (N,) int64.

        `choices` are those of the penalty, if it makes any. `latency` has measured times of the
        network's layers, for latency targets. `dense` is the network before any pruning, if known;
        its weights do not matter. `masks` stay in force, whatever the pruner decides.
        """
        self.model, self.images, self.dense = model, images, dense
        self.labels = torch.empty(0, dtype=torch.int64) if labels is None else labels
        self.choices: Choices = choices or {}
        self.latency = latency
        self.masks: Masks = masks or {}

    @cached_property
    def graph(self) -> ChannelGraph:
        """The network's channel graph; PruningError if the network cannot be traced."""
        return build_channel_graph(self.model, self.images[:1])

    def need_labels(self, purpose: str) -> None:
        """Raise PruningError naming the `purpose` unless every image has a label."""
        if len(self.labels) != len(self.images):
            raise PruningError(f"labels: {purpose} needs one for each image")

    @torch.inference_mode()
    def loss(self, model: nn.Module, purpose: str) -> float:
        """Mean cross-entropy over the images of a network in eval mode, such as a pruned copy.

        Infinite if it is not a number, so that such a network never is the best one.
        Raises PruningError naming the `purpose` if the images have no labels, and for a network
        that is not a classifier.
        """
        self.need_labels(purpose)
        device = next(model.parameters()).device
        labels = self.labels.to(device)
        logits = class_scores(model(self.images.to(device)), labels, purpose)
        loss = float(F.cross_entropy(logits.double(), labels))
        return math.inf if math.isnan(loss) else loss


def decision_from_choices(
    context: PruningContext, choices: Choices, granularity: Granularity | None = None
) -> PruningDecision:
    """The chosen filters and channels as whole channels where these can be removed, else as masks.

    A channel is removed whole if it is not locked and every layer that produces it has chosen it as
    a filter, or every layer that reads it has chosen all its entries as a channel. Choices of
    single weights, biases and scales become masks. A choice with the name of an index buffer is one
    of the channels that a ChannelSelect selects.

    Where a filter or a channel is a single weight, the shape of a choice does not determine its
    granularity. Without `granularity` it is that of the other choices, or weight if there are none.
    Raises PruningError for a choice that does not fit the network.
    """
    buffers = dict(context.model.named_buffers())
    selected = {name: choice for name, choice in choices.items() if name in buffers}
    choices = {name: choice for name, choice in choices.items() if name not in buffers}
    validate_choices(context.model, choices)
    if granularity is None:
        no_weights = bool(selected) or _of_filters_or_channels(context.model, choices)
    else:
        no_weights = granularity != "weight"
    by_layer = {
        name.removesuffix(".weight"): choice
        for name, choice in choices.items()
        if _side(choice)
        and (no_weights or choice.numel() < context.model.get_parameter(name).numel())
    }
    if not by_layer and not selected:
        return PruningDecision(masks_from_choices(context.model, choices))
    graph = context.graph
    kept = _kept_entries(graph, by_layer, selected)
    free = torch.zeros(len(graph.canonical), dtype=torch.bool)
    for group in graph.groups:
        free[group.ids] = group.locked is None
    whole: list[Tensor] = []
    for name, choice in by_layer.items():
        ids = _chosen_ids(graph, name, choice)
        whole.append(ids[free[ids] & (kept[_side(choice)][ids] == 0)])
    for name, choice in selected.items():
        ids = graph.output_ids()[name][choice.cpu()]
        whole.append(ids[free[ids] & (kept["outputs"][ids] == 0)])
    selection = graph.removable(graph.selection(torch.cat(whole).unique()))
    removed = graph.ids_of(selection)
    rest = dict(choices)
    for name, choice in by_layer.items():
        ids = getattr(graph.layers[name], _side(choice))
        if bool(torch.isin(graph.canonical[ids[choice.flatten().cpu()]], removed).all()):
            rest.pop(f"{name}.weight", None)
            rest.pop(name, None)  # a projection that a MultiheadAttention holds itself
    return PruningDecision(masks_from_choices(context.model, rest), selection)


def _of_filters_or_channels(model: nn.Module, choices: Choices) -> bool:
    """Whether these choices are of filters or channels, by the choices whose shapes show it."""
    found = False
    for name, choice in choices.items():
        if choice.numel() < model.get_parameter(name).numel():
            found = True
        elif choice.numel() > 1 and not _side(choice):
            return False
    return found


def _kept_entries(graph: ChannelGraph, by_layer: Choices, selected: Choices) -> dict[str, Tensor]:
    """By side and canonical id: in how many layers the channel's entry is not chosen."""
    count = len(graph.canonical)
    kept = {"outputs": torch.zeros(count), "inputs": torch.zeros(count)}
    for name, layer in graph.layers.items():
        if layer.depthwise():  # its outputs are the channels of its inputs
            continue
        for side, number in kept.items():
            ids = getattr(layer, side)
            not_chosen = torch.ones(len(ids), dtype=torch.bool)
            if name in by_layer and _side(by_layer[name]) == side:
                not_chosen = ~by_layer[name].flatten().cpu()
            number.index_add_(0, graph.canonical[ids[ids >= 0]], not_chosen[ids >= 0].float())
    for name, select in graph.selects.items():  # channels of a shortcut, chosen only by group
        if select.owns_channels:
            chosen = selected.get(name, torch.zeros(len(select.outputs), dtype=torch.bool))
            kept["outputs"].index_add_(0, graph.canonical[select.outputs], (~chosen.cpu()).float())
    return kept


def _chosen_ids(graph: ChannelGraph, name: str, choice: Tensor) -> Tensor:
    """Canonical ids of the channels that are chosen in a layer, without fixed zeros."""
    ids = getattr(graph.layers[name], _side(choice))
    found: Tensor = graph.canonical[ids[choice.flatten().cpu() & (ids >= 0)]]
    return found


def unprunable_layers(graph: ChannelGraph, granularity: Granularity) -> dict[str, str]:
    """Layers whose filters or channels cannot be pruned on their own, with the reason.

    These are filters that are locked or coupled to those of other layers (by a sum, a product),
    channels that are locked or that several layers produce, and both in grouped convolutions.
    Single weights can always be pruned.
    """
    if granularity == "weight":
        return {}
    producers = torch.zeros(len(graph.canonical))
    for layer in graph.layers.values():
        if not layer.depthwise():
            producers[graph.canonical[layer.outputs].unique()] += 1
    for select in graph.selects.values():
        if select.owns_channels:
            producers[graph.canonical[select.outputs]] += 1
    locks: dict[int, str] = {}
    for group in graph.groups:
        if group.locked is not None:
            locks |= dict.fromkeys(group.ids.tolist(), group.locked)
    how: dict[int, str] = {}  # by canonical id
    for group in graph.groups:
        coupled = [c for c in graph.couplings.get(group.name, ()) if "depthwise" not in c]
        how |= dict.fromkeys(group.ids.tolist(), " and of ".join(coupled) or "several layers")
    found: dict[str, str] = {}
    side: Side = "outputs" if granularity == "filter" else "inputs"
    for name, layer in graph.layers.items():
        ids = getattr(layer, side)
        ids = graph.canonical[ids[ids >= 0]]
        reason = next((locks[channel] for channel in ids.tolist() if channel in locks), None)
        if layer.depthwise():
            found[name] = f"a depthwise convolution, whose outputs go with its inputs; {COUPLED}"
        elif layer.groups > 1:
            found[name] = f"a grouped convolution, whose groups stay of one size; {COUPLED}"
        elif bool((producers[ids] > 1).any()):
            shared = int(ids[producers[ids] > 1][0])
            found[name] = f"its {side} are part of {how.get(shared, 'several layers')}; {COUPLED}"
        elif reason is not None:
            found[name] = f"its {side} are locked: {reason}"
    return found


def _side(choice: Tensor) -> str:
    """The side of the layer that a choice belongs to; empty for single weights."""
    if choice.dim() < 2:
        return ""
    if choice.shape[0] == choice.numel() > 1:
        return "outputs"
    return "inputs" if choice.shape[1] == choice.numel() > 1 else ""
