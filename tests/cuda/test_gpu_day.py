"""The day on a GPU, rehearsed on the emulated device: everything is packed, replayed and written into one table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from q35c.runtime.cuda.driver import LIBRARY
from tests.cuda.machine import engine

ROOT = Path(__file__).parents[2]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.nightly
def test_a_day_is_rehearsed(tmp_path: Path) -> None:
    packing = ("--architecture", "emulated", "--shape", "demo", "--context", 64)
    run("scripts/gpu_pack.py", tmp_path, *packing, "--tests", "tests/cuda/test_norm_linear.py")
    run("scripts/gpu_day.py", tmp_path, **{LIBRARY: str(engine())})
    table = (tmp_path / "day.md").read_text()
    for row in (
        "calls beside the checking machine | right",
        "w4 beside eager PyTorch",
        "prefill of 32",
        "decode, 4 sequences of 32",
        "decode: ",
    ):
        assert row in table, table
    assert "WRONG" not in table and "FAILED" not in table.replace("eager demo | FAILED", "")
