"""The matrix tile that linears and experts share.

A tile multiplies a few rows of X with some vectors of one packed block of 32 output columns:

    acc[i, j] = sum over k of  X[row i, k] * W[block, k, vector j]

The sum runs over k in order with one accumulator per output, whatever the tile's height, so a
row's result depends neither on how many rows are computed with it nor on the number of threads.

Accumulators live in registers. Rows are taken in tall tiles (AVX2 6 rows x 2 vectors of its 16
registers, AVX-512 8 x 2 of 32; more rows at a power-of-two stride would fight for one set of a
small L1), and the rows that are left in short tiles over the whole block. A tall tile walks K in
chunks, so that a chunk of weights serves up to 8 tiles from L1; bf16 is widened once per chunk.

These are plain functions that emit statements into the kernel under construction: call them as a
statement inside TVMScript. (T.inline macros would cost half a second of parsing for each linear.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import (
    BLOCK,
    STACK,
    Expr,
    ceil_div,
    ramp,
    splat,
    vsilu,
    widen_high,
    widen_low,
)

Vectors = Sequence[int]  # indices of vectors in a line

_CHUNK = 128  # k in one chunk: 16 KiB of f32 weights, half of L1


_GROUP = 8  # tall tiles that one chunk serves; their partial sums take 6 KiB


@dataclass(frozen=True)
class Matmul:
    """Describe a product with packed weights: N output rows (before swiglu) of K inputs each.

    `epilogue` says what is stored: "none" the sums, "residual" sums plus the same element of R,
    "swiglu" silu(gate) * up of the two halves of each block.
    """

    N: int
    K: int
    dtype: str
    epilogue: str
    isa: Isa

    @property
    def blocks(self) -> int:
        """Number of 32-row blocks of weights."""
        return ceil_div(self.N, BLOCK)

    @property
    def lines(self) -> int:
        """Number of 32-element lines in a block: one for each k, or in bf16 for each pair."""
        return self.K if self.dtype == "f32" else ceil_div(self.K, 2)

    @property
    def element(self) -> str:
        """TIR type of a stored element of W."""
        return "float32" if self.dtype == "f32" else "int32"

    @property
    def is_swiglu(self) -> bool:
        """Tell whether gate and up vectors pair into one output vector."""
        return self.epilogue == "swiglu"

    @property
    def outputs(self) -> int:
        """Number of columns of Y."""
        return self.N // 2 if self.is_swiglu else self.N

    @property
    def block_outputs(self) -> int:
        """Number of columns of Y that one full block makes."""
        return BLOCK // 2 if self.is_swiglu else BLOCK

    @property
    def vectors(self) -> Vectors:
        """Indices of the vectors of a line."""
        return tuple(range(BLOCK // self.isa.lanes))

    @property
    def tall_rows(self) -> int:
        """Number of rows of a tall tile."""
        return 6 if self.isa.registers == 16 else 8

    @property
    def short_rows(self) -> tuple[int, ...]:
        """Heights of the short tiles: each takes what the taller ones leave."""
        return (3, 2, 1) if self.isa.registers == 16 else (4, 2, 1)

    @property
    def passes(self) -> tuple[Vectors, ...]:
        """Vectors of a line that one tall tile takes at a time."""
        if len(self.vectors) == 2:
            return (self.vectors,)
        # swiglu needs a gate vector and its up vector, 16 columns further, in one pass.
        return ((0, 2), (1, 3)) if self.is_swiglu else ((0, 1), (2, 3))

    @property
    def unroll(self) -> int:
        """Number of k in one turn of a tall tile's loop; it divides every chunk."""
        return math.gcd(self.K, 4)


@dataclass(frozen=True)
class Operands:
    """Hold the buffers of one block's product, and where its rows are.

    w [blocks, lines, 32]; x, y and r (the residual, or y) by row and column. `block` counts in w,
    `column_block` in the columns of y. `x_row(position)` and `y_row(position)` give rows.
    """

    w: Expr
    x: Expr
    y: Expr
    r: Expr
    block: Expr
    column_block: Expr
    x_row: Callable[[Expr], Expr]
    y_row: Callable[[Expr], Expr]


def sweep(matmul: Matmul, operands: Operands, begin: Expr, end: Expr) -> None:
    """Emit the product of one block with the rows at positions begin..end, int64."""
    position = begin
    count = T.Bind(T.truncdiv(end - begin, matmul.tall_rows))
    _tall_tiles(matmul, operands, position, count)
    position = T.Bind(position + count * matmul.tall_rows)
    for rows in matmul.short_rows:
        count = T.Bind(T.truncdiv(end - position, rows))
        _short_tiles(matmul, operands, position, count, rows)
        position = T.Bind(position + count * rows)


def _accumulators(matmul: Matmul, rows: int, vectors: Vectors) -> Expr:
    return T.alloc_buffer((rows, len(vectors), matmul.isa.lanes), "float32", annotations=STACK)


def _multiply(matmul: Matmul, acc: Expr, weights: Sequence[Expr], xs: Sequence[Expr]) -> None:
    """Emit acc[i, j] += weights[j] * xs[i]."""
    lanes = ramp(0, matmul.isa.lanes)
    weights = [T.Bind(weight) for weight in weights]
    for i, x in enumerate(xs):
        wide = T.Bind(splat(x, matmul.isa.lanes))
        for j, weight in enumerate(weights):
            T.buffer_store(acc, acc[i, j, lanes] + weight * wide, [i, j, lanes])


