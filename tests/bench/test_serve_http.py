"""The scenes of bench/serve_http.py play on a model that needs no compiler, and tell what happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_artifact import write_fake

SCRIPT = Path(__file__).parents[2] / "bench" / "serve_http.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("babbler") / "babbler.q35c"
    write_fake(path)
    return path


@pytest.mark.parametrize(
    ("scene", "options", "said"),
    [
        ("load", ["--clients", "2", "--tokens", "8"], "2 clients: "),
        ("overload", ["--count", "5"], "{200: 5}, 5 streams whole"),
        ("cancel", ["--count", "20"], "after 20 more {"),
        ("stop", ["--runs", "1"], "'exit 0': 1"),
    ],
)
def test_a_scene(artifact: Path, scene: str, options: list[str], said: str) -> None:
    command = [sys.executable, str(SCRIPT), str(artifact), scene, *options]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert said in child.stdout and "'cut'" not in child.stdout


def test_an_unknown_scene_is_named(artifact: Path) -> None:
    child = subprocess.run(
        [sys.executable, str(SCRIPT), str(artifact), "flood"], capture_output=True, text=True
    )
    assert child.returncode == 2 and "flood" in child.stderr
