"""Programs: an entry's launch table, launched row by row, or captured once into a graph that serves every step."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from q35c.artifact.entries import Entry
from q35c.artifact.target import CudaArgument, CudaKernel, CudaProgram, CudaTarget
from q35c.runtime.cuda.blocks import Memory
from q35c.runtime.cuda.driver import Driver
from q35c.runtime.cuda.stream import Stream

_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_UNASKED_SHARED_BYTES = 48 << 10  # more dynamic shared memory must be asked for
_RELAXED = 2  # capture: what else this process does meanwhile, as freeing memory, does not end it
_WORD = 2**64

Around = Callable[[], None]  # adds copies to the stream that a program runs on


class Kernel:
    """A function of the loaded image, and how it is launched."""

    def __init__(self, driver: Driver, module: int, plan: CudaKernel) -> None:
        """Find the function, and let it have its shared memory. Raises DeviceError."""
        self.plan = plan
        name = plan.symbol.encode()
        self.function = ctypes.c_void_p(driver.size("cuModuleGetFunction", module, name))
        if plan.shared_bytes > _UNASKED_SHARED_BYTES:
            driver.call("cuFuncSetAttribute", self.function, _MAX_DYNAMIC_SHARED, plan.shared_bytes)
        # Now, for otherwise the driver would do it at the first launch, perhaps in the midst of a capture.
        driver.call("cuFuncLoad", self.function)
        self.shape = tuple(map(ctypes.c_uint, (*plan.block, plan.shared_bytes)))


class Launch:
    """One launch with its arguments made ready: a step changes only what depends on its number of rows."""

    def __init__(
        self, kernel: Kernel, arguments: Sequence[CudaArgument], blobs: Mapping[str, int], *, is_one_row: bool
    ) -> None:  # fmt: skip
        self._extents = kernel.plan.grid
        self._is_one_row = is_one_row
        self._rows = 0
        self._values = (ctypes.c_uint64 * len(arguments))()
        first = ctypes.addressof(self._values)
        places = [first + 8 * index for index in range(len(arguments))]
        self._pointers = (ctypes.c_void_p * len(arguments))(*places)
        self._grid = tuple(ctypes.c_uint(0) for _ in self._extents)
        bases = [blobs.get(argument.of, 0) for argument in arguments]
        self._numbered = list(zip(range(len(arguments)), bases, arguments, strict=True))
        self._varying = [item for item in self._numbered if item[2].per_row]
        self._call = (kernel.function, *self._grid, *kernel.shape)

    def prepare(self, rows: int) -> None:
        """Make the arguments those of a step of so many rows."""
        if rows == self._rows:
            return
        # Little-endian: a narrower number is the first bytes of its cell.
        for index, base, argument in self._varying if self._rows else self._numbered:
            self._values[index] = (base + argument.value(rows)) % _WORD
        for cell, extent in zip(self._grid, self._extents, strict=True):
            cell.value = extent.blocks(1 if self._is_one_row else rows)
        self._rows = rows

    def __call__(self, launch: Any, stream: int) -> int:
        """Add the launch to a stream by the function of the driver; return its code."""
        return launch(*self._call, stream, self._pointers, None)


class Program:
    """The launches of one entry, and the graphs made of them by number of rows."""

    def __init__(self, driver: Driver, memory: Memory, launches: Sequence[Launch]) -> None:
        self._driver, self._memory = driver, memory
        self._launches = launches
        self._launch = driver.function("cuLaunchKernel")
        self._graphs: dict[int, int] = {}
        self._events: list[int] = []

    def enqueue(self, rows: int, stream: Stream, between: Around | None = None) -> None:
        """Add all launches to a stream; call `between` before each and after the last."""
        for number, launch in enumerate(self._launches):
            if between is not None:
                between()
            launch.prepare(rows)
            if code := launch(self._launch, stream.handle):
                error = self._driver.error("cuLaunchKernel", code)
                error.what += f" in step {number}"
                raise error
        if between is not None:
            between()

    def graph(self, rows: int, capture: Stream, before: Around, after: Around) -> int:
        """Return the graph of a step of so many rows between two copies; it is captured the first time, on a stream for that."""
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows, capture, before, after)
        return self._graphs[rows]

    def _capture(self, rows: int, capture: Stream, before: Around, after: Around) -> int:
        driver = self._driver
        if capture.is_capturing:  # a signal handler has cut it short
            _abandon(driver, capture)
        capture.is_capturing = True
        driver.call("cuStreamBeginCapture_v2", capture.handle, _RELAXED)
        try:
            before()
            self.enqueue(rows, capture)
            after()
        except BaseException:
            _abandon(driver, capture)
            raise
        with contextlib.ExitStack() as undo:
            made = ctypes.c_void_p()
            driver.call("cuStreamEndCapture", capture.handle, ctypes.byref(made))
            capture.is_capturing = False
            undo.callback(driver.function("cuGraphDestroy"), made)
            graph = driver.size("cuGraphInstantiateWithFlags", made, 0)
            return self._memory.take("cuGraphExecDestroy", graph)

    def record(self, rows: int, stream: Stream) -> list[int]:
        """Add all launches to a stream, and an event before each and after the last; return the events."""
        while len(self._events) <= len(self._launches):
            event = self._driver.size("cuEventCreate", 0)
            self._events.append(self._memory.take("cuEventDestroy_v2", event))
        events = iter(self._events)
        self.enqueue(rows, stream, lambda: self._driver.call("cuEventRecord", next(events), stream.handle))  # fmt: skip
        return self._events


def _abandon(driver: Driver, capture: Stream) -> None:
    """End a capture, if there is one, and throw away what it has."""
    made = ctypes.c_void_p()
    if not driver.function("cuStreamEndCapture")(capture.handle, ctypes.byref(made)) and made.value:
        driver.function("cuGraphDestroy")(made)
    capture.is_capturing = False


def load_programs(
    driver: Driver,
    memory: Memory,
    module: int,
    target: CudaTarget,
    entries: Sequence[Entry],
    blobs: Mapping[str, int],
) -> dict[str, Program]:
    """Return each entry's program, by name; `blobs` are addresses. Raises DeviceError if the image lacks a kernel."""
    kernels = [Kernel(driver, module, plan) for plan in target.kernels]
    return {
        entry.name: Program(driver, memory, list(_launches(plan, entry, kernels, blobs)))
        for plan, entry in zip(target.programs, entries, strict=True)
    }


def _launches(
    program: CudaProgram, entry: Entry, kernels: Sequence[Kernel], blobs: Mapping[str, int]
) -> Iterator[Launch]:
    single = frozenset(entry.single_row_steps)
    for number, (kernel, launch) in enumerate(zip(entry.steps, program.launches, strict=True)):
        yield Launch(kernels[kernel], launch.arguments, blobs, is_one_row=number in single)
