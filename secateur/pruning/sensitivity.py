"""Sensitivity of accuracy to each layer: ablations of some of its outputs.

An ablation sets the members of some channels to zero. It changes nothing before their layer.
Therefore each batch passes through the whole network once, all intermediate results are kept, and
for each ablation only the nodes that depend on changed tensors are run again.
"""

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from secateur.base.errors import PruningError
from secateur.channels.graph import Selection
from secateur.nn.layers import ChannelSelect
from secateur.nn.modes import in_eval_mode
from secateur.nn.norms import unmask_layer_norm
from secateur.pruning import criteria, group_scores
from secateur.pruning.decision import PruningContext, decision_from_choices, unprunable_layers
from secateur.pruning.removal import silence
from secateur.sparsity import choices, masks
from secateur.sparsity.masks import Masks

MAX_BYTES = 2**28
"""Memory for the intermediate results of a batch."""
MAX_BATCH = 500
JOIN = " + "
"""Joins the names of channel groups that can only be pruned together, to stay balanced."""


@dataclass(frozen=True)
class Ablation:
    """The outputs that are set to zero: the least important ones of one layer, or of several."""

    layer: str
    """Name of the layer, or of the channel groups, joined by JOIN."""
    criterion: str
    ratio: float
    channels: Selection
    masks: Masks = field(default_factory=dict)
    """Masks of outputs that cannot be removed whole, because parts must stay balanced."""


def independent_layers(context: PruningContext) -> list[str]:
    """Layers whose outputs can be pruned on their own, in order.

    Raises PruningError if there are none.
    """
    refused = unprunable_layers(context.graph, "filter")
    found = [name for name in context.graph.layers if name not in refused]
    if not found:
        raise PruningError("no layer of this network has outputs that can be pruned on their own")
    return found


def ablations(
    context: PruningContext,
    layers: Sequence[str],
    measures: Sequence[str],
    ratios: Sequence[float],
    seed: int,
) -> list[Ablation]:
    """One ablation for every layer, criterion (or `random`) and ratio.

    Layers for which a criterion is not defined are left out.
    """
    found = []
    for criterion in measures:
        without = layers_without(context, layers, criterion)
        measured = [name for name in layers if name not in without]
        scores = _scores(context, measured, criterion, seed)
        for name in measured:
            weight = f"{name}.weight"
            rank = choices.ranks({weight: scores[weight]})[weight]
            for ratio in ratios:
                choice = rank < choices.number_pruned(ratio, rank.numel())
                if bool(choice.any()):
                    decided = decision_from_choices(context, {weight: choice}, "filter")
                    own = Ablation(name, criterion, ratio, decided.channels, decided.masks)
                    found.append(own)
    return found


def layers_without(context: PruningContext, layers: Sequence[str], criterion: str) -> list[str]:
    """Names in `layers` for which the criterion is not defined."""
    if criterion != "bn_scale":
        return []
    return criteria.layers_without_scales(context, layers, "filter")


def group_ablations(
    context: PruningContext,
    measures: Sequence[str],
    ratios: Sequence[float],
    seed: int,
    only: Container[str] | None = None,
) -> list[Ablation]:
    """One ablation for every group of coupled channels, criterion (or `random`) and ratio.

    Groups for which a criterion is not defined are left out, and those that `only` does not name.
    Raises PruningError if no group has channels that can be pruned.
    """
    graph, found = context.graph, []
    for criterion in measures:
        scored = {"random": "l1", "lamp": "l2"}.get(criterion, criterion)
        groups, _ = group_scores.score_groups(context, scored)  # type: ignore[arg-type]
        scores = {JOIN.join(g.groups): g.scores for g in groups if len(g.units) > 1}
        scores = {name: own for name, own in scores.items() if only is None or name in only}
        if criterion == "random":
            scores = choices.pick_scores_by_layer(scores, "random", seed)
        for group in groups:
            name = JOIN.join(group.groups)
            if name not in scores:
                continue
            own = replace(group, scores=scores[name])
            for ratio in ratios:
                chosen = group_scores.GroupRanking((own,), (ratio,), "layer").selection(graph)
                channels = graph.removable(chosen)
                if channels:
                    found.append(Ablation(name, criterion, ratio, channels))
    if not found:
        raise PruningError("no group of this network has channels that can be pruned")
    return found


def _scores(
    context: PruningContext, layers: Sequence[str], criterion: str, seed: int
) -> dict[str, Tensor]:
    if criterion != "random":
        known: criteria.Criterion = criterion  # type: ignore[assignment]
        return criteria.scores(context, layers, "filter", known)
    sizes = criteria.scores(context, layers, "filter", "l1")
    return choices.pick_scores_by_layer(sizes, "random", seed)


