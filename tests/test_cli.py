"""The command `secateur`: help, subcommands, completion, and which copy of the code runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from secateur import __version__, cli
from secateur.base import plugin
from secateur.data import dataset
from secateur.data.dataset import Images, InMemoryImages
from secateur.gconv import config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "import sys\nfrom secateur.__main__ import script\nsys.exit(script())\n"
"""What pip writes as a console script."""


def run(*command, cwd=ROOT, **env):
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, text=True, capture_output=True, check=False
    )


def secateur(*arguments, **options):
    return run(sys.executable, "-m", "secateur", *arguments, **options)


def test_help_lists_every_command_and_needs_no_library():
    code = (
        "import sys, contextlib\nfrom secateur import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "with contextlib.suppress(SystemExit): cli.main(['recipe', '--help'])\n"
        "print({'torch', 'pandas', 'rich', 'yaml', 'pydantic', 'dvc'} & set(sys.modules))"
    )
    out = run(sys.executable, "-c", code).stdout
    assert out.endswith("set()\n")
    assert all(f"\n    {command.name} " in out for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_and_a_handler(command, capsys):
    assert f"usage: secateur {command.name}" in printed(capsys, command.name, "--help")
    module, _, function = command.handler.partition(":")
    assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_without_a_command_there_is_help(capsys):
    assert "commands:" in printed(capsys)


def printed(capsys, *arguments):
    """Output of a command that runs in this process and succeeds."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_a_command_that_is_not_there_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["recipes"])
    assert end.value.code == 2 and "invalid choice: 'recipes'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("study digits --workers two", "argument --workers: 'two': a whole number is needed"),
        ("study digits --workers 0", "argument --workers: 0: at least 1 is needed"),
        ("recipe mnist --seeds a", "argument --seeds: 'a': a whole number is needed"),
        ("rounds 3 --to little", "argument --to: 'little': a number is needed"),
        ("compare --sort compresion", "; did you mean compression?"),
        ("recipes", "; did you mean recipe?"),
        (
            "report --latency mine torch",
            "argument --latency: 'mine' is read as a runtime; there are: torch, onnxruntime, "
            "openvino; after one of them, names may follow",
        ),
        ("study digits --latency torch openvin", "; did you mean openvino?"),
    ],
)
def test_a_wrong_argument_is_told_in_plain_words(arguments, line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments.split())
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(line)


