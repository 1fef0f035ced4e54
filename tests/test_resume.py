"""Work in progress: one process at a time, nothing lost, nothing done twice or kept for long."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from multiprocessing import forkserver, spawn
from pathlib import Path
from types import SimpleNamespace

import hostile
import pytest
import safetensors.torch
import torch
from workspace import ROOT, Project, warm_python

from secateur.base.errors import SecateurError, SettingsError
from secateur.base.stage import Stage
from secateur.training import resume
from secateur.training.resume import ResumeStore, single_flight

PROCESSES = multiprocessing.get_context("forkserver")  # pytest has threads, so it cannot fork
# only libraries: the fork server does not find the modules of this folder
PROCESSES.set_forkserver_preload(["pydantic.dataclasses", "pytest", "safetensors.torch"])
OUTS = ["models/toy", "models/toy.run.json"]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty project, with the current folder inside it."""
    (tmp_path / "workspace").mkdir()
    monkeypatch.chdir(tmp_path / "workspace")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def stage(**declared):
    return Stage("baseline", None, declared, {})


def nobody():
    raise AssertionError("nobody else holds this work")


def write_outs(text):
    Path("models/toy/deep").mkdir(parents=True, exist_ok=True)
    for path in ("models/toy/model", "models/toy/deep/history", "models/toy.run.json"):
        Path(path).write_text(f"{text} {path}")


def tensors():
    torch.manual_seed(0)
    layout = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return {
        "weights": torch.randn(3, 4),
        "optimizer/0/step": torch.tensor(7.0),
        "layout": layout,
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
        "view": torch.arange(6).view(2, 3).T,
    }


INFO = {"history": [{"epoch": 1, "lr": 0.1 + 0.2, "val_loss": 1e-300}], "best": 1}


