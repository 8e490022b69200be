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
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import call
from queue import SimpleQueue
from typing import NamedTuple

from q35c.errors import ExecutionError, InputError, OptionError

_ARGUMENTS = 8  # weights, state, arena, io and barrier address, T, tid, nt
_INTEGER = 1  # type index of TVM FFI, with its padding; addresses travel as integers too
_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p
)
_PACKED = struct.Struct("<" + "qq" * _ARGUMENTS)

# One thread's part of a run; returns 0, or what the compiled code reported.
Share = Callable[[], int]


class Arguments(NamedTuple):
    """Hold what all threads of one run share: five addresses in bytes, and the number of tokens."""

    weights: int
    state: int
    arena: int
    io: int
    barrier: int
    tokens: int


class Frame:
    """The arguments of one thread's calls, kept: building them anew would cost more than a call."""

    def __init__(self) -> None:
        self.values = ctypes.create_string_buffer(_PACKED.size)
        self.result = ctypes.create_string_buffer(16)

    def pack(self, arguments: Arguments, tid: int, nt: int) -> None:
        """Write the arguments of the share `tid` of `nt`."""
        weights, state, arena, io, barrier, tokens = arguments
        one = _INTEGER
        _PACKED.pack_into(
            self.values, 0,
            one, weights, one, state, one, arena, one, io, one, barrier, one, tokens, one, tid, one, nt,
        )  # fmt: skip


class Entry:
    """One program; any number of threads may call it at once, each with a frame of its own."""

    def __init__(self, symbol: str, function: Callable[..., int]) -> None:
        self.symbol = symbol
        self._function = function

    def bind(self, frame: Frame) -> Share:
        """Return the call with the arguments that the frame then holds. It releases the GIL."""
        return partial(self._function, None, frame.values, _ARGUMENTS, frame.result)

    def __call__(self, arguments: Arguments) -> int:
        """Run all shares on the calling thread."""
        frame = Frame()
        frame.pack(arguments, 0, 1)
        return self.bind(frame)()


class Library:
    """Load a shared object from memory. The caller vouches for `code`: loading runs it."""

    def __init__(self, code: bytes) -> None:
        self._entries: dict[str, Entry] = {}
        self._library = _open_library(code)

    def entry(self, symbol: str) -> Entry:
        """Return the program exported under this name; ExecutionError when there is none."""
        if symbol in self._entries:
            return self._entries[symbol]
        try:
            place = ctypes.c_char.in_dll(self._library, f"__tvm_ffi_{symbol}")
        except ValueError as error:
            raise ExecutionError("the compiled code lacks an entry", expected=symbol) from error
        function = _FUNCTION(ctypes.addressof(place))
        # One that the library itself hands out refers to itself, so that the code would stay until the next collection.
        setattr(function, "library", self._library)  # noqa: B010 (of which ctypes' types know nothing)
        return self._entries.setdefault(symbol, Entry(symbol, function))


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


class _Semaphore:
    """A semaphore of the C library: waiting for it runs no signal handler, and posting never waits."""

    def __init__(self) -> None:
        self._words = (ctypes.c_long * 8)()  # sem_t has 32 bytes
        library = ctypes.CDLL(None)
        library.sem_init(self._words, 0, 0)
        self.post: Callable[[], int] = partial(ctypes.PyDLL(None).sem_post, self._words)
        self.wait: Callable[[], int] = partial(library.sem_wait, self._words)  # -1: a signal came


class Workers:
    """Run entries on up to `count` threads: the calling one is thread 0, the others are daemon threads.

    Python runs signal handlers on the main thread, between bytecodes and in some waits, and they may raise there.
    From the first start of a worker to the end of the last nothing of that may happen: a thread alone would wait at a
    barrier for ever, or write to memory that is somebody else's by then. So this part of a run is one call of
    C code from Python's point of view: iterators of the standard library, with the calls bound before.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ExecutionError("a program needs at least one thread", got=count)
        self.count = count
        self._lock = threading.Lock()
        self._frames = [Frame() for _ in range(count)]
        self._ended = _Semaphore()
        self._outcomes: list[int | BaseException] = [0] * count
        self._jobs: list[SimpleQueue[Share | None]] = [SimpleQueue() for _ in range(1, count)]
        self._calls: dict[tuple[Entry, int], list[Callable[[], int | None]]] = {}
        for tid, jobs in enumerate(self._jobs, start=1):
            name = f"q35c-worker-{tid}"
            work = (tid, jobs, self._outcomes, self._ended.post)
            threading.Thread(target=_work, args=work, name=name, daemon=True).start()
        self._finalizer = weakref.finalize(self, _stop, self._jobs)

    def close(self) -> None:
        """Let the threads end, and go of the code; later runs fail."""
        self._finalizer()
        self._calls.clear()

    def run(self, entry: Entry, arguments: Arguments, threads: int | None = None) -> None:
        """Run `entry` on `threads` threads, by default all; ExecutionError when any of them failed.

        One run at a time: a second caller waits. Whatever is raised, all threads have ended then. The barrier words of
        `arguments` must be zero before the first run.
        """
        threads = threads or self.count
        with self._lock:
            self._check_usable()
            for tid in range(threads):
                self._frames[tid].pack(arguments, tid, threads)
            calls = map(call, self._bound(entry, threads))
            # Each asks again until its wait was no longer cut short by a signal.
            waits = chain.from_iterable([iter(self._ended.wait, 0) for _ in range(1, threads)])
            section = chain(calls, waits)
            found: list[int | None] = []
            try:
                found.extend(section)
            finally:
                if found:  # workers have been started; there are waits left only if thread 0 raised
                    deque(waits, maxlen=0)
            outcomes = [found[threads - 1], *self._outcomes[1:threads]]
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise ExecutionError("a worker thread failed", got=repr(outcome)) from outcome
        if any(outcomes):
            raise ExecutionError("compiled code failed", where=entry.symbol, got=outcomes)

    def _bound(self, entry: Entry, threads: int) -> list[Callable[[], int | None]]:
        """Return what starts each worker, and the share of thread 0."""
        found = self._calls.get((entry, threads))
        if found is None:
            own, *others = (entry.bind(frame) for frame in self._frames[:threads])
            starts = [
                partial(jobs.put, share) for jobs, share in zip(self._jobs, others, strict=False)
            ]
            found = self._calls[entry, threads] = [*starts, own]
        return found

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise ExecutionError("the worker threads are closed")
        if sys.is_finalizing():
            raise OptionError("the interpreter is ending: its threads do not run any more")


def _work(
    tid: int,
    jobs: SimpleQueue[Share | None],
    outcomes: list[int | BaseException],
    post: Callable[[], int],
) -> None:
    while (share := jobs.get()) is not None:
        try:
            outcomes[tid] = share()
        except BaseException as error:
            outcomes[tid] = error
        post()


def _stop(jobs: list[SimpleQueue[Share | None]]) -> None:
    for queue in jobs:
        queue.put(None)
