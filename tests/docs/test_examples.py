"""Every program under examples/ runs, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_serve import serving
from tests.compiled import artifact, checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
STANDARD_INPUT = {"chat": "the house\nthe thin\n\n"}


def run_example(name: str, *arguments: object, cwd: Path) -> str:
    child = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        input=STANDARD_INPUT.get(name, ""),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.parametrize("name", ["batch", "chat", "logits", "score", "snapshot"])
def test_example_runs_on_an_artifact(name: str, tmp_path: Path) -> None:
    assert run_example(name, artifact("dense"), cwd=tmp_path).strip()


def test_compile_and_inspect(tmp_path: Path) -> None:
    output = run_example("compile_and_inspect", checkpoint("dense"), "tiny.q35c", cwd=tmp_path)
    assert "tiny.q35c: " in output and "prefill" in output
    assert (tmp_path / "tiny.q35c").stat().st_size > 0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Return the address of a server for a tiny model."""
    with serving(artifact("dense"), "--threads", 1) as (url, _):
        yield url


@pytest.mark.parametrize(
    ("name", "said"), [("agent", ""), ("load", "2 answers, "), ("extract", " years")]
)
def test_example_runs_on_a_server(name: str, said: str, url: str, tmp_path: Path) -> None:
    numbers = (2, 1, 8) if name == "load" else ()
    assert said in run_example(name, url, *numbers, cwd=tmp_path)


def test_all_examples_are_tried_and_listed() -> None:
    tried = {"batch", "chat", "compile_and_inspect", "logits", "score", "snapshot"}
    tried |= {"agent", "extract", "load"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tried
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"({name}.py)" in text for name in tried)
