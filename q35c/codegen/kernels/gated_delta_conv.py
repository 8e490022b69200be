"""Causal depthwise convolution with SiLU, in place, continuing from the last K-1 inputs of the sequence.

    y[t, c] = silu(sum over j < K of w[j, c] * u[t + j, c])      u = the state's K-1 rows, then x

y takes the place of x: rows are walked from the last to the first, so what a row needs is still there (into a second array
it took a quarter longer). The state becomes the last K-1 rows of u. Threads split the channels, so nothing is shared
between them. Channels are walked in blocks whose weights and window stay in L1; x is read once and written once: that is
the limit, after the exponential of SiLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import STACK, Expr, ramp, share, vsilu

GRAIN = 16  # channels that threads share out: one cache line
BLOCK_CHANNELS = 512  # 2 KiB of each of K weight rows and of the rows in use
GROUP_ROWS = (
    4  # computed together: their inputs overlap, and 4 exponentials hide each other's latency
)

Row = Callable[[Expr], Expr]  # tap -> vector


@dataclass(frozen=True)
class ConvShape:
    """Describe one convolution: C channels, K taps, vectors of `lanes`."""

    channels: int
    taps: int
    lanes: int
    slot_offset: int  # in f32 elements

    def state_vector(self, state: Expr, base: Expr, row: Expr, channel: Expr) -> Expr:
        """Return one vector of a row of the state."""
        return state[ramp(base + row * self.channels + channel, self.lanes)]

    def dot(self, w: Expr, channel: Expr, inputs: Row) -> Expr:
        """Return the sum over taps, oldest first."""
        total = inputs(0) * w[0, ramp(channel, self.lanes)]
        for tap in range(1, self.taps):
            total = total + inputs(tap) * w[tap, ramp(channel, self.lanes)]
        return total

    def rows_of_x(self, x: Expr, row: Expr, channel: Expr) -> Row:
        """Return the inputs of a row that has K-1 rows before it."""
        return lambda tap: x[row + (tap - self.taps + 1), ramp(channel, self.lanes)]

    def rows_of_both(
        self, x: Expr, first: Expr, t: Expr, state: Expr, base: Expr, channel: Expr
    ) -> Row:
        """Return the inputs of row t of a run that begins at `first`: the oldest come from the state."""

        def at(tap: Expr) -> Expr:
            row = t + tap  # in u
            return T.if_then_else(
                row < self.taps - 1,
                self.state_vector(state, base, row, channel),
                x[first + row - (self.taps - 1), ramp(channel, self.lanes)],
            )

        return at


@T.inline
def convolve_rows(shape, x, w, first, rows, begin, vectors):
    """Convolve `rows` rows (a Python int) that have K-1 rows of x before them."""
    done = T.alloc_buffer((rows, shape.lanes), "float32")
    for v in T.serial(vectors):
        channel: T.let[T.int64] = begin + v * shape.lanes
        for r in T.unroll(rows):
            done[r, ramp(0, shape.lanes)] = vsilu(
                shape.dot(w, channel, shape.rows_of_x(x, first + r, channel)), shape.lanes
            )
        for r in T.unroll(rows):
            x[first + r, ramp(channel, shape.lanes)] = done[r, ramp(0, shape.lanes)]


@T.inline
def convolve_run(shape, x, w, state, base, first, count, begin, vectors):
    """Convolve `count` rows from `first`, and their state, in up to BLOCK_CHANNELS channels from `begin`."""
    saved = T.alloc_buffer((shape.taps - 1, BLOCK_CHANNELS), "float32", annotations=STACK)
    for i in T.serial(T.int64(shape.taps - 1)):
        for v in T.serial(vectors):
            channel: T.let[T.int64] = begin + v * shape.lanes
            saved[i, ramp(v * shape.lanes, shape.lanes)] = shape.rows_of_both(
                x, first, count, state, base, channel
            )(i)
    rest: T.let[T.int64] = T.max(count - (shape.taps - 1), T.int64(0))
    groups: T.let[T.int64] = T.truncdiv(rest, T.int64(GROUP_ROWS))
    single: T.let[T.int64] = rest - groups * GROUP_ROWS
    for t in T.serial(groups):
        convolve_rows(shape, x, w, first + count - (t + 1) * GROUP_ROWS, GROUP_ROWS, begin, vectors)
    for t in T.serial(single):
        convolve_rows(shape, x, w, first + (shape.taps - 1) + (single - 1 - t), 1, begin, vectors)
    for t in T.serial(count - rest):
        for v in T.serial(vectors):
            channel: T.let[T.int64] = begin + v * shape.lanes
            row: T.let[T.int64] = count - rest - 1 - t
            x[first + row, ramp(channel, shape.lanes)] = vsilu(
                shape.dot(w, channel, shape.rows_of_both(x, first, row, state, base, channel)),
                shape.lanes,
            )
    for i in T.serial(T.int64(shape.taps - 1)):
        for v in T.serial(vectors):
            at: T.let[T.int64] = base + i * shape.channels + begin + v * shape.lanes
            state[ramp(at, shape.lanes)] = saved[i, ramp(v * shape.lanes, shape.lanes)]


def conv_update(C: int, K: int, slot_offset_bytes: int, isa: Isa) -> tirx.PrimFunc:
    """Build the convolution kernel; C is a multiple of 16, K is 2 to 4.

    Params: X f32[T, C], which is replaced, W f32[K, C], STATE, SLOTS i64[1], T, ld_x, tid, nt. The state of a sequence is
    f32[K-1, C], oldest row first. All rows continue sequence 0; in decode, `gated_delta_decode` convolves.
    """
    shape = ConvShape(C, K, isa.lanes, slot_offset_bytes // 4)

    @T.prim_func(private=True, s_tir=True)
    def conv_update_kernel(
        X: T.handle("float32"),
        W: T.handle("float32"),
        STATE: T.handle("float32"),
        SLOTS: T.handle("int64"),
        tokens: T.int64,
        ld_x: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((tokens, ld_x), "float32", data=X)
        w = T.decl_buffer((K, C), "float32", data=W)
        state = T.decl_buffer((T.int64(1) << 48,), "float32", data=STATE)
        slots = T.decl_buffer((1,), "int64", data=SLOTS)
        base: T.let[T.int64] = slots[0] * 16 + shape.slot_offset
        low: T.let[T.int64] = share(C // GRAIN, tid, nt) * GRAIN
        high: T.let[T.int64] = share(C // GRAIN, tid + 1, nt) * GRAIN
        for block in T.serial(
            T.truncdiv(high - low + (BLOCK_CHANNELS - 1), T.int64(BLOCK_CHANNELS))
        ):
            begin: T.let[T.int64] = low + block * BLOCK_CHANNELS
            vectors: T.let[T.int64] = T.truncdiv(
                T.min(high - begin, T.int64(BLOCK_CHANNELS)), T.int64(shape.lanes)
            )
            convolve_run(shape, x, w, state, base, T.int64(0), tokens, begin, vectors)
        return T.int32(0)

    return conv_update_kernel
