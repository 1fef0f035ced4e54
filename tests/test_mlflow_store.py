"""MLflow's store: created completely or not at all; moved aside if damaged, else left alone."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from workspace import ROOT, Project

from secateur.base.errors import SecateurError
from secateur.base.stage import Stage
from secateur.pipeline import mlflow_file, mlflow_store, tracking
from secateur.pipeline.mlflow_store import Store
from secateur.pipeline.record import RunRecord
from secateur.training.resume import single_flight

pytestmark = pytest.mark.usefixtures("programs")


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A complete store without runs, in its own project."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        assert Store(strict=True).runs("") == []
    assert names(folder) == ["mlflow.db"]
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty):
    """A complete store with one run, in its own project."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(empty, folder)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        store = Store(strict=True)
        run = store.client.create_run(store.experiment, run_name="kept")
        store.client.set_terminated(run.info.run_id)
    assert names(folder) == ["mlflow.db"]
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path, monkeypatch, programs):
    """An empty project."""
    enter(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def tracked(project, empty):
    """A project with an empty store, in which no stage has run."""
    shutil.copy(empty, project)
    return project


def enter(patch, folder):
    patch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "SECATEUR_TRACKING"):
        patch.delenv(name, raising=False)
    patch.setenv("DVC_ROOT", str(folder))