def _line(matmul: Matmul, operands: Operands, line: Expr, vectors: Vectors) -> list[Expr]:
    size = matmul.isa.lanes
    return [operands.w[operands.block, line, ramp(v * size, size)] for v in vectors]


def _load_sums(matmul: Matmul, acc: Expr, sums: Expr, first: Expr, vectors: Vectors) -> None:
    """Emit acc = the sums of the tile whose first row is `first`."""
    lanes = matmul.isa.lanes
    for i in range(int(acc.shape[0])):
        for j, v in enumerate(vectors):
            value = sums[first + i, ramp(v * lanes, lanes)]
            T.buffer_store(acc, value, [i, j, ramp(0, lanes)])


def _store_sums(matmul: Matmul, acc: Expr, sums: Expr, first: Expr, vectors: Vectors) -> None:
    """Emit sums of the tile whose first row is `first` = acc."""
    lanes = matmul.isa.lanes
    for i in range(int(acc.shape[0])):
        for j, v in enumerate(vectors):
            value = acc[i, j, ramp(0, lanes)]
            T.buffer_store(sums, value, [first + i, ramp(v * lanes, lanes)])


# Short tiles: every vector of the block at once, straight from the packed weights


def _short_tiles(matmul: Matmul, operands: Operands, begin: Expr, count: Expr, rows: int) -> None:
    lanes = matmul.isa.lanes
    with T.serial(count) as tile:
        first = T.Bind(begin + tile * rows)
        x_rows = [T.Bind(operands.x_row(first + i)) for i in range(rows)]
        acc = _accumulators(matmul, rows, matmul.vectors)
        for i in range(rows):
            for j in matmul.vectors:
                T.buffer_store(acc, splat(0.0, lanes), [i, j, ramp(0, lanes)])
        if matmul.dtype == "f32":
            with T.serial(matmul.K) as k:
                weights = _line(matmul, operands, k, matmul.vectors)
                _multiply(matmul, acc, weights, [operands.x[row, k] for row in x_rows])
        else:
            _short_bf16(matmul, operands, acc, x_rows)
        sums = T.alloc_buffer((rows, BLOCK), "float32", annotations=STACK)
        _store_sums(matmul, acc, sums, T.int64(0), matmul.vectors)
        _finish(matmul, operands, sums, first, T.int64(rows))


def _short_bf16(matmul: Matmul, operands: Operands, acc: Expr, x_rows: Sequence[Expr]) -> None:
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


def _tall_tiles(matmul: Matmul, operands: Operands, begin: Expr, count: Expr) -> None:
    rows, lanes = matmul.tall_rows, matmul.isa.lanes
    with T.serial(T.truncdiv(count + (_GROUP - 1), _GROUP)) as group:
        sums = T.alloc_buffer((_GROUP * rows, BLOCK), "float32", annotations=STACK)
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
                    acc = _accumulators(matmul, rows, vectors)
                    _load_sums(matmul, acc, sums, tile * rows, vectors)
                    with T.serial(T.truncdiv(size, matmul.unroll)) as step:
                        for u in range(matmul.unroll):
                            k = step * matmul.unroll + u
                            xs = [operands.x[row, chunk * _CHUNK + k] for row in x_rows]
                            _multiply(matmul, acc, [weight(k, v) for v in vectors], xs)
                    _store_sums(matmul, acc, sums, tile * rows, vectors)
        _finish(matmul, operands, sums, first, tiles * rows)


def _chunk_weights(
    matmul: Matmul, operands: Operands, chunk: Expr, size: Expr
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


# Epilogue


def _finish(matmul: Matmul, operands: Operands, sums: Expr, first: Expr, rows: Expr) -> None:
    """Emit the epilogue of the rows at positions first.., and their stores."""
    lanes = matmul.isa.lanes
    outputs = matmul.block_outputs
    narrow = matmul.outputs % outputs  # columns of a last block that is not full
    with T.serial(rows) as i:
        row = T.Bind(operands.y_row(first + i))
        if matmul.is_swiglu:
            for v in range(0, outputs, lanes):
                gate, up = sums[i, ramp(v, lanes)], sums[i, ramp(v + outputs, lanes)]
                T.buffer_store(sums, vsilu(gate, lanes) * up, [i, ramp(v, lanes)])
        if not narrow:
            _store_row(matmul, operands, sums, i, row)
            return
        with T.If(operands.column_block < matmul.blocks - 1):
            with T.Then():
                _store_row(matmul, operands, sums, i, row)
            with T.Else(), T.serial(narrow) as column:
                _store_columns(matmul, operands, sums, i, row, column, 1)


def _store_row(matmul: Matmul, operands: Operands, sums: Expr, i: Expr, row: Expr) -> None:
    for column in range(0, matmul.block_outputs, matmul.isa.lanes):
        _store_columns(matmul, operands, sums, i, row, column, matmul.isa.lanes)


def _store_columns(
    matmul: Matmul, operands: Operands, sums: Expr, i: Expr, row: Expr, column: Expr, lanes: int
) -> None:
    value = sums[i, ramp(column, lanes)]
    columns = ramp(operands.column_block * matmul.block_outputs + column, lanes)
    if matmul.epilogue == "residual":
        value = value + operands.r[row, columns]
    T.buffer_store(operands.y, value, [row, columns])
