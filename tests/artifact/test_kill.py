"""R7: `kill -9` at any moment leaves the old file, a verified new one or none, and no litter."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiled import checkpoint

REPOSITORY = Path(__file__).parents[2]

# Runs in a child that forks: each grandchild kills itself at one system call, or is killed by time.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from q35c.artifact import read_artifact
from tests.fake_artifact import write_small

path, mode, points = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
NAMES = ("open", "write", "lseek", "fsync", "pread", "replace", "close", "unlink")
NAMES += ("rename", "link", "sendfile", "ftruncate", "truncate", "pwrite")


def dying(kill_at):
    count = -1

    def wrap(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for name in NAMES:
        setattr(os, name, wrap(getattr(os, name)))


def state():
    if not path.exists():
        return "absent"
    if path.read_bytes() == b"old":
        return "old"
    with read_artifact(path) as artifact:
        artifact.verify_segments()
        artifact.verify_weights()
    return "new"


results = []
for number, point in enumerate(points):
    path.unlink(missing_ok=True)
    if number % 2:
        path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        if mode == "call":
            dying(point)
        try:
            while True:
                write_small(path)
                if mode == "call":
                    break
        finally:
            os._exit(0)
    if mode == "time":
        time.sleep(point)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = state()
    litter = len([p for p in path.parent.iterdir() if p != path])
    write_small(path)  # the next compile works and sweeps
    left = len([p for p in path.parent.iterdir() if p != path])
    results.append([os.WIFSIGNALED(status), number % 2, found, litter, state(), left])
print(json.dumps(results))
"""


def run_child(path: Path, mode: str, points: list[float]) -> list[list]:
    command = [sys.executable, "-c", CHILD, str(path), mode, json.dumps(points)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(results: list[list]) -> None:
    for killed, had_old, found, litter, after, left in results:
        assert killed
        assert found in ("new", "old" if had_old else "absent"), results
        assert litter <= 1
        assert (after, left) == ("new", 0), results


def test_killed_before_every_system_call(tmp_path: Path) -> None:
    results = run_child(tmp_path / "m", "call", list(range(80)))
    survivors = [index for index, result in enumerate(results) if not result[0]]
    assert survivors == list(range(survivors[0], 80))  # beyond the last call nobody dies
    assert survivors[0] >= 15, "too few calls seen: is the hook still in place?"
    check(results[: survivors[0]])
    # Both outcomes were reached: before and after the rename.
    assert {result[2] for result in results[: survivors[0]]} == {"old", "absent", "new"}


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_instants(tmp_path: Path, count: int) -> None:
    draw = random.Random(count)
    check(run_child(tmp_path / "m", "time", [draw.random() * 0.05 for _ in range(count)]))


# The same with whole compilations, from one process that has imported what they need.
COMPILE = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from q35c.artifact import read_artifact
from q35c.compile import compile_model

source, folder, count, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
path, draw = folder / "out" / "m.q35c", random.Random(seed)
for name in ("out", "temporary"):
    (folder / name).mkdir()

def compile_it():
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        compile_model(source, path, context=64, batch=1)
        os._exit(0)
    return child, begin

def finish():
    child, begin = compile_it()
    assert os.waitpid(child, 0)[1] == 0, "a compilation failed"
    with read_artifact(path) as artifact:
        artifact.verify_segments()
        artifact.verify_weights()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "litter beside the output"
    assert not list((folder / "temporary").glob("q35c-*")), "litter among temporary files"
    return time.monotonic() - begin

whole = finish()
for number in range(count):
    path.unlink(missing_ok=True)
    if number % 2:
        path.write_bytes(b"old")
    child, _ = compile_it()
    time.sleep(draw.random() * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if path.exists() and not (number % 2 and path.read_bytes() == b"old"):
        with read_artifact(path) as artifact:
            artifact.verify_segments()
            artifact.verify_weights()
    if number % 10 == 9 or number == count - 1:
        finish()
"""


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(100, marks=pytest.mark.nightly),
        pytest.param(1000, marks=pytest.mark.nightly),
    ],
)
def test_killed_compilations(tmp_path: Path, count: int) -> None:
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path / "temporary"),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    source = checkpoint("dense")
    command = [sys.executable, "-c", COMPILE, str(source), str(tmp_path), str(count), "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
