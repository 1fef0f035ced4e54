"""Comparison of exported networks: accuracy, size and latency, in float32 and int8, by runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.deploy.latency import Latency
from secateur.deploy.parity import Parity
from secateur.deploy.runtimes import RUNTIMES, for_file
from secateur.deploy.sparse_inference import Gain

DENSE = "baseline"
"""The dense network's name in the report."""
INT8_FILE = "model-int8.onnx"
INT8 = "_int8"
"""Ending of a network's name in the report, for its int8 version."""


def proved(results: Mapping[tuple[Path, str], Parity]) -> dict[str, dict[str, Any]]:
    """File name -> its size and its parity results, from the results by file and runtime.

    Results of the default runtime are next to the size, those of other runtimes below their names.
    """
    report: dict[str, dict[str, Any]] = {}
    for (path, runtime), result in results.items():
        entry = report.setdefault(path.name, {"bytes": path.stat().st_size})
        entry |= asdict(result) if runtime == for_file(path)[0] else {runtime: asdict(result)}
    return report


def add_latencies(report: dict[str, dict[str, Any]], latencies: Sequence[Latency]) -> None:
    """Add the times to the networks' parts of the report, by runtime, threads and batch."""
    for row in latencies:
        for key in ("latency_ms", "latency_iqr_ms"):
            runtime = report[row.model].setdefault(key, {}).setdefault(row.runtime, {})
            by_batch = runtime.setdefault(f"threads_{row.threads}", {})
            by_batch[f"batch_{row.batch}"] = round(getattr(row, key), 5)


def add_gains(report: dict[str, Any], gains: Sequence[Gain]) -> None:
    """Add the gains by sparse layers to one network's part of the report."""
    for gain in gains:
        plain = asdict(gain) | {"layers": list(gain.layers)}
        threads, batch = plain.pop("threads"), plain.pop("batch")
        by_batch = report.setdefault("csr", {}).setdefault(f"threads_{threads}", {})
        by_batch[f"batch_{batch}"] = plain


def rows(
    report: Mapping[str, Mapping[str, Any]], latencies: Sequence[Latency]
) -> list[dict[str, Any]]:
    """One row for each network, precision, runtime, number of threads and images per pass.

    `speedup` is relative to the dense network in float32 in the same runtime.
    """
    dense = {
        (row.runtime, row.threads, row.batch): row.latency_ms
        for row in latencies
        if row.model == DENSE
    }
    found = []
    for row in latencies:
        file = report[row.model][_file(row)]
        found.append(
            {
                "network": row.model.removesuffix(INT8),
                "precision": "int8" if row.model.endswith(INT8) else "float32",
                "runtime": row.runtime,
                "threads": row.threads,
                "batch": row.batch,
                "latency_ms": row.latency_ms,
                "latency_iqr_ms": row.latency_iqr_ms,
                "speedup": dense[row.runtime, row.threads, row.batch] / row.latency_ms,
                "accuracy": _accuracy(file, row),
                "bytes": file["bytes"],
            }
        )
    return found


def _file(row: Latency) -> str:
    """Name of the file that was timed, as in the report."""
    if row.model.endswith(INT8):
        return INT8_FILE
    return str(Path("model").with_suffix(RUNTIMES[row.runtime].suffix))


def _accuracy(file: Mapping[str, Any], row: Latency) -> float:
    """The accuracy of the file in the runtime in which it was timed."""
    if row.model.endswith(INT8):
        found: float = file["accuracy"][row.runtime]
    elif row.runtime == for_file(Path(_file(row)))[0]:
        found = file["accuracy"]
    else:
        found = file[row.runtime]["accuracy"]
    return found
