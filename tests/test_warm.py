"""A process that starts warm (tests/warm) behaves like the real program."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import pytest
from workspace import PROGRAMS, Project, warm_children

pytestmark = pytest.mark.pipeline

SURROUNDINGS = """
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "named": [hasattr(sys.modules["__main__"], name) for name in ("__file__", "__spec__")],
    "environment": dict(os.environ), "umask": os.umask(0), "executable": sys.executable,
    "input": sys.stdin.read(), "encoding": sys.stdout.encoding,
    "terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "signals": [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
    "blocked": [str(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "modules": [name for name in sys.modules if name.split(".")[0] in ("secateur", "stages")],
    "files": len(os.listdir("/dev/fd")),
    "warm": "mlflow" in sys.modules,
}))
print("to the error stream", file=sys.stderr)
"""
ENDS = {
    "nothing more": "pass",
    "exit without a status": "raise SystemExit",
    "exit 0": "sys.exit(0)",
    "exit 3": "sys.exit(3)",
    "exit -1": "sys.exit(-1)",
    "exit 300": "sys.exit(300)",
    "exit with a text": "sys.exit('error: a text')",
    "exit with an object": "sys.exit([1, 'two'])",
    "an error": "raise ValueError('a text')",
    "an error inside": "def f(): 1 / 0\ntry: f()\nfinally: print('at last')",
    "at exit": "import atexit; atexit.register(print, 'at exit')\nsys.exit(4)",
    "a thread": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "no line end": "print('without a line end', end='')",
    "interrupted": "raise KeyboardInterrupt",
    "at once": "import os; os._exit(5)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "a closed stream": "sys.stdout.close(); sys.exit(6)",
    "not Python": "1 +",
}


@pytest.fixture
def project(tmp_path, programs):
    if "WARM_SERVER" not in PROGRAMS:
        pytest.skip("the path of the tests' folder is too long for a socket")
    return Project(tmp_path)


def run(project, program, *arguments, text="", **env):
    """Exit status and both streams of a command, to compare warm programs with real ones."""
    done = subprocess.run(
        [program, *arguments], cwd=project.path, env=project.env(**env), input=text,
        text=True, capture_output=True, timeout=300, umask=0o027,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def without_places(text):
    """A traceback without the server's frames, which come before those of the command.

    Source lines below the command's frames are removed too: Python 3.13 prints them only if it has
    started the command itself.
    """
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if 'File "<string>"' in line), None)
    if start is None:
        return text
    return re.sub(
        r'(  File "<string>", line \d+, in .*\n)(?: {4}.*\n)+', r"\1", "".join(lines[start:])
    )


@pytest.mark.parametrize("command", ["code", "module"])
def test_it_has_arguments_folder_environment_and_streams_of_the_caller(project, command):
    arguments = ["-c", SURROUNDINGS]
    if command == "module":
        (project.path / "stages").mkdir()
        (project.path / "stages/mine.py").write_text(SURROUNDINGS)
        arguments = ["-m", "stages.mine"]
    found = []
    for program in (sys.executable, "python"):
        status, out, err = run(
            project, program, *arguments, "a b", "", "--c=ä", text="two\nlines", SOMETHING="a\nb"
        )
        assert (status, err) == (0, "to the error stream\n")
        found.append(json.loads(out))
    real, warm = found
    assert (real.pop("warm"), warm.pop("warm")) == (False, True)
    assert warm == real
    assert warm["input"] == "two\nlines" and warm["umask"] == 0o027
    assert warm["environment"]["SOMETHING"] == "a\nb"


@pytest.mark.parametrize("case", ENDS)
def test_it_ends_as_python_does(project, case):
    code = f"import sys; print('begun', flush=True)\n{ENDS[case]}"
    real, warm = (run(project, program, "-c", code) for program in (sys.executable, "python"))
    assert warm[:2] == real[:2]
    assert without_places(warm[2]) == without_places(real[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_it(project, number):
    code = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n"
        "print('mlflow' in sys.modules, flush=True)\n"
        "while True: time.sleep(0.1)"  # a signal just before a sleep is handled after it
    )
    for warm, program in enumerate((sys.executable, "python")):
        with subprocess.Popen(
            [program, "-c", code], cwd=project.path, env=project.env(), text=True,
            stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            first = process.stdout.readline()
            process.send_signal(number)
            try:
                assert process.wait(60) == 7
            finally:
                process.kill()
            assert first == f"{bool(warm)}\n"


def test_it_dies_with_the_process_that_stands_for_it(project):
    with subprocess.Popen(
        ["python", "-c", "import time; print('begun', flush=True); time.sleep(600)"],
        cwd=project.path, env=project.env(), text=True, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "begun\n"
        process.kill()
        # the forked process holds the other end of the pipe until it ends
        ended = threading.Event()
        threading.Thread(target=lambda: (process.stdout.read(), ended.set()), daemon=True).start()
        assert ended.wait(60)


@pytest.mark.parametrize("changed", ["environment", "limit"])
def test_what_must_hold_from_the_start_makes_it_a_real_process(project, changed):
    code = "import sys, os; print('mlflow' in sys.modules, os.environ['OMP_NUM_THREADS'])"
    if changed == "environment":
        assert run(project, "python", "-c", code, OMP_NUM_THREADS="2")[1] == "False 2\n"
    else:
        command = ("bash", "-c", 'ulimit -n 99; exec python -c "$0"', code)
        assert run(project, *command)[1] == "False 1\n"


def test_what_libraries_set_in_the_callers_environment_does_not(project):
    """No other test would notice: everything would pass, but take twice as long."""
    import sklearn  # noqa: F401  sets KMP_* in this process

    code = "import sys; print('mlflow' in sys.modules)"
    assert run(project, "python", "-c", code)[1] == "True\n"
    assert run(project, "python", "-c", code, GOMP_SPINCOUNT="30000")[1] == "True\n"  # as in stages


ROOT = Path(__file__).resolve().parents[1]
TAKEN_OVER = """
import sys
from secateur.base import plugin, stage
from secateur.pruning import criteria
mine = [name for name in sorted(sys.modules) if name.split(".")[0] == "secateur"]
print(json.dumps({
    "modules": mine,
    "files": [sys.modules[name].__file__ for name in mine],
    "paths": [list(getattr(sys.modules[name], "__path__", [])) for name in mine],
    "specs": [[spec.name, spec.origin, type(spec.loader).__name__, str(spec.loader_state)]
              for spec in (sys.modules[name].__spec__ for name in mine)],
    "packages": [sorted(k for k in vars(sys.modules[name]) if f"{name}.{k}" in sys.modules)
                 for name in mine if hasattr(sys.modules[name], "__path__")],
    "attributes": [hasattr(sys.modules["secateur.base"], name) for name in ("errors", "timing")],
    "plugins": [plugin.names("penalties"), str(plugin.find("penalties", "l1"))],
}))
from secateur.penalties import l1
print(l1.__file__)
"""


@pytest.fixture
def copied(project):
    """A project with a copy of this repository's code, whose files have new times."""
    shutil.copytree(ROOT / "secateur", project.path / "secateur", copy_function=shutil.copyfile)
    return project