def process(folder, code):
    """A Python process with the project's code in this folder; it prints its process id first."""
    begin = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); print(os.getpid(), flush=True)\n"
    started = subprocess.Popen(
        ["python", "-c", begin + code],
        cwd=folder,
        env=Project(folder).env(SECATEUR_TRACKING="on", DVC_ROOT=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return started, int(started.stdout.readline())


def kill(started):
    """Send SIGKILL and wait until the process has ended."""
    process, number = started
    os.kill(number, signal.SIGKILL)
    process.wait()


def copied_when_made(patch, empty):
    """Create new stores as copies of an empty one: making one takes a second."""
    patch.setattr(mlflow_file, "create", lambda file, *_: shutil.copy(empty, file))


def names(folder):
    """Names of the files in the folder, without locks and journals of stores."""
    found = sorted(path.name for path in folder.iterdir() if path.name != ".mlflow.lock")
    return [name for name in found if not name.endswith("-journal")]


def runs(path):
    """Names of the runs in a store, read with SQLite alone."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [name for (name,) in database.execute("SELECT name FROM runs")]


def old(path):
    """Set the time of the last change to a minute ago: recent files are waited for."""
    then = time.time() - 60
    os.utime(path, (then, then))


FIRST = "from secateur.pipeline.mlflow_store import Store; assert Store().client is not None"


def test_a_process_killed_while_it_makes_the_store_leaves_none(project):
    making = process(project, FIRST)
    while not any(p.stat().st_size > 300_000 for p in project.glob(".mlflow.db.new-*/mlflow.db")):
        assert making[0].poll() is None, making[0].communicate()[0]
        time.sleep(0.001)
    kill(making)
    assert not (project / "mlflow.db").exists()
    store = Store(strict=True)
    assert store.runs("") == []
    assert names(project) == ["mlflow.db"]


def half_made(path):
    """Leave what MLflow itself leaves if it is killed while it creates a store."""
    code = (
        "from mlflow import MlflowClient; MlflowClient('sqlite:///mlflow.db').search_experiments()"
    )
    making = process(path.parent, code)
    while not path.exists() or path.stat().st_size < 190_000:
        assert making[0].poll() is None
        time.sleep(0.001)
    kill(making)


def tables_of_another_program(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE runs (x)")
        database.commit()


def half_migrated(path, made):
    """A store with runs whose last migrations have been undone halfway."""
    shutil.copy(made, path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE alembic_version SET version_num = '867495a8f9d4'")
        database.execute("DROP TABLE issues")
        database.commit()


DAMAGED = {
    "half made": lambda path, made: half_made(path),
    "empty": lambda path, made: path.touch(),
    "junk": lambda path, made: path.write_bytes(bytes(range(256)) * 100),
    "zeros": lambda path, made: path.write_bytes(bytes(40_000)),
    "text": lambda path, made: path.write_text("mlflow"),
    "only a header": lambda path, made: path.write_bytes(made.read_bytes()[:100]),
    "truncated": lambda path, made: path.write_bytes(made.read_bytes()[: 4096 * 30]),
    "a page of junk": lambda path, made: path.write_bytes(
        made.read_bytes()[:50] + bytes(4046) + made.read_bytes()[4096:]
    ),
    "other tables": lambda path, made: tables_of_another_program(path),
    "half migrated": half_migrated,
    "a folder": lambda path, made: path.mkdir(),
    "a fifo": lambda path, made: os.mkfifo(path),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_store_is_kept_aside_and_replaced(case, project, empty, made, capfd, monkeypatch):
    path = project / "mlflow.db"
    if case not in ("half made", "half migrated"):
        copied_when_made(monkeypatch, empty)
    DAMAGED[case](path, made)
    before = path.read_bytes() if path.is_file() else None
    old(path)
    store = Store()
    assert store.client is not None
    assert store.runs("") == []
    output = capfd.readouterr()
    (line,) = [line for line in output.err.splitlines() if "warning" in line]
    (name,) = (name for name in names(project) if name.startswith("mlflow.db.broken-"))
    kept = project / name
    assert str(path) in line and kept.name in line and "`make sync`" in line
    assert "Traceback" not in output.err + output.out
    if before is not None and case not in ("half made", "half migrated"):  # SQLite rolls these back
        assert kept.read_bytes() == before
    if case == "half migrated":
        assert runs(kept) == ["kept"]
    assert names(project) == sorted(["mlflow.db", kept.name])
    assert Store().client is not None
    assert capfd.readouterr().err == ""


def test_a_second_damaged_store_is_kept_under_another_name(project):
    for _ in range(3):
        (project / "mlflow.db").write_text("junk")
        mlflow_file.keep_aside(project / "mlflow.db")
    assert len(list(project.glob("mlflow.db.broken-*"))) == 3


def test_damage_deep_in_the_file_is_found_by_sync(project, empty, made, capfd, monkeypatch):
    copied_when_made(monkeypatch, empty)
    content = bytearray(made.read_bytes())
    content[4096 * 40 : -4096 * 20] = b"\xaa" * (len(content) - 4096 * 60)
    (project / "mlflow.db").write_bytes(content)
    store = Store(strict=True)
    assert store.runs("") == []
    (line,) = capfd.readouterr().err.splitlines()
    assert "damaged" in line and "make sync" not in line
    assert next(project.glob("mlflow.db.broken-*")).read_bytes() == content


def test_a_journal_of_a_deleted_store_does_not_spoil_the_new_one(project, made):
    for ending in mlflow_file.COMPANIONS:
        (project / f"mlflow.db{ending}").write_bytes(made.read_bytes()[:5000])
    assert Store().client is not None
    assert mlflow_file.fault(project / "mlflow.db", thorough=True) is None
    assert names(project) == ["mlflow.db"]


def test_what_a_killed_process_has_left_beside_a_whole_store_is_removed(project, made):
    (project / ".mlflow.db.new-abc").mkdir()
    shutil.copy(made, project / "mlflow.db")
    os.link(project / "mlflow.db", project / ".mlflow.db.new-abc" / "mlflow.db")
    assert Store(strict=True).client is not None
    assert names(project) == ["mlflow.db"]
    assert runs(project / "mlflow.db") == ["kept"]


def test_a_store_that_another_program_is_making_is_waited_for(project, made):
    path = project / "mlflow.db"
    code = (
        "from mlflow import MlflowClient; MlflowClient('sqlite:///mlflow.db').search_experiments()"
    )
    making, _ = process(project, code)
    while not path.exists():
        assert making.poll() is None
        time.sleep(0.001)
    store = Store()
    assert making.wait() == 0
    assert store.client is not None
    assert names(project) == ["mlflow.db"]


def test_a_store_that_another_program_writes_just_then_is_no_truncated_one(
    project, made, monkeypatch
):
    """The other commit ends between two reads of the file: the header has the new size."""
    path, whole = project / "mlflow.db", made.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in mlflow_file.fault(path)
    real = Path.open

    def opened(self, *arguments, **more):
        if self == path:
            shutil.copyfile(made, path)
        return real(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", opened)
    assert mlflow_file.fault(path) is None


def newer(database):
    database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")


def older(database):
    database.execute("UPDATE alembic_version SET version_num = 'b7e4c1a90f23'")


@pytest.mark.parametrize("version", [newer, older])
def test_a_store_of_another_version_of_mlflow_is_left_as_it_is(version, project, made, capfd):
    path = shutil.copy(made, project / "mlflow.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        version(database)
        database.commit()
    before = path.read_bytes()
    assert Store().client is None
    (line,) = capfd.readouterr().err.splitlines()
    assert "another version of MLflow" in line and "mlflow db upgrade" in line
    assert path.read_bytes() == before
    assert names(project) == ["mlflow.db"]
    with pytest.raises(SecateurError, match="another version of MLflow"):
        Store(strict=True)


def test_a_locked_store_is_left_as_it_is(project, made, monkeypatch, capfd):
    monkeypatch.setattr(mlflow_file, "LOCK_SECONDS", 0.5)
    path = shutil.copy(made, project / "mlflow.db")
    code = (
        "import sqlite3, time; d = sqlite3.connect('mlflow.db', isolation_level=None);"
        "d.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); time.sleep(3600)"
    )
    holder = process(project, code)
    assert holder[0].stdout.readline() == "locked\n"
    try:
        assert Store().client is None
    finally:
        kill(holder)
    (line,) = capfd.readouterr().err.splitlines()
    assert "locked by another process" in line
    assert names(project) == ["mlflow.db"]
    assert Store().client is not None
    assert runs(path) == ["kept"]


def test_a_damaged_store_named_by_the_user_is_left_as_it_is(project, monkeypatch, capfd):
    other = project / "other.db"
    other.write_text("junk")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert Store().client is None
    (line,) = capfd.readouterr().err.splitlines()
    assert str(other) in line and "not an SQLite database; move it away" in line
    assert names(project) == ["other.db"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/new.db")
    assert Store().client is not None, "a new store is created"


def test_a_relative_store_lies_in_the_project_and_not_in_a_copy_of_it(tmp_path, monkeypatch):
    """Experiments run in copies that DVC removes afterwards, with all that is in them."""
    project, copy = tmp_path / "my project", tmp_path / "copy"
    project.mkdir()
    copy.mkdir()
    enter(monkeypatch, project)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my runs/all.db?timeout=30")
    store = Store()
    assert store.client is not None
    assert store.uri == f"sqlite:///{tmp_path}/my project/my runs/all.db?timeout=30"
    assert names(project / "my runs") == ["all.db"]
    assert names(copy) == []


def test_the_project_may_lie_in_a_folder_of_any_name(tmp_path, monkeypatch):
    """SQLAlchemy decodes `%41`, and takes what follows a question mark for options."""
    project = tmp_path / "50%41 of what? #é"
    project.mkdir()
    enter(monkeypatch, project)
    assert Store(strict=True).client is not None
    assert names(project) == ["mlflow.db"]
    store = Store(strict=True)  # and finds it again
    assert mlflow_file.local_file(store.uri) == project / "mlflow.db"
    assert names(tmp_path) == [project.name]


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///?timeout=3"])
def test_a_store_in_memory_is_refused(project, monkeypatch, capfd, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Store().client is None
    (line,) = capfd.readouterr().err.splitlines()
    assert "a store in memory is lost; name a file" in line
    with pytest.raises(SecateurError, match="MLFLOW_TRACKING_URI"):
        Store(strict=True)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://host:5432/db"),
        ("mysql+pymysql://me:se/cret@host/db", "mysql+pymysql://host/db"),
        ("https://me:secret@host/path@x", "https://host/path@x"),
        ("https://secret@host", "https://host"),
        ("postgresql://host/db?user=me&password=secret&x=1",
         "postgresql://host/db?user=me&password=***&x=1"),
        ("sqlite:////a:b@c/mlflow.db", "sqlite:////a:b@c/mlflow.db"),
        ("https://host:5000/path", "https://host:5000/path"),
        ("no 'https://me:secret@host/api', e@f", "no 'https://host/api', e@f"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_passwords(address, shown):
    assert mlflow_store.without_password(address) == shown


def test_neither_a_store_nor_its_warnings_tell_the_password(project, monkeypatch, capfd):
    address = "http://me:secret@127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(mlflow_store, "_knock", lambda uri: None)
    monkeypatch.setattr(mlflow_store, "end_abandoned", lambda store: None)
    opened = []
    monkeypatch.setattr(Store, "_open", lambda self, uri, *_: opened.append(uri))
    store = Store()
    assert (opened, store.uri) == ([address], "http://127.0.0.1:5000")

    def fail():
        raise OSError(f"API request to {address}/api failed")

    store.attempt(fail)
    store.strict = True
    with pytest.raises(SecateurError) as caught:
        store.attempt(fail)
    for said in (capfd.readouterr().err, str(caught.value)):
        assert "API request to http://127.0.0.1:5000/api failed" in said and "secret" not in said


@pytest.mark.parametrize("size", [10_000, 300_000, 2_000_000])
def test_a_limit_on_the_size_of_files_gives_one_line_and_nothing_half_made(
    size, project, empty, monkeypatch
):
    copied_when_made(monkeypatch, empty)  # only in this process
    whole = size == 2_000_000
    code = (
        "import os, resource;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));"
        "from secateur.pipeline.mlflow_store import Store; s = Store();"
        "from mlflow.entities import Metric;"
        "m = [Metric('x', float(n), 0, n) for n in range(30000)];"
        "s.client and s.attempt(lambda: s.log(s.client.create_run(s.experiment).info.run_id, m));"
        "print('end', s.client is None)"
    )
    output = process(project, code)[0].communicate()[0]
    assert output.splitlines()[-1] == "end True", output
    assert len(output.splitlines()) == 2 and output.startswith("warning: MLflow"), output
    assert names(project) == (["mlflow.db"] if whole else [])
    assert Store(strict=True).client is not None


RUNNING = """
import sys, time
from secateur.base.stage import Stage
from secateur.pipeline import tracking
from secateur.pipeline.mlflow_store import Store
from secateur.training.resume import single_flight
stage = Stage("baseline", None, {"seed": int(sys.argv[1])}, {})
with single_flight(stage, [], lambda: None) as work:
    run = tracking.Run(Store(strict=True), stage, {})
    run.open(work.note("run_id"), {"name": "toy", "hash": "00"})
    work.note("run_id", run.id)
    print(run.id, stage.fingerprint, flush=True)
    time.sleep(3600)
"""


def training(folder, seed=1):
    """A process that has begun a run of a stage; the run's id and the stage's fingerprint."""
    begun = process(folder, RUNNING.replace("int(sys.argv[1])", str(seed)))
    return begun, *begun[0].stdout.readline().split()


def status(store, run_id):
    return store.client.get_run(run_id).info.status


def test_a_run_whose_process_was_killed_is_ended_by_the_next_and_resumed_as_the_same(tracked):
    killed, first, fingerprint = training(tracked, seed=1)
    alive, second, _ = training(tracked, seed=2)
    try:
        kill(killed)
        store = Store(strict=True)
        assert status(store, first) == "KILLED"
        assert status(store, second) == "RUNNING", "its process is alive"
        again, resumed, _ = training(tracked, seed=1)
        assert resumed == first
        assert status(store, first) == "RUNNING"
        Store(strict=True)
        assert status(store, first) == "RUNNING"
        kill(again)
        shutil.rmtree(tracked / ".resume" / "baseline" / fingerprint)
        Store(strict=True)
        assert status(store, first) == "KILLED", "even if its state was deleted"
    finally:
        kill(alive)


def test_runs_of_other_clones_and_machines_are_left_alone(tracked, monkeypatch):
    store = Store(strict=True)
    own = mlflow_store.clone_tags()
    stage = {"kind": "stage", "stage": "baseline", "fingerprint": "ab" * 16}

    def begin(**tags):
        return store.client.create_run(store.experiment, tags=stage | own | tags).info.run_id

    here, clone, host = begin(), begin(clone="another"), begin(host="another")
    untagged = store.client.create_run(store.experiment).info.run_id
    shared = tracked / "shared.db"
    shutil.copy(tracked / "mlflow.db", shared)
    Store(strict=True)
    assert [status(store, r) for r in (here, clone, host, untagged)] == [
        "KILLED", "RUNNING", "KILLED", "RUNNING",
    ], "the project's own store has no runs of other machines"  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    store = Store(strict=True)
    assert [status(store, r) for r in (here, clone, host, untagged)] == [
        "KILLED", "RUNNING", "RUNNING", "RUNNING",
    ]  # fmt: skip


def test_epochs_that_were_saved_but_not_sent_are_sent_by_the_process_that_resumes(tracked):
    stage = Stage("baseline", None, {"seed": 1}, {})
    rows = [{"epoch": n, "train_loss": 1 / n} for n in (1, 2, 3)]
    run = tracking.Run(Store(strict=True), stage, {})
    run.open(None, {"name": "toy", "hash": "00"})
    run.on_epoch_end(rows[0])
    run.on_state_saved()
    run.end("KILLED")
    again = tracking.Run(Store(strict=True), stage, {})
    again.open(run.id, {"name": "toy", "hash": "00"})
    assert again.id == run.id
    again.on_train_start(9, 1, rows)
    history = again.store.client.get_metric_history(run.id, "epoch/train_loss")
    assert [metric.step for metric in history] == [1, 2, 3]
    with single_flight(stage, [], lambda: None):
        Store(strict=True)
        assert status(again.store, run.id) == "RUNNING", "this process holds its lock"


def test_epochs_with_names_of_layers_that_mlflow_refuses_are_logged(tracked):
    store = Store(strict=True)
    run = store.client.create_run(store.experiment)
    row = {"epoch": 1.0, "magnitude_ratio/blocks.3x3+bn": 2.0}
    store.attempt(lambda: store.log(run.info.run_id, tracking._metrics([(row, 1.0)])))
    logged = store.client.get_run(run.info.run_id).data.metrics
    assert logged == {"epoch/magnitude_ratio/blocks.3x3_bn": 2.0}


def test_a_run_that_was_closed_and_killed_then_has_its_model_once(tracked):
    stage = Stage("baseline", None, {"seed": 1}, {})
    ids = set()
    for _ in range(2):
        run = tracking.Run(Store(strict=True), stage, {})
        run.open(next(iter(ids), (None,))[0], {"name": "toy", "hash": "00"})
        ids.add((run.id, run.close({"accuracy": 1.0}, "models/toy/model", "ab")))
    assert len(ids) == 1
    found = run.store.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert len(found.outputs.model_outputs) == 1


def record(**changes):
    given = {
        "stage": "baseline", "fingerprint": "ab" * 16, "params": {"seed": 1},
        "metrics": {"loss": 1.0}, "model": "models/toy/model", "sha256": "ab",
        "dataset": {"name": "toy", "hash": "00"}, "seconds": 1.0, "hardware": "", "run_id": "lost",
    }  # fmt: skip
    return RunRecord(**given | changes)


def test_a_restored_run_that_was_left_half_written_is_made_anew(tracked):
    store = Store(strict=True)
    rows = [{"epoch": 1.0, "train_loss": 0.5}]
    half, _ = tracking.restore(store, record(), rows, {})
    store.client.update_run(half, "RUNNING")
    store = Store(strict=True)
    assert status(store, half) == "KILLED", "whoever restores a run holds the store's lock"
    whole, made = tracking.restore(store, record(), rows, {})
    assert made and whole != half
    assert [run.info.run_id for run in store.runs("")] == [whole]
    assert tracking.restore(store, record(), rows, {}) == (whole, False)


@pytest.mark.parametrize("ended", ["KILLED", "FAILED"])
def test_a_run_of_finished_work_that_the_store_lost_before_its_end_is_made_anew(tracked, ended):
    store = Store(strict=True)
    own = store.client.create_run(store.experiment, run_name="baseline").info.run_id
    store.client.set_terminated(own, ended)
    whole, made = tracking.restore(store, record(run_id=own), [{"epoch": 1.0, "loss": 0.5}], {})
    assert made and store.client.get_run(whole).data.metrics["loss"] == 1.0
    assert [run.info.run_id for run in store.runs("")] == [whole]
    assert status(store, whole) == "FINISHED"


def test_a_run_that_goes_on_is_left_alone(tracked):
    store = Store(strict=True)
    own = store.client.create_run(store.experiment, run_name="baseline").info.run_id
    assert tracking.restore(store, record(run_id=own), [], {}) == (own, False)
    assert status(store, own) == "RUNNING"


def test_the_experiment_opens_as_one_of_training_models(tracked):
    store = Store(strict=True)
    tags = store.client.get_experiment(store.experiment).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


class Late:
    """A stage with a clock that the test moves."""

    def __init__(self, folder, at_once=False):
        self.stage = Stage("baseline", None, {"seed": 1}, {})
        self.late = tracking.LateRun(self.begin, at_once)

    def begin(self, began):
        run = tracking.Run(Store(strict=True), self.stage, {})
        run.open(None, {"name": "toy", "hash": "00"}, began)
        return run

    def epoch(self, number):
        self.late.on_step_end(number, 1)
        self.late.on_epoch_end({"epoch": number, "train_loss": 1 / number})
        self.late.on_state_saved()


def test_a_stage_is_shown_once_it_has_worked_for_a_while_with_all_its_epochs(tracked):
    done = Late(tracked)
    done.late.on_train_start(4, 1, [{"epoch": 1, "train_loss": 1.0}])  # of an interrupted process
    done.epoch(2)
    assert done.late.run is None
    done.late.since -= tracking.LIVE_AFTER
    done.late.began -= tracking.LIVE_AFTER
    done.epoch(3)
    done.epoch(4)
    assert done.late.close({"accuracy": 1.0}, "models/toy/model", "ab") is not None
    client, found = done.late.run.store.client, done.late.run.id
    logged = client.get_metric_history(found, "epoch/train_loss")
    assert {m.step: m.value for m in logged} == {1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4}
    assert len(logged) == 4
    run = client.get_run(found)
    assert run.info.status == "FINISHED"
    assert run.info.start_time == int(1000 * done.late.began), "the time of importing MLflow counts"
    assert run.info.end_time - run.info.start_time > 1000 * tracking.LIVE_AFTER


@pytest.mark.parametrize("end", ["closed", "KILLED", "FAILED"])
def test_a_short_stage_leaves_its_run_to_its_record_unless_it_fails(end, tracked):
    done = Late(tracked)
    done.epoch(1)
    if end == "closed":
        assert done.late.close({}, "models/toy/model", "ab") is None
    else:
        done.late.end(end)
    assert [run.info.status for run in Store(strict=True).runs("")] == ["FAILED"] * (
        end == "FAILED"
    )
    assert Late(tracked, at_once=True).late.run is not None


def test_runs_made_from_records_are_linked_by_models_and_have_their_own_time(tracked):
    store = Store(strict=True)
    known = {"run_id": None, "experiment": "mine", "revision": "cd" * 20, "ended": 1e9}
    dense, _ = tracking.restore(store, record(**known, seconds=10.0), [], {})
    rows = [{"epoch": float(n), "train_loss": 1 / n} for n in (1, 2)]
    later = record(**known, seconds=4.0, stage="sparse-train", fingerprint="ef" * 16, sha256="cd")
    sparse, _ = tracking.restore(store, later, rows, {"baseline": dense})
    run, made = store.client.get_run(sparse), store.client.get_run(dense).outputs
    assert (run.info.start_time, run.info.end_time) == (999_999_996_000, 1_000_000_000_000)
    assert [m.model_id for m in run.inputs.model_inputs] == [made.model_outputs[0].model_id]
    assert run.data.tags["dvc.exp_name"] == "mine"
    assert run.data.tags["mlflow.source.git.commit"] == "cd" * 20
    logged = store.client.get_metric_history(sparse, "epoch/train_loss")
    assert [m.timestamp for m in logged] == [999_999_998_000, 1_000_000_000_000]


@pytest.mark.parametrize(
    ("surroundings", "live"),
    [
        ({}, True),
        ({"DVC_STAGE": "baseline"}, False),
        ({"DVC_STAGE": "baseline", "SECATEUR_TRACKING": "live"}, True),
    ],
)
def test_a_stage_run_by_itself_is_tracked_from_its_start(monkeypatch, surroundings, live):
    for name in ("DVC_STAGE", "SECATEUR_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert mlflow_store.tracking_live() is live
