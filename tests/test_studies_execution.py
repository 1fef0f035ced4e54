"""Executors of studies, and the copies of the project in which they run."""

import json
import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from workspace import ROOT, Project, warm_python

from secateur.base.errors import SecateurError, SettingsError
from secateur.cli import build_parser
from secateur.studies import progress
from secateur.studies.execution import check, local, snapshot
from secateur.studies.execution.experiments import Experiments
from secateur.studies.execution.keys import Graph

SERVE = """
import os, socket, sys
from secateur.studies.execution import workers
task, folder = workers.serve(socket.socket(fileno=int(sys.argv[1])))
os._exit(int(task.key))
"""


def request(key):
    task = {
        "key": key, "stage": "prepare", "params": "", "upstream": [], "root": ".",
        "revision": "", "tree": "", "cache": "", "ignored": [], "experiment": "", "folders": {},
    }  # fmt: skip
    return json.dumps({"task": task, "folder": "."}).encode() + b"\n"


def test_requests_that_arrive_together_are_all_answered():
    """One of them arrives in two parts."""
    ours, its = socket.socketpair()
    ours.settimeout(60)
    sent = b"".join(request(key) for key in "1234")
    command, env = [warm_python(), "-c", SERVE, str(its.fileno())], Project(ROOT).env()
    with subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[its.fileno()]) as server, ours:
        its.close()
        answers = ours.makefile("rb")
        try:
            assert json.loads(answers.readline()) == {"ready": True}
            ours.sendall(sent[:-30])
            found = [json.loads(answers.readline()) for _ in range(3)]
            ours.sendall(sent[-30:])
            found.append(json.loads(answers.readline()))
        except TimeoutError:
            server.kill()
            raise
        answers.close()
    assert sorted((each["key"], each["status"]) for each in found) == [
        ("1", 1), ("2", 2), ("3", 3), ("4", 4),
    ]  # fmt: skip
    assert server.returncode == 0


@pytest.fixture
def small(tmp_path):
    """A committed project without stages, and with files that Git does not track."""
    contents = {
        "params.yaml": "seed: 1\n", "weights/.gitignore": "*.bin\n", "a b/ü.py": "1",
        ".dvc/config": "", ".dvc/.gitignore": "/tmp\n/cache\n/config.local\n",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    who = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "weights/mine.bin").write_text("first")
    (tmp_path / "plugin.py").write_text("first")
    (tmp_path / "images/cats").mkdir(parents=True)
    (tmp_path / "images/cats/1").write_text("first")
    return tmp_path


@pytest.fixture
def identity(monkeypatch):
    """Who commits, which Git knows on no fresh machine."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b.c")


UNKNOWN = ("weights/mine.bin", "plugin.py", "images")


def studied(root, copy):
    """Hashes of untracked files as a study sees them, and the files in a worker's copy."""
    state = snapshot.take(root)
    graph = Graph(state.copy("plan"), root)
    hashes = [graph.file(path)["md5"] for path in UNKNOWN]
    for known in ("a b/ü.py", "a b", "./weights/", "."):
        graph.file(known)
    assert graph.ignored == [*UNKNOWN]
    folder = state.copy(copy, graph.ignored)
    listed = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and ".dvc" not in path.relative_to(folder).parts
    }
    return hashes, listed


@pytest.mark.parametrize("copy", ["worker", "another"])
def test_a_study_sees_files_that_git_does_not_know_as_they_are_now(copy, small):
    """In copies made by an earlier study, and in new ones."""
    before, listed = studied(small, "worker")
    assert listed["images/cats/1"] == "first" and len(listed) == 6
    times = {path: (small / path).stat().st_mtime_ns for path in UNKNOWN}
    assert studied(small, copy) == (before, listed)
    (small / "weights/mine.bin").write_text("other")
    (small / "plugin.py").write_text("longer than before")
    (small / "images/cats").rename(small / "images/1")
    (small / "images/1/1").rename(small / "images/1/2")
    assert times["plugin.py"] != (small / "plugin.py").stat().st_mtime_ns
    after, now = studied(small, copy)
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert now.pop("images/1/2") == listed.pop("images/cats/1")
    assert now == listed | {"weights/mine.bin": "other", "plugin.py": "longer than before"}
    assert {"images/1/2", *UNKNOWN[:2]} | now.keys() == {*now, "images/1/2"}


def test_a_study_sees_a_file_of_equal_size_that_is_changed_in_the_moment_of_a_commit(small):
    """Its size and time are then those in Git's index."""
    subprocess.run(["git", "config", "core.trustctime", "false"], cwd=small, check=True)
    before, now = snapshot.take(small).tree, 1_700_000_000
    file, index = small / "params.yaml", small / ".git/index"
    os.utime(file, (now, now))
    subprocess.run(["git", "add", "-u"], cwd=small, check=True)
    os.utime(index, (now, now))
    file.write_text("seed: 2\n")
    os.utime(file, (now, now))
    state = snapshot.take(small)
    assert state.tree != before
    assert (state.copy("plan") / "params.yaml").read_text() == "seed: 2\n"


def test_a_file_that_is_gone_is_missed(small):
    studied(small, "worker")
    (small / "plugin.py").unlink()
    with pytest.raises(SettingsError, match=r"plugin\.py"):
        studied(small, "worker")


def test_two_studies_that_start_together_share_one_copy(small):
    state = snapshot.take(small)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            found = {*threads.map(lambda _: state.copy("plan", UNKNOWN), range(4))}
            (folder,) = found
            assert (folder / "a b/ü.py").read_text() == "1"
            assert (folder / "images/cats/1").read_text() == "first"
            shutil.rmtree(folder)


