"""The matrix tile that linears and experts share.

A tile multiplies a few rows of X with some vectors of one packed block of 32 output columns:

    acc[i, j] = sum over k of  X[row i, k] * W[block, k, vector j]

The sum runs over k in order with one accumulator per output, whatever the tile's height, so a
row's result depends neither on how many rows are computed with it nor on the number of threads.

Accumulators live in registers. Rows are taken in tall tiles (AVX2 6 rows x 2 vectors of its 16
registers, AVX-512 8 x 2 of 32; more rows at a power-of-two stride would fight for one set of a
small L1), and the rows that are left in short tiles over the whole block. A tall tile walks K in
chunks, so that a chunk of weights serves up to 8 tiles from L1; bf16 is widened once per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.kernels.products.product import (
    Operands,
    Product,
    Vectors,
    accumulators,
    clear,
    finish,
    load_sums,
    store_sums,
    sums_buffer,
)
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, ramp, splat, widen_high, widen_low
from q35c.layouts.weights import BLOCK, ceil_div

_CHUNK = 128  # k in one chunk: 16 KiB of f32 weights, half of L1
_GROUP = 8  # tall tiles that one chunk serves; their partial sums take 6 KiB


@dataclass(frozen=True)
class FloatProduct(Product):
    """A product of f32 rows with f32 or bf16 weights."""

    @property
    def x_element(self) -> str:
        return "float32"

    @property
    def lines(self) -> int:
        """Number of 32-element lines in a block: one for each k, or in bf16 for each pair."""
        return self.K if self.dtype == "f32" else ceil_div(self.K, 2)

    @property
    def block_elements(self) -> int:
        return self.lines * BLOCK

    @property
    def element(self) -> str:
        return "float32" if self.dtype == "f32" else "int32"

    @property
    def tall_rows(self) -> int:
        """Number of rows of a tall tile."""
        return self.isa.tuning.float_rows[0]

    @property
    def short_rows(self) -> tuple[int, ...]:
        """Heights of the short tiles: each takes what the taller ones leave."""
        return self.isa.tuning.float_rows[1:]

    @property
    def passes(self) -> tuple[Vectors, ...]:
        """Vectors of a line that one tall tile takes at a time."""
        half = len(self.vectors) // 2
        if self.is_swiglu:  # a gate vector and its up vector, 16 columns further
            return tuple((v, v + half) for v in range(half))
        return tuple((2 * v, 2 * v + 1) for v in range(half))

    @property
    def unroll(self) -> int:
        """Number of k in one turn of a tall tile's loop; it divides every chunk."""
        return math.gcd(self.K, 4)

    def sweep(self, operands: Operands, begin: Expr, end: Expr) -> None:
        position = begin
        count = T.Bind(T.truncdiv(end - begin, self.tall_rows))
        _tall_tiles(self, operands, position, count)
        position = T.Bind(position + count * self.tall_rows)
        for rows in self.short_rows:
            count = T.Bind(T.truncdiv(end - position, rows))
            _short_tiles(self, operands, position, count, rows)
            position = T.Bind(position + count * rows)


def _multiply(matmul: FloatProduct, acc: Expr, weights: Sequence[Expr], xs: Sequence[Expr]) -> None:
    """Emit acc[i, j] += weights[j] * xs[i]."""
    lanes = ramp(0, matmul.isa.lanes)
    weights = [T.Bind(weight) for weight in weights]
    for i, x in enumerate(xs):
        wide = T.Bind(splat(x, matmul.isa.lanes))
        for j, weight in enumerate(weights):
            T.buffer_store(acc, acc[i, j, lanes] + weight * wide, [i, j, lanes])


def _line(matmul: FloatProduct, operands: Operands, line: Expr, vectors: Vectors) -> list[Expr]:
    size = matmul.isa.lanes
    return [operands.w[operands.block, ramp(line * BLOCK + v * size, size)] for v in vectors]


# Short tiles: every vector of the block at once, straight from the packed weights


