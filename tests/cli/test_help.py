"""`--help` teaches, and what needs no compiler imports none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import q35c
from q35c.cli import main
from tests.cli.conftest import Run
from tests.test_architecture import HEAVY


@pytest.mark.parametrize("name", main.commands)
def test_help_shows_an_example_and_explains_options(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"  q35c {name}" in result.stdout.partition("Example")[2]
    for parameter in main.commands[name].params:
        is_argument = isinstance(parameter, click.Argument)
        shown = parameter.make_metavar(click.Context(main)) if is_argument else parameter.opts[-1]
        assert shown.strip("[]") in result.stdout


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"q35c, version {q35c.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["compile", "--help"],
        ["generate", "ARTIFACT", "Th"],
        ["inspect", "ARTIFACT"],
        ["verify-file", "ARTIFACT"],
        ["bench", "ARTIFACT", "-p", "8", "-n", "2", "-r", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_lean_commands_import_no_compiler(speaker: Path, arguments: list[str]) -> None:
    words = [str(speaker) if word == "ARTIFACT" else word for word in arguments]
    program = (
        "import sys\nfrom q35c.cli import main\n"
        f"try:\n    main({words!r})\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
