"""`secateur libraries`: compare the versions in params.yaml with those installed, or write them.

Models depend on the versions of torch and torchvision, but DVC does not see what is installed.
Therefore params.yaml has the versions, in a section that every stage that trains or measures
declares: a change makes their models stale, which `dvc status` shows before `dvc repro` trains
anything. A stage refuses to run with other versions.
"""

import argparse

from secateur.base import machine, settings
from secateur.pipeline import console, params_file


def command(options: argparse.Namespace) -> None:
    """Print both versions of every library, or write the installed ones into params.yaml."""
    installed = machine.installed_versions()
    written = settings.read().libraries.model_dump()
    different = [name for name in written if written[name] != installed.get(name)]
    if not options.update or not different:
        for name, version in written.items():
            console.say(f"{name:12} {version:12} installed: {installed.get(name, 'nothing')}")
        if different:
            console.say("`secateur libraries --update` writes the installed versions")
        return
    params_file.update({f"libraries.{name}": installed[name] for name in different})
    for name in different:
        console.say(f"params.yaml: libraries.{name}: {written[name]} -> {installed[name]}")
    console.say("`dvc status` lists what `dvc repro` will now make again")
