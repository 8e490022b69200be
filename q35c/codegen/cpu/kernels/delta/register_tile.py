"""Register tiles: the inner loop of every matrix product in the delta rule and in attention.

A tile is a local buffer f32[rows, vectors, lanes] whose indices are constants once the loops are unrolled, so LLVM
keeps it in registers. Its two factors are Python functions that return TIR expressions: `left(r, k)` one scalar
broadcast over the lanes, `right(k, j)` one vector. So one macro serves every layout and storage type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.vectors import Expr, ramp, splat

Left = Callable[[Expr, Expr], Expr]
Right = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class TileShape:
    """Describe one register tile: rows x (vectors x lanes) f32 values."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """Return how many f32 columns the tile covers."""
        return self.vectors * self.lanes

    def with_rows(self, rows: int) -> TileShape:
        """Return the same tile with another height."""
        return TileShape(rows, self.vectors, self.lanes)


def tile_for(columns: int, isa: Isa) -> TileShape:
    """Choose the tile for a product whose width is a multiple of `columns`.

    A multiply-add has 4 cycles latency and 2 issue per cycle, so 8 accumulators hide it. AVX2 has 16 registers:
    4 x 2 ran as fast as 6 x 2 here, and 4 divides every size that occurs. AVX-512 has 32 registers and takes 8 x 2.
    """
    vectors = 2 if columns % (2 * isa.lanes) == 0 else 1
    return TileShape(isa.tuning.delta_rows, vectors, isa.lanes)


def scalars(buffer: Expr, base: Expr, row_stride: Expr, step: Expr, lanes: int) -> Left:
    """Return left(r, k) = buffer[base + r * row_stride + k * step], broadcast."""
    return lambda r, k: splat(buffer[base + r * row_stride + k * step], lanes)


def vectors(buffer: Expr, base: Expr, row_stride: Expr, lanes: int) -> Right:
    """Return right(k, j) = the j-th vector of row k, which begins at base + k * row_stride."""
    return lambda k, j: buffer[ramp(base + k * row_stride + j * lanes, lanes)]


@T.inline
def clear(acc, shape):
    """Set a tile to zero."""
    for r in T.unroll(shape.rows):
        for j in T.unroll(shape.vectors):
            acc[r, j, ramp(0, shape.lanes)] = splat(0.0, shape.lanes)


@T.inline
def multiply_add(acc, shape, left, right, count):
    """acc[r, j] += sum over k < count of left(r, k) * right(k, j)."""
    for k in T.serial(count):
        for r in T.unroll(shape.rows):
            for j in T.unroll(shape.vectors):
                acc[r, j, ramp(0, shape.lanes)] = acc[r, j, ramp(0, shape.lanes)] + left(
                    r, k
                ) * right(k, j)
