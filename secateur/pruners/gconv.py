"""Group convolutions: what lies outside the best groups of outputs and inputs goes.

Source: R. Zhao, W. Luk, Efficient structured pruning and architecture searching for group
convolution, ICCV workshops 2019. Each convolution keeps the pairs of G groups of its outputs and
inputs that keep the most (gconv/permutation.py). How
many groups a layer gets is set, read from a file, or searched for within a budget
(gconv/search.py). With prune.export = gconv the masks become group convolutions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.base.errors import ArgumentError, PruningError
from secateur.base.settings import Strict
from secateur.gconv import config as groupconfig
from secateur.gconv import permutation as permute
from secateur.gconv.search import Budget, Candidate, State, Strategy, Table, uniform
from secateur.gconv.search import candidates as numbers
from secateur.gconv.search import search as find
from secateur.nn import cost
from secateur.pruning.criteria import gradients
from secateur.pruning.decision import PruningContext, PruningDecision

FOLDER = Path("recipes/groups")
Count = Annotated[int, Field(ge=1)]


class Within(Strict):
    """The budget of the whole network, and which numbers of groups a layer may have."""

    max_params: Count | None = None
    max_macs: Count | None = None
    """Multiply-accumulates of one image."""
    strategy: Strategy = "knapsack"
    """knapsack: the best choice there is | max_cost: the paper's local search."""
    min_channels_per_group: Count = 1
    """On either side of a layer."""
    max_groups: Count = 64
    depthwise: bool = False
    """Whether a layer may have as many groups as inputs and outputs."""

    def __str__(self) -> str:
        """The budget, and how it is used."""
        if self.max_params is None and self.max_macs is None:
            return "off"
        limits = {"max_params": self.max_params, "max_macs": self.max_macs}
        given = [f"{key} {value:,}" for key, value in limits.items() if value is not None]
        return f"{' and '.join(given)} by {self.strategy}"


class Settings(permute.Search):
    """How many groups: one of groups, channels_per_group, config and search; and which."""

    groups: Annotated[int, Field(ge=2)] | None = 4
    """The same number for every layer whose channels divide; the others stay dense."""
    channels_per_group: Count | None = None
    """Channels of a group on the wider side of a layer."""
    config: str | None = None
    """A file in recipes/groups/, in the form of gconv/config.py."""
    search: Within = Within()
    """In use if it has a budget."""
    criterion: permute.Criterion = "magnitude"
    """magnitude: norm of each kernel | taylor: gradient times weight, over the batch at hand."""
    skip: tuple[str, ...] = ()
    """Convolutions left alone, by name."""

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
                f"groups: how many is said by {', '.join(given) or 'nothing'}; set one of groups, "
                "channels_per_group, config and search (max_params, max_macs), the others null"
            )
        return self


def prune(settings: Settings, context: PruningContext) -> PruningDecision:
    """Masks of all convolutions that get groups; they stay whole kernels.

    Raises PruningError or SettingsError if no layer can have groups, if a layer is named that is
    not there, or if a budget cannot be met (by how much).
    """
    known = groupconfig.convolutions(context.model)
    for name in settings.skip:
        if name not in known:
            raise ArgumentError("skip", "there is no such convolution", name)
    layers = {n: m for n, m in known.items() if n not in settings.skip}
    if not layers:
        raise PruningError("pruner gconv: the network has no convolution, or all are skipped")
    criteria = _criteria(settings, context, layers)
    notes: dict[str, float] = {}
    lines: list[str] = []
    if settings.search.max_params is not None or settings.search.max_macs is not None:
        wanted = _searched(settings, context, layers, criteria, notes, lines)
    else:
        wanted = _wanted(settings, context.model, layers)
    fitting = {n: g for n, g in wanted.items() if g > 1 and g > layers[n].groups}
    dense = [n for n in layers if n not in fitting and layers[n].groups == 1]
    if not fitting and "search_share" in notes:
        raise PruningError(f"the network meets the budget as it is: {lines[0]}")
    if not fitting:
        raise PruningError(f"no convolution can have groups as asked: {_asked(settings)}")
    masks, shares = {}, {}
    for name, groups in fitting.items():
        layer, criterion = layers[name], criteria[name]
        found = permute.group_parts(criterion, layer.groups, groups, settings)
        whole = permute.extract_groups(found.mask(), layer.groups)
        masks[f"{name}.weight"] = whole[:, :, None, None].expand(layer.weight.shape).contiguous()
        total = float(criterion.sum())
        shares[name] = _share(permute.expand_groups(criterion, layer.groups), found, total)
    notes |= {
        "grouped_layers": float(len(fitting)),
        "dense_layers": float(len(dense)),
        "kept_share": sum(shares.values()) / len(shares),
        "kept_share_least": min(shares.values()),
    }
    lines.append(
        f"{len(fitting)} convolutions in groups keep {notes['kept_share']:.1%} of their "
        f"{settings.criterion} on average, at least {notes['kept_share_least']:.1%}"
    )
    if dense:
        lines.append(f"left dense: {', '.join(dense)}")
    everything = {n: fitting.get(n, m.groups) for n, m in known.items()}
    files = {
        "groups.json": groupconfig.text(context.model, everything),
        "groups.csv": _rows(layers, fitting, shares),
    }
    return PruningDecision(masks, notes=notes, lines=tuple(lines), files=files)


