"""Latency of a network at other widths, predicted from a table of measured layers.

The table has the time of every layer at several numbers of outputs and inputs, and times in between
are interpolated. It also has the time of the whole network, at full width and with all channel
groups narrower. With S the sum of the layers' times and A the number of their outputs at all
positions, the predicted time of a network is that of the dense network minus
a * (dense S - S) + b * (dense A - A). The non-negative factors a and b are fitted to the measured
networks, because a layer takes a different time on its own than within a network, and because the
operations between layers (norms, activations, sums, attention) take time for every output.

Source of the table by layer: T.-J. Yang et al., NetAdapt: Platform-aware neural network adaptation
for mobile applications, ECCV 2018. The correction by whole networks is Secateur's own.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, TypeAdapter, model_validator

from secateur.base import files
from secateur.base.documents import read_json, validated
from secateur.base.errors import PruningError, SecateurError
from secateur.base.optional import RuntimeName
from secateur.base.sections import Strict
from secateur.channels.graph import ChannelGraph, Selection

Milliseconds = Annotated[float, Field(gt=0)]
Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class MeasuredLayer(Strict):
    """Times of one layer at several widths."""

    outputs: Widths
    """Ascending."""
    inputs: Widths
    """Ascending; a depthwise convolution has one, since its inputs are its outputs."""
    ms: tuple[tuple[Milliseconds, ...], ...]
    """(outputs, inputs)."""
    positions: Annotated[int, Field(ge=1)]
    """Positions of the outputs of one image."""

    @model_validator(mode="after")
    def _one_time_for_each(self) -> Self:
        rows = [len(row) for row in self.ms]
        ascending = all(list(own) == sorted(set(own)) for own in (self.outputs, self.inputs))
        if rows != [len(self.inputs)] * len(self.outputs) or not ascending:
            raise ValueError("ms: needs a time for each number of outputs and inputs, ascending")
        return self

    def time(self, outputs: int, inputs: int) -> float:
        """Milliseconds at these widths, interpolated; outside the table, those at its edge."""
        row, up = _place(self.outputs, outputs)
        column, right = _place(self.inputs, inputs)
        rows = []
        for number in (row, min(row + 1, len(self.outputs) - 1)):
            low = self.ms[number][column]
            high = self.ms[number][min(column + 1, len(self.inputs) - 1)]
            rows.append(low + right * (high - low))
        return rows[0] + up * (rows[1] - rows[0])


def _place(widths: Sequence[int], width: int) -> tuple[int, float]:
    """Index of the last entry up to `width`, and how far `width` is towards the next entry."""
    number = bisect_right(widths, width) - 1
    if number < 0:
        return 0, 0.0
    if number == len(widths) - 1:
        return number, 0.0
    return number, (width - widths[number]) / (widths[number + 1] - widths[number])


class MeasuredNetwork(Strict):
    """Time of the whole network at the widths of its layers."""

    widths: dict[str, tuple[int, int]]
    """Layer -> outputs and inputs."""
    ms: Milliseconds


class LatencyTable(Strict):
    """Measured times of the layers of one network, and of the network at several widths."""

    runtime: RuntimeName
    batch: Annotated[int, Field(ge=1)]
    """Images per pass."""
    threads: Annotated[int, Field(ge=1)]
    hardware: str
    """The model of the processor."""
    versions: dict[str, str]
    multiple: Annotated[int, Field(ge=1)]
    """A width between two multiples of this takes about as long as the next multiple."""
    layers: dict[str, MeasuredLayer]
    networks: Annotated[tuple[MeasuredNetwork, ...], Field(min_length=1)]
    """The dense network first."""

    @property
    def about(self) -> str:
        """Runtime, threads and images per pass in words."""
        threads = f"{self.threads} thread{'s'[: self.threads != 1]}"
        return f"{self.runtime}, {threads}, batch {self.batch}"

    def __repr__(self) -> str:
        """One line, where the fields would fill pages of a notebook."""
        dense = f"{len(self.layers)} layers, dense network {self.networks[0].ms:.3g} ms"
        return f"LatencyTable({self.about}: {dense}; {self.hardware})"

    def __str__(self) -> str:
        """The line of `repr`."""
        return repr(self)

    @cached_property
    def factors(self) -> tuple[float, float]:
        """Factors a (of the sum over the layers) and b (milliseconds per output)."""
        from scipy.optimize import nnls  # takes a while to import

        dense = self.networks[0]
        layers, outputs = self._sums(dense.widths)
        rows, saved = [], []
        for network in self.networks[1:]:
            own = self._sums(network.widths)
            rows.append([(layers - own[0]) / network.ms, (outputs - own[1]) / network.ms])
            saved.append((dense.ms - network.ms) / network.ms)  # relative errors count
        if not rows:
            return dense.ms / layers, 0.0
        found, _ = nnls(rows, saved)
        return float(found[0]), float(found[1])

    def time(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Milliseconds of the network; `widths` are the outputs and inputs of its layers.

        Raises PruningError naming a layer that was not measured, or is wider than it was then.
        """
        dense = self.networks[0]
        (layers, outputs), own = self._sums(dense.widths), self._sums(widths)
        for name, (out, into) in widths.items():
            most = dense.widths.get(name, (out, into))
            if out > most[0] or into > most[1]:
                raise PruningError(
                    f"layer {name} has {out} outputs and {into} inputs, and was measured with at "
                    f"most {most[0]} and {most[1]}: the table of measured layers is of another "
                    "network"
                )
        by_layer, by_output = self.factors
        left = dense.ms - by_layer * (layers - own[0]) - by_output * (outputs - own[1])
        return max(left, 1e-3 * dense.ms)

    def check_positions(self, positions: Mapping[str, int]) -> None:
        """Raise PruningError unless layers were measured with as many positions of one image.

        Layers that were not measured are left to `time`.
        """
        for name, layer in self.layers.items():
            if (own := positions.get(name, layer.positions)) != layer.positions:
                raise PruningError(
                    f"layer {name} was measured with {layer.positions} positions and has {own}: "
                    "the table of measured layers is for images of another size"
                )

    def _sums(self, widths: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
        """Sum of the times of the layers, and number of their outputs at all positions."""
        layers, outputs = 0.0, 0.0
        for name, (out, into) in widths.items():
            if name not in self.layers:
                raise PruningError(
                    f"layer {name} is not in the table of measured layers, which is of another "
                    "network"
                )
            layer = self.layers[name]
            layers += layer.time(out, into)
            outputs += out * layer.positions
        return layers, outputs

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        files.write_text(Path(path), self.model_dump_json(indent=1) + "\n")


def load_table(path: Path) -> LatencyTable:
    """Read a table; SecateurError naming the file if it is missing or damaged."""
    found = read_json(path, SecateurError)
    return validated(TypeAdapter(LatencyTable), found, str(path), SecateurError)


def widths_left(graph: ChannelGraph, selection: Selection) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every layer once these channels are removed."""
    gone = torch.zeros(len(graph.canonical) + 1, dtype=torch.bool)  # the last: fixed zeros
    gone[graph.ids_of(selection)] = True
    found = {}
    for name, layer in graph.layers.items():
        left = [
            max(1, int((~gone[torch.where(ids >= 0, graph.canonical[ids], -1)]).sum()))
            for ids in (layer.outputs, layer.inputs)
        ]
        found[name] = (left[0], left[1])
    return found
