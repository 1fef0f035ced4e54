"""prepare: read the data set and divide it into train, val and test.

Reads   the files of the data set, under SECATEUR_DATA (default: data/raw); downloads what is not
        there and can be downloaded. `digits` needs no files.
Writes  data/<dataset>/images.safetensors and about.json: the images as they are (uint8), the
        division by class with its hash, class names and normalisation.
"""

from pathlib import Path

from secateur import console
from secateur.core import data, plugin, raw, stage


def main() -> None:
    """Read, divide, write."""
    params = stage.open_stage("prepare").params
    source = plugin.load("datasets", params.dataset)
    images = source.read(params.chosen("datasets"), raw.folder())
    prepared = data.prepare(
        params.dataset, source.CLASSES, images, params.data.validation, params.data.seed
    )
    data.save(Path("data") / params.dataset, prepared)
    counts = ", ".join(f"{count:,} {name}" for name, count in prepared.about.counts.items())
    shape = "x".join(map(str, prepared.about.shape))
    console.say(
        f"prepare: {params.dataset}, {shape} pixels, {len(source.CLASSES)} classes: {counts}; "
        f"split {prepared.about.hash[:12]}"
    )


if __name__ == "__main__":
    console.main(main, "prepare", __doc__)
