"""Hostile and broken model directories: the exact error, and nothing run or opened outside."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.abuse.directory_cases import CASES, MARKER
from tests.models import write_checkpoint


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Build every directory, open them all in one child, return its report."""
    root = tmp_path_factory.mktemp("hostile")
    full = {"layer_types": ["full_attention"], "full_attention_interval": None}
    good = write_checkpoint(root / "base", num_hidden_layers=1, **full)
    directories = root / "directories"
    for name, (_, _, change) in CASES.items():
        made = shutil.copytree(good, directories / directory_name(name))
        change(made)
    child = Path(__file__).with_name("open_directories.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", child, directories],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(root.rglob(MARKER)), "code from a model directory was run"
    return json.loads(done.stdout)


def directory_name(name: str) -> str:
    """Keep `good` readable for the child, number the rest: their names may not be file names."""
    return name if name == "good" else f"{list(CASES).index(name):03d}"


@pytest.mark.parametrize("name", CASES)
def test_directory(name: str, report: dict[str, dict[str, Any]]) -> None:
    error, message, _ = CASES[name]
    outcome = report[directory_name(name)]
    assert outcome["error"] == error, outcome["message"]
    assert message in outcome["message"]
    assert outcome["is_ours"] == (error is not None)
    assert outcome["events"] == []
    assert len(outcome["message"]) < 2000


def test_a_directory_that_does_not_exist(report: dict[str, dict[str, Any]]) -> None:
    outcome = report["does not exist"]
    assert outcome["error"] == "CheckpointError" and "not a directory" in outcome["message"]


def test_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("statement", "event"),
    [
        ("open('/etc/hostname').close()", "open"),
        ("import wave", "import"),
        ("exec('1')", "exec"),
        ("__import__('os').listdir('/')", "os.listdir"),
        ("__import__('pickle').loads(b'cos\\nsystem\\n.')", "pickle.find_class"),
        ("open(__import__('os').devnull, 'w').close()", "open for writing"),
    ],
)
def test_the_watch_sees_what_it_must(statement: str, event: str, tmp_path: Path) -> None:
    """Plant each kind of violation: a watch that reports nothing proves nothing."""
    code = (
        "import os, pickle, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import open_directories as child\n"
        "sys.addaudithook(child.watch)\n"
        f"code = compile({statement!r}, 'planted', 'exec')\n"
        f"child.allowed = Path({str(tmp_path)!r})\n"
        "eval(code)\n"
        "child.allowed = None\n"
        "print(*child.events, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    seen = [line.startswith(f"{event} ") for line in done.stdout.splitlines()]
    assert any(seen), done.stdout + done.stderr
