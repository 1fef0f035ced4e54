"""`secateur check`: finds settings in params.yaml that a stage would refuse, before DVC starts.

DVC checks the files that a stage depends on before the stage starts, including files that a setting
names. A misspelt name would therefore end in DVC's `No such file or directory`.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.base import plugin, settings
from secateur.base.documents import read_yaml
from secateur.base.errors import DataError, SettingsError, cut, did_you_mean, shorten
from secateur.pipeline import console, tracked
from secateur.pipeline.params_file import has, value_at

PLUGIN_CODE = "secateur/"
"""Dependencies below it are code; plug-ins that a setting names are checked by `plugin.find`."""
OUTS = ("outs", "metrics", "plots")
"""Keys of a stage in a pipeline file that list what the stage writes."""
FOREACH = ("key", "item")
"""DVC's names for the entry that a stage of a `foreach` stands for."""
SHOWN = 8
"""Number of existing files that are listed when one is missing."""


def command(_options: argparse.Namespace) -> None:
    """Raise SecateurError for the first thing that a stage would refuse when it starts.

    Architecture, penalty and pruner are tried on an untrained network if the data are prepared.
    """
    params = settings.raw()
    check_names(params)
    from secateur.base import stage  # torch takes a second

    stage.check_settings()
    stage.check_environment()
    stage.check_libraries(settings.read().libraries)
    untried = _try_network(params)
    console.say(f"{settings.FILE}: {untried or 'no mistake found'}")


def check_values(params: Mapping[str, Any], root: Path = Path()) -> None:
    """Raise SettingsError, naming the key, for values of params.yaml that are not allowed."""
    check_names(params, root)
    settings.check_values(params)


def check_names(params: Mapping[str, Any], root: Path = Path()) -> None:
    """Raise SettingsError for a plug-in or a file that is named in `params` but does not exist.

    Keys by which pipeline files name a file must be there, even those with a default. `root` is
    the project's folder. No plug-in is imported.
    """
    for kind, key in plugin.KEYS.items():
        if key in params:
            plugin.find(kind, str(params[key]))
    files = (root / "dvc.yaml", *sorted(root.glob("stages/*/dvc.yaml")))
    deps, outs = deps_and_outs(read_yaml(file, SettingsError) for file in files)
    made = [re.sub(r"\\\$\\\{.*?\\\}", "[^/]+", re.escape(out)) for out in outs]
    for dep in sorted(dep for dep in deps if not dep.startswith(PLUGIN_CODE)):
        for key in re.findall(r"\$\{([\w.]+)\}", dep):
            if not has(params, key) and key.partition(".")[0] not in FOREACH:
                raise SettingsError(f"{settings.FILE}: {key}: missing; {_default(key)}")
            value = value_at(params, key)
            path = dep.replace(f"${{{key}}}", str(value))
            by_a_stage = any(re.fullmatch(out, path) for out in made)
            if isinstance(value, str) and not by_a_stage and not Path(root, path).exists():
                raise SettingsError(_missing(key, value, path, root))


def deps_and_outs(pipelines: Iterable[Mapping[str, Any]]) -> tuple[set[str], set[str]]:
    """Deps and outs of all stages as written in pipeline files, with `${...}`.

    `pipelines` has the content of each file.
    """
    deps, outs = set[str](), set[str]()
    for content in pipelines:
        for stage in (content.get("stages") or {}).values():
            own = stage.get("do", stage)
            deps.update(own.get("deps") or ())
            written = (out for kind in OUTS for out in own.get(kind) or ())
            outs |= {next(iter(out)) if isinstance(out, dict) else out for out in written}
    return deps, outs


def _try_network(params: Mapping[str, Any]) -> str:
    """Why the network could not be tried; empty if it could. Raises SettingsError if it fails.

    Data prepared with other settings are not used.
    """
    from secateur.data import dataset
    from secateur.pipeline import preflight

    name = params["dataset"]
    waits = f"no mistake found; the network is checked when the data are prepared (data/{name})"
    if tracked.is_outdated(Path(), params, "prepare"):
        return waits
    try:
        info = dataset.load(Path("data") / name).info
    except DataError:
        return waits
    preflight.check_settings(info)
    return ""


def _default(key: str) -> str:
    """What to write for a key that DVC needs, although the stages have a default for it."""
    needed = "DVC needs it for the files that stages depend on"
    section, _, rest = key.partition(".")
    schema: Any = settings.Params.model_fields.get(section)
    if schema is None or not hasattr(schema.annotation, "model_construct"):
        return needed  # below `archs`, whose architectures have defaults of their own
    value = value_at(schema.annotation.model_construct().model_dump(mode="json"), rest)
    return f"{needed}, and {value} is the default"


def _missing(key: str, value: str, path: str, root: Path) -> str:
    """One line about a missing file that a setting names."""
    line = f"{settings.FILE}: {key} = {shorten(value)}: there is no {cut(path)}"
    if Path(root, f"{path}.dvc").is_file():
        return f"{line}; `dvc pull {path}` brings it"
    folder, beside = Path(root, path).parent, Path(value).parent
    if not folder.is_dir():
        return line
    known = [str(beside / p.name) for p in sorted(folder.iterdir()) if p.name[0] != "."]
    known = [name for name in known if not name.endswith((".dvc", ".lock"))]
    there = f"; there are: {', '.join(known)}" if len(known) <= SHOWN else ""
    return f"{line}{there}{did_you_mean(value, known)}"
