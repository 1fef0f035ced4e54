"""The page of a comparison: a self-contained HTML file, and its parts as separate files.

These are index.html, table.md, table.csv, table.tex, rounds.csv (with several rounds), and the
plots as SVG and PNG.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from secateur.base import files
from secateur.base.errors import SecateurError
from secateur.pipeline import console
from secateur.studies import results
from secateur.studies.marks import PAGE, REPORTS
from secateur.studies.report import (
    anchors,
    artifacts,
    by_hand,
    fairness,
    latencies,
    plots,
    rounds,
    statistics,
    tables,
    trials,
)
from secateur.studies.report.anchors import Anchor
from secateur.studies.report.artifacts import Artifacts
from secateur.studies.report.latencies import Conditions
from secateur.studies.report.statistics import Interval
from secateur.studies.report.tables import Row
from secateur.studies.results import Cell, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def command(options: argparse.Namespace) -> None:
    """`secateur report`: the page of experiments given by name."""
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", options.name):
        raise SecateurError(f"--name {options.name}: letters, digits, '-', '_' and '.' are allowed")
    results.check_names(options.experiment)
    found = results.read(dict.fromkeys(options.experiment))
    pair: list[str] = []
    if len(found) == 2:  # two single models
        from secateur.studies.report import predictions

        try:
            pair = [predictions.words(found)]
        except SecateurError as error:
            console.say(f"no comparison image by image: {error}")
    folder = REPORTS / options.name
    measure(folder, found, options)
    cells = by_hand.cells_of(found)
    doubled = by_hand.left_out(found, cells)
    for sentence in doubled:
        console.say(sentence)
    write(folder, options.name, cells, said=[*pair, *doubled])


def measure(folder: Path, found: Sequence[Result], options: argparse.Namespace) -> None:
    """Measure the requested latencies, and store them in the folder of the page."""
    if options.latency:
        conditions = Conditions(options.latency, options.batch, options.threads, options.repeats)
        times = latencies.read(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for time in latencies.measure(found, conditions, tuple(times), console.say):
            times = latencies.replaced(times, time)
            latencies.write(folder, times)


def write(
    folder: Path,
    title: str,
    cells: Sequence[Cell],
    digest: str = "",
    said: Sequence[str] = (),
    objectives: Sequence[str] = (),
    revision: str | None = None,
) -> None:
    """Write the page of these experiments into `folder`; SecateurError if none can be read.

    `digest`, written near the beginning of index.html, identifies the state it was made from;
    `said` are further notes; `objectives` are those of a search whose trials are in the folder;
    `revision` is the commit that the experiments are based on, by default the one checked out.
    """
    found = results.read([cell.experiment for cell in cells], revision)
    by_name = {result.name: result for result in found}
    pairs = [(cell, by_name[cell.experiment]) for cell in cells if cell.experiment in by_name]
    if not pairs:
        raise SecateurError(f"{title}: none of its experiments can be read")
    times = latencies.columns(found, latencies.read(folder))
    rows = tables.rows(pairs, times)
    published = _published(rows)
    figures = {cost: _figure(rows, cost, published) for cost in ("compression", "macs", "latency")}
    figures |= {_file_name(runtime): _figure(rows, runtime, []) for runtime in times}
    left = artifacts.read([result for row in rows for result in row.results])
    figures |= _details(rows, left)
    searched = trials.figure(folder, objectives) if objectives else None
    if searched is not None:
        figures["trials"] = searched
    folder.mkdir(parents=True, exist_ok=True)
    _remove_old(folder, figures)
    pictures = {}
    for name, figure in figures.items():
        pictures[name] = plots.svg(figure)
        files.write_bytes(folder / f"{name}.svg", pictures[name])
        files.write_bytes(folder / f"{name}.png", plots.png(figure))
    files.write_text(folder / "table.csv", tables.as_csv(rows))
    if rounds.lines(rows):
        files.write_text(folder / ROUNDS, rounds.as_csv(rows))
    files.write_text(folder / "table.md", tables.as_markdown(rows))
    files.write_text(folder / "table.tex", tables.as_latex(rows))
    files.write_text(
        folder / PAGE,
        _html(
            title,
            rows,
            pictures,
            [*_notes(rows, left), *latencies.notes(times), *said],
            published,
            digest,
        ),
    )
    print(f"{folder / PAGE}: experiments: {len(pairs)}, rows: {len(rows)}", flush=True)


def _remove_old(folder: Path, figures: Mapping[str, "Figure"]) -> None:
    """Remove figures and tables of an earlier page, of other experiments, that this one lacks."""
    (folder / ROUNDS).unlink(missing_ok=True)
    for file in [*folder.glob("*.svg"), *folder.glob("*.png")]:
        if (file.stem in CAPTIONS or file.stem.startswith("latency-")) and file.stem not in figures:
            file.unlink()


def _published(rows: Sequence[Row]) -> list[Anchor]:
    """Published results for the network and data set of the rows, if all rows have the same."""
    found = [result for row in rows for result in row.results]
    kinds = {(str(one.report.get("dataset")), str(one.report.get("arch"))) for one in found}
    if len(kinds) != 1:
        return []
    ((dataset, arch),) = kinds
    depths = {one.params.get(f"archs.{arch}.depth") for one in found}
    if len(depths) != 1:
        return []
    (depth,) = depths
    return anchors.of(dataset, arch, depth if isinstance(depth, int) else None)


ROUNDS = "rounds.csv"
"""Beside the page: the results of each round, if there are several."""

TITLES = {
    "compression": "parameters of the dense network / non-zeros that are left",
    "macs": "MACs of the dense network / MACs that are left",
    "latency": "latency of the dense network / latency, both dense in torch",
}


def _figure(rows: Sequence[Row], cost: str, published: Sequence[Anchor]) -> "Figure":
    """Accuracy against `cost`: a key of TITLES or the title of a runtime; rows without it are left
    out."""
    lines: dict[str, list[plots.Point]] = {}
    rows = [row for row in rows if not math.isnan(tables.gain(row, cost))]
    for row in rows:
        accuracy = row.final
        point = plots.Point(tables.gain(row, cost), accuracy.mean, accuracy.half_width)
        lines.setdefault(row.label, []).append(point)
    known = [(a.method, getattr(a, cost, None), a.accuracy) for a in published]
    others = [(method, value, accuracy) for method, value, accuracy in known if value is not None]
    return plots.trade_off(lines, tables.dense(rows), tables.best(rows, cost), _axis(cost), others)


def _axis(cost: str) -> str:
    """Label of the axis of a cost."""
    return TITLES.get(cost, f"latency of the dense network / latency, in {cost}")


def _file_name(runtime: str) -> str:
    """File name of the figure of a runtime that was measured."""
    return "latency-" + re.sub(r"[^a-z0-9]+", "-", runtime.lower()).strip("-")


MOST_CURVES = 10
"""Largest number of methods whose curves are drawn; more cannot be told apart."""


def _details(rows: Sequence[Row], left: Mapping[str, Artifacts]) -> "dict[str, Figure]":
    """Curves of each method's last operating point, and sparsity by layer of all rows."""
    of_row = [[left[result.name] for result in row.results] for row in rows]
    last = {row.label: (row, found) for row, found in zip(rows, of_row, strict=True)}
    lines = {
        f"{row.label} {row.point}": artifacts.validation_curves(found)
        for row, found in last.values()
        if not row.control
    }
    drawn = {label: line for label, line in lines.items() if line}
    figures = {}
    if drawn:
        figures["curves"] = plots.curves(dict(list(drawn.items())[:MOST_CURVES]))
    by_round = {
        f"{row.label} {row.point}": [_point(figures) for figures in rounds.steps(row).values()]
        for row, _ in last.values()
    }
    drawn_rounds = {label: points for label, points in by_round.items() if points}
    if drawn_rounds:
        chosen = dict(list(drawn_rounds.items())[:MOST_CURVES])
        dense = tables.dense(rows)
        figures["rounds"] = plots.trade_off(chosen, dense, [], TITLES["compression"], [])
    sparsity = {
        f"{row.label} {row.point}": artifacts.layer_sparsity(found)
        for row, found in zip(rows, of_row, strict=True)
    }
    if any(sparsity.values()):
        figures["layers"] = plots.layers({k: v for k, v in sparsity.items() if v})
    return figures


