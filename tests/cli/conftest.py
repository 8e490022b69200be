"""What the tests of the command line share: an artifact that needs no compiler, and ways to run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from q35c.cli import main
from q35c.cli.group import DEBUG_VARIABLE
from tests.fake_artifact import script, write_fake

Run = Callable[..., Result]
SAYING = "The quick"


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact that continues "Th" with "e quick" and then ends."""
    path = tmp_path_factory.mktemp("speaker") / "speaker.q35c"
    write_fake(path, bigram=script(SAYING))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in this process, without a word about its progress."""
    monkeypatch.setenv(DEBUG_VARIABLE, "0")
    monkeypatch.setattr("q35c.progress._QUIET_SECONDS", float("inf"))  # a busy machine takes long

    def call(*arguments: object, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)

    return call


def start(
    *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command line as a process of its own, with all three streams as pipes."""
    command = [sys.executable, "-m", "q35c", *(str(argument) for argument in arguments)]
    pipe = subprocess.PIPE
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        preexec_fn=listen,
        env={**os.environ, **(environment or {})},
    )
