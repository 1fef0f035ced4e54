"""Position of every layer in its network: its number, stage, block and convolution in the block.

Stages and blocks are read from names such as `layer2.0.conv1`, as residual networks have them.
"""

import re
from dataclasses import dataclass

from torch import nn

from secateur.sparsity import masks
from secateur.sparsity.choices import Granularity

BLOCK = re.compile(r"(?:.*\.)?layer(\d+)\.(\d+)\.(.+)")
SHORTCUTS = {"shortcut", "downsample"}


@dataclass(frozen=True)
class Position:
    """Position of a layer in its network."""

    number: int
    """Index among convolutions and linear layers, from 0."""
    last: bool
    grouped: bool
    linear: bool
    residual: bool
    """Whether the network has shortcuts."""
    stage: int | None = None
    """0: stem; then the number in `layer<n>`; one more for the layers after the last stage."""
    block: int | None = None
    conv: int | None = None
    """Index within its block, from 0; None for a shortcut."""
    block_end: bool = False

    def refusal(self, granularity: Granularity) -> str:
        """Why units of this granularity cannot be pruned in this layer; empty if they can."""
        if granularity == "weight":
            return ""
        if self.grouped:
            return "a grouped convolution"
        if granularity == "filter":
            if self.last:
                return "its outputs are the classes"
            if self.residual and (self.stage == 0 or (self.block is not None and self._at_sum)):
                return "its outputs are part of a residual sum"
        else:
            if self.number == 0:
                return "its inputs are the pixels"
            if self.residual and (self.last or (self.block is not None and not self.conv)):
                return "its inputs are a residual sum"
        return ""

    def selects_pixels(self, granularity: Granularity) -> bool:
        """Whether units of this granularity are single pixels: inputs of a first linear layer."""
        return granularity == "channel" and self.number == 0 and self.linear

    @property
    def _at_sum(self) -> bool:
        return self.conv is None or self.block_end


def layer_positions(model: nn.Module) -> dict[str, Position]:
    """Position of every convolution and linear layer, by name and in order."""
    layers = masks.layers(model)
    matches = {name: BLOCK.fullmatch(name) for name in layers}
    residual = any(SHORTCUTS & set(name.split(".")) for name, _ in model.named_modules())
    residual = residual and any(matches.values())
    blocks: dict[tuple[int, int], list[str]] = {}
    for name, match in matches.items():
        if match and not SHORTCUTS & set(match[3].split(".")):
            blocks.setdefault((int(match[1]), int(match[2])), []).append(name)
    stages = max((int(match[1]) for match in matches.values() if match), default=0)
    positions: dict[str, Position] = {}
    after_stem = False
    for number, (name, layer) in enumerate(layers.items()):
        last = number == len(layers) - 1
        linear = isinstance(layer, nn.Linear)
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if match := matches[name]:
            after_stem = True
            key = int(match[1]), int(match[2])
            convs = blocks.get(key, [])
            conv = convs.index(name) if name in convs else None
            end = bool(convs) and name == convs[-1]
            positions[name] = Position(number, last, grouped, linear, residual, *key, conv, end)
        else:
            stage = None if not stages else stages + 1 if after_stem else 0
            positions[name] = Position(number, last, grouped, linear, residual, stage)
    return positions
