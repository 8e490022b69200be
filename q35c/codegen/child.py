"""Work in a child process: LLVM ends its process where a disk is full, a limit is met or memory runs out.

The child is a fork, which has all that is to be compiled without importing or reading anything again. It runs nothing
of the parent's other threads, and of their locks it meets only those that fork itself puts right.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import pickle
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

from q35c.errors import InternalError, ToolchainError

Report = Callable[[float], None]
_DONE = "done"
_PR_SET_PDEATHSIG = 1
_STDERR = 2
_MOST_SAID = 300  # characters of what a tool printed before it failed


def run_in_child(what: str, folder: Path, work: Callable[[Report], None], report: Report) -> None:
    """Run `work`, which leaves its results in the folder, in a child process.

    What it reports is passed on to `report`, what it raises is raised here. ToolchainError that names `what` where no
    child can be made or a signal ends it. None is left when this returns or raises.
    """
    try:
        said = os.memfd_create("q35c-said")
    except OSError as error:
        raise _cannot_start(what, error) from None
    try:
        pid, results = _start(what, work, said)
        with results:
            is_done, code = _follow(pid, results, report)
        if not is_done:
            raise tool_failed(
                what, folder, code, os.pread(said, 1 << 20, 0).decode(errors="replace")
            )
    finally:
        os.close(said)


def tool_failed(
    what: str, folder: Path, code: int, said: str, need: int | None = None
) -> ToolchainError:
    """Return the error for a tool that ended with an exit code, or by a signal (negative)."""
    lines = said.strip().splitlines()
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    end = (
        f"exit code {code}"
        if code >= 0
        else f"{signal.Signals(-code).name}: {signal.strsignal(-code)}"
    )
    facts = [end, line[:_MOST_SAID], room_in(folder)]
    return ToolchainError(
        f"{what} failed",
        where=str(folder.parent),
        expected=None if need is None else f"room for a file of about {need} bytes",
        got="; ".join(fact for fact in facts if fact),
        hint="let TMPDIR name a directory with more space, or raise the limits (ulimit -a)",
    )


def room_in(folder: Path) -> str:
    """Say how much may be written to a folder."""
    status = os.statvfs(folder)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    text = f"{status.f_bavail * status.f_frsize} bytes free"
    return text if limit == resource.RLIM_INFINITY else f"{text}, files limited to {limit} bytes"


def _cannot_start(what: str, error: OSError) -> ToolchainError:
    return ToolchainError(
        f"cannot start a process for {what}: {error.strerror}",
        hint="end other programs or raise the limits (ulimit -a)",
    )


def _start(what: str, work: Callable[[Report], None], said: int) -> tuple[int, BinaryIO]:
    """Fork; return the child's number and the stream of what it reports."""
    try:
        reader, writer = os.pipe()
    except OSError as error:
        raise _cannot_start(what, error) from None
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork beside other threads; the module's head says why this one is safe.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _work(work, writer, said)
    except OSError as error:
        os.close(reader)
        raise _cannot_start(what, error) from None
    finally:
        os.close(writer)
    return pid, os.fdopen(reader, "rb")


def _follow(pid: int, results: BinaryIO, report: Report) -> tuple[bool, int]:
    """Pass on what the child reports until it ends; return whether it finished, and its exit code."""
    is_done, status = False, 0
    try:
        # A child that dies while it writes leaves half an item.
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while not is_done:
                item = pickle.load(results)
                if isinstance(item, Exception):
                    raise item
                is_done = item == _DONE
                if not is_done:
                    report(item)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        with contextlib.suppress(
            ChildProcessError
        ):  # a program may let the system reap its children
            _, status = os.waitpid(pid, 0)
    return is_done, os.waitstatus_to_exitcode(status)


def _work(work: Callable[[Report], None], writer: int, said: int) -> NoReturn:
    """Be the child: work, report, and end without any of the parent's clean-up."""
    code = 1
    try:
        _settle(said)
        with open(fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, _STDERR + 1), "wb", 0) as results:

            def report(done: float) -> None:
                results.write(pickle.dumps(done))

            try:
                work(report)
                results.write(pickle.dumps(_DONE))
            except Exception as error:
                results.write(_pickled(error))
        code = 0
    finally:
        os._exit(code)


def _settle(said: int) -> None:
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(said, _STDERR)


def _pickled(error: Exception) -> bytes:
    """Return the error with its traceback as a note; what cannot be pickled as InternalError."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(InternalError(f"{type(error).__name__}: {error}"))
    return data
