"""Group convolutions: prune the kernels outside the best groups of outputs and inputs.

Source: R. Zhao, W. Luk, Efficient structured pruning and architecture searching for group
convolution, ICCV workshops 2019. Outputs and inputs of a convolution are divided into G matching
groups, and only the kernels within these groups are kept; the division is searched for such that
the kept kernels have as much importance as possible (gconv/permutation.py). The number of groups of
a layer is set, read from a file, or searched for within a budget (gconv/search.py). With
prune.group_convolutions the masks become group convolutions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.errors import ArgumentError, SettingsError
from secateur.base.sections import Strict
from secateur.gconv import config, permutation, search
from secateur.gconv.search import Assignment, Budget, Candidate, SearchSpace, Strategy
from secateur.nn import cost
from secateur.pruning.criteria import gradients
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity.masks import prunable

FOLDER = Path("recipes/groups")
Count = Annotated[int, Field(ge=1)]


class SearchSettings(Strict):
    """The budget of the whole network, and the numbers of groups that a layer may have."""

    max_params: Count | None = None
    max_macs: Count | None = None
    """Multiply-accumulates of one image."""
    strategy: Strategy = "knapsack"
    """knapsack: the optimum | max_cost: the paper's local search."""
    min_channels_per_group: Count = 1
    """Fewest outputs, and fewest inputs, of a group."""
    max_groups: Count = 64
    depthwise: bool = False
    """Whether a layer may have as many groups as inputs and outputs."""

    def __str__(self) -> str:
        """The budget and the strategy."""
        if self.max_params is None and self.max_macs is None:
            return "off"
        limits = {"max_params": self.max_params, "max_macs": self.max_macs}
        given = [f"{key} {value:,}" for key, value in limits.items() if value is not None]
        return f"{' and '.join(given)} by {self.strategy}"


