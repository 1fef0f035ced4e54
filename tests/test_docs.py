"""The pages in docs/: their examples print what the page shows, and the site is complete."""

import contextlib
import io
import re
from pathlib import Path
from typing import get_args

import torch
import yaml

import secateur
from secateur.archs import lenet300
from secateur.base import plugin
from secateur.nn import checkpoint
from secateur.pruning.criteria import Criterion

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def model_of_the_pipeline(folder):
    """A model as `dvc repro` leaves it in models/finetuned, untrained."""
    settings = lenet300.Settings()
    header = checkpoint.Header(
        "lenet300", settings.model_dump(), [str(k) for k in range(10)], [1, 8, 8], [0.3], [0.4],
        split="", stage="finetune",
    )  # fmt: skip
    model = lenet300.build(settings, 10, (1, 8, 8))
    checkpoint.save(folder / "models/finetuned/model.safetensors", header, model, {})


def test_the_example_prints_what_the_page_shows(tmp_path, monkeypatch):
    """Python blocks run in one namespace; each is followed by its output, if it has any."""
    torch.manual_seed(0)
    model_of_the_pipeline(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = BLOCK.findall(PAGE.read_text())
    assert found[0][0] == "python" and len(found) > 10
    namespace, printed = {"__name__": "__main__"}, ""
    for kind, content in found:
        if kind == "text":
            assert printed == content
            printed = ""
            continue
        assert not printed, f"the page does not show {printed!r}"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(content, str(PAGE), "exec"), namespace)
        printed = out.getvalue()
    assert not printed


CFF = {
    "cff-version", "message", "title", "authors", "abstract", "type", "version", "license",
    "keywords", "references",
}  # fmt: skip
REFERENCE = {"type", "title", "authors", "journal", "collection-title", "year", "notes"}


def test_the_citation_file_names_papers_in_the_fields_of_cff_1_2_0():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert set(cited) == CFF and cited["cff-version"] == "1.2.0"
    project = (ROOT / "secateur/__init__.py").read_text()
    assert f'__version__ = "{cited["version"]}"' in project
    for paper in cited["references"]:
        place = {"article": "journal", "conference-paper": "collection-title"}[paper["type"]]
        assert set(paper) == REFERENCE - {"journal", "collection-title"} | {place}
        assert all(set(person) == {"family-names", "given-names"} for person in paper["authors"])
        assert isinstance(paper["year"], int)


METHODS = (
    "granularity 2:4", "granularity group", "reduce", "normalise", "ranking isomorphic",
    "ratios by stage", "target latency", "finetune.budget compute", "finetune.init rewind",
    "finetune.init orthogonal", "schedule_after", "distillation", "distillation.features",
    "average.kind swa", "augment.cutout", "progressive_resizing",
    "conversion to group convolutions", "regrow of penalty gradual",
    "growth random of penalty rigl",
)  # fmt: skip
"""Settings that select a published method, with its name in CITATION.cff."""


def test_every_method_is_named_beside_a_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    notes = "; ".join(paper["notes"] for paper in cited)
    kinds = ("penalties", "parametrizations", "pruners")
    plugins = {name for kind in kinds for name in plugin.names(kind)} - {"none"}
    assert plugins <= set(re.findall(r"\w+", notes))
    settings = [*METHODS, *(f"criterion {name}" for name in get_args(Criterion))]
    assert [name for name in settings if not re.search(rf"{name}(?![\w.])", notes)] == []


def test_the_reference_has_every_room_and_kind_of_plugin():
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").rglob("*.md"))
    folders = {path.parent.name for path in ROOT.glob("secateur/*/__init__.py")}
    assert set(re.findall(r"^::: secateur\.([a-z]+)$", pages, re.MULTILINE)) >= folders


def test_the_reference_has_every_public_name_of_the_package():
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").rglob("*.md"))
    assert set(re.findall(r"^::: secateur\.(\w+)$", pages, re.MULTILINE)) >= set(secateur.__all__)


def test_the_site_is_built_without_warnings_and_asks_nothing_of_the_network(site):
    folder, status, messages = site
    assert status == 0, messages
    pages = "".join(page.read_text() for page in folder.rglob("*.html"))
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?:https?:)?//""", pages)
    assert "channel_graph" in (folder / "reference/api.html").read_text()
