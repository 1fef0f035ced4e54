"""prepare: read the data set and divide it into train, val and test.

Reads   the files of the data set, under SECATEUR_DATA (default: data/raw); missing files are
        downloaded if possible. `digits` needs no files.
Writes  data/<dataset>/images.safetensors and about.json: the images as uint8 or, for a large data
        set, the names of their files; the stratified split with its hash, class names,
        normalisation and augmentation.

DVC does not watch SECATEUR_DATA. When pictures there have changed, raise
datasets.<name>.version, or run `dvc repro -f prepare`.
"""

from pathlib import Path

from secateur.base import plugin, stage
from secateur.base.settings import section
from secateur.data import dataset
from secateur.pipeline import console, preflight


def main() -> None:
    """Read, divide, write."""
    params = stage.open_stage("prepare").params
    name = params.dataset
    with section(f"datasets.{name}"):
        images = plugin.load("datasets", name).read(params.chosen("datasets"), stage.raw_folder())
    if images.val is not None:
        console.say("prepare: the data set's own val is used; data.validation is not applied")
    prepared = dataset.prepare(name, images, params.data.validation, params.data.seed)
    info = prepared.info
    preflight.check_settings(info)
    dataset.save(Path("data") / name, prepared)
    counts = ", ".join(f"{count:,} {part}" for part, count in info.counts.items())
    shape = "x".join(map(str, info.shape))
    console.say(
        f"prepare: {name}, {shape} pixels, {len(info.classes)} classes: {counts}; "
        f"split {info.hash[:12]}"
    )


if __name__ == "__main__":
    console.main(main, "prepare", __doc__)
