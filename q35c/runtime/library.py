"""Compiled code in this process, and the threads that run it. Needs ctypes only.

An entry `run` is exported as `int __tvm_ffi_run(void*, Any* args, int32 count, Any* result)`, the packed calling
convention of TVM FFI: `Any` is 16 bytes, an int32 type index (1 is an integer), padding, and an 8-byte value.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import os
import struct
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from q35c.errors import ExecutionError, InputError

_ARGUMENTS = 8  # weights, state, arena, io and barrier address, T, tid, nt
_INTEGER = 1  # type index of TVM FFI; addresses travel as integers too
_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p
)
_PACKED = struct.Struct("=" + "iiq" * _ARGUMENTS)


class Arguments(NamedTuple):
    """Hold what all threads of one run share: five addresses in bytes, and the number of tokens."""

    weights: int
    state: int
    arena: int
    io: int
    barrier: int
    tokens: int


class Entry:
    """Call one program on the calling thread; any number of threads may call it at once."""

    def __init__(self, symbol: str, function: Callable[..., int]) -> None:
        self.symbol = symbol
        self._function = function
        self._local = threading.local()

    def __call__(
        self,
        weights: int,
        state: int,
        arena: int,
        io: int,
        barrier: int,
        tokens: int,
        tid: int = 0,
        nt: int = 1,
    ) -> int:
        """Run the share `tid` of `nt`; return 0, or what the compiled code reported. Releases the GIL."""
        buffer, result = self._buffers()
        values = (weights, state, arena, io, barrier, tokens, tid, nt)
        _PACKED.pack_into(buffer, 0, *(part for value in values for part in (_INTEGER, 0, value)))
        return self._function(None, buffer, _ARGUMENTS, result)

    def _buffers(self) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]:
        try:
            return self._local.buffers
        except AttributeError:
            # Value buffers of this thread, kept: building them anew would cost more than the call.
            self._local.buffers = (
                ctypes.create_string_buffer(_PACKED.size),
                ctypes.create_string_buffer(16),
            )
            return self._local.buffers


class Library:
    """Load a shared object from memory. The caller vouches for `code`: loading runs it."""

    def __init__(self, code: bytes) -> None:
        self._library = _open_library(code)

    def entry(self, symbol: str) -> Entry:
        """Return the program exported under this name; ExecutionError when there is none."""
        try:
            place = ctypes.c_char.in_dll(self._library, f"__tvm_ffi_{symbol}")
        except ValueError as error:
            raise ExecutionError("the compiled code lacks an entry", expected=symbol) from error
        function = _FUNCTION(ctypes.addressof(place))
        # One that the library itself hands out refers to itself, so that the code would stay until the next collection.
        setattr(function, "library", self._library)  # noqa: B010 (of which ctypes' types know nothing)
        return Entry(symbol, function)


def _open_library(code: bytes) -> ctypes.CDLL:
    """Load code, which stays in memory as long as the library or one of its functions is referred to."""
    with contextlib.ExitStack() as undo:
        try:
            descriptor = os.memfd_create("q35c-code")
            undo.callback(os.close, descriptor)
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(code)
            library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        except OSError as error:
            if not os.path.isdir("/proc/self/fd"):
                raise InputError("compiled code cannot be loaded without /proc", hint="mount /proc") from None  # fmt: skip
            raise ExecutionError("the compiled code cannot be loaded", got=error) from error
        undo.pop_all()
    # The descriptor stays open as long: the loader knows a library by its path, so a second one under a reused
    # descriptor number would silently get the first one's code.
    weakref.finalize(library, _unload, library._handle, descriptor).atexit = False
    return library


def _unload(handle: int, descriptor: int) -> None:
    _ctypes.dlclose(handle)
    os.close(descriptor)


class _Job(NamedTuple):
    number: int
    entry: Entry
    arguments: Arguments
    threads: int


class _Result(NamedTuple):
    number: int
    tid: int
    code: int
    error: BaseException | None


class Workers:
    """Run entries on `count` threads: the calling one is thread 0, the others are daemon threads."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ExecutionError("a program needs at least one thread", got=count)
        self.count = count
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._number = 0
        self._waiting: set[int] = set()  # threads whose result of the newest run is not here yet
        self._results: SimpleQueue[_Result] = SimpleQueue()
        self._jobs: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(1, count)]
        for tid, jobs in enumerate(self._jobs, start=1):
            name = f"q35c-worker-{tid}"
            threading.Thread(
                target=_work, args=(tid, jobs, self._results), name=name, daemon=True
            ).start()
        self._finalizer = weakref.finalize(self, _stop, self._jobs)

    def close(self) -> None:
        """Let the threads end; later runs fail."""
        self._finalizer()

    def run(self, entry: Entry, arguments: Arguments) -> None:
        """Run `entry` on all threads and wait for them; ExecutionError when any of them failed.

        One run at a time: a second caller waits. The barrier words of `arguments` must be zero before the first run.
        """
        with self._lock:
            self._check_usable()
            self._collect()  # an interrupted run may have left its threads behind
            self._number += 1
            job = _Job(self._number, entry, arguments, self.count)
            self._waiting = set(range(1, self.count))
            try:
                self._start(job)
            except BaseException:
                # A signal handler raised between two threads: none may be left alone at a barrier.
                self._start(job)
                entry(*arguments, 0, self.count)
                raise
            codes = [entry(*arguments, 0, self.count), *self._collect()]
        if any(codes):
            raise ExecutionError("compiled code failed", where=entry.symbol, got=codes)

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise ExecutionError("the worker threads are closed")
        if self._process != os.getpid():
            raise ExecutionError(
                "worker threads do not survive a fork", hint="load the model in the child process"
            )

    def _start(self, job: _Job) -> None:
        for jobs in self._jobs:
            jobs.put(job)

    def _collect(self) -> list[int]:
        """Wait for the newest run's results; one return code for each thread but the first."""
        codes: list[int] = []
        error: BaseException | None = None
        while self._waiting:
            result = self._results.get()
            if result.number == self._number and result.tid in self._waiting:
                self._waiting.discard(result.tid)
                codes.append(result.code)
                error = error or result.error
        if error is not None:
            raise ExecutionError("a worker thread failed", got=repr(error)) from error
        return codes


def _work(tid: int, jobs: SimpleQueue[_Job | None], results: SimpleQueue[_Result]) -> None:
    done = 0
    while (job := jobs.get()) is not None:
        if job.number <= done:  # the second copy of a job whose start was interrupted
            continue
        done = job.number
        try:
            code = job.entry(*job.arguments, tid, job.threads)
            results.put(_Result(done, tid, code, None))
        except BaseException as error:
            results.put(_Result(done, tid, -1, error))


def _stop(jobs: list[SimpleQueue[_Job | None]]) -> None:
    for queue in jobs:
        queue.put(None)