def combined(found: Sequence[Ablation], ratios: Mapping[str, float], criterion: str) -> Ablation:
    """One ablation of several layers at once; `found` has an ablation of each at its ratio."""
    channels: dict[str, Tensor] = {}
    masked: Masks = {}
    for ablation in found:
        if ablation.criterion == criterion and ratios.get(ablation.layer) == ablation.ratio:
            for name, index in ablation.channels.items():
                channels[name] = torch.cat([channels.get(name, index[:0]), index]).unique()
            masked = masks.joined(ablation.masks, masked)
    return Ablation("all suggested", criterion, max(ratios.values(), default=0.0), channels, masked)


class AblationRunner:
    """Runs ablations on a network, and restores its weights after each."""

    def __init__(self, context: PruningContext) -> None:
        """Takes over the context's model: its in-place operations are replaced."""
        self.model, self.graph = in_eval_mode(context.model), context.graph
        fx_graph = self.graph.fx_graph
        _make_out_of_place(self.model, fx_graph)
        self.fx_graph = in_eval_mode(fx.GraphModule(self.model, fx_graph))
        self.interpreter = fx.Interpreter(self.fx_graph, garbage_collect_values=False)
        self.tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @torch.inference_mode()
    def batch_size(self, example: Tensor) -> int:
        """Largest number of images whose intermediate results fit into `MAX_BYTES`; `example` is
        one image."""
        self.interpreter.run(example)
        results = [t for t in self.interpreter.env.values() if isinstance(t, Tensor)]
        bytes_ = sum(t.numel() * t.element_size() for t in results)
        return max(1, min(MAX_BATCH, MAX_BYTES // bytes_))

    @torch.inference_mode()
    def count_correct(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        found: Sequence[Ablation],
        tick: Callable[[], None],
    ) -> list[int]:
        """Number of correctly classified images: without an ablation, then with each of them.

        `tick` is called after every ablation on every batch.
        """
        counts = torch.zeros(1 + len(found), dtype=torch.int64)
        dependent = [self.dependent_nodes(ablation) for ablation in found]
        run = self.interpreter
        for images, labels in batches:
            logits = run.run(images)
            whole = dict(run.env)
            counts[0] += int((logits.argmax(1) == labels).sum())
            for number, (ablation, nodes) in enumerate(zip(found, dependent, strict=True), start=1):
                with _Ablated(self, ablation):
                    run.env = dict(whole)
                    for node in nodes:
                        run.env[node] = logits = run.run_node(node)
                counts[number] += int((logits.argmax(1) == labels).sum())
                tick()
        return counts.tolist()

    def changed_tensors(self, ablation: Ablation) -> set[str]:
        """Names of the tensors that an ablation changes: members of its channels, or masked."""
        groups = [self.graph.group(name) for name in ablation.channels]
        return {member.tensor for group in groups for member in group.members} | {*ablation.masks}

    def dependent_nodes(self, ablation: Ablation) -> list[fx.Node]:
        """Nodes that depend on an ablation, in order; the last returns the logits."""
        changed = self.changed_tensors(ablation)
        owners = {name.rpartition(".")[0] for name in changed}
        found: dict[fx.Node, None] = {}
        for node in self.fx_graph.graph.nodes:
            own = node.op == "call_module" and str(node.target) in owners
            own = own or (node.op == "get_attr" and str(node.target) in changed)
            if node.op == "output" or own or any(n in found for n in node.all_input_nodes):
                found[node] = None
        return list(found)


class _Ablated:
    """Context manager in which the members of an ablation's channels are zero, and masks apply."""

    def __init__(self, runner: AblationRunner, ablation: Ablation) -> None:
        self.runner, self.ablation = runner, ablation

    def __enter__(self) -> None:
        selects = self.runner.graph.selects.items()
        names = self.runner.changed_tensors(self.ablation)
        names |= {name for name, select in selects if select.owns_channels}
        self.before = {name: self.runner.tensors[name].detach().clone() for name in names}
        silence(self.runner.model, self.ablation.channels, self.runner.graph)
        masks.apply(self.runner.model, self.ablation.masks)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                owner = self.runner.model.get_submodule(name.rpartition(".")[0])
                if isinstance(owner, ChannelSelect):
                    owner.set_index(tensor)
                else:
                    if isinstance(owner, nn.LayerNorm):
                        unmask_layer_norm(owner)
                    self.runner.tensors[name].detach().copy_(tensor)


def _make_out_of_place(model: nn.Module, fx_graph: fx.Graph) -> None:
    """Replace in-place operations, so that earlier results stay valid."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    out_of_place = {
        **{"iadd": operator.add, "isub": operator.sub},
        **{"imul": operator.mul, "itruediv": operator.truediv},
    }
    for node in fx_graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_method" and str(node.target).endswith("_"):
            node.target = str(node.target).rstrip("_")
        if node.op == "call_function":
            node.target = out_of_place.get(getattr(node.target, "__name__", ""), node.target)


def largest_ratio(rows: Iterable[tuple[float, float]], least: float) -> float:
    """The largest ratio up to which no accuracy is below `least`; 0 if the first one already is.

    `rows` are pairs of ratio and accuracy.
    """
    best = 0.0
    for ratio, accuracy in sorted(rows):
        if accuracy < least:
            return best
        best = ratio
    return best
