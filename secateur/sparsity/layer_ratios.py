"""The ratio of each layer of a network, from the settings `ratios` and `skip`.

Source of the notation by stage and number, and of `skip`: the code of H. Wang et al., Neural
pruning via growing regularization, ICLR 2021.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from secateur.base.errors import ArgumentError
from secateur.sparsity import masks
from secateur.sparsity.choices import Granularity
from secateur.sparsity.masks import Scope
from secateur.sparsity.positions import Position, layer_positions
from secateur.sparsity.ratios import NUMBERS, Rules, Skipped


def ratios_by_layer(
    model: nn.Module,
    rules: Rules,
    granularity: Granularity,
    skip: tuple[Skipped, ...],
    refused: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Ratio of every convolution and linear layer, by name; 0 where nothing is pruned.

    `refused` has the reasons why layers cannot be pruned, by name; by default they follow from
    names and positions. Raises ArgumentError (`ratios` or `skip`) for an entry that matches no
    layer, for a ratio above 0 of a layer that cannot be pruned at this granularity (a single number
    for all layers skips such layers), and if nothing would be pruned. Pixels, the inputs of a first
    linear layer, are pruned if a ratio names that layer.
    """
    positions = layer_positions(model)
    names = list(positions)
    skipped = {name for entry in skip for name in _skipped_layers(entry, positions)}
    if refused is None:
        refused = {name: position.refusal(granularity) for name, position in positions.items()}
    refused = {name: refused.get(name, "") for name in names}
    given = _given(rules, positions)
    result: dict[str, float] = {}
    for name in names:
        ratio, origin = given[name]
        asked = bool(origin) and positions[name].selects_pixels(granularity)
        if ratio > 0 and name not in skipped and (reason := refused[name]) and not asked:
            if origin:
                raise ArgumentError(
                    "ratios",
                    f"{origin} = {ratio:g} is for layer {name}, whose {granularity}s may not be "
                    f"pruned: {reason}",
                )
            ratio = 0.0
        result[name] = 0.0 if name in skipped else ratio
    if not any(result.values()):
        raise _nothing("layer", names, {name: why for name, why in refused.items() if why}, rules)
    return result


def ratios_by_parameter(
    model: nn.Module, rules: Rules, scope: Scope, skip: tuple[Skipped, ...]
) -> dict[str, float]:
    """Ratio of every parameter in scope that is pruned, by the parameter's name.

    A bias has the ratio of its layer; scales of normalisations have the single ratio that is given
    for everything. Raises ArgumentError as `ratios_by_layer` does, and for scales without such a
    ratio.
    """
    by_layer = ratios_by_layer(model, rules, "weight", skip)
    found: dict[str, float] = {}
    for name in masks.prunable(model, scope):
        layer = name.rpartition(".")[0]
        if layer in by_layer:
            found[name] = by_layer[layer]
        elif scope == "weights_and_scales" and name.endswith(".weight"):
            if rules.everywhere is None:
                raise ArgumentError(
                    "scope", "the scales of normalisations need one number as ratios", scope
                )
            found[name] = rules.everywhere
    return {name: ratio for name, ratio in found.items() if ratio > 0}


def layers_left(model: nn.Module, skip: tuple[Skipped, ...]) -> list[str]:
    """Convolutions and linear layers that `skip` does not name, in order.

    Raises ArgumentError (`skip`) for an entry that matches no layer, and if no layer is left.
    """
    positions = layer_positions(model)
    skipped = {name for entry in skip for name in _skipped_layers(entry, positions)}
    left = [name for name in positions if name not in skipped]
    if not left:
        raise ArgumentError("skip", "no layer is left")
    return left