@pytest.mark.parametrize(
    ("arguments", "names", "runtimes"),
    [
        ("report --latency torch mine other", ["mine", "other"], ["torch"]),
        ("report --latency torch openvino mine", ["mine"], ["torch", "openvino"]),
        ("report mine --latency torch onnxruntime --batch 2", ["mine"], ["torch", "onnxruntime"]),
        ("report --lat torch onnxruntime -- mine", ["mine"], ["torch", "onnxruntime"]),
        ("report --latency=torch torch", ["torch"], ["torch"]),
        ("report mine", ["mine"], []),
    ],
)
def test_names_may_follow_the_runtimes(arguments, names, runtimes, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_run", lambda _command, options: given.append(options))
    with pytest.raises(SystemExit):
        cli.main(arguments.split())
    assert (given[0].experiment, given[0].latency) == (names, runtimes)


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_versions_are_printed(arguments, capsys):
    assert __version__ in printed(capsys, *arguments)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    script = printed(capsys, "completion", shell)
    assert all(command.name in script for command in cli.COMMANDS) and "seeds" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_a_command(tmp_path):
    (tmp_path / "script").write_text(secateur("completion", "bash").stdout)
    code = (
        "source ./script; COMP_WORDS=(secateur re); COMP_CWORD=1; COMP_LINE='secateur re'; "
        '$(complete -p secateur | sed "s/.*-F \\([^ ]*\\).*/\\1/") secateur re secateur; '
        'echo "${COMPREPLY[@]}"'
    )
    done = run("bash", "-c", code, cwd=tmp_path)
    assert done.stdout == "recipe report\n", done.stderr


def test_the_modules_of_before_do_what_the_command_does(capsys):
    listed = printed(capsys, "recipe")
    assert "mnist-lenet300-element" in listed
    assert run(sys.executable, "-m", "secateur.recipe").stdout == listed
    assert "usage: secateur sync" in run(sys.executable, "-m", "secateur.sync", "--help").stdout


def test_a_mistake_is_one_line_and_status_1(tmp_path):
    wrong = secateur("recipe", "nope")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: recipe 'nope'")
    assert wrong.stderr.count("\n") == 1
    outside = secateur("recipe", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert outside.returncode == 1
    assert outside.stderr == (
        "error: no dvc.yaml here or above; run `secateur recipe` in a project\n"
    )


def test_a_reader_that_stops_early_sees_no_traceback():
    pipe = f"{sys.executable} -m secateur recipe | head -n 1"
    done = run("bash", "-c", pipe)
    assert done.stdout.count("\n") == 1 and not done.stderr


def package(folder, version):
    """A copy of the package with its own version, which tells it from others."""
    shutil.copytree(
        ROOT / "secateur", folder / "secateur", ignore=shutil.ignore_patterns("__pycache__")
    )
    file = folder / "secateur/__init__.py"
    changed = file.read_text().replace(f'"{__version__}"', f'"{version}"')
    file.write_text(changed)


@pytest.fixture
def places(tmp_path):
    """An environment with the package installed, and a project with its own code."""
    package(tmp_path / "site", "0+installed")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/secateur").write_text(SCRIPT)
    package(tmp_path / "project", "0+project")
    (tmp_path / "project/dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "project/stages").mkdir()
    (tmp_path / "project/stages/__init__.py").touch()
    (tmp_path / "project/stages/told.py").write_text(
        "import secateur\nprint('secateur', secateur.__version__)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "stages.told"),  # as in dvc.yaml, also in the temporary copy of an experiment
        ("-m", "secateur", "--version"),
        ("../bin/secateur", "--version"),
    ],
)
def test_in_a_project_its_own_code_runs_although_a_package_is_installed(places, command):
    installed = {"PYTHONPATH": str(places / "site")}
    done = run(sys.executable, *command, cwd=places / "project", **installed)
    assert done.stdout == "secateur 0+project\n", done.stderr


def test_within_a_project_its_root_is_found(places):
    folder = places / "project/stages/sensitivity"
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    command = (sys.executable, places / "bin/secateur")
    installed = {"PYTHONPATH": str(places / "site")}
    done = run(*command, "--version", cwd=folder, **installed)
    assert done.stdout == "secateur 0+project\n", done.stderr
    for name in ("params.yaml", "recipes"):
        (places / "project" / name).symlink_to(ROOT / name)
    listed = run(*command, "recipe", cwd=folder, **installed)
    assert "mnist-lenet300-element" in listed.stdout and not listed.stderr


def test_elsewhere_the_installed_package_runs(places):
    done = run(
        sys.executable, "bin/secateur", "--version", cwd=places, PYTHONPATH=str(places / "site")
    )
    assert done.stdout == "secateur 0+installed\n", done.stderr


def test_make_puts_a_launcher_beside_python_and_does_not_install_the_package():
    makefile = (ROOT / "Makefile").read_text()
    assert "-m secateur" in makefile and "pip install --quiet $(LOCKED) --group run" in makefile
    assert "pip install ." not in makefile and "pip install -e" not in makefile


def test_libraries_lists_written_and_installed_versions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    params = tmp_path / "params.yaml"
    version = re.search(r"^  torch: (\S+)", params.read_text(), re.MULTILINE)[1]
    params.write_text(params.read_text().replace(f"torch: {version}", "torch: 1.0.0", 1))
    shown = printed(capsys, "libraries")
    assert re.search(rf"^torch +1\.0\.0 +installed: {re.escape(version)}$", shown, re.MULTILINE)
    done = printed(capsys, "libraries", "--update")
    assert f"libraries.torch: 1.0.0 -> {version}" in done
    assert f"torch: {version}" in params.read_text()


def test_groups_writes_a_form_that_names_every_convolution(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"arch": "resnet_cifar"}
    params["archs"]["resnet_cifar"] |= {"depth": 8, "shortcut": "B"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(SystemExit):
        cli.main(["groups", "mine"])
    assert "run `dvc repro prepare` to make it" in capsys.readouterr().err
    parts = [
        InMemoryImages.from_pixels(torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.arange(4))
        for _ in ("train", "test")
    ]
    images = Images(*parts, ["a", "b", "c", "d"], (0.5,), (0.5,))
    dataset.save(tmp_path / "data/digits", dataset.prepare("digits", images, 0, 0))

    module = plugin.load("archs", "resnet_cifar")
    model = module.build(module.Settings(depth=8, shortcut="B"), 4, (1, 8, 8))
    assert "recipes/groups/mine.json: 9 convolutions" in printed(capsys, "groups", "mine")
    form = json.loads((tmp_path / "recipes/groups/mine.json").read_text())
    assert [name.removeprefix("module.") for name in form] == [*config.convolutions(model)]
    assert {entry["G"] for entry in form.values()} == {-1}
    printed(capsys, "groups", "four", "--groups", "4")
    groups = config.read(tmp_path / "recipes/groups/four.json", model)
    assert groups.pop("conv1") == 1 and set(groups.values()) == {4}
    for name, words in (("mine", "already exists"), ("../mine", "the name of a file in")):
        with pytest.raises(SystemExit):
            cli.main(["groups", name])
        assert words in capsys.readouterr().err
    (tmp_path / "recipes").rename(tmp_path / "aside")
    (tmp_path / "recipes").write_text("a file")
    with pytest.raises(SystemExit):
        cli.main(["groups", "mine"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "recipes" in line
