"""Reading files of commits from Git and DVC's cache, without DVC."""

import hashlib
import json
import subprocess
from functools import partial
from unittest.mock import Mock

import dvc.api
import pytest
import yaml
from dvc_data.index import DataIndexDirError

from secateur.base.errors import SecateurError
from secateur.pipeline import sync, tracked


def keep(cache, content):
    """Put an object into a cache; returns its hash."""
    md5 = hashlib.md5(content).hexdigest()
    place = tracked.place(cache, md5)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return md5


@pytest.fixture
def commit(tmp_path, monkeypatch):
    """A commit with two lock files and a report."""
    monkeypatch.chdir(tmp_path)
    for file, outs in {
        "dvc.lock": {"models/a": "0a.dir", "metrics/report.json": "0b"},
        "stages/rounds/dvc.lock": {"models/rounds/x/a": "0c.dir"},
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        made = [{"path": path, "md5": md5} for path, md5 in outs.items()]
        (tmp_path / file).write_text(yaml.safe_dump({"stages": {"any": {"outs": made}}}))
    (tmp_path / "report.json").write_bytes(b"two\nlines\n\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for rest in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "state"]):
        subprocess.run([*git, *rest], check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def test_objects_of_git_are_read_in_one_go_and_missing_ones_told(commit):
    long = f"{commit}:{'x' * 3000}"
    names = [f"{commit}:nothing", f"{commit}:report.json", long, "no-such-revision:report.json"]
    found = tracked.objects([*names, f"{commit}:dvc.lock"])
    assert found[names[1]] == b"two\nlines\n\n" and found[f"{commit}:dvc.lock"]
    assert [found[name] for name in (names[0], names[2], names[3])] == [None] * 3


def test_what_git_says_is_told_if_it_refuses(commit, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(SecateurError, match=r"^git cat-file: fatal: .*dubious ownership") as caught:
        tracked.objects([f"{commit}:report.json"])
    assert "\n" not in str(caught.value)


def test_outs_are_those_of_all_lock_files_and_a_damaged_one_has_none(commit, tmp_path):
    outs = {"models/a": "0a.dir", "metrics/report.json": "0b", "models/rounds/x/a": "0c.dir"}
    assert tracked.outs([commit, "no-such-revision"]) == {commit: outs, "no-such-revision": {}}
    for damage in ("stages: [1", "[]", "stages: {any: {outs: [1]}}"):
        (tmp_path / "dvc.lock").write_text(damage)
        subprocess.run(["git", "add", "-A"], check=True)
        tree = subprocess.run(["git", "write-tree"], capture_output=True, text=True).stdout.strip()
        assert tracked.outs([tree])[tree] == {"models/rounds/x/a": "0c.dir"}


def test_a_file_is_read_not_there_or_only_in_the_remote(tmp_path):
    inside = keep(tmp_path, b"inside")
    files = {"b/c.csv": inside, "gone": "f" * 32}
    entries = [{"relpath": path, "md5": md5} for path, md5 in files.items()]
    listed = keep(tmp_path, json.dumps(entries).encode())
    alone = keep(tmp_path, b"a file")
    locked = {"models/a": listed, "models/a.json": alone, "models/lost": "e" * 32 + ".dir",
              "models/lost.json": "d" * 32}  # fmt: skip
    assert tracked.read(tmp_path, locked, "models/a/b/c.csv") == b"inside"
    assert tracked.read(tmp_path, locked, "models/a.json") == b"a file"
    assert tracked.read(tmp_path, locked, "models/a/history.csv") is None
    assert tracked.read(tmp_path, locked, "models/other.json") is None
    for path in ("models/a/gone", "models/lost/x", "models/lost.json"):
        with pytest.raises(tracked.NotCachedError):
            tracked.read(tmp_path, locked, path)


@pytest.mark.parametrize("error", [FileNotFoundError, DataIndexDirError])
def test_sync_finds_nothing_where_neither_cache_nor_remote_has_a_file(error, tmp_path, monkeypatch):
    def lost(_tree, _path):
        raise error("lost")

    monkeypatch.setattr(dvc.api, "DVCFileSystem", lambda rev: Mock(read_bytes=partial(lost, rev)))
    read = sync._reader("commit", {}, {"models/a": "a" * 32 + ".dir"}, tmp_path)
    assert read("models/a/history.csv") is None
