"""Results of experiments, read from the files in Git, without models, DVC or MLflow."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from secateur.base.documents import YAML_LOADER, parse_json
from secateur.base.errors import SecateurError, cut, did_you_mean, shorten
from secateur.pipeline import record, tracked
from secateur.pipeline.params_file import flat, with_numbers
from secateur.studies.execution.snapshot import git

REPORT, PARAMS = "metrics/evaluate.json", "params.yaml"
NAMESPACE = "refs/exps"
"""DVC stores an experiment as refs/exps/<two digits>/<other digits of its parent>/<name>."""
WORKSPACE = "workspace"
"""Name of the result in the project's folder."""
SHOWN = 10
"""Number of experiments that are listed in the error for an unknown name."""


@dataclass(frozen=True)
class Cell:
    """An experiment and its place in a comparison."""

    experiment: str
    method: str
    point: str
    """Operating point, in words."""
    seed: int
    control: str | None = None


@dataclass(frozen=True)
class Result:
    """Settings and results of one experiment, or of the workspace."""

    name: str
    params: dict[str, Any]
    """Values of params.yaml, by dotted key."""
    report: dict[str, Any]
    """The content of metrics/evaluate.json."""
    commit: str = ""
    """Hash of the commit that it was read from; empty for the workspace."""

    @property
    def dense(self) -> float:
        """Test accuracy of the dense network, a fraction."""
        return float(self.report["baseline"]["accuracy"])

    @property
    def final(self) -> float:
        """Test accuracy of the finetuned network, a fraction."""
        return float(self.report["finetuned"]["accuracy"])

    @property
    def compression(self) -> float:
        """Dense parameters / non-zeros that are left."""
        return float(self.report["compression"])

    @property
    def macs(self) -> float:
        """Share of the dense network's multiply-accumulates that is left."""
        return 1 / float(self.report["theoretical_speedup"])

    @property
    def speedup(self) -> float:
        """Measured latency of the dense network / latency of the finetuned network."""
        return float(self.report["measured_speedup"])

    @property
    def rounds(self) -> dict[str, dict[str, float]]:
        """Round -> accuracy, compression and share of MACs after it; empty for a single round."""
        dense = self.report["baseline"]
        return {
            name: {
                "accuracy": float(row["accuracy"]),
                "compression": float(row["compression"]),
                "macs": float(row["macs"]) / float(dense["macs_dense"]),
            }
            for name, row in self.report.get("rounds", {}).items()
        }

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return int(self.report["seed"])


def experiments(everything: bool = False) -> dict[str, str]:
    """Name -> commit of the experiments of HEAD, or of all commits.

    With all commits, ambiguous names become `<name>@<the first 7 digits of the commit>`.
    """
    head = git(Path.cwd(), "rev-parse", "HEAD")
    listed = [(name, commit) for base, name, commit in _listed() if everything or base == head]
    count = Counter(name for name, _ in listed)
    return {name if count[name] == 1 else f"{name}@{commit[:7]}": commit for name, commit in listed}


def check_names(names: Iterable[str]) -> None:
    """Raise SecateurError for the first name that is neither an experiment nor a Git revision, or
    that several experiments of other commits have."""
    listed, clear = _listed(), experiments(everything=True) | experiments()
    known = {name: None for _, name, _ in listed} | clear
    for name in names:
        if name in known and name not in clear:
            own = ", ".join(f"{name}@{commit[:7]}" for _, other, commit in listed if other == name)
            raise SecateurError(
                f"experiment {shorten(name)}: HEAD has none, and several other commits have one: "
                f"{own}"
            )
        if name not in known and not _is_revision(name):
            here = sorted(experiments())
            there = ", ".join(here[:SHOWN]) or "none on this commit"
            there += f" and {len(here) - SHOWN} more" if len(here) > SHOWN else ""
            cure = "; `secateur compare --all` lists those of every commit"
            if name == WORKSPACE:
                cure = "; `dvc exp save dvc.yaml -n NAME` makes one of the workspace"
            raise SecateurError(
                f"experiment {shorten(name)}: there is none of this name, and no Git revision; "
                f"there are: {there}{did_you_mean(name, known) or cure}"
            )


