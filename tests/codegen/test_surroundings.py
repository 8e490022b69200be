"""Machine code where the surroundings do not suffice: typed errors, a live process, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs in a child, because limits hold for a whole process. One import of TVM serves all cases.
CASES = """
import contextlib, json, os, resource, signal, sys, tempfile
from pathlib import Path
from q35c.codegen.cpu.build import build_shared
from q35c.codegen.cpu.probes import probes
from q35c.codegen.targets import find_target
from q35c.errors import Q35CError

isa = find_target("cpu").isa
probe = next(probe for probe in probes(isa) if probe.kernel)
base = Path(sys.argv[1])

def build():
    try:
        build_shared({probe.symbol: probe.kernel}, {probe.symbol: probe.program()}, isa)
        return ["built", ""]
    except Q35CError as error:
        return [type(error).__name__, str(error)]
    except BaseException as error:
        return ["untyped " + type(error).__name__, str(error)]

@contextlib.contextmanager
def limited(kind, soft):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)

def in_folder(name):
    folder = base / name
    folder.mkdir(exist_ok=True)
    tempfile.tempdir = str(folder)
    return folder

found = {}
used = len(os.listdir("/proc/self/fd"))
in_folder("file size")
for size in (0, 1, 1000, 4096, 16384):
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGXFSZ, handler)
        with limited(resource.RLIMIT_FSIZE, size):
            found[f"file size {size} {handler.name}"] = build()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
in_folder("descriptors")
for more in range(12):
    with limited(resource.RLIMIT_NOFILE, used + more):
        found[f"descriptors {more}"] = build()
in_folder("memory")
size = int(open("/proc/self/statm").read().split()[0]) * 4096
for more in (1, 8, 32):
    with limited(resource.RLIMIT_AS, size + (more << 20)):
        found[f"memory {more}"] = build()
in_folder("gone").rmdir()
found["no such folder"] = build()
(base / "a file").touch()
tempfile.tempdir = str(base / "a file")
found["a file"] = build()
tempfile.tempdir = None
tempfile._get_default_tempdir, real = None, tempfile._get_default_tempdir
def none_usable():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
tempfile._get_default_tempdir = none_usable
found["none usable"] = build()
tempfile._get_default_tempdir = real
in_folder("last")
found["last"] = build()
found["left"] = [sorted(str(path) for path in base.rglob("*") if path.parent != base), ""]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["off", "on"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Build under every limit, without kept objects and with them."""
    base = tmp_path_factory.mktemp("base")
    command = [sys.executable, "-c", CASES, str(base)]
    environment = {**os.environ, "Q35C_CACHE": request.param}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_refusal_is_typed(found: dict[str, list[str]]) -> None:
    allowed = {"built", "ToolchainError", "OptionError"}
    ends = {name: end for name, end in found.items() if name != "left"}
    assert {name: end for name, end in ends.items() if end[0] not in allowed} == {}


def test_nothing_is_left_and_the_next_build_works(found: dict[str, list[str]]) -> None:
    assert found["left"][0] == []
    assert found["last"][0] == "built"


@pytest.mark.parametrize("size", [1, 4096])
@pytest.mark.parametrize("handler", ["SIG_IGN", "SIG_DFL"])
def test_a_limit_on_file_sizes_is_named(
    found: dict[str, list[str]], size: int, handler: str
) -> None:
    kind, text = found[f"file size {size} {handler}"]
    assert kind == "ToolchainError"
    assert "file size" in text and "bytes free" in text and f"limited to {size} bytes" in text


def test_places_are_named(found: dict[str, list[str]]) -> None:
    for name in ("no such folder", "a file", "none usable"):
        assert found[name][0] == "OptionError"
    assert "gone" in found["no such folder"][1] and "a file" in found["a file"][1]
    assert "TMPDIR" in found["none usable"][1]


BUILD = """
from q35c.codegen.cpu.build import build_shared
from q35c.codegen.cpu.probes import probes
from q35c.codegen.targets import find_target
isa = find_target("cpu").isa
all = list(probes(isa))
build_shared({p.symbol: p.kernel for p in all if p.kernel}, {p.symbol: p.program() for p in all}, isa)
"""


def test_a_killed_build_is_swept_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "q35c-objects-of-nobody").mkdir()
    (tmp_path / "q35c-mine").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", BUILD], env=environment)
    while not list(tmp_path.glob("q35c-objects-*/*.o")):
        assert first.poll() is None
        time.sleep(0.002)
    assert not (tmp_path / "q35c-objects-of-nobody").exists()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(list(tmp_path.iterdir())) == 2
    subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["q35c-mine"]
