"""Controls of a comparison: the settings of a method with one thing taken away.

- `dense`: nothing is pruned, and nothing is trained after the baseline.
- `dense_longer`: the dense network, trained in one go for the epochs of all stages together;
  milestones, warm-up and the start of an average are scaled like the epochs.
- `random`: the same amounts are pruned in the same layers, chosen at random (`pick: random`).
- `scratch`: the pruned network from new weights, trained like the dense network: for as many epochs
  (Scratch-E) and for as much computation (Scratch-B of Z. Liu et al., Rethinking the value of
  network pruning, ICLR 2019), as two controls `scratch_epochs` and `scratch_compute`.
- `smaller`: a narrower dense network: outputs are removed at random, layer by layer, from the
  untrained network, which is then trained from new weights like the dense network. It needs a
  method that removes whole outputs.

`dense_longer` has the epochs of all rounds; `random` picks at random in every round; `scratch` and
`smaller` are derived only from the last network, and trained with the teacher of the dense network,
if it has one: without the teacher of sparse-train or finetuning.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from secateur.base import settings as base_settings
from secateur.base.sections import NOTHING, Baseline, Prune, Train
from secateur.pipeline.params_file import flat, label, short_key, value_at
from secateur.pipeline.record import FIRST
from secateur.studies import rounds
from secateur.studies.rounds import in_round, merged
from secateur.training.budget import stretched

Control = Literal[
    "dense", "dense_longer", "random", "scratch", "scratch_epochs", "scratch_compute", "smaller"
]
TARGET = "pruners.magnitude.target"
Combination = tuple[str, str, dict[str, Any]]
"""Method, point, settings."""

UNPRUNED: dict[str, Any] = {
    "penalty": "none",
    "parametrization": "none",
    "sparse_train": {"epochs": 0, "warmup": 0},
    "pruner": "threshold",
    "pruners": {"threshold": {"sensitivity": 0.0}},
    "prune": Prune(remove_dead=False).model_dump(mode="json"),
    "finetune": {"epochs": 0, "warmup": 0, "init": "inherit", "budget": "epochs"},
    "rounds": {},
}
"""Settings of a chain that passes the dense network on unchanged."""


def make(
    control: Control,
    methods: Sequence[str],
    combinations: Sequence[Combination],
    params: Mapping[str, Any],
) -> tuple[list[Combination], list[str]]:
    """The combinations of a control, and a line for each method for which it is not possible."""
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
        copied = control != "random"
        if copied and not _value(settings, params, "baseline.epochs"):
            above: dict[str, Any] | str = "its dense network is not trained (baseline.epochs = 0)"
        else:
            above = build(settings, params)
        if isinstance(above, str):
            notes.append(f"{method}: no control '{control}': {above}")
        else:
            made.append((method, point, merged(settings, above)))
    return made, [*dict.fromkeys(notes)]


def _value(settings: Mapping[str, Any], params: Mapping[str, Any], key: str) -> Any:
    """The value that a combination has at a dotted key; None if there is none."""
    return value_at(rounds.whole(params, settings), key)


def _dense(
    control: str, chosen: Sequence[Combination], params: Mapping[str, Any]
) -> list[Combination]:
    """One dense network for each way in which the methods train one."""
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for _, _, settings in chosen:
        above = merged(settings, UNPRUNED)
        if control == "dense_longer":
            whole = rounds.whole(params, settings)
            parts = (rounds.epochs(whole, section) for section in ("sparse_train", "finetune"))
            above = merged(above, {"baseline": _longer(whole["baseline"], sum(map(sum, parts)))})
        way = _way_of_dense(rounds.whole(params, above))
        if not any(way == known for known, _ in ways):
            ways.append((way, above))
    points = _differences([way for way, _ in ways])
    method = "dense" if control == "dense" else "longer"
    return [(method, point, above) for point, (_, above) in zip(points, ways, strict=True)]


def _way_of_dense(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a dense network depends on, by dotted keys; a copy kept for rewinding does
    not change it."""
    own = (f"datasets.{whole['dataset']}", f"archs.{whole['arch']}")
    used = ("dataset", "arch", "data", "baseline", *own)
    found = flat({key: value_at(whole, key) for key in used})
    return {key: value for key, value in found.items() if key != "baseline.keep_epoch"}


