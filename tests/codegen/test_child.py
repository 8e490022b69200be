"""Work in a child process: results, errors and deaths come back, and no process or descriptor stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from q35c.codegen.child import Report, run_in_child
from q35c.errors import InternalError, ToolchainError


def nothing(_done: float) -> None:
    pass


def run(folder: Path, work: Callable[[Report], None], report: Report = nothing) -> None:
    """Run work and demand that nothing of it is left, however it ends."""
    before = os.listdir("/proc/self/fd")
    try:
        run_in_child("the tool", folder, work, report)
    finally:
        assert len(os.listdir("/proc/self/fd")) == len(before)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_work_leaves_its_results_and_reports(tmp_path: Path) -> None:
    def work(report: Report) -> None:
        for number in range(1, 5):
            report(number / 4)
        (tmp_path / "result").write_text(str(os.getpid()))

    said: list[float] = []
    run(tmp_path, work, said.append)
    assert said == [0.25, 0.5, 0.75, 1.0]
    assert (tmp_path / "result").read_text() != str(os.getpid())


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), ToolchainError("no", where="here", got=3), MemoryError(), OSError(28, "no")],
    ids=repr,
)
def test_what_it_raises_is_raised_with_its_traceback(tmp_path: Path, error: Exception) -> None:
    def work(_report: Report) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run(tmp_path, work)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "where", None) == getattr(error, "where", None)
    assert "in work" in caught.value.__notes__[0]


def test_an_error_that_cannot_travel_is_told(tmp_path: Path) -> None:
    class Local(Exception):
        pass

    def work(_report: Report) -> None:
        raise Local("told")

    with pytest.raises(InternalError, match="Local: told"):
        run(tmp_path, work)


@pytest.mark.parametrize("end", ["SIGABRT", "SIGSEGV", "SIGKILL", "SIGXFSZ"])
def test_a_death_names_the_signal_the_place_and_what_was_said(tmp_path: Path, end: str) -> None:
    number = getattr(signal, end)

    def work(report: Report) -> None:
        report(0.5)
        os.write(2, b"a warning\nLLVM ERROR: IO failure on output stream\nmore\n")
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    folder = tmp_path / "objects"
    folder.mkdir()
    with pytest.raises(ToolchainError) as caught:
        run(folder, work)
    error = caught.value
    assert error.where == str(tmp_path) and "the tool failed" in error.what
    for part in (end, "LLVM ERROR: IO failure", "bytes free"):
        assert part in str(error.got)
    assert "a warning" not in str(error.got)


def test_an_early_exit_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="exit code 0"):
        run(tmp_path, lambda report: os._exit(0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_of_the_caller_ends_the_child(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def work(report: Report) -> None:
        report(0.5)
        time.sleep(60)
        (tmp_path / "late").touch()

    def report(_done: float) -> None:
        raise error

    with pytest.raises(error):
        run(tmp_path, work, report)
    assert list(tmp_path.iterdir()) == []


def test_a_child_beside_busy_threads(tmp_path: Path) -> None:
    """Threads that hold locks while the process forks do not stop the child."""
    is_over = threading.Event()

    def be_busy() -> None:
        while not is_over.is_set():
            os.environ.get("HOME")
            open(os.devnull).close()

    threads = [threading.Thread(target=be_busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            run_in_child("it", tmp_path, lambda _, n=number: (tmp_path / str(n)).touch(), nothing)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert len(list(tmp_path.iterdir())) == 20


def test_from_another_thread(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            run_in_child("the tool", tmp_path, lambda report: (tmp_path / "made").touch(), nothing)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert errors == [] and (tmp_path / "made").exists()


def test_where_no_process_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ToolchainError, match="cannot start a process for the tool: Resource"):
        run(tmp_path, lambda report: None)