def _is_revision(name: str) -> bool:
    """Whether Git knows a commit by this name."""
    try:
        git(Path.cwd(), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except SecateurError:
        return False
    return True


def elsewhere() -> int:
    """Number of experiments of other commits than HEAD."""
    return len(_listed()) - len(experiments())


def _listed() -> list[tuple[str, str, str]]:
    """For all experiments: the commit that it is based on, its name and its own commit."""
    listed = git(Path.cwd(), "for-each-ref", "--format=%(objectname) %(refname)", NAMESPACE)
    found = []
    for line in filter(None, listed.split("\n")):
        commit, _, ref = line.partition(" ")
        parts = ref.split("/")
        if len(parts) == 5 and len(parts[2]) == 2:
            found.append((parts[2] + parts[3], parts[4], commit))
    return found


def read(names: Iterable[str], revision: str | None = None) -> list[Result]:
    """Results of experiments or Git revisions by name; unreadable ones are reported in one line.

    With `revision`, names refer to experiments on this commit, whatever is checked out.
    """
    return read_commits(commits(names, revision))


def read_commits(wanted: Mapping[str, str]) -> list[Result]:
    """The results of these commits; `wanted` is name of the result -> commit."""
    paths = [f"{commit}:{path}" for commit in wanted.values() for path in (PARAMS, REPORT)]
    contents = tracked.objects(paths)
    found = []
    for name, commit in wanted.items():
        try:
            texts = [contents[f"{commit}:{path}"] for path in (PARAMS, REPORT)]
            found.append(replace(parse(name, *texts), commit=commit))
        except SecateurError as error:
            print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
    return found


def commits(names: Iterable[str], revision: str | None = None) -> dict[str, str]:
    """Name -> commit of these experiments; any other name is that of a Git revision.

    Of several experiments with the same name, the one of HEAD is taken; `<name>@<commit>`, as in
    `experiments`, names another, and `check_names` asks for it if HEAD has none. With `revision`,
    each name is the ref of an experiment on this commit.
    """
    if revision is not None:
        return {name: f"{NAMESPACE}/{revision[:2]}/{revision[2:]}/{name}" for name in names}
    known = {name: commit for _, name, commit in _listed()}
    known |= experiments(everything=True) | experiments()
    return {name: known.get(name, name) for name in names}


def workspace() -> Result | None:
    """The result in the project's folder; None without one.

    A result that is damaged, or whose settings differ from params.yaml, is reported in one line.
    """
    try:
        found = parse(WORKSPACE, Path(PARAMS).read_bytes(), Path(REPORT).read_bytes())
        settings = yaml.load(Path(PARAMS).read_bytes(), YAML_LOADER)
        stage = tracked.outdated_stage(Path.cwd(), settings, REPORT)
        if stage is None:
            return found
        print(
            f"workspace: left out: {PARAMS} has changed since {REPORT} was made (stage {stage}); "
            "run `dvc repro`",
            file=sys.stderr,
            flush=True,
        )
    except FileNotFoundError:
        pass
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        print(f"workspace: left out: dvc.lock: {cut(repr(error))}", file=sys.stderr, flush=True)
    except (OSError, SecateurError) as error:
        print(f"workspace: left out: {error}", file=sys.stderr, flush=True)
    return None


def parse(name: str, params: bytes | None, report: bytes | None) -> Result:
    """The result in these two files; SecateurError, naming the file, if one is damaged."""
    if params is None or report is None:
        raise SecateurError(f"it has no {PARAMS if params is None else REPORT}")
    try:
        settings = yaml.load(params, YAML_LOADER)
        result = Result(name, flat(with_numbers(settings)), parse_json(report))
        record.chain_of(result.report)
        numbers = [result.dense, result.final, result.compression, result.macs, result.speedup]
        numbers += [number for row in result.rounds.values() for number in row.values()]
        if not all(number >= 0 for number in numbers) or result.seed < 0:
            raise ValueError("a number below zero")
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SecateurError(f"{REPORT} or {PARAMS}: {cut(repr(error))}") from None
    except ZeroDivisionError:
        raise SecateurError(f"{REPORT}: theoretical_speedup or macs_dense = 0") from None
    return result


NO_EFFECT = (
    r"(export|sensitivity)(\..+)?|evaluate\.(latency_repeats|last_epochs)|datasets\.\w+\.memory_mb"
)
"""Settings that change no result: of other pipelines, of measurement, and of memory."""
OFF: tuple[Any, ...] = (0, False, "none", [], {})
"""Values of settings that do nothing."""


def different(results: Sequence[Result]) -> list[str]:
    """Keys, except the seed, whose values are not the same in all results."""
    keys = {key: None for result in results for key in result.params if key != "seed"}
    return [key for key in keys if are_different(key, results)]


def are_different(key: str, results: Sequence[Result]) -> bool:
    """Whether a setting that can change a result has several values.

    A version of Secateur that lacks the setting did the same as one where it is turned off.
    """
    if not has_effect(key) or (key.startswith("latency.") and not _latency_counts(results)):
        return False
    values = [result.params.get(key) for result in results]
    if any(key not in result.params for result in results):
        values = [None if value in OFF else value for value in values]
    return any(value != values[0] for value in values)


def has_effect(key: str) -> bool:
    """Whether a setting can change a result."""
    return re.fullmatch(NO_EFFECT, key) is None


def _latency_counts(results: Sequence[Result]) -> bool:
    """Whether a round of any result uses a latency table."""
    chosen = [
        value
        for result in results
        for key, value in result.params.items()
        if f".{key}".endswith(".prune.latency")
    ]
    return any(value not in (None, "none") for value in chosen)
