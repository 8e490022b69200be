"""What the threads of a block do together, and formulas of one thread.

Sums have a fixed order, so that no result depends on the order of blocks or warps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm import tirx

from q35c.codegen.cuda.kernels.family import WARP
from q35c.codegen.cuda.kernels.make import Expr, T, let, store

_ALL_LANES = 0xFFFFFFFF


@contextmanager
def when(*conditions: Expr) -> Iterator[None]:
    """Do what follows where all conditions hold; later ones are not evaluated where an earlier one does not."""
    with T.If(tirx.all(*conditions)), T.Then():
        yield


@contextmanager
def threads(
    grid: tuple[Expr, Expr, Expr], block: tuple[int, int, int]
) -> Iterator[tuple[Expr, ...]]:
    """Bind blocks and threads along x, y and z; yield the block's and the thread's numbers on axes of more than one."""
    bound = []
    with _Frames() as frames:
        for kind, extents in (("blockIdx", grid), ("threadIdx", block)):
            for axis, extent in zip("xyz", extents, strict=True):
                is_one = isinstance(extent, int) and extent == 1
                bound += (
                    []
                    if is_one and axis != "x"
                    else [frames.enter(T.thread_binding(extent, thread=f"{kind}.{axis}"))]
                )
        yield tuple(bound)


@contextmanager
def columns(count: int, thread: Expr, width: int) -> Iterator[Expr]:
    """Do what follows for every column of a row that is this thread's, of `width` side by side; yield the column."""
    with T.serial(-(-count // width)) as i:
        column = let("d", i * width + thread)
        if count % width:
            with when(column < count):
                yield column
        else:
            yield column


class _Frames:
    """Leave in reverse order what was entered."""

    def __enter__(self) -> _Frames:
        self._entered = []
        return self

    def enter(self, frame: Expr) -> Expr:
        value = frame.__enter__()
        self._entered.append(frame)
        return value

    def __exit__(self, *error: object) -> None:
        for frame in reversed(self._entered):
            frame.__exit__(*error)


def shuffle_xor(value: Expr, distance: Expr) -> Expr:
    """Return the value of the lane at this distance; every lane of the warp must come here."""
    return T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, distance, WARP, WARP)


def warp_sum(cell: Expr, at: Expr = 0) -> None:
    """Let cell[at], of each lane its own, become the sum over the lanes of a warp."""
    for distance in (16, 8, 4, 2, 1):
        store(cell, cell[at] + shuffle_xor(cell[at], distance), at)


def warp_max(cell: Expr, at: Expr = 0) -> None:
    """Let cell[at], of each lane its own, become the largest over the lanes of a warp."""
    for distance in (16, 8, 4, 2, 1):
        store(cell, T.max(cell[at], shuffle_xor(cell[at], distance)), at)


def barrier() -> None:
    """Let no thread of the block go on before all have come here."""
    T.evaluate(T.tvm_storage_sync("shared"))


def block_sum(cell: Expr, parts: Expr, thread: Expr, warps: int, *at: Expr) -> None:
    """Let cell[0], of each thread its own, become the sum over the block; parts[at] are `warps` shared words of no other use."""
    warp_sum(cell)
    with when(thread % WARP == 0):
        store(parts, cell[0], *at, thread // WARP)
    barrier()
    store(cell, T.float32(0), 0)
    for warp in range(warps):
        store(cell, cell[0] + parts[(*at, warp)], 0)


def extern(dtype: str, name: str, *arguments: Expr) -> Expr:
    """Call a function of CUDA or of the prelude that has no effects."""
    return T.call_pure_extern(dtype, name, *arguments)


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x)); exp overflows to infinity where that is 0."""
    return T.float32(1) / (T.float32(1) + T.exp(-x))


def silu(x: Expr) -> Expr:
    return x / (T.float32(1) + T.exp(-x))


def f32_of(word: Expr) -> Expr:
    """Return the f32 whose bits a word uint32 holds."""
    return extern("float32", "__uint_as_float", word)


def low_bf16(word: Expr) -> Expr:
    """Return as f32 the first of two bf16 in a word uint32."""
    return f32_of(T.shift_left(word, T.uint32(16)))


def high_bf16(word: Expr) -> Expr:
    """Return as f32 the second of two bf16 in a word uint32."""
    return f32_of(T.bitwise_and(word, T.uint32(0xFFFF0000)))


def bits_of(value: Expr) -> Expr:
    """Return the bits of an f32 as int32."""
    return extern("int32", "__float_as_int", value)


def from_bits(word: Expr) -> Expr:
    """Return the f32 whose bits an int32 holds."""
    return extern("float32", "__int_as_float", word)


def shuffle(value: Expr, lane: Expr) -> Expr:
    """Return the value of a lane; every lane of the warp must come here."""
    return T.tvm_warp_shuffle(T.uint32(_ALL_LANES), value, lane, WARP, WARP)