def test_the_state_comes_back_as_it_was():
    store = ResumeStore(Path("folder"), [])
    assert store.load() is None
    given = tensors()
    store.save(given, INFO)
    for tensor in given.values():  # later changes of the tensors do not matter
        tensor.zero_()
    store.flush()
    found, info = ResumeStore(Path("folder"), []).load()
    assert info == INFO
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_state_is_written_after_a_second_and_then_it_says_so(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(resume, "time", clock)
    store = ResumeStore(Path("folder"), [])
    assert not store.save({"a": torch.zeros(1)}, {"epoch": 1})
    assert store.load() is None
    clock.now += 1.05
    assert store.save({"a": torch.zeros(1)}, {"epoch": 2})
    assert store.load()[1] == {"epoch": 2}
    assert not store.save({"a": torch.zeros(1)}, {"epoch": 3})
    assert store.load()[1] == {"epoch": 2}


@pytest.mark.parametrize(("wanted", "written"), [("0", [1, 2, 3]), ("2.5", [3]), ("60", [])])
def test_the_time_between_states_is_that_of_the_variable(wanted, written, monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(resume, "time", clock)
    monkeypatch.setenv("SECATEUR_SAVE_SECONDS", wanted)
    store, found = ResumeStore(Path("folder"), []), []
    for epoch in (1, 2, 3):
        clock.now += 1.0
        if store.save({"a": torch.zeros(1)}, {"epoch": epoch}):
            found.append(epoch)
    assert found == written


@pytest.mark.parametrize("wanted", ["-1", "soon", "1e3", "0.0001", "1000000"])
def test_a_time_between_states_that_is_none_is_named(wanted, monkeypatch):
    monkeypatch.setenv("SECATEUR_SAVE_SECONDS", wanted)
    with pytest.raises(SettingsError, match=f"^SECATEUR_SAVE_SECONDS = .*{wanted}.*: seconds from"):
        ResumeStore(Path("folder"), [])


@pytest.mark.parametrize("error", [ValueError, SecateurError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_stage_the_last_state_is_written_and_the_lock_goes(error):
    with pytest.raises(error), single_flight(stage(), OUTS, nobody) as store:
        store.save({"a": torch.ones(1)}, {"epoch": 1})
        store.save({"a": torch.ones(2)}, {"epoch": 2})
        raise error("over")
    with single_flight(stage(), OUTS, nobody) as store:
        found, info = store.load()
        assert info == {"epoch": 2}
        assert torch.equal(found["a"], torch.ones(2))
        assert not store.complete


def test_finished_work_is_taken_over_and_its_state_is_gone():
    with single_flight(stage(), OUTS, nobody) as store:
        assert not store.complete
        store.save(tensors(), INFO)
        store.flush()
        store.note("run_id", "abc")
        write_outs("made")
        store.finish()
    write_outs("something else")
    with single_flight(stage(), OUTS, nobody) as store:
        assert store.complete
        store.restore_outs()
        assert store.load() is None
        assert store.note("run_id") is None
    for path in ("models/toy/model", "models/toy/deep/history", "models/toy.run.json"):
        assert Path(path).read_text() == f"made {path}"


def test_work_is_not_done_while_its_outs_are_half_kept(project):
    with single_flight(stage(), OUTS, nobody) as store:
        Path("models/toy").mkdir(parents=True)
        Path("models/toy/model").write_text("made")  # the record is missing
        with pytest.raises((OSError, SecateurError), match=r"toy\.run\.json"):
            store.finish()
        assert not store.complete


def whole_state(folder):
    store = ResumeStore(folder, [])
    store.save(tensors(), INFO)
    store.flush()
    return (folder / "state.safetensors").read_bytes()


def forged(folder, name, value):
    """The state of this work with another value of one tensor, but the old digest."""
    with safetensors.safe_open(folder / "state.safetensors", "pt") as file:
        found, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    return safetensors.torch.save(found | {name: value}, metadata)


DAMAGED = {
    "truncated": lambda folder, whole: whole[: len(whole) // 2],
    "without its end": lambda folder, whole: whole[:-1],
    "empty": lambda folder, whole: b"",
    "junk": lambda folder, whole: bytes(range(256)) * 40,
    "zeros": lambda folder, whole: bytes(len(whole)),
    "pickle": lambda folder, whole: b"\x80\x02}q\x00.",
    "foreign": lambda folder, whole: safetensors.torch.save({"x": torch.ones(3)}),
    "of other work": lambda folder, whole: whole_state(Path("other")),
    "one bit": lambda folder, whole: whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:],
    "other shape": lambda folder, whole: forged(folder, "weights", torch.ones(4, 3)),
    "another tensor": lambda folder, whole: forged(folder, "more", torch.ones(1)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_state_is_discarded_with_one_line(case, capsys):
    folder = Path("folder")
    whole = whole_state(folder)
    assert ResumeStore(folder, []).load() is not None
    (folder / "state.safetensors").write_bytes(DAMAGED[case](folder, whole))
    store = ResumeStore(folder, [])
    assert store.load() is None
    line = capsys.readouterr().err
    assert line.startswith("warning: folder/state.safetensors: ") and line.count("\n") == 1
    assert "discarded" in line and not (folder / "state.safetensors").exists()
    assert store.load() is None and capsys.readouterr().err == ""
    whole_state(folder)
    assert ResumeStore(folder, []).load()[1] == INFO


@pytest.mark.parametrize("what", ["folder", "fifo", "link"])
@pytest.mark.parametrize("name", ["state.safetensors", "notes.json"])
def test_what_is_no_file_is_discarded_too(name, what, capsys):
    path = Path("folder") / name
    path.parent.mkdir()
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("no")}[
        what
    ]()
    store = ResumeStore(Path("folder"), [])
    assert store.load() is None and store.note("run_id") is None
    assert capsys.readouterr().err.count("\n") == 1
    assert store.note("run_id", "abc") == "abc"
    whole_state(Path("folder"))
    assert ResumeStore(Path("folder"), []).load() is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[1, 2]", b"3", b"{", b"\xff\x00", b'{"run_id": 3}', b'{"seconds": "long"}',
     b'{"seconds": NaN}', b'{"seconds": -1}', b'{"seconds": true}', b"[" * 90_000],
)  # fmt: skip
def test_damaged_notes_are_discarded_with_one_line(content, capsys):
    Path("folder").mkdir()
    Path("folder/notes.json").write_bytes(content)
    store = ResumeStore(Path("folder"), [])
    assert store.note("run_id") is None
    line = capsys.readouterr().err
    assert line.startswith("warning: folder/notes.json: ") and line.count("\n") == 1
    assert store.note("seconds", 2.0) == 2.0
    assert json.loads(Path("folder/notes.json").read_text()) == {"seconds": 2.0}


def lose(done):
    shutil.rmtree(done / "models")


OUTS_LOST = {
    "all": lose,
    "one": lambda done: (done / "models/toy.run.json").unlink(),
    "half of one": lambda done: (done / "models/toy/model").write_text("ma"),
    "a file more": lambda done: (done / "models/toy/more").write_text(""),
    "a file for a folder": lambda done: (lose(done), (done / "models").write_text("")),
    "list empty": lambda done: (done / "complete").write_text(""),
    "list junk": lambda done: (done / "complete").write_bytes(b"\xff"),
    "list of nothing": lambda done: (done / "complete").write_text("{}"),
    "list a folder": lambda done: ((done / "complete").unlink(), (done / "complete").mkdir()),
}


@pytest.mark.parametrize("case", OUTS_LOST)
def test_finished_outs_that_are_not_whole_are_discarded_with_one_line(case, capsys):
    with single_flight(stage(), OUTS, nobody) as store:
        write_outs("made")
        store.finish()
    OUTS_LOST[case](store.folder / "done")
    with single_flight(stage(), OUTS, nobody) as store:
        assert not store.complete
        line = capsys.readouterr().err
        assert line.startswith("warning: ") and line.count("\n") == 1 and "discarded" in line
        assert not (store.folder / "done").exists()
        write_outs("made")
        store.finish()
        assert store.complete


@pytest.mark.parametrize("place", [".", "baseline", "fingerprint", "lock", "done"])
def test_what_lies_in_the_way_is_removed_or_renamed(place, project, capsys):
    root = project / ".resume"
    folder = root / "baseline" / stage().fingerprint
    path = {".": root, "baseline": folder.parent, "fingerprint": folder}.get(place, folder / place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if place == "lock" else path.write_text("not ours")
    with single_flight(stage(), OUTS, nobody) as store:
        assert not store.complete
        write_outs("made")
        store.finish()
        assert store.complete
    line = capsys.readouterr().err
    assert line.startswith("warning: ") and line.count("\n") == 1
    kept = [path.read_text() for path in project.glob(".resume.*")]
    assert kept == (["not ours"] if place == "." else [])


@pytest.fixture
def own_root(monkeypatch):
    """A project that an ordinary user can access, unlike the temporary folders of pytest."""
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    root.chmod(0o755)
    monkeypatch.setenv("DVC_ROOT", str(root))
    yield root
    root.chmod(0o755)
    shutil.rmtree(root)


@pytest.mark.parametrize("place", ["project", ".resume", "lock"])
def test_where_nothing_can_be_written_one_line_names_the_file(place, own_root):
    lock = own_root / ".resume/baseline" / stage().fingerprint / "lock"
    if place == "lock":
        lock.parent.mkdir(parents=True)
        lock.touch(0o444)
    elif place == ".resume":
        (own_root / ".resume").mkdir()
    for path in (own_root, *own_root.rglob("*")):
        path.chmod(0o444 if path == lock else 0o555)
    with hostile.ordinary_user(), pytest.raises(SecateurError) as caught:
        single_flight(stage(), OUTS, nobody).__enter__()
    line = str(caught.value)
    assert str(own_root / ".resume") in line and "Permission denied; " in line and "\n" not in line
    for path in (own_root, *own_root.rglob("*")):
        path.chmod(0o755)


def test_old_work_of_another_user_is_left_alone(own_root):
    old = abandoned(resume.KEEP_DAYS + 1, a=1)
    (old / "lock").chmod(0o000)
    (own_root / ".resume/baseline").chmod(0o777)
    with hostile.ordinary_user(), single_flight(stage(a=2), OUTS, nobody):
        assert old.exists()


def test_it_is_known_whether_a_process_works_on_a_fingerprint():
    fingerprint = stage().fingerprint
    with resume.unused("baseline", fingerprint) as free:
        assert free, "no process has a folder for it"
    with another_process(worker) as (pipe, process):
        assert told(pipe) == "working"
        with resume.unused("baseline", fingerprint) as free:
            assert not free
        os.kill(process.pid, signal.SIGKILL)
        process.join(600)
        with resume.unused("baseline", fingerprint) as free:
            assert free
    with single_flight(stage(), OUTS, nobody), resume.unused("baseline", fingerprint) as free:
        assert not free, "this process is working on it"


def test_notes_are_remembered_one_by_one():
    store = ResumeStore(Path("folder"), [])
    assert store.note("run_id") is None
    assert store.note("run_id", "abc") == "abc"
    assert store.note("seconds", 1.5) == 1.5
    assert store.note("seconds", 2.5) == 2.5
    later = ResumeStore(Path("folder"), [])
    assert later.note("run_id") == "abc"
    assert later.note("seconds") == 2.5
    assert json.loads(Path("folder/notes.json").read_text()) == {"run_id": "abc", "seconds": 2.5}


@pytest.mark.parametrize(
    "other", [{"decay": 0.2}, {"decay": 0.1, "seed": 2}, {"decay": "0.1"}, {}], ids=str
)
def test_other_params_are_other_work(other):
    assert stage(decay=0.1).fingerprint == stage(decay=0.1).fingerprint
    assert stage(**other).fingerprint != stage(decay=0.1).fingerprint
    one = single_flight(stage(decay=0.1), OUTS, nobody)
    two = single_flight(stage(**other), OUTS, nobody)
    with one as first, two as second:
        assert first.folder != second.folder


def test_inputs_and_names_are_part_of_the_work():
    works = [
        Stage("baseline", None, {}, {}),
        Stage("finetune", None, {}, {}),
        Stage("baseline", None, {}, {"data/toy": "1"}),
        Stage("baseline", None, {}, {"data/toy": "2"}),
        Stage("baseline", None, {}, {"data/other": "1"}),
    ]
    assert len({work.fingerprint for work in works}) == len(works)


@functools.cache
def start_server_of_processes():
    """The server that forks processes; warm if possible."""
    with pytest.MonkeyPatch.context() as patch:
        Project(ROOT).enter(patch)
        patch.setattr(spawn, "_python_exe", os.fsencode(warm_python()))
        forkserver.ensure_running()


def start(target, *arguments):
    """A process in the current folder and in the project of the test."""
    start_server_of_processes()
    where = (os.getcwd(), os.environ["DVC_ROOT"])  # noqa: PTH109
    process = PROCESSES.Process(target=in_project, args=(*where, target, *arguments))
    process.start()
    return process


def in_project(folder, root, target, *arguments):
    os.chdir(folder)
    os.environ["DVC_ROOT"] = root
    target(*arguments)


@contextlib.contextmanager
def another_process(target, *arguments):
    """A separate process in the project of the test; yields its pipe and the process."""
    ours, theirs = PROCESSES.Pipe()
    process = start(target, theirs, *arguments)
    try:
        yield ours, process
    finally:
        process.kill()
        process.join()


def told(pipe):
    assert pipe.poll(600), "the other process sent nothing"
    return pipe.recv()


def do_the_same_work(pipe, folder):
    """A second process that needs the same work in its own workspace."""
    os.chdir(folder)
    pipe.recv()
    with single_flight(stage(), OUTS, lambda: pipe.send("waiting")) as store:
        pipe.send("done" if store.complete else "not done")
        if store.complete:
            store.restore_outs()


@pytest.mark.parametrize("finished", [True, False])
def test_a_second_process_waits_and_takes_what_the_first_has_made(finished, project):
    (project / "second").mkdir()
    with another_process(do_the_same_work, project / "second") as (pipe, process):
        with single_flight(stage(), OUTS, nobody) as store:
            pipe.send("go")
            assert told(pipe) == "waiting"
            write_outs("made")
            if finished:
                store.finish()
            assert not pipe.poll(0.2), "it waits while the lock is held"
        assert told(pipe) == ("done" if finished else "not done")
        process.join(600)
        assert process.exitcode == 0
    taken = project / "second" / "models" / "toy" / "model"
    assert taken.exists() == finished
    if finished:
        assert taken.read_text() == "made models/toy/model"


def worker(pipe):
    """Works until it is killed."""
    with single_flight(stage(), OUTS, nobody) as store:
        store.save({"a": torch.ones(1)}, {"epoch": 3})
        store.flush()
        pipe.send("working")
        time.sleep(3600)


def test_the_lock_of_a_killed_process_is_free_and_its_state_is_there():
    with another_process(worker) as (pipe, process):
        assert told(pipe) == "working"
        os.kill(process.pid, signal.SIGKILL)
        process.join(600)
        with single_flight(stage(), OUTS, nobody) as store:
            assert store.load()[1] == {"epoch": 3}


def abandoned(days, **declared):
    """Work that was last touched this number of days ago."""
    with single_flight(stage(**declared), OUTS, nobody) as store:
        store.save({"a": torch.ones(1)}, {"epoch": 1})
        store.flush()
    age(store.folder, days)
    return store.folder


def age(folder, days):
    then = time.time() - days * 86_400
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


def test_work_untouched_for_longer_than_the_limit_is_deleted():
    old, recent = abandoned(resume.KEEP_DAYS + 0.1, a=1), abandoned(resume.KEEP_DAYS - 0.1, a=2)
    with single_flight(stage(a=3), OUTS, nobody):
        assert not old.exists()
        assert (recent / "state.safetensors").exists()


def test_old_work_that_is_needed_now_or_locked_is_kept():
    with single_flight(stage(a=2), OUTS, nobody) as held:
        wanted = abandoned(9, a=1)
        age(held.folder, 9)
        with single_flight(stage(a=1), OUTS, nobody) as store:
            assert store.folder == wanted
            assert store.load() is not None
            assert held.folder.exists()


def tidying(barrier, count):
    barrier.wait()
    for number in range(count):
        with single_flight(stage(own=os.getpid(), number=number), OUTS, nobody):
            pass


def test_several_that_tidy_up_at_once_do_not_disturb_each_other():
    for number in range(30):
        abandoned(resume.KEEP_DAYS + 1, number=number)
    barrier = PROCESSES.Barrier(4)
    processes = [start(tidying, barrier, 5) for _ in range(4)]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_lock_whose_folder_was_removed_meanwhile_is_taken_again(monkeypatch):
    removed = []
    whole = resume.fcntl.flock

    def remove_first(lock, how):
        whole(lock, how)
        if not removed:
            removed.append(lock.name)
            shutil.rmtree(Path(lock.name).parent)

    monkeypatch.setattr(resume.fcntl, "flock", remove_first)
    with single_flight(stage(), OUTS, nobody) as store:
        assert removed
        assert (store.folder / "lock").exists()


def test_files_that_change_in_other_work_cause_no_error():
    with single_flight(stage(a=1), OUTS, nobody) as busy:
        over, failures = threading.Event(), []

        def write():
            while not over.is_set():
                try:
                    busy.note("seconds", time.monotonic())
                except OSError as error:
                    failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(300):
                with single_flight(stage(a=2), OUTS, nobody):
                    pass
        finally:
            over.set()
            writer.join()
        assert not failures
