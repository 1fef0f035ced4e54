"""How much accuracy a network loses when one layer loses some of its outputs.

Everything before the layer computes what it computed before. So each batch goes once through the
whole network, all intermediate results are kept, and for every trial only what depends on the
changed tensors is computed again.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from secateur.base.errors import PruningError
from secateur.channels.graph import Selection
from secateur.nn.layers import ChannelSelect
from secateur.pruning import criteria
from secateur.pruning.decision import PruningContext, decision_from_choices, unprunable_layers
from secateur.pruning.removal import silence
from secateur.sparsity import choices

MEMORY = 2**28
"""Bytes of intermediate results that are kept at once."""


@dataclass(frozen=True)
class Trial:
    """Some outputs of one layer that are silent."""

    layer: str
    criterion: str
    ratio: float
    channels: Selection


def layers(subject: PruningContext) -> list[str]:
    """Layers whose outputs may go for themselves, in order; PruningError if there are none."""
    refused = unprunable_layers(subject.graph, "filter")
    found = [name for name in subject.graph.layers if name not in refused]
    if not found:
        raise PruningError("no layer of this network may lose outputs for itself")
    return found


def trials(
    subject: PruningContext,
    names: Sequence[str],
    how: Sequence[str],
    ratios: Sequence[float],
    seed: int,
) -> list[Trial]:
    """Every layer with every criterion (or `random`) and ratio."""
    found = []
    for criterion in how:
        scores = _scores(subject, names, criterion, seed)
        for name in names:
            weight = f"{name}.weight"
            rank = choices.ranks({weight: scores[weight]})[weight]
            for ratio in ratios:
                gone = rank < choices.number_pruned(ratio, rank.numel())
                if bool(gone.any()):
                    channels = decision_from_choices(subject, {weight: gone}).channels
                    found.append(Trial(name, criterion, ratio, channels))
    return found


def _scores(
    subject: PruningContext, names: Sequence[str], criterion: str, seed: int
) -> dict[str, Tensor]:
    if criterion != "random":
        known: criteria.Criterion = criterion  # type: ignore[assignment]
        return criteria.scores(subject, names, "filter", known, "sensitivity.criteria")
    sizes = criteria.scores(subject, names, "filter", "l1", "sensitivity.criteria")
    return choices.picking_by_layer(sizes, "random", seed)


def with_ratios(found: Sequence[Trial], ratios: Mapping[str, float], criterion: str) -> Trial:
    """One trial of several layers at once; `found` has each of them at its ratio."""
    channels: dict[str, Tensor] = {}
    for trial in found:
        if trial.criterion == criterion and ratios.get(trial.layer) == trial.ratio:
            for name, index in trial.channels.items():
                channels[name] = torch.cat([channels.get(name, index[:0]), index]).unique()
    return Trial("all suggested", criterion, max(ratios.values(), default=0.0), channels)


class Bench:
    """A network at which trials are made; it is as it was after each of them."""

    def __init__(self, subject: PruningContext) -> None:
        """Takes the subject's model over: its operations no longer work in place."""
        self.model, self.graph = subject.model.eval(), subject.graph
        fx_graph = self.graph.fx_graph
        _pure(self.model, fx_graph)
        self.fx_graph = fx.GraphModule(self.model, fx_graph).eval()
        self.run = fx.Interpreter(self.fx_graph, garbage_collect_values=False)
        self.tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @torch.inference_mode()
    def images_at_once(self, example: Tensor) -> int:
        """As many as leave intermediate results within `MEMORY`; `example` is one image."""
        self.run.run(example)
        results = [t for t in self.run.env.values() if isinstance(t, Tensor)]
        return max(1, min(500, MEMORY // sum(t.numel() * t.element_size() for t in results)))

    @torch.inference_mode()
    def right(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        made: Sequence[Trial],
        tick: Callable[[], None],
    ) -> list[int]:
        """Images that are classified right: by the network as it is, then in each trial.

        `tick` is called after every trial on every batch.
        """
        counts = torch.zeros(1 + len(made), dtype=torch.int64)
        later = [self._later(trial.channels) for trial in made]
        for images, labels in batches:
            logits = self.run.run(images)
            whole = dict(self.run.env)
            counts[0] += int((logits.argmax(1) == labels).sum())
            for number, (trial, nodes) in enumerate(zip(made, later, strict=True), start=1):
                with _Silent(self, trial.channels):
                    self.run.env = dict(whole)
                    for node in nodes:
                        self.run.env[node] = logits = self.run.run_node(node)
                counts[number] += int((logits.argmax(1) == labels).sum())
                tick()
        return counts.tolist()

    def changed(self, channels: Selection) -> set[str]:
        """Tensors that have members of these channels."""
        return {member.tensor for name in channels for member in self.graph.group(name).members}

    def _later(self, channels: Selection) -> list[fx.Node]:
        """What these channels change, in order; the last gives the logits."""
        changed = self.changed(channels)
        owners = {name.rpartition(".")[0] for name in changed}
        found: dict[fx.Node, None] = {}
        for node in self.fx_graph.graph.nodes:
            own = node.op == "call_module" and str(node.target) in owners
            own = own or (node.op == "get_attr" and str(node.target) in changed)
            if node.op != "output" and (own or any(n in found for n in node.all_input_nodes)):
                found[node] = None
        return list(found)


class _Silent:
    """Zeros in the members of some channels for a while."""

    def __init__(self, bench: Bench, channels: Selection) -> None:
        self.bench, self.channels = bench, channels

    def __enter__(self) -> None:
        selects = self.bench.graph.selects.items()
        names = self.bench.changed(self.channels) | {
            n for n, select in selects if select.owns_channels
        }
        self.before = {name: self.bench.tensors[name].detach().clone() for name in names}
        silence(self.bench.model, self.channels, self.bench.graph)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                owner = self.bench.model.get_submodule(name.rpartition(".")[0])
                if isinstance(owner, ChannelSelect):
                    owner.set_index(tensor)
                else:
                    self.bench.tensors[name].detach().copy_(tensor)


def _pure(model: nn.Module, fx_graph: fx.Graph) -> None:
    """Let no operation write into what it reads."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    for node in fx_graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_method" and str(node.target).endswith("_"):
            node.target = str(node.target).rstrip("_")
        plain = {"iadd": operator.add, "imul": operator.mul, "isub": operator.sub}
        if node.op == "call_function":
            node.target = plain.get(getattr(node.target, "__name__", ""), node.target)


def allowed(rows: Iterable[tuple[float, float]], least: float) -> float:
    """The largest ratio up to which accuracy never falls below `least`; 0 if the first does.

    `rows` are ratio and accuracy.
    """
    best = 0.0
    for ratio, accuracy in sorted(rows):
        if accuracy < least:
            return best
        best = ratio
    return best
