"""The command `secateur`: everything around the pipeline, as subcommands.

A subcommand is one entry of COMMANDS. Its handler is imported only when it runs, so `--help`
needs no third-party library, and `completion` only shtab.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from secateur import __version__
from secateur.base.errors import SecateurError, did_you_mean
from secateur.base.optional import RUNTIME_TITLES

VERSIONS = ("torch", "torchvision", "lightning-fabric", "dvc", "mlflow")
"""Shown by `secateur version`."""
RUNTIMES = tuple(RUNTIME_TITLES)
LATENCY = "--latency"


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    name: str
    summary: str
    """One line, for the list of commands."""
    handler: str
    """`module:function`; the function takes the parsed options."""
    arguments: Callable[[argparse.ArgumentParser], None]
    details: str = ""
    """Shown by `--help` below the arguments, such as examples."""
    in_project: bool = True
    """Whether it only works in a project; it then runs in the project's root."""


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the recipe; without it, all are listed")
    parser.add_argument(
        "--seeds", nargs="+", type=_whole, default=[1, 2, 3], metavar="N", help="default: 1 2 3"
    )
    parser.add_argument(
        "--apply", action="store_true", help="write its settings into params.yaml; run nothing"
    )


def _rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("steps", type=_positive, help="number of rounds")
    parser.add_argument(
        "--to",
        type=_number,
        required=True,
        metavar="SHARE",
        help="share of the dense network that is left after the last round, such as 0.02",
    )
    parser.add_argument(
        "--of", choices=("params", "macs", "bytes"), default="params", help="default: params"
    )
    parser.add_argument("--equal", action="store_true", help="equal steps; default: geometric")
    parser.add_argument("--apply", action="store_true", help="write the rounds into params.yaml")


def _study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the study; without it, all are listed")
    parser.add_argument("--plan", action="store_true", help="show what would run; run nothing")
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="pieces of work that run at the same time; default: one per processor; with slurm 64, "
        "with ray as many as the cluster has room for",
    )
    parser.add_argument(
        "--executor", choices=("local", "ray", "slurm"), default="local", help="default: local"
    )
    parser.add_argument(
        "--cpus",
        type=_number,
        metavar="N",
        help="CPUs per piece of work, with --executor ray; default: 1",
    )
    parser.add_argument(
        "--gpus",
        type=_number,
        metavar="N",
        help="GPUs per piece of work, with --executor ray; default: 0",
    )
    parser.add_argument(
        "--slurm",
        type=_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --executor slurm: a parameter of submitit, such as slurm_partition=gpu or "
        "timeout_min=60; repeatable",
    )
    parser.add_argument(
        "--no-mlflow",
        action="store_true",
        help="write no MLflow runs; `secateur sync --all` writes them later",
    )

    _latency(parser)


def _latency(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that write a page."""
    group = parser.add_argument_group("latency columns of the page")
    group.add_argument(
        LATENCY,
        type=_runtime,
        action="append",
        choices=RUNTIMES,
        default=[],
        metavar="RUNTIME",
        help="measure the dense and finetuned networks in one or several of torch, onnxruntime "
        "and openvino, and keep the times in report/NAME/latency.csv",
    )
    for name, default, what in (
        ("--batch", 1, "images per forward pass"),
        ("--threads", 1, "threads of a forward pass"),
        ("--repeats", 100, "timed passes"),
    ):
        group.add_argument(
            name, type=_positive, default=default, metavar="N", help=f"{what}; default: {default}"
        )


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiment",
        nargs="*",
        help="names of experiments, or `workspace`; default: the workspace and all experiments "
        "of HEAD",
    )
    parser.add_argument("--all", action="store_true", help="experiments of every commit")
    parser.add_argument(
        "--sort",
        default="final",
        choices=("experiment", "differs", "seed", "dense", "final", "change", "compression",
                 "macs", "latency", "speedup"),
        help="the best first: the highest, or the least MACs and latency; default: final",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON list")
    form.add_argument("--csv", action="store_true", help="print CSV")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="+", help="names of experiments")
    parser.add_argument(
        "--name", default="comparison", help="folder in report/, and the title; default: comparison"
    )
    _latency(parser)


def _sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all", action="store_true", help="all experiments, not only the workspace"
    )


def _libraries(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--update", action="store_true", help="write the installed versions into params.yaml"
    )


def _groups(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the file to write in recipes/groups/")
    parser.add_argument(
        "--groups",
        type=_positive,
        metavar="N",
        help="groups of every convolution whose channels are divisible by N; default: -1, a "
        "placeholder to replace",
    )


def _predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=".safetensors, .onnx or .pt2 file, or a folder with one")
    parser.add_argument("image", nargs="+", help="image files, and folders of them")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument(
        "--top", type=_positive, default=1, metavar="N", help="classes per image; default: 1"
    )
    parser.add_argument(
        "--resize",
        type=_positive,
        metavar="PIXELS",
        help="length of the shorter side before the centre crop; default: the length that the file "
        "names, otherwise the network's input size",
    )


def _pair(text: str) -> tuple[str, str]:
    """A key and its value."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _positive(text: str) -> int:
    """A whole number of at least 1."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: at least 1 is needed")
    return value


def _whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number is needed") from None


def _number(text: str) -> float:
    """Any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a number is needed") from None


def _runtime(text: str) -> str:
    """The name of a runtime."""
    if text not in RUNTIMES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is read as a runtime; there are: {', '.join(RUNTIMES)}"
            f"{did_you_mean(text, RUNTIMES) or '; after one of them, names may follow'}"
        )
    return text