def ratios_by_group(
    model: nn.Module,
    rules: Rules,
    skip: tuple[Skipped, ...],
    groups: Mapping[str, Sequence[str]],
    refused: Mapping[str, str],
) -> dict[str, float]:
    """Ratio of every group of coupled channels, by name; 0 where nothing is pruned.

    `groups` are the layers that produce the channels of each group; `refused` has the reasons why
    groups cannot be pruned, by name. A group has the ratio that is given for one of its layers, or
    for its own name; with ratios by stage, it has the lowest ratio of its layers' stages. Raises
    ArgumentError as `ratios_by_layer` does, and if layers of a group are given different ratios.
    """
    positions = layer_positions(model)
    named = [name for name, layers in groups.items() if layers]
    skipped = {name for entry in skip for name in _skipped_layers(entry, positions, named)}
    given = _named(rules, positions, named) if rules.named else _given(rules, positions)
    if rules.everywhere is not None:  # also projections that a MultiheadAttention holds itself
        given = dict.fromkeys((*positions, *named), (rules.everywhere, ""))
    result: dict[str, float] = {}
    for group, layers in groups.items():
        known = [given[name] for name in dict.fromkeys(layers) if name in given]
        if rules.named:
            own = given.get(group, (0.0, "")) if group not in positions else (0.0, "")
            known = [own] if own[1] else [found for found in known if found[1]]
            if len({ratio for ratio, _ in known}) > 1:
                raise ArgumentError(
                    "ratios",
                    f"{' and '.join(f'{p} = {r:g}' for r, p in sorted(set(known))[:2])} are for "
                    f"layers whose channels can only be removed together ({_shortened(layers)}); "
                    "give one ratio",
                )
        ratio, origin = min(known, default=(0.0, ""))
        if skipped.intersection((group, *layers)):
            ratio = 0.0
        if ratio > 0 and group in refused:
            if rules.named:
                raise ArgumentError(
                    "ratios",
                    f"{origin} = {ratio:g} is for the channels of {group}, which may not be "
                    f"pruned: {refused[group]}",
                )
            ratio = 0.0
        result[group] = ratio
    if not any(result.values()):
        raise _nothing("group", groups, refused, rules)
    return result


def _nothing(
    kind: str, names: Iterable[str], refused: Mapping[str, str], rules: Rules
) -> ArgumentError:
    """The error if no ratio is above 0: which layers or groups can be pruned, or why none can.

    `refused` has the reasons why some cannot, by name.
    """
    prunable = [name for name in names if name not in refused]
    if not prunable:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
        more = f"; {len(refused) - 3} more" if len(refused) > 3 else ""
        return ArgumentError(
            "ratios", f"no {kind} of the network can be pruned ({reasons}{more})", rules
        )
    return ArgumentError(
        "ratios",
        f"nothing would be pruned; at least one {kind} that can be pruned needs a ratio above 0 "
        f"(prunable: {_shortened(prunable)})",
        rules,
    )


def scaled(ratios: Mapping[str, float], highest: float) -> dict[str, float]:
    """The ratios scaled by one factor, so that the highest is `highest`."""
    most = max(ratios.values())
    return {name: ratio / most * highest for name, ratio in ratios.items()}


def _given(rules: Rules, positions: Mapping[str, Position]) -> dict[str, tuple[float, str]]:
    """Ratio of each layer, and the entry that gives it; "" for a number given for all layers."""
    if rules.everywhere is not None:
        return dict.fromkeys(positions, (rules.everywhere, ""))
    if rules.stages:
        return _by_stage(rules.stages, positions)
    return _named(rules, positions)


def _named(
    rules: Rules, positions: Mapping[str, Position], others: Collection[str] = ()
) -> dict[str, tuple[float, str]]:
    """Ratio of each layer by patterns, and the pattern that gives it; "" where none does.

    `others` are further names that a pattern may be for.
    """
    matches: dict[str, list[tuple[int, str, float]]] = {n: [] for n in (*positions, *others)}
    for pattern, ratio in rules.named:
        for name in _matching("ratios", pattern, positions, others):
            matches[name].append((_specificity(pattern), pattern, ratio))
    given: dict[str, tuple[float, str]] = {}
    for name, found in matches.items():
        most = max((specificity for specificity, _, _ in found), default=0)
        best = [(ratio, pattern) for specificity, pattern, ratio in found if specificity == most]
        if len({ratio for ratio, _ in best}) > 1:
            raise ArgumentError(
                "ratios",
                f"{' and '.join(f'{p} = {r:g}' for r, p in best[:2])} are both for layer {name}, "
                "and neither is more specific; make one of them more specific",
            )
        given[name] = best[0] if best else (0.0, "")
    return given