def code_is_known(copied):
    """Whether the server's modules are used for the copy."""
    code = "from secateur.base import plugin; print(plugin.find.__code__.co_filename)"
    return run(copied, "python", "-c", code)[1] == f"{ROOT}/secateur/base/plugin.py\n"


def test_modules_of_the_same_code_are_taken_over_as_if_imported(copied):
    (copied.path / "secateur/penalties/mine.py").touch()
    real, warm = (
        run(copied, program, "-c", f"import json\n{TAKEN_OVER}")
        for program in (sys.executable, "python")
    )
    assert warm == real and real[0] == 0
    assert "mine" in warm[1] and str(copied.path) in warm[1] and f"{ROOT}/secateur" not in warm[1]
    assert code_is_known(copied)


@pytest.mark.parametrize("changed", ["base/plugin.py", "base/errors.py", "base/__init__.py"])
def test_changed_code_is_run_and_so_is_all_that_imports_it(copied, changed):
    file = copied.path / "secateur" / changed
    file.write_text(file.read_text() + "\nNEW = 1\n")
    name = f"secateur.{changed.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
    code = f"import {name} as m; print(m.NEW)"
    assert run(copied, "python", "-c", code) == (0, "1\n", "")
    assert not code_is_known(copied)
    file.unlink()
    if changed != "base/__init__.py":  # a package works without it
        assert "No module named" in run(copied, "python", "-c", code)[2]


def test_a_change_elsewhere_leaves_the_rest_known(copied):
    (copied.path / "secateur/archs/vgg.py").write_text("NEW = 2")
    code = "from secateur.archs import vgg; print(vgg.NEW)"
    assert run(copied, "python", "-c", code) == (0, "2\n", "")
    assert code_is_known(copied)


def test_what_is_imported_again_is_imported_anew(copied):
    code = (
        "import importlib, sys\n"
        "from secateur.base import errors, plugin\n"
        "errors.cut = plugin.names = None\n"
        "importlib.reload(errors); del sys.modules['secateur.base.plugin']\n"
        "again = importlib.import_module('secateur.base.plugin')\n"
        "print(errors.cut is None, again.names is None, again is plugin, plugin.names)"
    )
    assert run(copied, "python", "-c", code) == (0, "False False False None\n", "")


