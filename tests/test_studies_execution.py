"""Who runs the pieces of a study, and the copies of the project in which they run."""

import json
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SERVE = """
import os, socket, sys
from secateur.studies.execution import workers
task, folder = workers.serve(socket.socket(fileno=int(sys.argv[1])))
os._exit(int(task.key))
"""


def request(key):
    task = {
        "key": key, "stage": "prepare", "settings": {}, "upstream": [], "root": ".",
        "revision": "", "tree": "", "cache": "", "ignored": [], "experiment": "", "folders": {},
    }  # fmt: skip
    return json.dumps({"task": task, "folder": "."}).encode() + b"\n"


def test_requests_that_arrive_together_are_all_answered():
    """Also one that arrives in two parts."""
    ours, its = socket.socketpair()
    ours.settimeout(20)
    sent = b"".join(request(key) for key in "1234")
    command = [sys.executable, "-c", SERVE, str(its.fileno())]
    with subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()]) as server, ours:
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
