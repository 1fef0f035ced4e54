"""The stages of the pipeline, and run records: small tracked files beside each model."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from secateur.base import files
from secateur.base.documents import MAX_BYTES, parse_json, validated
from secateur.base.errors import SecateurError, cut, shorten


@dataclass(frozen=True)
class ModelSpec:
    """The model that a stage writes."""

    folder: str
    """Folder of the model; its run record is beside this folder."""
    key: str
    """Its key in metrics/evaluate.json."""
    title: str
    """Its name in tables."""
    kind: str
    """Its model type in MLflow."""

    @property
    def checkpoint(self) -> Path:
        """The weights and masks."""
        return Path(self.folder) / "model.safetensors"

    @property
    def history(self) -> Path:
        """The table of epochs; only stages that train write it."""
        return Path(self.folder) / "history.csv"

    @property
    def record(self) -> Path:
        """The run record."""
        return Path(f"{self.folder}.run.json")


@dataclass(frozen=True)
class StageSpec:
    """One stage: its name, the models that it reads, and the model that it writes."""

    name: str
    """Name of the stage in dvc.yaml and in MLflow."""
    inputs: tuple[str, ...] = ()
    """Stages whose models it reads."""
    model: ModelSpec | None = None
    pipeline: str = "dvc.yaml"
    """The file that declares it."""
    rounds: Literal["all", "last"] | None = None
    """all: it reads the models of all rounds; last: those of the last round, not of the first."""

    @property
    def module(self) -> str:
        """Name of its script (`python -m stages.<module>`) and of its section in params.yaml."""
        return self.name.replace("-", "_")


STAGES = {
    spec.name: spec
    for spec in (
        StageSpec("prepare"),
        StageSpec(
            "baseline",
            model=ModelSpec("models/baseline", "baseline", "dense", "dense"),
        ),
        StageSpec(
            "sparse-train",
            inputs=("baseline",),
            model=ModelSpec("models/sparse", "sparse", "sparse-trained", "regularized"),
        ),
        StageSpec(
            "prune",
            inputs=("sparse-train",),
            model=ModelSpec("models/pruned", "pruned", "pruned", "pruned"),
        ),
        StageSpec(
            "finetune",
            inputs=("prune",),
            model=ModelSpec("models/finetuned", "finetuned", "finetuned", "finetuned"),
        ),
        StageSpec(
            "evaluate", inputs=("baseline", "sparse-train", "prune", "finetune"), rounds="all"
        ),
        StageSpec("sensitivity", inputs=("baseline",), pipeline="stages/sensitivity/dvc.yaml"),
        StageSpec("latency", pipeline="stages/latency/dvc.yaml"),
        StageSpec(
            "export",
            inputs=("baseline", "prune", "finetune"),
            pipeline="stages/export/dvc.yaml",
            rounds="last",
        ),
    )
}
"""All stages by name, in the order in which they run."""

MODELS = {name: spec.model for name, spec in STAGES.items() if spec.model is not None}
"""The models of the first round by the stage that writes them, in the order of the stages."""

ROUND = ("sparse-train", "prune", "finetune")
"""The stages of every round; in further rounds they are named `prune@<round>` and so on."""
FIRST = "round1"
"""Name of the first round, that of the main chain, in reports; no further round may have it."""


def stage_spec(name: str, after: str = "finetuned") -> StageSpec:
    """The stage of this name, of the main chain, a round or a runtime; KeyError if there is none.

    `after` is the model, below models/, that the round starts from.
    """
    stage, at, round_name = name.partition("@")
    spec = STAGES[stage]
    if not at:
        return spec
    if stage == "latency":
        return replace(spec, name=name)
    if stage not in ROUND or spec.model is None or not re.fullmatch(r"[a-z]\w{,63}", round_name):
        raise KeyError(name)
    place = ROUND.index(stage)
    before = f"{ROUND[place - 1]}@{round_name}" if place else _maker(after)
    model = replace(
        spec.model,
        folder=spec.model.folder.replace("models/", f"models/rounds/{round_name}/"),
        title=f"{round_name}: {spec.model.title}",
    )
    return StageSpec(name, (before,), model, "stages/rounds/dvc.yaml")


def _maker(path: str) -> str:
    """The stage that makes a model below models/: `rounds/x/pruned` is made by `prune@x`."""
    *folder, key = path.split("/")
    stage = next(name for name, model in MODELS.items() if model.key == key)
    return f"{stage}@{folder[-1]}" if folder else stage


def model_spec(stage: str) -> ModelSpec:
    """The model that a stage writes; KeyError if it writes none."""
    model = stage_spec(stage).model
    if model is None:
        raise KeyError(stage)
    return model


@dataclass(frozen=True)
class Chain:
    """The stages that make models, over all rounds."""

    rounds: tuple[str, ...] = ()
    """The further rounds in their order."""

    @property
    def stages(self) -> list[str]:
        """All stages in the order in which they run."""
        return [*MODELS, *(f"{stage}@{name}" for name in self.rounds for stage in ROUND)]

    @property
    def models(self) -> dict[str, ModelSpec]:
        """The models by the stage that writes them, in the order of the stages."""
        return {stage: model_spec(stage) for stage in self.stages}

    def of_round(self, name: str) -> dict[str, str]:
        """Stages of a round: stage of the first round -> the same stage of this round."""
        return {stage: stage if name == FIRST else f"{stage}@{name}" for stage in ROUND}

    @property
    def last(self) -> dict[str, str]:
        """Stage of the first round -> the same stage of the last round, with the final networks."""
        last = self.of_round(self.rounds[-1] if self.rounds else FIRST)
        return {stage: last.get(stage, stage) for stage in MODELS}


def chain_of(report: Mapping[str, Any]) -> Chain:
    """The chain of a report of stage evaluate; ValueError if its rounds are not possible."""
    names = [name for name in report.get("rounds", {}) if name != FIRST]
    try:
        chain = Chain(tuple(names))
        chain.models  # noqa: B018
    except KeyError as error:
        raise ValueError(f"rounds: {error}") from None
    return chain


@dataclass(frozen=True)
class RunRecord:
    """Record of a training or pruning that really ran; DVC restores it together with its model.

    The annotations are the schema of the file.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str
    fingerprint: str
    params: dict[str, Any]
    """Values of the params that dvc.yaml declares for the stage."""
    metrics: dict[str, Annotated[float, Field(strict=True)]]
    """Metrics of the model that was kept."""
    model: str
    """Path of the checkpoint."""
    sha256: str
    """Hash of the checkpoint."""
    dataset: dict[str, Any]
    """Name, hash, and number of images in each part."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
    """Wall time of the work, over all attempts."""
    hardware: str
    ended: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """When the work ended, in seconds since 1970."""
    run_id: str | None = None
    """MLflow run; None if it was not tracked."""
    model_id: str | None = None
    tracking_uri: str | None = None
    experiment: str | None = None
    """DVC experiment in which the stage ran, if any."""
    revision: str | None = None
    """Git commit that was checked out; None without a repository."""
    upstream: dict[str, str] = field(default_factory=dict)
    """Stage -> sha256 of its checkpoint, from which this stage started."""

    @property
    def identity(self) -> str:
        """A unique name of this work: its MLflow run, or else its fingerprint."""
        return self.run_id or self.fingerprint


def save(path: Path, record: RunRecord) -> None:
    """Replace `path` by this record in one step."""
    files.write_text(path, json.dumps(asdict(record), indent=2, sort_keys=True) + "\n")


def load(path: Path) -> RunRecord:
    """Read a record; raises SecateurError if the file is missing or is not a record."""
    cure = "; run `dvc repro` to make it"
    return parse(files.read_bytes(path, SecateurError, MAX_BYTES, cure), str(path))


def parse(content: bytes, where: str) -> RunRecord:
    """Parse the content of a record; raises SecateurError that begins with `where`."""
    try:
        plain = parse_json(content)
    except ValueError as error:
        raise SecateurError(f"{where}: not a run record: {cut(str(error), 200)}") from None
    record = validated(_RECORD, plain, f"{where}: not a run record", SecateurError)
    try:
        model_spec(record.stage)
    except KeyError:
        unknown = f"stage = {shorten(record.stage)}: unknown"
        raise SecateurError(f"{where}: not a run record: {unknown}") from None
    if not all(isinstance(record.dataset.get(key), str) for key in ("name", "hash")):
        raise SecateurError(f"{where}: not a run record: dataset: name or hash is missing")
    return record


_RECORD = TypeAdapter(RunRecord)