def _point(figures: Mapping[str, Interval]) -> plots.Point:
    """The result of a round, as a point of a figure."""
    accuracy = figures["accuracy"]
    return plots.Point(figures["compression"].mean, accuracy.mean, accuracy.half_width)


CAPTIONS = {
    "compression": "Accuracy against compression; bars are 95 % intervals over seeds, up to 100 %.",
    "macs": "Accuracy against MACs; bars are 95 % intervals over seeds, up to 100 %.",
    "latency": "Accuracy against latency as measured by evaluate; zeros save no time in a dense "
    "layer.",
    "curves": "Validation accuracy by epoch, mean over seeds, at the last operating point of each "
    f"method (the first {MOST_CURVES}).",
    "rounds": "Accuracy against compression after each round, at the last operating point of each "
    f"method (the first {MOST_CURVES}); bars are 95 % intervals over seeds, up to 100 %.",
    "layers": "Sparsity by layer of the finetuned networks, mean over seeds.",
    "trials": "All trials of the search, on the validation images; trials.csv has the values.",
}


MEASURED = "Accuracy against latency, as measured for this page."


def _notes(rows: Sequence[Row], left: Mapping[str, Artifacts]) -> list[str]:
    """What is compared, and the limits of the comparison."""
    revisions = sorted({each.revision[:10] for each in left.values() if each.revision})
    return [
        *tables.notes(rows),
        *fairness.notes(rows),
        f"revision of the code: {', '.join(revisions) or 'not recorded'}",
        *_image_notes(rows, left),
    ]


