"""What a comparison needs beside its methods: the same settings with one thing taken away.

- `dense`: nothing is pruned and nothing trained after the baseline.
- `dense_longer`: the dense network, trained in one go for the epochs of all stages together.
- `random`: the same amounts in the same places, chosen at random (`pick: random`).
- `scratch`: the pruned network from new weights, trained as the dense network was: for as many
  epochs (Scratch-E) and for as much computation (Scratch-B of Z. Liu et al., Rethinking the value
  of network pruning, ICLR 2019), as two controls `scratch_epochs` and `scratch_compute`.
- `smaller`: a narrower dense network: outputs taken at random, layer by layer, from the untrained
  network, and the rest trained from new weights as the dense network was. It needs a method that
  removes whole outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from secateur.base.settings import merged

Control = Literal[
    "dense", "dense_longer", "random", "scratch", "scratch_epochs", "scratch_compute", "smaller"
]
Combination = tuple[str, str, dict[str, Any]]
"""Method, point, settings."""

UNPRUNED: dict[str, Any] = {
    "penalty": "none",
    "sparse_train": {"epochs": 0, "warmup": 0},
    "pruner": "threshold",
    "pruners": {"threshold": {"sensitivity": 0.0}},
    "prune": {"remove_dead": False, "export": "none"},
    "finetune": {"epochs": 0, "warmup": 0, "init": "inherit", "budget": "epochs"},
}
"""Settings of a chain that hands the dense network on as it is."""


def make(
    control: Control,
    methods: Sequence[str],
    combinations: Sequence[Combination],
    params: Mapping[str, Any],
) -> tuple[list[Combination], list[str]]:
    """The combinations of a control for these methods, and a line for each that it cannot be."""
    chosen = [c for c in combinations if c[0] in methods]
    if control in ("dense", "dense_longer"):
        return _dense(control, chosen, params), []
    build = {
        "random": _random,
        "scratch_epochs": lambda settings, params: _scratch(settings, params, "epochs"),
        "scratch_compute": lambda settings, params: _scratch(settings, params, "compute"),
        "smaller": _smaller,
    }[control]
    made: list[Combination] = []
    notes: list[str] = []
    for method, point, settings in chosen:
        above = build(settings, params)
        if above is None:
            notes.append(f"{method}: no control '{control}': {_WHY[control]}")
        else:
            made.append((method, point, merged(settings, above)))
    return made, [*dict.fromkeys(notes)]


_WHY = {
    "random": "its pruner has no `pick: random`",
    "smaller": "it does not remove whole outputs by pruner magnitude",
}


def _value(settings: Mapping[str, Any], params: Mapping[str, Any], key: str) -> Any:
    """The value that a combination has at a dotted key; None if there is none."""
    for tree in (settings, params):
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, Mapping) else None  # type: ignore[assignment]
        if tree is not None:
            return tree
    return None


def _dense(
    control: str, chosen: Sequence[Combination], params: Mapping[str, Any]
) -> list[Combination]:
    """One dense network for each way in which the methods train one."""
    found: dict[str, Combination] = {}
    for _, _, settings in chosen:
        above = merged(settings, UNPRUNED)
        if control == "dense_longer":
            sections = ("baseline", "sparse_train", "finetune")
            total = sum(int(_value(settings, params, f"{part}.epochs") or 0) for part in sections)
            above = merged(above, {"baseline": {"epochs": total}})
        keys = ("dataset", "arch", "baseline", "data", "datasets", "archs")
        same = repr([_value(above, params, key) for key in keys])
        found.setdefault(same, ("dense" if control == "dense" else "longer", "", above))
    several = len(found) > 1
    return [
        (method, str(number) if several else "", settings)
        for number, (method, _, settings) in enumerate(found.values(), 1)
    ]


def _random(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is pruned is picked at random; by the penalty if the penalty picks."""
    pruner, penalty = _value(settings, params, "pruner"), _value(settings, params, "penalty")
    if pruner == "chosen" and _value(settings, params, f"penalties.{penalty}.pick") is not None:
        return {"penalties": {penalty: {"pick": "random"}}}
    if _value(settings, params, f"pruners.{pruner}.pick") is not None:
        return {"pruners": {pruner: {"pick": "random"}}}
    return None


def _scratch(settings: Mapping[str, Any], params: Mapping[str, Any], budget: str) -> dict[str, Any]:
    """The pruned shape from new weights, trained as the dense network was."""
    known = params["finetune"]
    below = merged(params["baseline"], settings.get("baseline", {}))
    training = {key: value for key, value in below.items() if key in known}
    return {"finetune": training | {"init": "scratch", "budget": budget}}


def _smaller(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any] | None:
    """A narrower network, from new weights."""
    granularity = _value(settings, params, "pruners.magnitude.granularity")
    if _value(settings, params, "pruner") != "magnitude" or granularity == "weight":
        return None
    above = _scratch(settings, params, "epochs")
    return above | {
        "baseline": {"epochs": 0, "weights": "none", "warmup": 0, "milestones": []},
        "penalty": "none",
        "sparse_train": {"epochs": 0, "warmup": 0},
        "pruners": {"magnitude": {"pick": "random", "ranking": "layer"}},
    }