def _differences(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of several tables of settings: the values in which it differs from others.

    A setting of an architecture or data set that only one of them has is left out.
    """
    values: dict[str, list[str]] = {}
    for key, value in (pair for way in ways for pair in way.items()):
        values.setdefault(key, []).append(label(value))
    keys = [key for key, given in values.items() if len(set(given)) > 1]
    names = [" ".join(f"{short_key(k, keys)} {label(w[k])}" for k in keys if k in w) for w in ways]
    unlike = len(set(names)) == len(names)
    return names if unlike else [str(number) for number in range(1, len(names) + 1)]


def _longer(baseline: Mapping[str, Any], more: int) -> dict[str, Any]:
    """What changes in the settings of the baseline for so many more epochs of one schedule."""
    given = base_settings.validate(Baseline, baseline, "baseline")
    if not given.epochs or not more:
        return {"epochs": given.epochs + more}
    changed = stretched(given, given.epochs + more)
    changed["milestones"] = [*changed["milestones"]]
    if "average" in changed:
        changed["average"] = changed["average"].model_dump()
    return {key: value for key, value in changed.items() if value}


def _random(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any] | str:
    """The pruner picks at random in every round; or the penalty, if the penalty chooses."""
    pruner, penalty = _value(settings, params, "pruner"), _value(settings, params, "penalty")
    if pruner == "chosen" and _value(settings, params, f"penalties.{penalty}.pick") is not None:
        above = {"penalties": {penalty: {"pick": "random"}}}
    elif _value(settings, params, f"pruners.{pruner}.pick") is not None:
        above = {"pruners": {pruner: {"pick": "random"}}}
    else:
        return "its pruner has no `pick: random`"
    found: dict[str, Any] = above
    for name in settings.get(rounds.KEY, {}):
        found = merged(found, in_round(name, above))
    return found


def _scratch(
    settings: Mapping[str, Any], params: Mapping[str, Any], budget: str
) -> dict[str, Any] | str:
    """The pruned network from new weights, trained like the dense network, in the last round."""
    last = _last_round(settings)
    training = _anew(settings, params, budget, last)
    return training if isinstance(training, str) else in_round(last, {"finetune": training})


def _anew(
    settings: Mapping[str, Any], params: Mapping[str, Any], budget: str, last: str
) -> dict[str, Any] | str:
    """Settings of `finetune` in round `last` that train new weights like those of the dense
    network, with its teacher; or why there are none."""
    below = merged(params["baseline"], settings.get("baseline", {}))
    # with the defaults of what the baseline leaves out, which finetune may have otherwise
    written_out = merged(Train(epochs=0).model_dump(mode="json"), below)
    training = {key: written_out[key] for key in Train.model_fields}
    training |= {"init": "scratch", "budget": budget}
    if last == FIRST:
        return training | {"rewind_to": NOTHING}
    taught = dict(training.pop("distillation"))
    # the files are the same in all rounds (base.settings): there, weight 0 means no teacher
    files = {key: taught.pop(key) for key in ("teacher", "code")}
    if all(_value(settings, params, f"finetune.distillation.{k}") == v for k, v in files.items()):
        return training | {"distillation": taught}
    if files["teacher"] == NOTHING:
        return training | {"distillation": {"weight": 0.0, "features": []}}
    return "its dense network has a teacher, its rounds have another one or none"


def _smaller(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any] | str:
    """A narrower network, from new weights."""
    table = settings.get(rounds.KEY, {})
    final = table.get(_last_round(settings), {}).get("prune", {})
    pruning = {key: value for key, value in final.items() if key != "pruners"}
    whole = rounds.whole(params, settings)
    pruners = base_settings.merged(whole["pruners"], final.get("pruners", {}), depth=2)
    own = pruners.get("magnitude") or {}
    if whole["pruner"] != "magnitude" or own.get("granularity") == "weight":
        return "it does not remove whole outputs by pruner magnitude"
    target = own.get("target")
    if table and not (isinstance(target, Mapping) and target.get("of") == "dense"):
        return "its last round has no target with `of: dense`, so no cut of one round is as large"
    alone: dict[str, Any] = {"pick": "random", "ranking": "layer"}
    if isinstance(target, Mapping):  # null for the kinds of the targets that it is merged with
        others = [value_at(below, TARGET) or {} for below in (params, settings)]
        alone["target"] = dict.fromkeys(key for other in others for key in other) | {**target}
    return {
        "finetune": _anew(settings, params, "epochs", FIRST),
        "baseline": {
            "epochs": 0, "weights": "none", "head": "inherit", "keep_epoch": None,
            "warmup": 0, "milestones": [],
            "distillation": {"teacher": NOTHING, "code": NOTHING, "features": []},
        },
        "penalty": "none",
        "parametrization": "none",
        "sparse_train": {"epochs": 0, "warmup": 0},
        "pruners": merged(final.get("pruners", {}), {"magnitude": alone}),
        "rounds": {},
        **({"prune": pruning} if pruning else {}),
    }  # fmt: skip


def _last_round(settings: Mapping[str, Any]) -> str:
    """The round that makes the final network."""
    return [FIRST, *rounds.names(settings)][-1]