class Settings(permutation.PermutationSettings):
    """How many groups (set by one of groups, channels_per_group, config and search), and how they
    are found."""

    groups: Annotated[int, Field(ge=2)] | None = 4
    """The same number for all layers whose channels it divides; other layers stay dense."""
    channels_per_group: Count | None = None
    """Channels of a group on the wider side of a layer."""
    config: str | None = None
    """A file in recipes/groups/, in the format of gconv/config.py."""
    search: SearchSettings = SearchSettings()
    """In use if it has a budget."""
    criterion: permutation.Importance = "magnitude"
    """Importance of a kernel. magnitude: its norm | taylor: |gradient * weight|, summed."""
    skip: tuple[str, ...] = ()
    """Convolutions that are not pruned, by name."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = {
            "groups": self.groups,
            "channels_per_group": self.channels_per_group,
            "config": self.config,
            "search.max_params": self.search.max_params,
            "search.max_macs": self.search.max_macs,
        }
        given = [key for key, value in ways.items() if value is not None]
        if len({key.split(".")[0] for key in given}) != 1:
            raise ValueError(
                f"groups: the number is given by {', '.join(given) or 'nothing'}; set one of "
                "groups, channels_per_group, config and search (max_params, max_macs), the others "
                "null"
            )
        return self


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """Masks of all convolutions that get groups; kernels are masked as a whole.

    Raises ArgumentError if no layer can have groups, if the dense network already meets the budget,
    if a budget cannot be met (with the excess), for a file that cannot be read or that belongs to
    another network, and for the name of a layer that does not exist.
    """
    convolutions = config.convolutions(context.model)
    layers = _prunable(settings, context.model, convolutions)
    importance = _importance(settings, context, layers)
    report = _Report()
    if settings.search.max_params is not None or settings.search.max_macs is not None:
        wanted = _searched(settings, context, layers, importance, report)
    else:
        wanted = _given(settings, context.model, layers)
    groups = {n: g for n, g in wanted.items() if g > 1 and g > layers[n].groups}
    if not groups and "search_share" in report.notes:
        raise ArgumentError("search", f"the network already meets the budget: {report.lines[0]}")
    if not groups:
        raise _refused(settings)
    masks, shares = {}, {}
    for name, number in groups.items():
        layer, scores = layers[name], importance[name]
        found = permutation.find_grouping_within(scores, layer.groups, number, settings)
        mask = permutation.extract_groups(found.mask(), layer.groups)
        masks[f"{name}.weight"] = mask[:, :, None, None].expand(layer.weight.shape).contiguous()
        total = float(scores.sum())
        shares[name] = _share(permutation.expand_groups(scores, layer.groups), found, total)
    dense = [n for n in layers if n not in groups and layers[n].groups == 1]
    report.add_shares(settings, shares, dense)
    everything = {n: groups.get(n, conv.groups) for n, conv in convolutions.items()}
    files = {
        "groups.json": config.to_json(context.model, everything),
        "groups.csv": _csv(layers, groups, shares),
    }
    return PruningDecision(masks, notes=report.notes, lines=tuple(report.lines), files=files)


@dataclass
class _Report:
    """Notes and lines of a decision, collected one after another."""

    notes: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add_search(self, strategy: str, found: Assignment, even: Assignment | None) -> None:
        """The assignment found, beside the one with the same number of groups everywhere."""
        for name, assignment in {"search": found, "uniform": even}.items():
            if assignment is not None:
                self.notes |= {
                    f"{name}_share": assignment.share,
                    f"{name}_params": float(assignment.params),
                    f"{name}_macs": float(assignment.macs),
                }
        self.lines.append(f"{strategy}: {_described(found)}")
        if even is None:
            self.lines.append("no number of groups, the same in all layers, meets the budget")
        else:
            groups = max(even.groups.values())
            self.notes["uniform_groups"] = float(groups)
            self.lines.append(f"the same number of groups everywhere, {groups}: {_described(even)}")

    def add_shares(self, settings: Settings, shares: Mapping[str, float], dense: list[str]) -> None:
        """Shares of the importance that layers with groups keep, and layers that stay dense."""
        mean, least = sum(shares.values()) / len(shares), min(shares.values())
        self.notes |= {
            "grouped_layers": float(len(shares)),
            "dense_layers": float(len(dense)),
            "kept_share": mean,
            "kept_share_least": least,
        }
        self.lines.append(
            f"{len(shares)} convolutions in groups keep {mean:.1%} of their {settings.criterion} "
            f"on average, at least {least:.1%}"
        )
        if dense:
            self.lines.append(f"left dense: {', '.join(dense)}")


def _prunable(
    settings: Settings, model: nn.Module, convolutions: Mapping[str, nn.Conv2d]
) -> dict[str, nn.Conv2d]:
    """The convolutions that are not skipped and that have a weight; of those with one weight, the
    first."""
    for name in settings.skip:
        if name not in convolutions:
            raise ArgumentError("skip", "there is no such convolution", name)
    own = prunable(model, "weights")
    layers = {
        name: conv
        for name, conv in convolutions.items()
        if name not in settings.skip and f"{name}.weight".lstrip(".") in own
    }
    if not layers:
        raise ArgumentError("skip", "the network has no convolution, or all are skipped")
    return layers


def _given(settings: Settings, model: nn.Module, layers: Mapping[str, nn.Conv2d]) -> dict[str, int]:
    """Groups of every layer by settings or file; 1 where they do not divide the channels."""
    if settings.config is not None:
        name = settings.config.removeprefix(f"{FOLDER}/")
        if Path(name).name != name:
            raise ArgumentError(
                "config", f"must be a file in the folder {FOLDER}/", settings.config
            )
        try:
            found = config.read(FOLDER / name, model)
        except SettingsError as error:
            raise ArgumentError("config", str(error), settings.config) from None
        return {n: g for n, g in found.items() if n in layers}
    wanted = {}
    for name, layer in layers.items():
        channels = layer.out_channels, layer.in_channels
        groups = settings.groups or 1
        if settings.channels_per_group is not None:
            groups, rest = divmod(max(channels), settings.channels_per_group)
            groups = groups if groups and not rest else 1
        fits = permutation.divides(*channels, groups) and groups % layer.groups == 0
        wanted[name] = groups if fits else 1
    return wanted


def _searched(
    settings: Settings,
    context: PruningContext,
    layers: Mapping[str, nn.Conv2d],
    importance: Mapping[str, Tensor],
    report: _Report,
) -> dict[str, int]:
    """Groups of every layer within the budget."""
    space = _search_space(settings, context, layers, importance)
    budget = Budget(settings.search.max_params, settings.search.max_macs)
    found = search.search(space, budget, settings.search.strategy)
    report.add_search(settings.search.strategy, found, search.uniform(space, budget))
    return found.groups


def _search_space(
    settings: Settings,
    context: PruningContext,
    layers: Mapping[str, nn.Conv2d],
    importance: Mapping[str, Tensor],
) -> SearchSpace:
    """All numbers of groups that the layers may have, with the share kept and the cost of each."""
    limits, rows = settings.search, {}
    dense = {row.layer: row for row in cost.layer_costs(context.model, context.images[:1])}
    for name, layer in layers.items():
        parts, size = layer.groups, layer.weight.numel()
        scores, total = importance[name], float(importance[name].sum())
        numbers = search.candidates(
            layer.out_channels,
            layer.in_channels,
            limits.min_channels_per_group,
            limits.max_groups,
            limits.depthwise,
        )
        expanded = permutation.expand_groups(scores, parts)
        rows[name] = [
            Candidate(
                groups,
                _share(
                    expanded,
                    permutation.find_grouping_within(scores, parts, groups, settings),
                    total,
                ),
                size * parts // groups,
                dense[name].macs_dense * parts // groups,
            )
            for groups in [g for g in numbers if g % parts == 0] or [parts]
        ]
    weights = sum(layer.weight.numel() for layer in layers.values())
    macs = sum(row.macs_dense for name, row in dense.items() if name not in layers)
    return SearchSpace(rows, cost.parameters(context.model) - weights, macs)


def _share(importance: Tensor, found: permutation.Grouping, total: float) -> float:
    """Share of the importance within the groups."""
    return found.kept(importance) / total if total else 1.0


def _importance(
    settings: Settings, context: PruningContext, layers: Mapping[str, nn.Conv2d]
) -> dict[str, Tensor]:
    """Importance of every kernel by layer: (outputs, inputs of each group)."""
    if settings.criterion == "magnitude":
        return {n: permutation.kernel_magnitudes(layer.weight) for n, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    pairs = zip(weights, gradients(context, weights), strict=True)
    return {n: permutation.kernel_taylor(w, g) for n, (w, g) in zip(layers, pairs, strict=True)}


def _csv(
    layers: Mapping[str, nn.Conv2d], groups: Mapping[str, int], shares: Mapping[str, float]
) -> str:
    """One line for each layer: channels, groups, and the share of the importance that is kept."""
    rows = ["layer,outputs,inputs,groups,kept_share"]
    for name, layer in layers.items():
        sizes = f"{layer.out_channels},{layer.in_channels},{groups.get(name, layer.groups)}"
        rows.append(f"{name},{sizes},{shares.get(name, 1.0):.6f}")
    return "\n".join(rows) + "\n"


def _described(found: Assignment) -> str:
    return f"{found.params:,} parameters, {found.macs:,} MACs, {found.share:.2%} kept on average"


def _refused(settings: Settings) -> ArgumentError:
    """Error for a number of groups that no layer can have; names the argument that asked for it."""
    ways = ("groups", "channels_per_group", "config")
    way, number = next((way, v) for way in ways if (v := getattr(settings, way)) is not None)
    return ArgumentError(way, "no convolution can have these groups", number)
