"""R1: only ArtifactError or an equal load. R21: the harness that shows it finds planted bugs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.abuse.mutants import BUGS

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("Q35C_TEST_SEED", "1"))


def hunt(*options: object, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.abuse.mutants", "--seed", str(SEED), *map(str, options)]
    print("repeat with:", f"Q35C_TEST_SEED={SEED}", *command[1:])
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize(
    ("small", "whole"),
    [
        (2_000, 60),
        pytest.param(15_000, 400, marks=pytest.mark.slow),
        pytest.param(200_000, 5_000, marks=pytest.mark.nightly),
    ],
)
def test_mutants(small: int, whole: int) -> None:
    done = hunt("--small", small, "--whole", whole, seconds=900)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    done = hunt("--bug", bug, seconds=60)
    assert done.returncode == 1 and done.stdout.startswith(f"seed {SEED}: "), done.stderr
    assert "AssertionError" in done.stdout


def test_bugs_that_are_found_soon() -> None:
    """A part of the above for the quick loop."""
    for bug in ("the hash of a segment is skipped", "the code's plan is not compared"):
        done = hunt("--bug", bug, "--small", 4_000, "--whole", 400, seconds=60)
        assert (done.returncode, "AssertionError" in done.stdout) == (1, True), bug
