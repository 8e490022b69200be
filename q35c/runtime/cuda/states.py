"""States of sequences on a device: an address range for the largest context each, with memory behind what is in use.

Kernels know the strides of a state at the largest context. So each state has that many addresses, and memory is mapped there in
granules of the device, usually of 2 MiB, before the first step that touches them.

A state that nobody refers to is given back by a later call: the garbage collector may come at any instant, and must not
talk to the driver then.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Manifest
from q35c.artifact.leaves import StateTensor
from q35c.errors import OptionError
from q35c.runtime.arrays import NUMPY_TYPES
from q35c.runtime.cuda.context import Context
from q35c.runtime.cuda.stream import Stream
from q35c.runtime.device import Saved

COMMIT_TOKENS = 1024  # memory is mapped for so many more tokens at once

_PINNED, _ON_DEVICE, _READ_WRITE = (
    1,
    1,
    3,
)  # CUmemAllocationType, CUmemLocationType, CUmemAccess_flags
_RECOMMENDED = 1  # CUmemAllocationGranularity_flags


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@dataclass(frozen=True, slots=True)
class Part:
    """What is in use of a tensor: `rows` stretches of `bytes`, `stride` bytes apart, as an array of this type and shape."""

    start: int
    stride: int
    rows: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def part_of(tensor: StateTensor, max_context: int, start: int, end: int) -> Part:
    """Return what tokens from `start` up to `end` use of a tensor, all of it if it does not grow with them."""
    rows, cells, *rest = tensor.shape
    if tensor.growth == "fixed":
        return Part(tensor.offset, 0, 1, tensor.bytes, tensor.dtype, tensor.shape)
    cell_bytes = tensor.bytes // (rows * cells)
    first, last = (tensor.used_cells(max_context, tokens) for tokens in (start, end))
    return Part(
        tensor.offset + first * cell_bytes,
        cells * cell_bytes,
        rows,
        (last - first) * cell_bytes,
        tensor.dtype,
        (rows, last - first, *rest),
    )


class StatePlan:
    """Where states need memory, in granules."""

    def __init__(self, manifest: Manifest, granularity: int) -> None:
        self.manifest = manifest
        self.granularity = granularity
        self.count = -(-manifest.state.bytes // granularity)
        self.committed_bytes = functools.lru_cache(64)(self._committed_bytes)

    @property
    def bytes(self) -> int:
        """Return how many addresses a state takes."""
        return self.count * self.granularity

    def covered(self, tokens: int) -> int:
        """Return up to how many tokens memory is mapped at once, where so many need it."""
        up = -(-tokens // COMMIT_TOKENS) * COMMIT_TOKENS
        return min(up, self.manifest.max_context)

    def needed(self, tokens: int) -> NDArray[np.bool_]:
        """Return which granules so many tokens use."""
        needed = np.zeros(self.count, np.bool_)
        for part in self.parts(0, tokens):
            for row in range(part.rows if part.bytes else 0):
                start = part.start + row * part.stride
                needed[start // self.granularity : -(-(start + part.bytes) // self.granularity)] = (
                    True
                )
        return needed

    def state_bytes(self, tokens: int) -> int:
        """Return the memory that a sequence of so many tokens takes."""
        return self.committed_bytes(self.covered(tokens))

    def _committed_bytes(self, tokens: int) -> int:
        return int(np.count_nonzero(self.needed(tokens))) * self.granularity

    def parts(self, start: int, end: int) -> list[Part]:
        """Return what is fixed, and what tokens from `start` up to `end` use of the rest."""
        tensors = self.manifest.state.tensors
        return [part_of(tensor, self.manifest.max_context, start, end) for tensor in tensors]

    def fixed(self) -> list[Part]:
        """Return what does not grow with the tokens."""
        return [
            part_of(tensor, self.manifest.max_context, 0, 0)
            for tensor in self.manifest.state.tensors
            if tensor.growth == "fixed"
        ]

    def cells(self, start: int, end: int) -> list[Part]:
        """Return what grows, for a range of tokens."""
        return [
            part_of(tensor, self.manifest.max_context, start, end)
            for tensor in self.manifest.state.tensors
            if tensor.growth == "context"
        ]


@dataclass(slots=True, eq=False)
class Piece:
    """Some granules of memory behind addresses. It counts from the moment on when it is ready: a signal handler may raise before."""

    address: int
    bytes: int
    handle: int = 0
    is_ready: bool = False


@dataclass(slots=True, eq=False)
class Space:
    """A state's addresses, and the memory behind them."""

    address: int
    covered: int = -1  # up to how many tokens memory is there
    pieces: list[Piece] = field(default_factory=list[Piece])


