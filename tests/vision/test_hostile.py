"""Hostile pictures and clips: a typed error or a right result, in bounded memory, in a process of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.vision.hostile import READ, cases

MAX_BYTES = 64 << 20
CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """Return what became of each: its outcome and the memory it took. One that never ends fails them all."""
    child = [sys.executable, "-W", "error", "-m", "tests.vision.hostile"]
    ended = subprocess.run(child, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "", "nothing but the error tells of a bad file"
    return {line["name"]: line for line in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_or_read(name: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[name]
    assert report["peak_bytes"] <= MAX_BYTES
    is_expected = re.search(CASES[name].outcome, report["outcome"]) is not None
    assert is_expected, report["outcome"]
    assert report["outcome"] == READ or report["outcome"].startswith("MediaError: ")