def test_the_module_that_runs_is_that_of_the_copy(copied):
    file = copied.path / "secateur/base/errors.py"
    file.write_text("print(__name__, __spec__.name)\n" + file.read_text())
    assert run(copied, "python", "-m", "secateur.base.errors") == (
        0, "__main__ secateur.base.errors\n", ""
    )  # fmt: skip


def test_what_it_starts_itself_is_warm_where_that_is_asked_for(project):
    """With inherited open files, and with an empty variable that Python ignores."""
    read, write = os.pipe()
    inner = f"import os, sys; os.write({write}, b'warm' if 'mlflow' in sys.modules else b'real')"
    code = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {inner!r}], pass_fds=[{write}], check=True,\n"
        "env=os.environ | {'PYTHONPATH': ''})"
    )
    for more, expected in (({}, b"real"), (warm_children(), b"warm")):
        subprocess.run(
            ["python", "-c", code], cwd=project.path, env=project.env(**more), pass_fds=[write],
            check=True,
        )  # fmt: skip
        assert os.read(read, 100) == expected
    os.close(read)
    os.close(write)


def test_a_text_that_is_parsed_twice_gives_values_of_their_own(project):
    code = (
        "from dvc.utils.serialize import loads_yaml, parse_yaml\n"
        "text = 'a: [1, 2.5, x, null, true, {b: 2020-01-01}]\\nb: &b {c: 1}\\nd: *b'\n"
        "one, two, other = (parse_yaml(text, '') for _ in range(3))\n"
        "two['a'].append(3); two['b']['c'] = 2\n"
        "print(one == other, one, loads_yaml(text, typ='rt'))\n"
        "for _ in range(2):\n"
        "    try: parse_yaml('a: [', 'name')\n"
        "    except Exception as error: print(type(error), error)\n"
    )
    for text in (code, code.replace("2020-01-01", "2020")):
        real, warm = (run(project, program, "-c", text) for program in (sys.executable, "python"))
        assert real == warm and real[1].startswith("True {'a'") and "corrupted" in real[1]


CHANGED = r"""
import collections
from dvc.utils.serialize import dumps_yaml, modify_yaml
values = [1, -2.5, 1e-05, 1e20, float("inf"), "", "1", "yes", "a: b", "ä 'b'", 'c "d"', "x" * 200,
          "a b " * 60, "two\nlines", True, None, [], {}, [[1, [2]], {"z": 1, "a": {}}]]
stages = {f"s{n}": {"cmd": "python -m s", "params": {"p": {"k": v}}} for n, v in enumerate(values)}
text = dumps_yaml(collections.OrderedDict({"schema": "2.0", "stages": stages}))
for text in (text, text + "# a comment\n", text.replace("cmd: python", "cmd: &a python", 1)):
    open("dvc.lock", "w").write(text)
    with modify_yaml("dvc.lock") as data:
        data["stages"].update({"new": collections.OrderedDict({"cmd": "x", "deps": [1]})})
        data["stages"].move_to_end("s3")
    print(type(data).__name__, open("dvc.lock").read())
"""


def test_a_lock_file_is_changed_as_by_a_parser_that_keeps_comments(project):
    real, warm = (run(project, program, "-c", CHANGED) for program in (sys.executable, "python"))
    assert real == warm and real[0] == 0 and "# a comment" in real[1] and "&a" in real[1]


def test_a_new_store_of_mlflow_has_all_tables_that_its_migrations_make(copied):
    (copied.path / "dvc.yaml").touch()  # marks the root of a project
    told = run(copied, "python", "-m", "secateur.sync", SECATEUR_TRACKING="on")
    assert told[0] == 0, told
    made = mlflow.MlflowClient(f"sqlite:///{copied.path}/migrated.db")  # made by its migrations
    made.create_experiment("secateur")
    assert tables(copied.path / "mlflow.db") == tables(copied.path / "migrated.db")


def tables(file):
    """SQL statements of tables and indices, numbers of rows, and the revision.

    Statements are sorted lists of words, since MLflow writes some lists of values in an order that
    differs between processes.
    """
    with contextlib.closing(sqlite3.connect(file)) as database:
        made = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        named = [name for name, sql in made.items() if sql.startswith("CREATE TABLE")]
        made = {name: sorted(re.findall(r"\w+", sql)) for name, sql in made.items()}
        rows = {n: database.execute(f'SELECT count(*) FROM "{n}"').fetchone() for n in named}
        rows.pop("experiment_tags")  # these tags describe our experiment
        return made, rows, database.execute("SELECT * FROM alembic_version").fetchall()


def test_other_programs_are_not_taken_over(project):
    (project.path / "script.py").write_text("import sys; print('mlflow' in sys.modules)")
    assert run(project, "python", "script.py")[1] == "False\n"
    assert run(project, "python", "-m", "json.tool", text="{}")[:2] == (0, "{}\n")