def _each_runtime(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--latency` repeated before each runtime that follows it.

    This way, names of experiments may follow the runtimes. A word that is close to the name of a
    runtime is treated as a misspelt runtime.
    """
    found: list[str] = []
    listing = False
    for before, text in zip(["", *arguments], arguments, strict=False):
        if len(before) > 2 and LATENCY.startswith(before):
            listing = True  # the option's own value
        elif listing:
            listing = text in RUNTIMES or bool(difflib.get_close_matches(text, RUNTIMES, 1, 0.8))
            found += [LATENCY] if listing else []
        found.append(text)
    return found


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _nothing(_parser: argparse.ArgumentParser) -> None:
    pass


COMMANDS = (
    Command(
        "recipe",
        "run a published experiment over several seeds, or list all",
        "secateur.pipeline.recipe:command",
        _recipe,
        "Every seed is a DVC experiment in a temporary copy: the workspace is not changed, and\n"
        "stages that have run before come from the cache. A recipe changes only the settings that\n"
        "it names; all others come from params.yaml, so start from a clean one:\n"
        "git checkout HEAD params.yaml\n\n"
        "examples:\n"
        "  secateur recipe\n"
        "  secateur recipe mnist-lenet300-element --seeds 1 2 3\n"
        "  secateur recipe mnist-lenet300-element --apply",
    ),
    Command(
        "rounds",
        "make settings of rounds that reach a target in several steps",
        "secateur.pipeline.commands.rounds:command",
        _rounds,
        "For the pruner selected in params.yaml: magnitude or network_slimming.\n\n"
        "examples:\n"
        "  secateur rounds 5 --to 0.02              # of the parameters, in geometric steps\n"
        "  secateur rounds 3 --to 0.4 --of macs --equal --apply && dvc repro",
    ),
    Command(
        "study",
        "run many experiments as one graph, or list the studies",
        "secateur.studies.run:command",
        _study,
        "A study is a file studies/NAME.yaml: settings, axes, seeds and controls. Trainings that\n"
        "cells share run once, results in the cache are reused, and every cell becomes a DVC\n"
        "experiment. After an interruption, the same command continues.\n\n"
        "examples:\n"
        "  secateur study digits --plan\n"
        "  secateur study digits --workers 2\n"
        "  dvc exp apply digits-L1-0.5-s1 && dvc repro",
    ),
    Command(
        "check",
        "report mistakes in params.yaml before anything runs",
        "secateur.pipeline.params_check:command",
        _nothing,
        "Checks the names of plug-ins and files, every setting, the versions of libraries and, if\n"
        "the data are prepared, whether penalty and pruner support the network. DVC itself only\n"
        "reports `No such file or directory` for a misspelt name.\n\n"
        "examples:\n"
        "  secateur check\n"
        "  secateur check && dvc repro",
    ),
    Command(
        "compare",
        "list experiments with accuracy, compression, MACs and latency",
        "secateur.studies.compare:command",
        _compare,
        "examples:\n"
        "  secateur compare\n"
        "  secateur compare --sort compression\n"
        "  secateur compare digits-L1-0.5-s1 digits-L1-0.7-s1 --json",
    ),
    Command(
        "report",
        "write the page that compares experiments: tables, plot, statistics",
        "secateur.studies.report.page:command",
        _report,
        "Experiments that differ only in the seed are one method at one operating point.",
    ),
    Command(
        "sync",
        "write the runs that MLflow lacks, from the files that DVC tracks",
        "secateur.pipeline.sync:command",
        _sync,
        "For a store that was lost or could not be reached, another tracking server, or a clone\n"
        "that pulled its models. Runs that are in the store are not changed.",
    ),
    Command(
        "libraries",
        "compare the versions of libraries in params.yaml with those installed",
        "secateur.pipeline.commands.libraries:command",
        _libraries,
        "Results depend on the versions of torch and torchvision, so a stage only runs with the\n"
        "versions that params.yaml names. After --update, `dvc status` lists the stages that\n"
        "`dvc repro` will run again.",
    ),
    Command(
        "groups",
        "write a template file with every convolution of the network, for pruner gconv",
        "secateur.pipeline.commands.group_file:command",
        _groups,
        "The network follows from arch and dataset in params.yaml; the data must be prepared.\n\n"
        "examples:\n"
        "  secateur groups mine\n"
        "  secateur groups mine --groups 4",
    ),
    Command(
        "predict",
        "classify images with a checkpoint or an exported file",
        "secateur.deploy.predict:command",
        _predict,
        "Images are resized and centre-cropped as in evaluation.\n"
        "Hidden files in folders are ignored.\n\n"
        "examples:\n"
        "  secateur predict models/finetuned pictures/\n"
        "  secateur predict models/export/model.onnx a.png b.png --top 3\n"
        "  secateur predict models/export/model.pt2 pictures/ --json",
        in_project=False,
    ),
    Command(
        "completion",
        "print a completion script for the shell",
        "secateur.cli:print_completion",
        _completion,
        "examples:\n"
        "  secateur completion bash > ~/.local/share/bash-completion/completions/secateur\n"
        '  eval "$(secateur completion zsh)"',
        in_project=False,
    ),
    Command(
        "version",
        "print the versions of Secateur and of the libraries that results depend on",
        "secateur.cli:print_versions",
        _nothing,
        in_project=False,
    ),
)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Line breaks as written; room for the longest command name, which argparse miscounts."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)
        self._action_max_length = 4 + max(len(command.name) for command in COMMANDS)


class _Parser(argparse.ArgumentParser):
    """A parser, also for subcommands, that suggests the nearest choice for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message; exit status 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = did_you_mean(choice[1], re.findall(r"[^', ]+", choice[2])) if choice else ""
        super().error(message + hint)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog="secateur",
        description="Prune image classifiers in one tracked pipeline.",
        epilog="The pipeline itself is run by DVC: dvc repro, dvc exp run.\n"
        "Run `secateur COMMAND --help` for the arguments of a command.",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"secateur {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=command.details,
            formatter_class=_Formatter,
        )
        command.arguments(own)
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command; exit status 0, 1 for an error that the user can correct, 2 for a wrong
    argument, 130 if interrupted."""
    parser = build_parser()
    options = parser.parse_args(_each_runtime(sys.argv[1:] if arguments is None else arguments))
    if options.command is None:
        parser.print_help()
        sys.exit(0)
    try:
        _run(next(c for c in COMMANDS if c.name == options.command), options)
    except SecateurError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # as in `secateur recipe | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(f"{error.filename or options.command}: {error.strerror or error}", 1)
    except Exception as error:
        dvc = sys.modules.get("dvc.exceptions")  # imported by the commands that need it
        if dvc is None or not isinstance(error, dvc.DvcException):
            raise
        _fail(f"DVC: {' '.join(str(error).split())}", 1)
    sys.exit(0)


def _run(command: Command, options: argparse.Namespace) -> None:
    if command.in_project:
        os.chdir(_project_root(command.name))
    module, _, function = command.handler.partition(":")
    try:
        handler = getattr(importlib.import_module(module), function)
        handler(options)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "secateur":
            raise
        raise SecateurError(
            f"`secateur {command.name}` needs {error.name}, which is not installed: "
            "in a clone of Secateur: pip install '.[pipeline]'"
        ) from None


def _project_root(command: str) -> Path:
    """The root of the project that the current folder is in; SecateurError if there is none.

    stages/sensitivity has a dvc.yaml too, but no params.yaml.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if all((folder / name).is_file() for name in ("dvc.yaml", "params.yaml")):
            return folder
    if not Path("dvc.yaml").is_file():
        raise SecateurError(f"no dvc.yaml here or above; run `secateur {command}` in a project")
    return here


def _fail(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def print_completion(options: argparse.Namespace) -> None:
    """Print a script that completes the command in a shell."""
    import shtab

    print(shtab.complete(build_parser(), options.shell), flush=True)


def print_versions(_options: argparse.Namespace) -> None:
    """Print the versions of Secateur, Python and the libraries, without importing them."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"secateur": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    for name, number in found.items():
        print(f"{name:17} {number}")
