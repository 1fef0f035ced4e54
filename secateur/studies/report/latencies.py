"""Latency of finished networks by runtime, measured for a page and stored beside it.

`evaluate` only times torch and, during a study, while other trainings run. Here the dense and the
finetuned network of each experiment take turns in every requested runtime, after the study has
ended. A line is valid for the model whose hash it names: a new model is measured again, and so is
one whose line has fewer repeats than requested.
"""

import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from secateur.base import files
from secateur.base.errors import SecateurError
from secateur.base.optional import RUNTIME_TITLES, RuntimeName
from secateur.pipeline import record
from secateur.studies.marks import LATENCIES
from secateur.studies.report import artifacts
from secateur.studies.results import Result

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLES: Mapping[RuntimeName, str] = {**RUNTIME_TITLES, "torch": "torch.export"}
OF_PROGRAMS = (
    "; of the programs that torch.export makes, which take longer to call than the modules that "
    "evaluate times: small networks seem slower, and their speed-ups smaller"
)


@dataclass(frozen=True)
class Conditions:
    """Runtimes, batch size, threads and repeats; without runtimes, nothing is measured."""

    runtimes: Sequence[RuntimeName] = ()
    batch: int = 1
    threads: int = 1
    repeats: int = 100


@dataclass(frozen=True)
class ExperimentLatency:
    """Times of one experiment's networks in one runtime: a line of the table."""

    experiment: str
    model: str
    """Hash of the finetuned network's folder, as dvc.lock has it."""
    runtime: RuntimeName
    batch: int
    threads: int
    hardware: str
    dense_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The shortest pass of the dense network, in milliseconds."""
    latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The shortest pass of the finetuned network, in milliseconds."""
    repeats: Annotated[int, Field(ge=0)] = 0
    """Passes of each network, of which the shortest counts; 0: not recorded."""

    @property
    def conditions(self) -> tuple[RuntimeName, int, int, str]:
        """The conditions that all times in a column must share."""
        return self.runtime, self.batch, self.threads, self.hardware

    @property
    def identity(self) -> tuple[str, str, RuntimeName, int, int, str]:
        """What has only one line: a model of an experiment, under certain conditions."""
        return self.experiment, self.model, *self.conditions

    @property
    def speedup(self) -> float:
        """Speed-up over the dense network."""
        return self.dense_ms / self.latency_ms


_LINES = TypeAdapter(list[ExperimentLatency])

Column = Mapping[str, ExperimentLatency]
"""Experiment -> its times, for all experiments measured under the same conditions."""


def read(folder: Path) -> list[ExperimentLatency]:
    """The table in the folder of a page; empty if it is missing or cannot be read."""
    try:
        return _LINES.validate_python(
            list(csv.DictReader(io.StringIO((folder / LATENCIES).read_text())))
        )
    except (OSError, ValueError, csv.Error):  # pydantic's error is a ValueError
        return []


def write(folder: Path, times: Sequence[ExperimentLatency]) -> None:
    """Write the table into the folder of a page."""
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream, [f.name for f in fields(ExperimentLatency)], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(asdict(line) for line in times)
    files.write_text(folder / LATENCIES, stream.getvalue())


def replaced(times: Iterable[ExperimentLatency], new: ExperimentLatency) -> list[ExperimentLatency]:
    """The lines with the new one, in place of the one of the same model and conditions."""
    return [*(line for line in times if line.identity != new.identity), new]


def columns(found: Sequence[Result], times: Iterable[ExperimentLatency]) -> dict[str, Column]:
    """Title -> times of these experiments' current models; a column for each set of conditions."""
    models = artifacts.final_models(found)
    by_conditions: dict[tuple[RuntimeName, int, int, str], dict[str, ExperimentLatency]] = {}
    for line in times:
        if line.model and models.get(line.experiment) == line.model:
            by_conditions.setdefault(line.conditions, {})[line.experiment] = line
    return {_title(key, list(by_conditions)): column for key, column in by_conditions.items()}


def _title(
    key: tuple[RuntimeName, int, int, str], others: Sequence[tuple[RuntimeName, int, int, str]]
) -> str:
    """The runtime, with the other conditions if columns would otherwise have the same title."""
    runtime, batch, threads, hardware = key
    if sum(other[0] == runtime for other in others) == 1:
        return TITLES[runtime]
    return f"{TITLES[runtime]}, batch {batch}, threads {threads}, {hardware}"


def notes(times: Mapping[str, Column]) -> list[str]:
    """The conditions under which the columns were measured, in words."""
    said = []
    for title, column in times.items():
        line = next(iter(column.values()))
        passes = sorted({each.repeats for each in column.values()})
        counts = " or ".join(f"{count:,}" if count else "many" for count in passes)
        threads = "1 thread" if line.threads == 1 else f"{line.threads} threads"
        said.append(
            f"latency in {title}: batch {line.batch}, {threads}, float32, {line.hardware}; the "
            f"shortest of {counts} passes, dense and finetuned network taking turns"
            f"{OF_PROGRAMS if line.runtime == 'torch' else ''}"
        )
    return said


def measure(
    found: Sequence[Result],
    conditions: Conditions,
    known: Sequence[ExperimentLatency],
    say: Callable[[str], object],
) -> Iterator[ExperimentLatency]:
    """Measure the times that are not known, or from fewer repeats, with the models in DVC's cache,
    one after the other.

    Raises SecateurError if a runtime is not installed; a model that is not in the cache is reported
    in one line.
    """
    from secateur.base.machine import cpu_name
    from secateur.deploy import layer_times

    layer_times.check_packages(conditions.runtimes)
    models, hardware = artifacts.final_models(found), cpu_name()
    have = {line.identity for line in known if line.repeats >= conditions.repeats}
    for number, result in enumerate(found, 1):
        model, place = models[result.name], (conditions.batch, conditions.threads, hardware)
        missing = [
            runtime
            for runtime in conditions.runtimes
            if (result.name, model, runtime, *place) not in have
        ]
        if not missing:
            continue
        say(f"latency: {number} of {len(found)}: {result.name}")
        try:
            networks, image = _networks(result)
        except SecateurError as error:
            say(f"latency: left out: {error}")
            continue
        for runtime in missing:
            ms = layer_times.compare(
                networks, image, runtime=runtime, batch=conditions.batch,
                threads=conditions.threads, repeats=conditions.repeats,
            )  # fmt: skip
            yield ExperimentLatency(
                result.name, model, runtime, *place, ms["dense"], ms["finetuned"],
                conditions.repeats,
            )  # fmt: skip


def _networks(result: Result) -> "tuple[dict[str, nn.Module], Tensor]":
    """The dense and the finetuned network of an experiment, and a random image for them."""
    import torch

    from secateur.nn import checkpoint

    chain = record.chain_of(result.report)
    stages = {"dense": "baseline", "finetuned": chain.last["finetune"]}
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place, name) for name in stages}
        artifacts.link(
            result,
            {record.model_spec(stage).folder: folders[name] for name, stage in stages.items()},
        )
        loaded = {
            name: checkpoint.load(folder / "model.safetensors") for name, folder in folders.items()
        }
        networks = {name: found.model() for name, found in loaded.items()}
    torch.manual_seed(0)
    return networks, torch.randn(1, *loaded["dense"].header.shape)