class _Watch(weakref.ref["DeviceState"]):
    """Tells that a state is gone, to a function in C alone: there no signal handler can come between."""

    space: Space


class StateMemory:
    """The states on one device. Thread-safe, but for calls that concern one state."""

    def __init__(self, context: Context, plan: StatePlan, steps: Stream, copies: Stream) -> None:
        """Take the streams on which steps are made and states copied. The context must be current."""
        self.plan = plan
        self._context, self._driver = context, context.driver
        self._steps, self._copies = steps, copies
        self._gone: deque[_Watch] = deque()
        self._live: dict[Space, _Watch | None] = {}
        # Slots of all states count from here, so that captured programs serve every sequence.
        self.origin = self._reserve().address

    def reserve(self) -> DeviceState:
        """Return a new state; memory is mapped by use. Raises OutOfDeviceMemory."""
        self.reclaim()
        with self._context.current("a new sequence"):
            space = self._reserve()
        state = DeviceState(self, space)
        watch = self._live[space] = _Watch(state, self._gone.append)
        watch.space = space
        return state

    def _reserve(self) -> Space:
        size = self.plan.bytes
        address = self._driver.size("cuMemAddressReserve", size, 0, 0, 0)
        space = Space(address)
        self._live[space] = None
        return space

    def commit(self, space: Space, tokens: int, stream: Stream) -> None:
        """Have zeroed memory behind what so many tokens use, once the stream comes there. Raises OutOfDeviceMemory."""
        if tokens <= space.covered:
            return
        for piece in [piece for piece in space.pieces if not piece.is_ready]:
            self._drop(piece)
            space.pieces.remove(piece)
        covered = self.plan.covered(tokens)
        lacking = self.plan.needed(covered)
        for piece in space.pieces:
            first = (piece.address - space.address) // self.plan.granularity
            lacking[first : first + piece.bytes // self.plan.granularity] = False
        at = 0
        for is_lacking, run in groupby(lacking.tolist()):
            length = sum(1 for _ in run)
            if is_lacking:
                self._map(space, at, length, stream)
            at += length
        space.covered = covered

    def _map(self, space: Space, first: int, count: int, stream: Stream) -> None:
        """Map zeroed memory behind some granules."""
        driver, size = self._driver, count * self.plan.granularity
        address = space.address + first * self.plan.granularity
        location = _Location(_ON_DEVICE, self._context.device)
        properties = _Properties(_PINNED, 0, location)
        access = _Access(location, _READ_WRITE)
        piece = Piece(address, size)
        space.pieces.append(piece)
        piece.handle = driver.size("cuMemCreate", size, ctypes.byref(properties), 0)
        driver.call("cuMemMap", address, size, 0, piece.handle, 0)
        driver.call("cuMemSetAccess", address, size, ctypes.byref(access), 1)
        driver.call("cuMemsetD8Async", address, 0, size, stream.handle)
        piece.is_ready = True

    def _drop(self, piece: Piece) -> None:
        """Give a piece back, as much of it as is there: nothing can be done about what fails."""
        piece.is_ready = False
        if piece.handle:
            self._driver.function("cuMemUnmap")(piece.address, piece.bytes)
            self._driver.function("cuMemRelease")(piece.handle)

    def unmap(self, space: Space) -> None:
        """Give the memory of a state back; its addresses stay."""
        space.covered = -1
        while space.pieces:
            self._drop(space.pieces[-1])
            space.pieces.pop()

    def reclaim(self) -> None:
        """Give back what states that are gone have left."""
        while self._gone:
            with self._context.current("giving back a sequence"):
                self._free(self._gone.popleft().space)

    def _free(self, space: Space) -> None:
        if space in self._live:
            self.unmap(space)
            self._driver.function("cuMemAddressFree")(space.address, self.plan.bytes)
            self._live.pop(space, None)

    def close(self) -> None:
        """Give everything back, live states included. The context must be current."""
        for space in list(self._live):
            self._free(space)

    def save(self, space: Space, parts: Sequence[Part], tokens: int) -> Saved:
        """Return copies of parts, which so many tokens use."""
        arrays = tuple(np.empty(part.shape, NUMPY_TYPES[part.dtype]) for part in parts)
        self._copy("cuMemcpyDtoHAsync_v2", space, zip(parts, arrays, strict=True), tokens)
        return arrays

    def restore(self, space: Space, parts: Sequence[Part], saved: Saved, tokens: int) -> None:
        """Bring copies back: all, or none if one is of another shape, as it may stem from a file."""
        shapes = [(NUMPY_TYPES[part.dtype], part.shape) for part in parts]
        if shapes != [(copy.dtype, copy.shape) for copy in saved]:
            raise OptionError("the copy is not of this state's shape")
        arrays = map(np.ascontiguousarray, saved)
        self._copy("cuMemcpyHtoDAsync_v2", space, zip(parts, arrays, strict=True), tokens)

    def _copy(
        self,
        copy: str,
        space: Space,
        pairs: Iterable[tuple[Part, NDArray[np.generic]]],
        tokens: int,
    ) -> None:
        arrays = list(pairs)
        with self._context.current("copying a state"):
            self._steps.settle()
            with self._copies.work(arrays):
                self.commit(space, tokens, self._copies)
                for part, array in arrays:
                    on_host = array.ctypes.data
                    for row in range(part.rows if part.bytes else 0):
                        device = space.address + part.start + row * part.stride
                        ends = (on_host + row * part.bytes, device)
                        ends = ends if copy == "cuMemcpyDtoHAsync_v2" else ends[::-1]
                        self._driver.call(copy, *ends, part.bytes, self._copies.handle)

    def zero(self, space: Space) -> None:
        """Make a state zero: its memory is given back."""
        with self._context.current("resetting a sequence"):
            self._steps.settle()
            self.unmap(space)


class DeviceState:
    """The state of one sequence, as `device.State`."""

    def __init__(self, memory: StateMemory, space: Space) -> None:
        self._memory, self._space = memory, space
        self.address = space.address

    def commit(self, tokens: int, stream: Stream) -> None:
        """Have memory behind what so many tokens use. The context must be current."""
        self._memory.commit(self._space, tokens, stream)

    def zero(self) -> None:
        self._memory.zero(self._space)

    def save(self, tokens: int) -> Saved:
        return self._memory.save(self._space, self._memory.plan.parts(0, tokens), tokens)

    def restore(self, saved: Saved, tokens: int) -> None:
        self._memory.restore(self._space, self._memory.plan.parts(0, tokens), saved, tokens)

    def save_fixed(self) -> Saved:
        return self._memory.save(self._space, self._memory.plan.fixed(), 0)

    def restore_fixed(self, saved: Saved) -> None:
        self._memory.restore(self._space, self._memory.plan.fixed(), saved, 0)

    def save_cells(self, start: int, end: int) -> Saved:
        return self._memory.save(self._space, self._memory.plan.cells(start, end), end)

    def restore_cells(self, saved: Saved, start: int, end: int) -> None:
        self._memory.restore(self._space, self._memory.plan.cells(start, end), saved, end)


def granularity_of(context: Context) -> int:
    """Return the bytes in which the device maps memory."""
    properties = _Properties(_PINNED, 0, _Location(_ON_DEVICE, context.device))
    with context.current():
        return context.driver.size(
            "cuMemGetAllocationGranularity", ctypes.byref(properties), _RECOMMENDED
        )