def _by_stage(
    ratios: tuple[float, ...], positions: Mapping[str, Position]
) -> dict[str, tuple[float, str]]:
    """One ratio per stage; within blocks it applies to the layers that can be pruned."""
    stages = {position.stage for position in positions.values()}
    if None in stages:
        raise ArgumentError(
            "ratios",
            "one ratio per stage needs layers named layer1.0..., layer2.0..., which this network "
            "does not have; give numbers ('0-4: 0.5') or names",
        )
    wanted = max(stage for stage in stages if stage is not None) + 1
    if len(ratios) != wanted:
        raise ArgumentError(
            "ratios",
            f"{len(ratios)} ratios for {wanted} stages: the stem, layer1 to layer{wanted - 2}, and "
            "what comes after them",
        )
    given: dict[str, tuple[float, str]] = {}
    for name, position in positions.items():
        assert position.stage is not None
        outside = position.block is None or not position.residual
        given[name] = ratios[position.stage], f"stage {position.stage}" if outside else ""
    return given


def _matching(
    key: str, pattern: str, positions: Mapping[str, Position], others: Collection[str] = ()
) -> list[str]:
    """Layers that a name pattern or a range of numbers matches; ArgumentError if there is none, or
    if it is the name of one layer and the number of another."""
    if match := NUMBERS.fullmatch(pattern):
        first, last = int(match[1]), int(match[2] or match[1])
        named = pattern in positions or pattern in others
        if named and list(positions)[first : first + 1] != [pattern]:
            raise ArgumentError(
                key,
                f"{pattern} may be the layer of this name or the one of this number; write "
                f"'[{pattern[0]}]{pattern[1:]}' for the name, '{pattern}-{pattern}' for the number",
            )
        if last >= len(positions):
            raise ArgumentError(
                key,
                f"{pattern}: there are {len(positions)} convolutions and linear layers, counted "
                f"from 0 to {len(positions) - 1}",
            )
        return list(positions)[first : last + 1]
    names = [name for name in {**positions, **dict.fromkeys(others)} if fnmatchcase(name, pattern)]
    if not names:
        listed = _shortened(positions)
        raise ArgumentError(key, f"{pattern} matches no layer; there are: {listed}")
    return names


def _skipped_layers(
    entry: Skipped, positions: Mapping[str, Position], others: Collection[str] = ()
) -> list[str]:
    """The layers that an entry of `skip` names; ArgumentError if there is none.

    `others` are further names that a pattern may be for.
    """
    blocks = any(position.block is not None for position in positions.values())
    if not blocks or not re.fullmatch(r"\d+(\.\d+){0,2}", entry.text):
        return _matching("skip", entry.text, positions, others)
    wanted = [int(part) for part in entry.text.split(".")]

    def matches(position: Position, numbers: list[int]) -> bool:
        return [position.stage, position.block, position.conv][: len(numbers)] == numbers

    names = [name for name, position in positions.items() if matches(position, wanted)]
    if not names:
        listed = _shortened(positions)
        raise ArgumentError("skip", f"there is no stage or block {entry}; layers: {listed}")
    if entry.number and len(wanted) == 2 and wanted[1]:
        longer = [wanted[0], wanted[1] * 10]
        if any(matches(position, longer) for position in positions.values()):
            raise ArgumentError(
                "skip",
                f"the number {entry} may mean block {wanted[1]} or {longer[1]} of stage "
                f"{wanted[0]}; write it in quotes",
            )
    return names


def _specificity(pattern: str) -> int:
    """Number of characters that are not wildcards; numbers are more specific than any name."""
    if NUMBERS.fullmatch(pattern):
        return 10**9
    pattern = re.sub(r"\[([^]!])\]", r"\1", pattern)  # [3] is the character 3
    return len(re.sub(r"\[[^]]*\]|[*?]", "", pattern))


def _shortened(names: Iterable[str]) -> str:
    """The first of many names."""
    listed = list(names)
    return ", ".join(listed[:8]) + (f", ... ({len(listed)} in all)" if len(listed) > 8 else "")