def _wanted(
    settings: Settings, model: nn.Module, layers: Mapping[str, nn.Conv2d]
) -> dict[str, int]:
    """Groups of every layer as set or as the file says; 1 where the channels do not divide."""
    if settings.config is not None:
        name = settings.config.removeprefix(f"{FOLDER}/")
        if Path(name).name != name:
            raise ArgumentError(
                "config",
                f"must be a file in the folder {FOLDER}/, which the stage depends on",
                settings.config,
            )
        return {n: g for n, g in groupconfig.read(FOLDER / name, model).items() if n in layers}
    wanted = {}
    for name, layer in layers.items():
        channels = layer.out_channels, layer.in_channels
        groups = settings.groups or 1
        if settings.channels_per_group is not None:
            groups, rest = divmod(max(channels), settings.channels_per_group)
            groups = groups if groups and not rest else 1
        fits = permute.divides(*channels, groups) and groups % layer.groups == 0
        wanted[name] = groups if fits else 1
    return wanted


def _searched(
    settings: Settings,
    context: PruningContext,
    layers: Mapping[str, nn.Conv2d],
    criteria: Mapping[str, Tensor],
    notes: dict[str, float],
    lines: list[str],
) -> dict[str, int]:
    """Groups of every layer within the budget; what was found, and the uniform choice beside it."""
    within = settings.search
    table = _table(settings, context, layers, criteria)
    budget = Budget(within.max_params, within.max_macs)
    found = find(table, budget, within.strategy)
    even = uniform(table, budget)
    for name, state in {"search": found, "uniform": even}.items():
        if state is not None:
            notes |= {
                f"{name}_share": state.share,
                f"{name}_params": float(state.params),
                f"{name}_macs": float(state.macs),
            }
    lines.append(f"{within.strategy}: {_says(found)}")
    if even is None:
        lines.append("no number of groups, the same in all layers, meets the budget")
    else:
        groups = max(even.groups.values())
        notes["uniform_groups"] = float(groups)
        lines.append(f"the same number of groups everywhere, {groups}: {_says(even)}")
    return found.groups


def _table(
    settings: Settings,
    context: PruningContext,
    layers: Mapping[str, nn.Conv2d],
    criteria: Mapping[str, Tensor],
) -> Table:
    """All numbers of groups that the layers may have, with what each keeps and costs."""
    within, rows = settings.search, {}
    dense = {row.layer: row for row in cost.layer_costs(context.model, context.images[:1])}
    for name, layer in layers.items():
        parts, size = layer.groups, layer.weight.numel()
        criterion, total = criteria[name], float(criteria[name].sum())
        options = [
            groups
            for groups in numbers(
                layer.out_channels,
                layer.in_channels,
                within.min_channels_per_group,
                within.max_groups,
                within.depthwise,
            )
            if groups % parts == 0
        ]
        full = permute.expand_groups(criterion, parts)
        rows[name] = [
            Candidate(
                groups,
                _share(full, permute.group_parts(criterion, parts, groups, settings), total),
                size * parts // groups,
                dense[name].macs_dense * parts // groups,
            )
            for groups in options or [parts]
        ]
    weights = sum(layer.weight.numel() for layer in layers.values())
    macs = sum(row.macs_dense for name, row in dense.items() if name not in layers)
    return Table(rows, cost.parameters(context.model) - weights, macs)


def _share(criterion: Tensor, found: permute.Grouping, total: float) -> float:
    return found.kept(criterion) / total if total else 1.0


def _criteria(
    settings: Settings, context: PruningContext, layers: Mapping[str, nn.Conv2d]
) -> dict[str, Tensor]:
    """How much every kernel matters: (outputs, inputs of each part), by layer."""
    if settings.criterion == "magnitude":
        return {name: permute.magnitude(layer.weight) for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    found = gradients(context, weights)
    return {n: permute.taylor(w, g) for n, w, g in zip(layers, weights, found, strict=True)}


def _rows(
    layers: Mapping[str, nn.Conv2d], groups: Mapping[str, int], shares: Mapping[str, float]
) -> str:
    """One line a layer: what became of it."""
    rows = ["layer,outputs,inputs,groups,kept_share"]
    for name, layer in layers.items():
        sizes = f"{layer.out_channels},{layer.in_channels},{groups.get(name, layer.groups)}"
        rows.append(f"{name},{sizes},{shares.get(name, 1.0):.6f}")
    return "\n".join(rows) + "\n"


def _says(state: State) -> str:
    return f"{state.params:,} parameters, {state.macs:,} MACs, {state.share:.2%} kept on average"


def _asked(settings: Settings) -> str:
    ways = ("groups", "channels_per_group", "config")
    given = [(way, getattr(settings, way)) for way in ways]
    return ", ".join(f"{way} {value}" for way, value in given if value) or str(settings.search)
