"""The matrix tile of integer weights and int8 rows.

    sums[i, j] = sum over groups g of  scale[row i, g] * scale[column j, g] * sum over k in g of q[i, k] * w[j, k]

Weights are stored without a sign, as u = w + z, because the instruction multiplies unsigned by signed bytes; then
sum(q w) = sum(q u) - z sum(q), and the last sum, times -8, comes ready with the rows (quantize.py). Inner sums are
exact int32; the outer sum runs over the groups in order, so a row's result depends neither on how many rows are
computed with it nor on the number of threads.

A block of 32 output columns lies group by group: 16 words with its bf16 scales, then lines of 32 words, a word for
each column with 4 inputs (8 bits) or 8 (4 bits: low halves first). One row reads it as one stream: the limit is
memory bandwidth. Many rows: the limit is one byte-product instruction a cycle; a tall tile unpacks each weight once
for 8 rows (AVX2: 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.kernels.common import (
    BLOCK,
    Expr,
    ramp,
    splat,
    splat_int,
    widen_high,
    widen_low,
)
from q35c.codegen.kernels.dot import dot_bytes, high_halves, low_halves
from q35c.codegen.kernels.product import (
    Operands,
    Product,
    Vectors,
    accumulators,
    clear,
    finish,
    store_sums,
    sums_buffer,
)
from q35c.codegen.kernels.quantize import RowLayout
from q35c.ir.formats import IntegerFormat, integer_format

_SCALE_WORDS = BLOCK // 2
_LINES_AT_ONCE = 4  # lines of one turn of the inner loop


@dataclass(frozen=True)
class IntegerProduct(Product):
    """A product of rows rounded to int8 with integer weights; X counts in int32 words."""

    element = "int32"
    x_element = "int32"

    @property
    def form(self) -> IntegerFormat:
        form = integer_format(self.dtype)
        assert form is not None
        return form

    @property
    def rows(self) -> RowLayout:
        """Where a row of X keeps its codes, scales and sums."""
        return RowLayout(self.K, self.form.group)

    @property
    def lines(self) -> int:
        """Number of lines of one group."""
        return self.form.group * self.form.bits // 32

    @property
    def words_of_x(self) -> int:
        """Number of words of a row that one line meets."""
        return 8 // self.form.bits

    @property
    def group_words(self) -> int:
        return _SCALE_WORDS + self.lines * BLOCK

    @property
    def block_elements(self) -> int:
        return self.form.groups(self.K) * self.group_words

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of a tile: each height takes what the taller ones leave."""
        return (4, 2, 1) if self.isa.registers == 16 else (8, 4, 2, 1)

    def passes(self, rows: int) -> tuple[Vectors, ...]:
        """Vectors of a line that one tile takes at a time: its sums must fit the registers."""
        if len(self.vectors) == 2 or rows == 1:
            return (self.vectors,)
        return (self.vectors[:2], self.vectors[2:])

    def sweep(self, operands: Operands, begin: Expr, end: Expr) -> None:
        position = begin
        for rows in self.heights:
            count = T.Bind(T.truncdiv(end - position, rows))
            _tiles(self, operands, position, count, rows)
            position = T.Bind(position + count * rows)


def _tiles(
    product: IntegerProduct, operands: Operands, begin: Expr, count: Expr, rows: int
) -> None:
    with T.serial(count) as tile:
        first = T.Bind(begin + tile * rows)
        x_rows = [T.Bind(operands.x_row(first + i)) for i in range(rows)]
        sums = sums_buffer(rows)
        for vectors in product.passes(rows):
            acc = accumulators(product, rows, vectors)
            clear(product, acc)
            with T.serial(product.form.groups(product.K)) as group:
                _add_group(product, operands, acc, x_rows, vectors, group)
            store_sums(product, acc, sums, T.int64(0), vectors)
        finish(product, operands, sums, first, T.int64(rows))


def _add_group(
    product: IntegerProduct,
    operands: Operands,
    acc: Expr,
    x_rows: Sequence[Expr],
    vectors: Vectors,
    group: Expr,
) -> None:
    """Emit acc += the scaled sums of one group of inputs."""
    size, x, layout = product.isa.lanes, operands.x, product.rows
    lanes = ramp(0, size)
    base = T.Bind(group * product.group_words)
    inner = accumulators(product, len(x_rows), vectors, "int32")
    for i, row in enumerate(x_rows):
        start = splat_int(x[row, layout.sums + group], size)
        if product.form.bits == 8:  # rows bring -8 times their sum; here the zero point is 128
            start = start << splat_int(4, size)
        for j in range(len(vectors)):
            T.buffer_store(inner, start, [i, j, lanes])
    step = math.gcd(_LINES_AT_ONCE, product.lines)
    with T.serial(product.lines // step) as turn:
        for line in range(step):
            _add_line(product, operands, inner, x_rows, vectors, group, turn * step + line)
    scales = _scales(product, operands, base, vectors)
    for i, row in enumerate(x_rows):
        scale = T.Bind(splat(T.reinterpret(x[row, layout.scales + group], dtype="float32"), size))
        for j, column_scale in enumerate(scales):
            value = T.cast(inner[i, j, lanes], f"float32x{size}") * scale
            T.buffer_store(acc, acc[i, j, lanes] + value * column_scale, [i, j, lanes])


def _add_line(
    product: IntegerProduct,
    operands: Operands,
    inner: Expr,
    x_rows: Sequence[Expr],
    vectors: Vectors,
    group: Expr,
    line: Expr,
) -> None:
    """Emit inner += the products of one line of weights with the words of each row that it meets."""
    size, words = product.isa.lanes, product.words_of_x
    base = group * product.group_words + _SCALE_WORDS + line * BLOCK
    column = group * (product.form.group // 4) + line * words
    parts: list[list[Expr]] = []
    for v in vectors:
        word = T.Bind(operands.w[operands.block, ramp(base + v * size, size)])
        halves = [low_halves(word, size), high_halves(word, size)] if words == 2 else [word]
        parts.append([T.Bind(half) for half in halves])
    for i, row in enumerate(x_rows):
        for part in range(words):
            signed = T.Bind(splat_int(operands.x[row, column + part], size))
            for j in range(len(vectors)):
                at = [i, j, ramp(0, size)]
                largest = (1 << product.form.bits) - 1
                value = dot_bytes(product.isa, inner[*at], parts[j][part], signed, largest)
                T.buffer_store(inner, value, at)


def _scales(
    product: IntegerProduct, operands: Operands, base: Expr, vectors: Vectors
) -> list[Expr]:
    """Return the columns' scales of a group: output j in the low half of word j, j + 16 in its high half."""
    size = product.isa.lanes
    half = _SCALE_WORDS // size  # vectors of words
    found = []
    for v in vectors:
        word = operands.w[operands.block, ramp(base + v % half * size, size)]
        found.append(T.Bind((widen_low if v < half else widen_high)(word, size)))
    return found