def _short_tiles(
    matmul: FloatProduct, operands: Operands, begin: Expr, count: Expr, rows: int
) -> None:
    with T.serial(count) as tile:
        first = T.Bind(begin + tile * rows)
        x_rows = [T.Bind(operands.x_row(first + i)) for i in range(rows)]
        acc = accumulators(matmul, rows, matmul.vectors)
        clear(matmul, acc)
        if matmul.dtype == "f32":
            with T.serial(matmul.K) as k:
                weights = _line(matmul, operands, k, matmul.vectors)
                _multiply(matmul, acc, weights, [operands.x[row, k] for row in x_rows])
        else:
            _short_bf16(matmul, operands, acc, x_rows)
        sums = sums_buffer(rows)
        store_sums(matmul, acc, sums, T.int64(0), matmul.vectors)
        finish(matmul, operands, sums, first, T.int64(rows))


def _short_bf16(
    matmul: FloatProduct, operands: Operands, acc: Expr, x_rows: Sequence[Expr]
) -> None:
    size, x = matmul.isa.lanes, operands.x
    with T.serial(matmul.K // 2) as pair:
        words = [T.Bind(word) for word in _line(matmul, operands, pair, matmul.vectors)]
        low = [widen_low(word, size) for word in words]
        _multiply(matmul, acc, low, [x[row, pair * 2] for row in x_rows])
        high = [widen_high(word, size) for word in words]
        _multiply(matmul, acc, high, [x[row, pair * 2 + 1] for row in x_rows])
    if matmul.K % 2:
        words = _line(matmul, operands, matmul.K // 2, matmul.vectors)
        low = [widen_low(word, size) for word in words]
        _multiply(matmul, acc, low, [x[row, matmul.K - 1] for row in x_rows])


# Tall tiles: K in chunks, up to _GROUP tiles for each chunk, the sums meanwhile on the stack


def _tall_tiles(matmul: FloatProduct, operands: Operands, begin: Expr, count: Expr) -> None:
    rows, lanes = matmul.tall_rows, matmul.isa.lanes
    with T.serial(T.truncdiv(count + (_GROUP - 1), _GROUP)) as group:
        sums = sums_buffer(_GROUP * rows)
        first = T.Bind(begin + group * (_GROUP * rows))
        tiles = T.Bind(T.min(count - group * _GROUP, T.int64(_GROUP)))
        with T.serial(tiles * rows) as i:
            for v in matmul.vectors:
                T.buffer_store(sums, splat(0.0, lanes), [i, ramp(v * lanes, lanes)])
        with T.serial(T.int64(ceil_div(matmul.K, _CHUNK))) as chunk:
            size = T.Bind(T.min(matmul.K - chunk * _CHUNK, T.int64(_CHUNK)))
            weight = _chunk_weights(matmul, operands, chunk, size)
            with T.serial(tiles) as tile:
                x_rows = [T.Bind(operands.x_row(first + tile * rows + i)) for i in range(rows)]
                for vectors in matmul.passes:
                    acc = accumulators(matmul, rows, vectors)
                    load_sums(matmul, acc, sums, tile * rows, vectors)
                    with T.serial(T.truncdiv(size, matmul.unroll)) as step:
                        for u in range(matmul.unroll):
                            k = step * matmul.unroll + u
                            xs = [operands.x[row, chunk * _CHUNK + k] for row in x_rows]
                            _multiply(matmul, acc, [weight(k, v) for v in vectors], xs)
                    store_sums(matmul, acc, sums, tile * rows, vectors)
        finish(matmul, operands, sums, first, tiles * rows)


def _chunk_weights(
    matmul: FloatProduct, operands: Operands, chunk: Expr, size: Expr
) -> Callable[[Expr, int], Expr]:
    """Return how to load vector v of line k of a chunk; bf16 is widened to the stack first."""
    lanes = matmul.isa.lanes
    if matmul.dtype == "f32":
        return lambda k, v: _line(matmul, operands, chunk * _CHUNK + k, (v,))[0]
    panel = T.alloc_buffer((_CHUNK, BLOCK), "float32", annotations=STACK)
    with T.serial(T.truncdiv(size + 1, 2)) as pair:
        words = _line(matmul, operands, chunk * (_CHUNK // 2) + pair, matmul.vectors)
        for v, word in zip(matmul.vectors, words, strict=True):
            word = T.Bind(word)
            columns = ramp(v * lanes, lanes)
            T.buffer_store(panel, widen_low(word, lanes), [pair * 2, columns])
            T.buffer_store(panel, widen_high(word, lanes), [pair * 2 + 1, columns])
    return lambda k, v: panel[k, ramp(v * lanes, lanes)]