def test_two_studies_check_their_settings_at_the_same_time(small, monkeypatch):
    """Each of them is told about its own mistake."""
    monkeypatch.chdir(small)
    state = snapshot.take(small)
    monkeypatch.chdir(state.copy("plan"))
    cells = [{}, {"dataset": "digits"}] * 2

    def said(params):
        return {check.refused("one", params) for _ in range(200)}

    with ThreadPoolExecutor(4) as threads:
        for params, lines in zip(cells, threads.map(said, cells), strict=True):
            (line,) = lines
            assert line.startswith("cell one: params.yaml: ")
            assert ("dataset: missing" in line) is (not params)


def test_where_no_study_can_start_is_said_in_one_line(small):
    for folder, message in (
        (small / "weights", r"in the folder weights/ of its Git repository"),
        (small.parent, r"not a git repository.*; experiments need a Git repository"),
    ):
        with pytest.raises(SecateurError, match=message):
            snapshot.take(folder)
    shutil.rmtree(small / ".dvc/tmp", ignore_errors=True)
    (small / ".dvc/tmp").mkdir()
    (small / snapshot.PLACE).write_text("")
    with pytest.raises(SecateurError, match=r"^\.dvc/tmp/studies: cannot be written to"):
        snapshot.take(small)
    with pytest.raises(SecateurError, match=r"^git write-tree: no wonder$"):
        snapshot.git(small, "write-tree", "--prefix=nosuch/", error="no wonder")
    (small / ".git/HEAD").write_text("ref: refs/heads/nosuch")
    with pytest.raises(SecateurError, match=r"no commit to start from$"):
        snapshot.take(small)


def test_a_parameter_of_slurm_without_a_value_is_refused(capsys):
    given = ["study", "mine", "--executor", "slurm", "--slurm"]
    chosen = build_parser().parse_args([*given, "comment=a=b", "--slurm", "timeout_min=60"])
    assert chosen.slurm == [("comment", "a=b"), ("timeout_min", "60")]
    for wrong in ("partition", "=gpu"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([*given, wrong])
        assert f"'{wrong}' is not KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--cpus", "0"], "--cpus: of no effect with --executor local, only with --executor ray"),
        (["--executor", "slurm", "--gpus", "1"], "--gpus: .* slurm, only with --executor ray"),
        (["--executor", "ray", "--slurm", "a=b"], "--slurm: .* ray, only with --executor slurm"),
    ],
)
def test_an_option_of_another_executor_is_refused(given, line):
    with pytest.raises(SettingsError, match=line):
        progress.check_options(build_parser().parse_args(["study", "mine", *given]))
    fitting = ["--executor", "ray", "--cpus", "0.5", "--gpus", "1"]
    progress.check_options(build_parser().parse_args(["study", "mine", *fitting]))


@pytest.mark.parametrize(
    "content",
    [
        b"stages:\n  prepare: [unclosed\n   x: {\n",
        b"- a\n",
        b"\xff\xfe\x00",
        b"stages: [1]\n",
        b"3\n",
    ],
)
@pytest.mark.usefixtures("identity")
def test_a_damaged_lock_file_is_told_before_a_study_runs_anything(content, tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    state = snapshot.Snapshot(tmp_path, "0" * 40, "", tmp_path)
    stage = SimpleNamespace(lock="dvc.lock")
    works = {"a": SimpleNamespace(stage=stage)}
    made = SimpleNamespace(graph=SimpleNamespace(folder=tmp_path), works=works, cells=[])
    Experiments(state, made, "mine")
    (tmp_path / "dvc.lock").write_bytes(b"")
    Experiments(state, made, "mine")
    (tmp_path / "dvc.lock").write_bytes(content)
    with pytest.raises(SecateurError, match=r"^dvc\.lock: not a lock file of DVC: ") as caught:
        Experiments(state, made, "mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ("study mine: mine-a-s1\n\nSecateur-Cell: 0123\n", False),
        ("study min: mine-a-s1\n\nSecateur-Cell: 0123\n", True),
        ("dvc: commit experiment 0123\n", True),
    ],
)
@pytest.mark.usefixtures("identity")
def test_an_experiment_of_somebody_else_is_not_replaced(message, refused, small):
    commit = snapshot.git(small, "commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", message)
    state = snapshot.take(small)
    ref = f"refs/exps/{state.revision[:2]}/{state.revision[2:]}/mine-a-s1"
    snapshot.git(small, "update-ref", ref, commit)
    made = SimpleNamespace(
        graph=SimpleNamespace(folder=small), works={}, cells=[SimpleNamespace(name="mine-a-s1")]
    )
    if not refused:
        Experiments(state, made, "mine")
        return
    with pytest.raises(SecateurError, match=r"^experiment mine-a-s1: .* `dvc exp rename mine-a-s1"):
        Experiments(state, made, "mine")


def test_a_wait_that_ends_early_loses_nothing():
    executor = local.LocalExecutor.__new__(local.LocalExecutor)
    executor._channel, server = socket.socketpair()
    executor._buffer, executor._running = b"", {"a": 0, "b": 1}
    with executor._channel, server:
        assert executor.wait(0.01) == []
        server.sendall(b'{"key": "a", "sta')
        server.sendall(b'tus": 0}\n{"key": "b", "status": 1}\n')
        assert [*executor.wait(9), *executor.wait(9)] == [
            local.Outcome("a", 0),
            local.Outcome("b", 1),
        ]
        assert executor.wait(0.01) == [] == [*executor._running]
