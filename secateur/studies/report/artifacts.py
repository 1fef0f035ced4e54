"""Artifacts of experiments besides their metrics: layers in Git, histories in DVC's cache.

The cache is read without DVC, by the hashes in dvc.lock and in the lock file of the rounds; files
that a clone has not pulled are left out.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.base.errors import SecateurError
from secateur.pipeline import record, tracked
from secateur.pipeline.record import MODELS, ModelSpec
from secateur.studies.results import Result

if TYPE_CHECKING:
    import pandas as pd

LAYERS = "metrics/layers.csv"


@dataclass(frozen=True)
class Artifacts:
    """Tables of one experiment, as far as they are available."""

    layers: str
    """Content of metrics/layers.csv, or empty."""
    histories: Mapping[str, str]
    """Stage -> content of its history.csv."""
    test_images: int | None
    """Number of test images; None without a run record."""
    revision: str | None
    """Git commit at which the dense network was trained."""


def read(found: Sequence[Result]) -> dict[str, Artifacts]:
    """The artifacts of these experiments by name."""
    contents = tracked.objects([f"{result.commit}:{LAYERS}" for result in found])
    locked = tracked.outs([result.commit for result in found])
    cache = tracked.cache_folder(Path.cwd())
    left = {}
    for result in found:
        layers = (contents[f"{result.commit}:{LAYERS}"] or b"").decode(errors="replace")
        outs = locked[result.commit]
        histories = _histories(outs, cache, record.chain_of(result.report).models)
        left[result.name] = Artifacts(layers, histories, *_record(outs, cache))
    return left


def link(result: Result, folders: Mapping[str, Path]) -> None:
    """Recreate tracked folders of an experiment at other paths, as links into DVC's cache.

    Raises SecateurError if the cache lacks one of them.
    """
    outs = tracked.outs([result.commit])[result.commit]
    cache = tracked.cache_folder(Path.cwd())
    for path, target in folders.items():
        listing = tracked.listing(cache, outs.get(path))
        if listing is None:
            raise SecateurError(f"{result.name}: {path} is not in DVC's cache (`dvc exp pull`)")
        for name, md5 in listing.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(tracked.place(cache, md5).resolve())


def final_models(found: Sequence[Result]) -> dict[str, str]:
    """Hash of the folder of each experiment's finetuned network, by name; empty if unknown."""
    locked = tracked.outs([result.commit for result in found])
    models = {}
    for result in found:
        folder = record.model_spec(record.chain_of(result.report).last["finetune"]).folder
        models[result.name] = locked[result.commit].get(folder, "")
    return models


def validation_curves(artifacts: Sequence[Artifacts]) -> dict[str, list[float]]:
    """Stage -> validation accuracy by epoch, a fraction, mean over the experiments."""
    import pandas as pd

    curves = {}
    for stage in dict.fromkeys(stage for each in artifacts for stage in each.histories):
        columns = []
        for each in artifacts:
            frame = _frame(each.histories.get(stage, ""))
            if "val_accuracy" in frame:
                columns.append(frame["val_accuracy"])
        if columns:
            curves[stage] = [float(v) for v in pd.concat(columns, axis=1).mean(axis=1)]
    return curves


def layer_sparsity(artifacts: Sequence[Artifacts]) -> dict[str, float]:
    """Layer -> share of the dense layer's weights that is pruned, mean over the experiments."""
    import pandas as pd

    columns = []
    for each in artifacts:
        frame = _frame(each.layers)
        if {"model", "layer", "sparsity_of_dense"} <= set(frame):
            final = frame[frame.model == "finetuned"]
            columns.append(final.set_index("layer").sparsity_of_dense)
    if not columns:
        return {}
    mean = pd.concat(columns, axis=1).mean(axis=1)
    return {str(layer): float(value) for layer, value in mean.items()}


def _record(outs: Mapping[str, str], cache: Path) -> tuple[int | None, str | None]:
    """Number of test images and Git commit, from the record of the dense network."""
    path = str(MODELS["baseline"].record)
    try:
        found = record.parse(tracked.place(cache, outs[path]).read_bytes(), path)
    except (OSError, KeyError, SecateurError):
        return None, None
    count = found.dataset.get("test")
    return (count if isinstance(count, int) else None), found.revision


def _histories(
    outs: Mapping[str, str], cache: Path, models: Mapping[str, ModelSpec]
) -> dict[str, str]:
    """Stage -> its history, if the cache has it."""
    found = {}
    for stage, model in models.items():
        content = tracked.file_in(cache, outs.get(model.folder), model.history.name)
        if content is not None:
            found[stage] = content.decode(errors="replace")
    return found


def _frame(text: str) -> "pd.DataFrame":
    """The table in a CSV file; an empty one if it is damaged."""
    import pandas as pd

    try:
        return pd.read_csv(io.StringIO(text))
    except (pd.errors.ParserError, pd.errors.EmptyDataError):
        return pd.DataFrame()