def _image_notes(rows: Sequence[Row], left: Mapping[str, Artifacts]) -> list[str]:
    """What the number of test images means for the accuracy, for each data set.

    Controls do not count: the dense network of `smaller` is not trained.
    """
    dense: dict[tuple[str, int], list[float]] = {}
    methods = [row for row in rows if not row.control] or rows
    for result in (result for row in methods for result in row.results):
        if images := left[result.name].test_images:
            dense.setdefault((str(result.report.get("dataset")), images), []).append(result.dense)
    said = []
    for (dataset, images), accuracies in sorted(dense.items()):
        mean = fmean(accuracies)
        if 0 < mean < 1:
            error = 100 * statistics.standard_error(mean, images)
            what = f"a standard error of {error:.2f} points; smaller differences"
        else:
            low, high = statistics.wilson(mean, images)
            what = f"an interval of {100 * low:.2f} to {100 * high:.2f} % (95 %, Wilson)"
            what += "; differences within it"
        said.append(
            f"{f'{dataset}: ' * (len(dense) > 1)}{images:,} test images: their number alone gives "
            f"the dense accuracy {what} say nothing about the methods"
        )
    return said


def _html(
    title: str,
    rows: Sequence[Row],
    pictures: Mapping[str, bytes],
    notes: Sequence[str],
    published: Sequence[Anchor],
    digest: str,
) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    svg = {name: content[content.index(b"<svg") :].decode() for name, content in pictures.items()}
    svg = {name: re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
           for name, text in svg.items()}  # fmt: skip
    return environment.from_string(TEMPLATE).render(
        title=title,
        digest=digest,
        rows=rows,
        svg=[(CAPTIONS.get(name, MEASURED), picture) for name, picture in svg.items()],
        headings=tables.headings(rows),
        cells=tables.cells,
        pairs=fairness.differences(rows),
        enough=fairness.ENOUGH,
        notes=notes,
        published=published,
        volumes=tables.volumes(rows),
        by_round=rounds.lines(rows),
        text=tables.text,
    )


TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="digest" content="{{ digest }}">
<style>
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
 color: #222}
