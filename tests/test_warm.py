"""A process that starts warm (tests/warm) does what the real program does."""

import json
import re
import signal
import subprocess
import sys
import threading

import pytest
from workspace import PROGRAMS, Project

pytestmark = pytest.mark.pipeline

SURROUNDINGS = """
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": __name__,
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
    if not PROGRAMS:
        pytest.skip("the path of the tests' folder is too long for a socket")
    return Project(tmp_path)


def run(project, program, *arguments, text="", **env):
    """Status and both streams of a command; those of the real Python are the measure."""
    done = subprocess.run(
        [program, *arguments], cwd=project.path, env=project.env(**env), input=text,
        text=True, capture_output=True, timeout=300, umask=0o027,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def without_places(text):
    """A traceback without the frames of the server, which stand before those of the command.

    The source lines below the command's frames are left out too: Python 3.13 prints them, but only
    where it starts the command itself.
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
        "print('mlflow' in sys.modules, flush=True); time.sleep(600)"
    )
    for warm, program in enumerate((sys.executable, "python")):
        with subprocess.Popen(
            [program, "-c", code], cwd=project.path, env=project.env(), text=True,
            stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            first = process.stdout.readline()
            process.send_signal(number)
            assert process.wait(60) == 7
            assert first == f"{bool(warm)}\n"


def test_it_dies_with_the_process_that_stands_for_it(project):
    with subprocess.Popen(
        ["python", "-c", "import time; print('begun', flush=True); time.sleep(600)"],
        cwd=project.path, env=project.env(), text=True, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "begun\n"
        process.kill()
        # the pipe ends when the forked process, which has its other end, has ended
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
    """Not noticed otherwise: everything would still pass, and take twice as long."""
    import sklearn  # noqa: F401  sets KMP_* in this process

    code = "import sys; print('mlflow' in sys.modules)"
    assert run(project, "python", "-c", code)[1] == "True\n"
    assert run(project, "python", "-c", code, GOMP_SPINCOUNT="30000")[1] == "True\n"  # of a stage


def test_other_programs_are_not_taken_over(project):
    (project.path / "script.py").write_text("import sys; print('mlflow' in sys.modules)")
    assert run(project, "python", "script.py")[1] == "False\n"
    assert run(project, "python", "-m", "json.tool", text="{}")[:2] == (0, "{}\n")
