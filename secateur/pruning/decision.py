"""What a pruner is given, and what it decides: single weights, whole channels, or both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from secateur.base.errors import PruningError
from secateur.channels.graph import ChannelGraph, build_channel_graph
from secateur.sparsity.choices import Choices, Granularity, validate_choices
from secateur.sparsity.choices import masks as as_masks
from secateur.sparsity.masks import Masks


@dataclass(frozen=True)
class PruningDecision:
    """What goes; everything that is named in neither way stays."""

    masks: Masks = field(default_factory=dict)
    """Parameter name -> True where the entry stays."""
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    """Group of channels, as channels.graph names it -> numbers of those that go, int64."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures that say how it came about, for the log; such as a ratio asked and reached."""
    lines: tuple[str, ...] = ()
    """What the user should read about it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> text to be written beside the model."""


class PruningContext:
    """A network that is to be pruned, with what a pruner may look at. It changes none of it."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None = None,
        choices: Choices | None = None,
    ) -> None:
        """`images` (N, C, H, W) are some of the training images, normalised; labels (N,) int64."""
        self.model, self.images = model, images
        self.labels = torch.empty(0, dtype=torch.int64) if labels is None else labels
        self.choices: Choices = choices or {}
        """What the penalty has chosen to go; empty after one that does not choose."""

    @cached_property
    def graph(self) -> ChannelGraph:
        """Its channels. PruningError if the network cannot be followed."""
        return build_channel_graph(self.model, self.images[:1])


def decision_from_choices(subject: PruningContext, choices: Choices) -> PruningDecision:
    """Choices of a layer's filters or inputs as channels where they can go whole, else as masks.

    A channel goes whole if it is not locked and every layer that makes it, or every entry of every
    layer that reads it, has been chosen. Choices of single weights are masks.
    """
    validate_choices(subject.model, choices)
    by_layer = {name.removesuffix(".weight"): choice for name, choice in choices.items()}
    by_layer = {name: choice for name, choice in by_layer.items() if _side(choice)}
    if not by_layer:
        return PruningDecision(as_masks(subject.model, choices))
    graph = subject.graph
    count = len(graph.canonical)
    left = {
        "outputs": torch.zeros(count),
        "inputs": torch.zeros(count),
    }  # entries that were not chosen
    for name, layer in graph.layers.items():
        if layer.depthwise():  # it has no say: its outputs are its inputs' channels
            continue
        for side in left:
            ids = getattr(layer, side)
            stays = torch.ones(len(ids), dtype=torch.bool)
            if name in by_layer and _side(by_layer[name]) == side:
                stays = ~by_layer[name].flatten().cpu()
            left[side].index_add_(0, graph.canonical[ids[ids >= 0]], stays[ids >= 0].float())
    for select in graph.selects.values():  # what a shortcut brings was not chosen either
        if select.owns_channels:
            left["outputs"][graph.canonical[select.outputs]] += 1
    free = torch.zeros(count, dtype=torch.bool)
    for group in graph.groups:
        if group.locked is None:
            free[group.ids] = True
    whole: list[Tensor] = []
    for name, choice in by_layer.items():
        side = _side(choice)
        ids = getattr(graph.layers[name], side)
        roots = graph.canonical[ids[choice.flatten().cpu() & (ids >= 0)]]
        whole.append(roots[free[roots] & (left[side][roots] == 0)])
    selection = graph.removable(graph.selection(torch.cat(whole).unique()))
    gone = graph.ids_of(selection)
    rest = dict(choices)
    for name, choice in by_layer.items():
        ids = getattr(graph.layers[name], _side(choice))
        if bool(torch.isin(graph.canonical[ids[choice.flatten().cpu()]], gone).all()):
            del rest[f"{name}.weight"]
    return PruningDecision(as_masks(subject.model, rest), selection)


def unprunable_layers(graph: ChannelGraph, granularity: Granularity) -> dict[str, str]:
    """Why layers' filters or inputs may not be chosen for themselves, by name.

    Filters: those that are added to others', that are locked, or that follow another layer's.
    Inputs: those that are sums, or locked. Single weights may always go.
    """
    if granularity == "weight":
        return {}
    makers = torch.zeros(len(graph.canonical))
    for layer in graph.layers.values():
        if not layer.depthwise():
            makers[graph.canonical[layer.outputs].unique()] += 1
    for select in graph.selects.values():
        if select.owns_channels:
            makers[graph.canonical[select.outputs]] += 1
    locks: dict[int, str] = {}
    for group in graph.groups:
        if group.locked is not None:
            locks |= dict.fromkeys(group.ids.tolist(), group.locked)
    found: dict[str, str] = {}
    for name, layer in graph.layers.items():
        ids = layer.outputs if granularity == "filter" else layer.inputs
        roots = graph.canonical[ids[ids >= 0]]
        ends = "outputs" if granularity == "filter" else "inputs"
        reason = next((locks[root] for root in roots.tolist() if root in locks), None)
        if layer.groups > 1:
            found[name] = "a grouped convolution"
        elif bool((makers[roots] > 1).any()):
            found[name] = f"its {ends} are part of a residual sum"
        elif reason is not None:
            found[name] = f"its {ends} are locked: {reason}"
    return found


def _side(choice: Tensor) -> str:
    """Which end of its layer a choice is about: `outputs`, `inputs`, or neither."""
    if choice.dim() < 2:
        raise PruningError("a choice needs as many axes as its weight")
    if choice.shape[0] == choice.numel() > 1:
        return "outputs"
    return "inputs" if choice.shape[1] == choice.numel() > 1 else ""
