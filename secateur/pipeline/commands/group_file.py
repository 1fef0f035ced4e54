"""`secateur groups`: write a template for pruner gconv that lists every convolution.

With -1 for each number of groups, the template has to be filled in by hand, like that of
gconv-prune's `--dump-only`; with a number it is complete.
"""

import argparse
from pathlib import Path

from secateur.base import files, settings
from secateur.base.errors import SettingsError
from secateur.data import dataset
from secateur.gconv import config
from secateur.pipeline import console, preflight

FOLDER = Path("recipes/groups")
EMPTY = -1
"""Number of groups in a template that has not been filled in."""


def command(options: argparse.Namespace) -> None:
    """Write recipes/groups/<name>.json for the architecture and the data set of params.yaml.

    Raises SettingsError if the file exists, DataError if the data are not prepared.
    """
    if Path(options.name).name != options.name or options.name.startswith("."):
        raise SettingsError(f"{options.name!r}: the name of a file in {FOLDER}/ is needed")
    path = FOLDER / f"{options.name.removesuffix('.json')}.json"
    if path.exists():
        raise SettingsError(f"{path}: already exists; remove it, or choose another name")
    params = settings.read()
    info = dataset.load(Path("data") / params.dataset).info
    model = preflight.build_network(params, info)
    layers = config.convolutions(model)
    if not layers:
        raise SettingsError(f"params.yaml: arch = {params.arch!r}: has no convolution")
    wanted = options.groups or EMPTY
    groups = {
        name: 1 if wanted != EMPTY and (conv.in_channels % wanted or conv.out_channels % wanted)
        else wanted
        for name, conv in layers.items()
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, config.to_json(model, groups))
    left = f"; fill in G, which is {EMPTY}" if wanted == EMPTY else ""
    console.say(f"{path}: {len(layers)} convolutions of {params.arch}{left}")
    console.say(
        f"then dvc exp run -S pruner=gconv -S pruners.gconv.groups=null "
        f"-S pruners.gconv.config={path.name}"
    )
