"""Every way a command can end: its message, its exit code, and no traceback."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import termios
import time
from pathlib import Path
from typing import Any

import pytest

import q35c
from q35c.cli.group import ReportingGroup
from q35c.errors import InputError, InternalError, MemoryRefused
from tests.cli.conftest import Run, start


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("generate",), ("bench", "x.q35c", "-p", "many"), ("inspect", "x.q35c", "--wrong")],
    ids=["command", "argument", "number", "option"],
)
def test_malformed_command_line(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert "--help" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["inspect", "verify-file", "generate", "bench"])
def test_missing_artifact(run: Run, tmp_path: Path, command: str) -> None:
    path = tmp_path / "absent.q35c"
    result = run(command, path, *(["x"] if command == "generate" else []))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}: cannot open: No such file")


def test_a_file_that_is_no_artifact(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("shopping list" * 10)
    result = run("generate", path, "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not a q35c artifact" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("bad", hint="mend it"), 1, ["error: bad", "what to do: mend it"]),
        (MemoryRefused("too big"), 1, ["error: too big"]),
        (PermissionError(13, "Permission denied", "/x/y"), 1, ["error: /x/y: Permission denied"]),
        (MemoryError(), 1, ["ran out of memory"]),
        (ModuleNotFoundError("no", name="tvm.script"), 1, ["'tvm'", "pip install 'q35c[compile]'"]),
        (ModuleNotFoundError("no", name="onnx"), 1, ["pip install 'q35c[onnx]'"]),
        (InternalError("impossible"), 2, ["error: impossible", "this is a bug"]),
        (ModuleNotFoundError("no", name="q35c.lost"), 2, ["this is a bug"]),
        (ValueError("oops"), 2, ["error: ValueError: oops", "this is a bug", "q35c --debug"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_of_a_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: list[str]
) -> None:
    fail_with(monkeypatch, error)
    result = run("generate", "x.q35c", "x")
    assert result.exit_code == code
    assert all(text in result.stderr for text in said), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("is_flag", [True, False], ids=["--debug", "variable"])
def test_debug_shows_the_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, is_flag: bool
) -> None:
    fail_with(monkeypatch, ValueError("oops"))
    if not is_flag:
        monkeypatch.setenv("Q35C_DEBUG", "1")
    result = run(*(["--debug"] if is_flag else []), "generate", "x.q35c", "x")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("hint", "typed"),
    [
        ("load with context=96 or less", "load with --context 96 or less"),
        ('precision="f32" holds more', "--precision f32 holds more"),
        ('consent: ignore_config=["a_b"]', "consent: --ignore-config a_b"),
        ("consent: follow_links=True", "consent: --follow-links"),
        ("no such argument: speed=3", "no such argument: speed=3"),
    ],
)
def test_hints_name_options(
    run: Run, monkeypatch: pytest.MonkeyPatch, hint: str, typed: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("no", hint=hint)

    monkeypatch.setattr("q35c.compile.compile_model", refuse)
    result = run("compile", "model", "-o", "x.q35c")
    assert f"what to do: {typed}\n" in result.stderr


def test_a_caller_in_python_gets_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, InputError("bad"))
    from q35c.cli import main

    assert isinstance(main, ReportingGroup)
    with pytest.raises(InputError, match="bad"):
        main.main(["generate", "x.q35c", "x"], standalone_mode=False)


def test_ctrl_c(speaker: Path) -> None:
    with start("generate", speaker, "-") as child:
        assert child.stdin is not None and child.stderr is not None
        child.stdin.write(b"Th")
        child.stdin.flush()
        wait_until_read(child.stdin.fileno())
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=120) == 130
        assert child.stderr.read().strip() == b"interrupted"


def test_nobody_reads_the_output(speaker: Path) -> None:
    with start("generate", speaker, "-") as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdout.close()  # as `| head` does
        child.stdin.write(b"Th")
        child.stdin.close()
        assert child.wait(timeout=120) == 141
        assert child.stderr.read() == b""


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(q35c, "load", load)


def wait_until_read(pipe: int) -> None:
    """Wait until the other end has taken everything out of a pipe: it is reading now."""
    for _ in range(12000):
        left = array.array("i", [0])
        fcntl.ioctl(pipe, termios.FIONREAD, left)
        if left[0] == 0:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {os.getpid()}: nobody reads")
