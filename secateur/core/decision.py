"""What a pruner is given, and what it decides: single weights, whole channels, or both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from secateur.core.channels import Network, follow
from secateur.core.choices import Choices, Groups, refuse_strange
from secateur.core.choices import masks as as_masks
from secateur.core.errors import PruningError
from secateur.core.masks import Masks


@dataclass(frozen=True)
class Decision:
    """What goes; everything that is named in neither way stays."""

    masks: Masks = field(default_factory=dict)
    """Parameter name -> True where the entry stays."""
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    """Group of channels, as core.channels names it -> numbers of those that go, int64."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures that say how it came about, for the log; such as a ratio asked and reached."""
    lines: tuple[str, ...] = ()
    """What the user should read about it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> text to be written beside the model."""


class Subject:
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
    def network(self) -> Network:
        """Its channels. PruningError if the network cannot be followed."""
        return follow(self.model, self.images[:1])


def of_choices(subject: Subject, choices: Choices) -> Decision:
    """Choices of a layer's filters or inputs as channels where they can go whole, else as masks.

    A channel goes whole if it is not locked and every layer that makes it, or every entry of every
    layer that reads it, has been chosen. Choices of single weights are masks.
    """
    refuse_strange(subject.model, choices)
    by_layer = {name.removesuffix(".weight"): choice for name, choice in choices.items()}
    by_layer = {name: choice for name, choice in by_layer.items() if _side(choice)}
    if not by_layer:
        return Decision(as_masks(subject.model, choices))
    network = subject.network
    count = len(network.roots)
    left = {"out": torch.zeros(count), "into": torch.zeros(count)}  # entries that were not chosen
    for name, layer in network.layers.items():
        if layer.depthwise():  # it has no say: its outputs are its inputs' channels
            continue
        for side in left:
            atoms = getattr(layer, side)
            stays = torch.ones(len(atoms), dtype=torch.bool)
            if name in by_layer and _side(by_layer[name]) == side:
                stays = ~by_layer[name].flatten().cpu()
            left[side].index_add_(0, network.roots[atoms[atoms >= 0]], stays[atoms >= 0].float())
    for select in network.selects.values():  # what a shortcut brings was not chosen either
        if select.own:
            left["out"][network.roots[select.out]] += 1
    free = torch.zeros(count, dtype=torch.bool)
    for group in network.groups:
        if group.locked is None:
            free[group.roots] = True
    whole: list[Tensor] = []
    for name, choice in by_layer.items():
        side = _side(choice)
        atoms = getattr(network.layers[name], side)
        roots = network.roots[atoms[choice.flatten().cpu() & (atoms >= 0)]]
        whole.append(roots[free[roots] & (left[side][roots] == 0)])
    selection = network.allowed(network.selection(torch.cat(whole).unique()))
    gone = network.gone(selection)
    rest = dict(choices)
    for name, choice in by_layer.items():
        atoms = getattr(network.layers[name], _side(choice))
        if bool(torch.isin(network.roots[atoms[choice.flatten().cpu()]], gone).all()):
            del rest[f"{name}.weight"]
    return Decision(as_masks(subject.model, rest), selection)


def refusals(network: Network, groups: Groups) -> dict[str, str]:
    """Why layers' filters or inputs may not be chosen for themselves, by name.

    Filters: those that are added to others', that are locked, or that follow another layer's.
    Inputs: those that are sums, or locked. Single weights may always go.
    """
    if groups == "weight":
        return {}
    makers = torch.zeros(len(network.roots))
    for layer in network.layers.values():
        if not layer.depthwise():
            makers[network.roots[layer.out].unique()] += 1
    for select in network.selects.values():
        if select.own:
            makers[network.roots[select.out]] += 1
    locks: dict[int, str] = {}
    for group in network.groups:
        if group.locked is not None:
            locks |= dict.fromkeys(group.roots.tolist(), group.locked)
    found: dict[str, str] = {}
    for name, layer in network.layers.items():
        atoms = layer.out if groups == "filter" else layer.into
        roots = network.roots[atoms[atoms >= 0]]
        ends = "outputs" if groups == "filter" else "inputs"
        reason = next((locks[root] for root in roots.tolist() if root in locks), None)
        if layer.groups > 1:
            found[name] = "a grouped convolution"
        elif bool((makers[roots] > 1).any()):
            found[name] = f"its {ends} are part of a residual sum"
        elif reason is not None:
            found[name] = f"its {ends} are locked: {reason}"
    return found


def _side(choice: Tensor) -> str:
    """Which end of its layer a choice is about: `out`, `into`, or neither."""
    if choice.dim() < 2:
        raise PruningError("a choice needs as many axes as its weight")
    if choice.shape[0] == choice.numel() > 1:
        return "out"
    return "into" if choice.shape[1] == choice.numel() > 1 else ""
