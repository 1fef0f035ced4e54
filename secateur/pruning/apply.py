"""Apply a pruning decision: mask, remove, and prove that the compact network is the masked one."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.channels.graph import build_channel_graph
from secateur.nn.copies import copied
from secateur.nn.modes import in_eval_mode
from secateur.pruning import branches, proof, removal
from secateur.pruning.branches import Branch
from secateur.pruning.decision import PruningDecision
from secateur.sparsity import masks
from secateur.sparsity.masks import Masks


@dataclass(frozen=True)
class PrunedNetwork:
    """A pruned network, and how far its outputs are from those of the masked network."""

    model: nn.Module
    """The compact network, in eval mode."""
    masks: Masks
    """Parameter name -> True where the entry is kept; in the shapes after the removal."""
    differences: Mapping[str, float] = field(default_factory=dict)
    """`difference_float64` and `difference_float32`: largest difference of the outputs over the
    largest output. Empty if nothing was removed: `model` is then the masked network."""

    @property
    def max_difference(self) -> float:
        """The largest of the differences; 0 if nothing was removed."""
        return max(self.differences.values(), default=0.0)


def apply_decision(
    model: nn.Module,
    decision: PruningDecision,
    images: Tensor,
    *,
    remove_dead: bool = True,
    group_convolutions: bool = False,
    requested: str = "this decision",
    held: Mapping[str, Tensor] | None = None,
) -> PrunedNetwork:
    """The network after the decision, in eval mode; `model` itself is not changed.

    Weights get the values of the decision and are masked by its masks, which include those of
    earlier prunings, `held`; its channels and residual branches are removed.
    With `remove_dead`, channels that are dead afterwards are removed too; with
    `group_convolutions`, masks that consist of groups of channels are converted (see
    gconv/conversion.py). If anything may be removed or converted, the compact network is compared
    with the masked one on `images`, (N, C, H, W), in float64 and in float32.

    Raises PruningError if a layer would be left empty (`requested` describes in the message what
    the user asked for), if the network cannot be traced, or if the two networks differ;
    ArgumentError (`group_convolutions`) if there is nothing to convert.
    """
    masks.refuse_empty(model, decision.masks, requested, held or {})
    images = images.to(next(model.parameters()).device)
    masked = in_eval_mode(copied(model))
    with torch.no_grad():
        for name, values in decision.weights.items():
            masked.get_parameter(name).copy_(values)
    masks.apply(masked, decision.masks)
    if not (remove_dead or decision.channels or decision.branches or group_convolutions):
        return PrunedNetwork(masked, decision.masks)
    removed = _branches(masked, decision.branches, images)
    double = images.double()
    exact = removal.to_precision(copy.deepcopy(masked), torch.float64)
    with proof.InDouble():
        compact = removal.compact(
            exact,
            decision.channels,
            decision.masks,
            double[:1],
            remove_dead,
            group_convolutions,
            removed,
        )
    masked = removal.mask(masked, decision.channels, images)
    branches.silence(masked, removed)
    exact = removal.to_precision(copy.deepcopy(masked), torch.float64)
    with proof.InDouble():
        in_double = proof.verify(exact, compact, double, proof.FLOAT64_TOLERANCE)
    own = {name for name, buffer in masked.named_buffers() if buffer.dtype == torch.float64}
    compact = compact.to(torch.float32, leave=own)
    in_single = proof.verify(masked, compact, images, proof.FLOAT32_TOLERANCE)
    differences = {"difference_float64": in_double, "difference_float32": in_single}
    return PrunedNetwork(compact.model, compact.masks, differences)


def without_branches(
    model: nn.Module, names: Sequence[str], masks: Masks, images: Tensor
) -> PrunedNetwork:
    """The network without these residual branches, as by `apply_decision`; `masks` are its masks.

    Branches that have been removed before are passed over. Raises ArgumentError (`branches`) for a
    name that the network lacks.
    """
    if not names:
        return PrunedNetwork(model, masks)
    decision = PruningDecision(masks, branches=names)
    return apply_decision(model, decision, images, remove_dead=False, held=masks)


def _branches(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Branch]:
    """The residual branches with these names."""
    if not names:
        return []
    graph = build_channel_graph(model, images[:1])
    return branches.find_named(graph, images[:1], names, "branches")
