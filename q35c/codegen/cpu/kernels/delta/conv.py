"""Causal depthwise convolution with SiLU, in place, continuing from the last K-1 inputs of the sequence.

    y[t, c] = silu(sum over j < K of w[j, c] * u[t + j, c])      u = the state's K-1 rows, then x

y takes the place of x: rows are walked from the last to the first, so what a row needs is still there (into a second array
it took a quarter longer). The state becomes the last K-1 rows of u. The kernels of tasks.py convolve the channels of
one key head and a chunk of rows at a time. Channels are walked in blocks whose weights and window stay in L1; x is read once
and written once: that is the limit, after the exponential of SiLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.kernels.vectors import STACK, Expr, ramp, vsilu

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


@T.inline
def convolve_channels(shape, x, w, state, base, first, count, begin, width):
    """Convolve `count` rows from `first`, and their state, in `width` channels from `begin`, whole vectors."""
    for block in T.serial(T.truncdiv(width + (BLOCK_CHANNELS - 1), T.int64(BLOCK_CHANNELS))):
        start: T.let[T.int64] = block * BLOCK_CHANNELS
        vectors: T.let[T.int64] = T.truncdiv(
            T.min(width - start, T.int64(BLOCK_CHANNELS)), T.int64(shape.lanes)
        )
        convolve_run(shape, x, w, state, base, first, count, begin + start, vectors)
