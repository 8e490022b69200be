"""R17: a model that does not fit, by one byte or a hundredfold, is refused at next to no cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_artifact import write_fake

MIB = 2**20
# What is there, as a part of what the model needs; 1: all but one byte.
PARTS = (1, 2, 10, 100)
CHILD = """
import json, sys
import q35c
from q35c.errors import MemoryRefused
from q35c.runtime import memory, model

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

path, part = sys.argv[1], int(sys.argv[2])
with q35c.runtime.load.read_artifact(path) as artifact:
    manifest = artifact.manifest
    need = memory.needed_bytes(manifest, manifest.context, manifest.batch)
if part:
    have = memory.Available((need - 1) // part, "test")
    memory.available_memory = lambda: have
before = peak()
try:
    q35c.load(path)
except MemoryRefused as error:
    print(json.dumps({"need": need, "grown": peak() - before, "said": str(error)}))
"""


def refused(path: Path, part: int) -> dict[str, object]:
    """Load in a process of its own, with (need - 1) / part bytes or, for 0, what the machine has."""
    command = [sys.executable, "-c", CHILD, str(path), str(part)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout, "the model was loaded"
    return json.loads(child.stdout)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of 300 KB that needs a terabyte: 1,024 sequences of four million tokens."""
    path = tmp_path_factory.mktemp("huge") / "huge.q35c"
    write_fake(path, with_code=False, context=2**22, batch=1024)
    return path


@pytest.mark.parametrize("part", PARTS)
def test_refused_for_a_byte_and_for_a_hundredfold(huge: Path, part: int) -> None:
    told = refused(huge, part)
    assert int(str(told["grown"])) < 32 * MIB
    assert str(told["need"]) in str(told["said"])


def test_refused_by_the_machine_itself(huge: Path) -> None:
    told = refused(huge, 0)
    assert int(str(told["need"])) > 2**40
    assert int(str(told["grown"])) < 32 * MIB
