"""`secateur compare`: a table of experiments in ten columns."""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.base import plugin
from secateur.base.errors import SecateurError
from secateur.pipeline.params_file import short_key
from secateur.studies import results
from secateur.studies.results import Result
from secateur.studies.rounds import of_first_round

COLUMNS = {
    "experiment": "experiment",
    "differs": "differs in",
    "seed": "seed",
    "dense": "dense acc.",
    "final": "final acc.",
    "change": "change",
    "compression": "compr.",
    "macs": "MACs left",
    "latency": "ms",
    "speedup": "speed-up",
}
"""Key -> heading. --sort, --json and --csv use the keys, with fractions and milliseconds."""


def command(options: argparse.Namespace) -> None:
    """Print the table of the requested experiments."""
    asked = [name for name in options.experiment if name != results.WORKSPACE]
    if options.experiment:
        results.check_names(asked)
        found = results.read(asked)
    else:
        found = results.read_commits(results.experiments(options.all))
    if not options.experiment and not options.all and (others := results.elsewhere()):
        print(
            f"left out: {others} experiment{'s' * (others > 1)} of other commits; "
            "`secateur compare --all` lists them too",
            file=sys.stderr,
            flush=True,
        )
    wanted = not options.experiment or results.WORKSPACE in options.experiment
    here = results.workspace() if wanted else None
    rows = table([here, *found] if here else found)
    if not rows:
        raise SecateurError("no experiment has a result; `dvc exp run` or `dvc repro` makes one")
    rows = _sorted(rows, options.sort)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print(rows)


def _sorted(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Names and seeds in order, the best first of all others; a latency that is missing is last."""
    highest_first = key in ("dense", "final", "change", "compression", "speedup")
    known = [row for row in rows if row[key] == row[key]]  # NaN is not
    found = sorted(known, key=lambda row: row[key], reverse=highest_first)
    return found + [row for row in rows if row[key] != row[key]]


def table(found: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each result, by the keys of COLUMNS."""
    keys = results.different(found)
    return [
        {
            "experiment": result.name,
            "differs": differences(result, keys),
            "seed": result.seed,
            "dense": result.dense,
            "final": result.final,
            "change": result.final - result.dense,
            "compression": result.compression,
            "macs": result.macs,
            "latency": float(result.report["finetuned"].get("latency_ms", float("nan"))),
            "speedup": result.speedup,
        }
        for result in found
    ]


def differences(result: Result, keys: Sequence[str]) -> str:
    """The settings under these keys that the result used, in words."""
    chosen = {str(kind): key for kind, key in plugin.KEYS.items()}
    words = []
    for key in keys:
        kind, _, rest = _by_round(key)[1].partition(".")
        if kind in chosen and rest.split(".")[0] != result.params.get(chosen[kind]):
            continue  # a setting of a plug-in that this result did not use
        if result.params.get(key) is not None:
            value = result.params[key]
            told = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else value
            words.append(f"{_short(key, keys)} {told}")
    return ", ".join(words)


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, with as many parts before it as make it unique in its round.

    The name of a further round comes first.
    """
    round_name, own = _by_round(key)
    own = short_key(own, [other for name, other in map(_by_round, keys) if name == round_name])
    return f"{round_name} {own}" if round_name else own


def _by_round(key: str) -> tuple[str, str]:
    """The further round that a setting belongs to, or "", and its key in the first round."""
    if not key.startswith("rounds."):
        return "", key
    name = key.split(".")[1]
    return name, of_first_round(key) or "after"


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    for key, heading in COLUMNS.items():
        left = key in ("experiment", "differs")
        shown.add_column(heading, justify="left" if left else "right", no_wrap=key != "differs")
    for row in rows:
        cells = (
            row["experiment"],
            row["differs"],
            str(row["seed"]),
            f"{row['dense']:.2%}",
            f"{row['final']:.2%}",
            f"{100 * row['change']:+.2f}",
            f"{row['compression']:.1f}x",
            f"{row['macs']:.1%}",
            f"{row['latency']:.3f}",
            f"{row['speedup']:.2f}x",
        )
        shown.add_row(*map(Text, cells))  # a list of names in a str is a tag of rich
    width = Console().width if Console().is_terminal else 160
    Console(width=max(110, width)).print(shown)