.wide {overflow: auto; max-height: 46rem} thead th {position: sticky; top: 0; background: #fff}
table {border-collapse: collapse; font-variant-numeric: tabular-nums}
th, td {padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4;
 white-space: nowrap}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {text-align: left}
thead th {border-bottom: 2px solid #888} svg {max-width: 100%; height: auto}
.figures {display: grid; gap: 1.5rem;
 grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr))}
figure {margin: 0} figure svg {width: 100%} figcaption {color: #555; font-size: 13px}
details {color: #555; font-size: 13px} h2 {margin-top: 2rem}
</style></head><body>
<h1>{{ title }}</h1>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<h2>Figures</h2>
<div class="figures">{% for caption, picture in svg %}
<figure>{{ picture | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>
<h2>Accuracy and cost</h2>
<p>Mean over seeds ± half-width of the 95 % t-interval of the mean. Accuracies are of the test
images, in percent.</p>
<div class="wide"><table><thead><tr>{% for h in headings %}<th>{{ h }}</th>{% endfor %}
<th>seeds</th></tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in cells(row) %}<td>{{ cell }}</td>{% endfor %}
<td><details><summary>{{ row.results | length }}</summary>
{% for result in row.results | sort(attribute="seed") %}
seed {{ result.seed }}: {{ "%.2f" | format(100 * result.final) }} % at
{{ "%.2f" | format(result.compression) }}x<br>{% endfor %}</details></td></tr>{% endfor %}
</tbody></table></div>
{% if by_round %}<h2>By round</h2>
<p>Results after each round; the network of the last round is the one in the table above.</p>
<div class="wide"><table><thead><tr><th>method</th><th>point</th><th>round</th><th>accuracy %</th>
<th>compression</th><th>MACs left %</th></tr></thead><tbody>
{% for row, name, figures in by_round %}<tr><td>{{ row.label }}</td><td>{{ row.point }}</td>
<td>{{ name }}</td><td>{{ text(figures.accuracy, 100) }}</td>
<td>{{ text(figures.compression) }}</td><td>{{ text(figures.macs, 100) }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
<h2>Differences between methods, paired by seed</h2>
<p>Points of final accuracy, at the same operating point; p of the paired t-test, adjusted by Holm
for all rows of this table. The setup says what is the same for both (Wang et al., arXiv
2301.05219): S1 network, data and ratio, S2 the base model too, S3 epochs (.1) and schedule (.2) of
finetuning, S4 those of sparse-train; the authors ask for {{ enough }} at least.</p>
{% if pairs %}
<div class="wide"><table><thead><tr><th>first</th><th>second</th><th>point</th><th>seeds</th>
<th>first − second</th><th>p</th><th>Holm</th><th></th><th>setup</th></tr></thead><tbody>
{% for pair in pairs %}<tr>{% for cell in pair %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% else %}<p>No two methods share an operating point and seeds.</p>{% endif %}
{% if published %}<h2>Published results</h2>
<p>Results of others, as given in the sources, with other base models and trainings.</p>
<div class="wide"><table><thead><tr><th>method</th><th>source</th><th>accuracy %</th>
<th>compression</th><th>MACs, dense / left</th></tr></thead><tbody>
{% for a in published %}<tr><td>{{ a.method }}</td>
<td style="white-space: normal">{{ a.source }}</td>
<td>{{ "%.2f" | format(100 * a.accuracy) }}</td><td>{{ a.compression or "" }}</td>
<td>{{ a.macs or "" }}</td></tr>{% endfor %}</tbody></table></div>{% endif %}
<h2>Hypervolume</h2>
<p>Area between the front of (share of MACs left, accuracy) and the reference point, which is all
MACs and an accuracy of 0.</p>
<div class="wide"><table><thead><tr><th>method</th><th>hypervolume</th></tr></thead><tbody>
{% for label, volume in volumes.items() %}<tr><td>{{ label }}</td>
<td>{{ "%.4f" | format(volume) }}</td></tr>{% endfor %}</tbody></table></div>
</body></html>
"""
