"""Fill a network with tensors that were saved under different names."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.base.errors import CheckpointError, cut
from secateur.nn import resizing
from secateur.nn.weights import Weights

Names = Mapping[str, str]
"""Name of a tensor, or of a module with all its tensors -> the name to use instead. A `*` matches
any text; both names have the same number of `*`."""

WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module"})
"""Parts of names that wrappers add: data parallelism, torch.compile, Lightning."""
COUNTERS = ("total_ops", "total_params", "num_batches_tracked")
"""Last parts of names of tensors that do not affect any output; a network may lack them."""
MASK, INDICES = "mask", ("ind_in", "ind_out")
"""Last parts of names of additional tensors in gconv-prune's layers."""
LISTED = 10
"""Largest number of tensors of each kind that an error names."""


@dataclass(frozen=True)
class Matches:
    """Which tensor of a file belongs to which tensor of a network."""

    sources: dict[str, str]
    """Name in the network -> name in the file."""
    unexpected: list[str]
    """Names in the file, without the prefixes of wrappers, that match nothing in the network."""


def fill(
    model: nn.Module,
    weights: Weights,
    *,
    rename: Names | None = None,
    aliases: Names | None = None,
    auxiliary: tuple[str, ...] = (),
    fresh: Collection[str] = (),
    classifier: Collection[str] = (),
    hint: str = "",
) -> None:
    """Copy the weights into a network, in place; its tensors named in `fresh` are not changed.

    Names are matched without the prefixes that wrappers add: directly, by `rename`, or by
    `aliases`, the names that other implementations of the network use. Tensors whose names begin
    with one of `auxiliary` may be left over. Masks of gconv-prune's layers are multiplied into the
    weights. A tensor that the network has under several names may have any of them in the file.
    Integer buffers that the file lacks, such as counters of batches, are not changed, and
    neither are extra states (`get_extra_state`) that are not tensors.

    Raises CheckpointError before anything is changed: if tensors are missing, unexpected or of
    another shape, naming up to ten of each kind, with `hint` if a tensor of `classifier` has
    another shape; or if a value is not finite.
    """
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    tensors = _without_layers_of_gconv(weights)
    try:
        found = match(list(tensors), own, rename or {}, aliases or {})
    except CheckpointError as error:
        raise CheckpointError(f"{weights.source}: {error}") from None
    missing = [name for name in _not_filled(model, found.sources) if name not in fresh]
    unexpected = [n for n in found.unexpected if n.rpartition(".")[2] not in COUNTERS]
    unexpected = [n for n in unexpected if not n.startswith(auxiliary)]
    chosen = {n: tensors[source] for n, source in found.sources.items() if n not in fresh}
    shapes = [
        f"{name} {_shape(tensor)}, needs {_shape(own[name])}"
        for name, tensor in chosen.items()
        if tensor.shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        told = "; ".join(f"{len(n)} {word}: {_list(n)}" for n, word in parts if n)
        if any(tensor.shape != own[n].shape for n, tensor in chosen.items() if n in classifier):
            told += hint
        raise CheckpointError(f"{weights.source}: its tensors do not fit the network: {told}")
    for name, tensor in chosen.items():
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex():
            raise CheckpointError(
                f"{weights.source}: {cut(name)} holds {tensor.dtype}, needs {own[name].dtype}"
            )
        if tensor.is_floating_point() and not bool(tensor.to(torch.float32).isfinite().all()):
            raise CheckpointError(f"{weights.source}: {cut(name)} holds values that are not finite")
    resizing.load_state(model, {**own, **chosen})


def _not_filled(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names of the network's floating-point tensors that have none of `names`.

    A tensor that several modules share has several, and a file may have it under one of them.
    """
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    filled = {id(own[name]) for name in names}
    return [
        name
        for name, tensor in own.items()
        if (tensor.is_floating_point() or tensor.is_complex())
        and name not in names
        and id(tensor) not in filled
    ]


def match(names: Iterable[str], own: Collection[str], rename: Names, aliases: Names) -> Matches:
    """Assign each of `names` to one of `own`; prefixes are removed such that most names match.

    Raises CheckpointError if a rule of `rename` applies to no name, if two names become the same,
    or if the two sides of a rule differ in their number of `*`.
    """
    for rule, new in rename.items():
        if rule.count("*") != new.count("*"):
            raise CheckpointError(f"rename: {cut(rule)!r}: {cut(new)!r} must have as many *")
    best: tuple[int, Matches, set[str], str] | None = None
    for read in _readings(list(names), own):
        sources: dict[str, str] = {}
        unexpected, used, twice = [], set(), ""
        for original, name in read.items():
            target, applied = _resolve(name, original, own, rename, aliases)
            used |= {applied} if applied else set()
            if target is None:
                unexpected.append(name)
            elif target in sources:
                twice = f"{cut(original)} and {cut(sources[target])}: both become {cut(target)}"
            else:
                sources[target] = original
        if best is None or len(sources) > best[0]:
            best = len(sources), Matches(sources, unexpected), used, twice
    assert best is not None
    if best[3]:
        raise CheckpointError(best[3])
    if idle := [rule for rule in rename if rule not in best[2]]:
        raise CheckpointError(f"rename: {cut(idle[0])!r} is the name of no tensor in the file")
    return best[1]


def renamed(name: str, rule: str, new: str) -> str | None:
    """The name after one rule of `Names`; None if the rule does not apply to it."""
    pattern = re.escape(rule).replace(r"\*", "(.*)") + r"(?=\.|$)"
    if (found := re.match(pattern, name)) is None:
        return None
    texts = iter(found.groups())
    start = re.sub(r"\*", lambda _: next(texts), new)
    return (start + name[found.end() :]).removeprefix(".")


def _resolve(
    name: str, original: str, own: Collection[str], rename: Names, aliases: Names
) -> tuple[str | None, str | None]:
    """The network's name for a tensor, or None, and the rule of `rename` that applied, or None.

    Rules are applied to `name`, without prefixes, then to `original`, the name in the file.
    """
    for rule, new in rename.items():
        if (other := renamed(name, rule, new)) is not None:
            return (other if other in own else None), rule
    in_file = {
        rule: other
        for rule, new in rename.items()
        if (other := renamed(original, rule, new)) is not None
    }
    prefix = original.removesuffix(name)
    for rule, other in in_file.items():
        for target in (other, other.removeprefix(prefix)):
            if target in own:
                return target, rule
    if name in own:
        return name, None
    for rule, new in aliases.items():
        if (other := renamed(name, rule, new)) is not None and other in own:
            return other, None
    return None, next(iter(in_file), None)


def _readings(names: list[str], own: Collection[str]) -> list[dict[str, str]]:
    """Candidates for the names of a file: without wrappers, then also without common prefixes."""
    known = {part for name in own for part in name.split(".")}
    parts = {
        name: [p for p in name.split(".") if p not in WRAPPERS or p in known] for name in names
    }
    readings = [{name: ".".join(kept) for name, kept in parts.items()}]
    for _ in range(3):
        starts = Counter(kept[0] for kept in parts.values() if len(kept) > 1)
        common = starts.most_common(1)
        if not common or 2 * common[0][1] < len(parts):
            break
        parts = {n: k[1:] if k[0] == common[0][0] and len(k) > 1 else k for n, k in parts.items()}
        reading = {name: ".".join(kept) for name, kept in parts.items()}
        if len(set(reading.values())) < len(reading):
            break
        readings.append(reading)
    return readings


def _without_layers_of_gconv(weights: Weights) -> dict[str, Tensor]:
    """The tensors without gconv-prune's indices, and with its masks (F, C) applied to the weights.

    CheckpointError for indices that permute channels, since the convolution is then grouped.
    """
    tensors = dict(weights.tensors)
    for name in weights.tensors:
        layer, _, last = name.rpartition(".")
        weight, inner = f"{layer}.weight", f"{layer}.conv2d.weight"
        if last in INDICES and inner in weights.tensors:
            index = tensors.pop(name)
            if not torch.equal(index, torch.arange(index.numel(), dtype=index.dtype)):
                raise CheckpointError(
                    f"{weights.source}: {cut(name)} changes the order of channels, as a "
                    "conversion to group convolutions does; take the file from before it"
                )
            if inner in tensors:
                tensors[weight] = tensors.pop(inner)
        elif (
            last == MASK and weight in tensors and tensors[name].shape == tensors[weight].shape[:2]
        ):
            mask = tensors.pop(name).to(tensors[weight].dtype)
            tensors[weight] = tensors[weight] * mask[(...,) + (None,) * (tensors[weight].dim() - 2)]
    return tensors


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _list(names: list[str]) -> str:
    shown = ", ".join(cut(name, 80) for name in names[:LISTED])
    return shown + (f", and {len(names) - LISTED} more" if len(names) > LISTED else "")
