"""`q35c demo`: compiled once, kept in the cache, and the shipped model writes its language."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.demo import CHECKPOINT, demo_artifact
from q35c.verify import verify_artifact
from tests.cli.conftest import Run
from tests.compiled import artifact, checkpoint, graph_of

VERSE = "And the LORD spake unto Moses, saying, Speak unto the children of Israel, and say"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Put a tiny model in the demo's place, compiled in no time; return what was asked for."""
    made: list[Path] = []
    tiny = artifact("dense")  # before the cache is another, in which its machine code would be kept

    def compile_model(source: Path, output: Path, **options: Any) -> None:
        made.append(source)
        shutil.copy(tiny, output)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("q35c.compile.compile_model", compile_model)
    monkeypatch.setattr(
        "q35c.demo.CHECKPOINT", shutil.copytree(checkpoint("dense"), tmp_path / "c")
    )
    return made


def test_compiled_once_and_again_when_something_changed(
    compilations: list[Path], tmp_path: Path
) -> None:
    path, is_new = demo_artifact()
    assert path.parent == tmp_path / "cache" / "q35c"
    assert (is_new, demo_artifact()) == (True, (path, False))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert demo_artifact() == (path, True)
    with (tmp_path / "c" / "config.json").open("a") as file:
        file.write("\n")
    other, is_new = demo_artifact()
    assert is_new and other != path
    assert list(path.parent.iterdir()) == [other]
    assert len(compilations) == 3


def test_a_cache_that_cannot_be_used(compilations: list[Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    result = run("demo", "-n", 1)
    assert result.exit_code == 1
    assert "cannot keep the compiled demo" in result.stderr and "XDG_CACHE_HOME" in result.stderr
    assert compilations == []


def test_what_else_lies_in_the_cache(compilations: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "q35c"
    (folder / "demo-0123.q35c").mkdir(parents=True)
    path, is_new = demo_artifact()
    assert is_new and sorted(folder.iterdir()) == sorted([folder / "demo-0123.q35c", path])


def test_demo_tells_where_and_writes(compilations: list[Path], run: Run) -> None:
    first = run("demo", "-n", 5, "--prompt", "the")
    again = run("demo", "-n", 5, "--prompt", "the")
    assert (first.exit_code, again.exit_code) == (0, 0)
    path = demo_artifact()[0]
    assert re.search(r"compiled in \d", first.stderr) and str(path) in first.stderr
    assert "compiled before" in again.stderr
    assert "new 5 tokens" in again.stderr
    assert first.stdout.startswith("the") and first.stdout == again.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artifact of the checkpoint that ships with q35c."""
    from q35c.compile import compile_model

    path = tmp_path_factory.mktemp("shipped") / "demo.q35c"
    compile_model(CHECKPOINT, path, precision="bf16", context=2048, batch=4, import_graph=graph_of)
    return path


def test_trained_weights_keep_the_promise(shipped: Path) -> None:
    assert verify_artifact(shipped, CHECKPOINT, text=VERSE).failures == ()


FILL_THE_PLAN = """
import sys
import q35c
from q35c.runtime.memory import needed_bytes
import q35c.runtime.model, q35c.runtime.session

def resident(which):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(which))

before = resident("VmRSS")
model = q35c.load(sys.argv[1])
rows = model.manifest.io.fields["logits"].shape[0]
sessions = [model.session() for _ in range(model.batch)]
for session in sessions:
    # All kinds of tokens: otherwise rows of the embedding, and experts, are never touched.
    session.prefill([i * 7919 % model.vocab_size for i in range(model.context - rows)])
type(session).decode_together(sessions, [1] * model.batch)
for session in sessions[1:]:
    session.prefill(range(rows - 1))
peak = resident("VmHWM")
# A chunk's rows of logits are planned too; the copies that score makes are not, so they are gone first.
sessions[0].score(range(rows - 1))
print(needed_bytes(model.manifest, model.context, model.batch), max(peak, resident("VmRSS")) - before)
"""


def test_the_planned_peak_is_the_measured_one(shipped: Path) -> None:
    """R17: never less than what a whole batch at the full context takes, and at most a tenth more."""
    command = [sys.executable, "-c", FILL_THE_PLAN, str(shipped)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, measured = map(int, child.stdout.split())
    assert measured <= planned <= 1.1 * measured


def test_the_shipped_model_knows_its_language(shipped: Path) -> None:
    with q35c.load(shipped) as model:
        ids = np.array(model.tokenizer.encode(VERSE))
        rows = model.score(ids)[:-1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    loss = -rows[np.arange(len(rows)), ids[1:]].mean()
    assert loss < 3.4  # the card's held-out loss; a model that knows nothing has 8.3 nats
