"""The matrix tile of integer weights and int8 rows.

    sums[i, j] = sum over groups g of  scale[row i, g] * scale[column j, g] * sum over k in g of q[i, k] * w[j, k]

w is the level that a code stands for. The instruction multiplies unsigned by signed bytes, so u = w + z takes its place:
codes of 6 and 8 bits are u, those of 4 and 5 are looked up in a register (byte shuffle) after they are unpacked. Then
sum(q w) = sum(q u) - z sum(q), and the last sum, times -8, comes ready with the rows (quantize.py). Inner sums are
exact int32; the outer sum runs over the groups in order, so a row's result depends neither on how many rows are
computed with it nor on the number of threads.

A block of 32 output columns lies group by group: 16 words with its bf16 scales, then lines of 32 words, a word for
each column. 16 inputs take 4 lines of 8 bits, or 2 of 4 bits (low halves first); 5 and 6 bits are stored as 4 and a
line with the high bits of 32 or 16 inputs (codegen/pack.py). One row reads it as one stream: the limit is memory bandwidth. Many rows: the limit is one byte-product instruction a cycle; a tall tile unpacks each weight once
for 8 rows (AVX2: 4).
"""

from __future__ import annotations

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
from q35c.codegen.kernels.dot import as_bytes, dot_bytes, high_halves, look_up, low_halves
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


@dataclass(frozen=True)
class IntegerProduct(Product):
    """A product of rows rounded to int8 with integer weights; X counts in int32 words."""

    @property
    def element(self) -> str:
        return "int32"

    @property
    def x_element(self) -> str:
        return "int32"

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
    def set_lines(self) -> int:
        """Number of lines that store a set of inputs."""
        return self.form.bits * self.set_words // 8

    @property
    def set_words(self) -> int:
        """Number of words of a row that a set of inputs meets."""
        return self.form.set_inputs // 4

    @property
    def sets(self) -> int:
        """Number of sets of one group."""
        return self.form.group // self.form.set_inputs

    @property
    def group_words(self) -> int:
        return _SCALE_WORDS + self.sets * self.set_lines * BLOCK

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
        # Rows bring -8 times their sum, this takes -z times.
        start = start << splat_int(product.form.zero_point.bit_length() - 4, size)
        for j in range(len(vectors)):
            T.buffer_store(inner, start, [i, j, lanes])
    with T.serial(product.sets) as number:
        _add_set(product, operands, inner, x_rows, vectors, group, number)
    scales = _scales(product, operands, base, vectors)
    for i, row in enumerate(x_rows):
        scale = T.Bind(splat(T.reinterpret(x[row, layout.scales + group], dtype="float32"), size))
        for j, column_scale in enumerate(scales):
            value = T.cast(inner[i, j, lanes], f"float32x{size}") * scale
            T.buffer_store(acc, acc[i, j, lanes] + value * column_scale, [i, j, lanes])


def _add_set(
    product: IntegerProduct,
    operands: Operands,
    inner: Expr,
    x_rows: Sequence[Expr],
    vectors: Vectors,
    group: Expr,
    number: Expr,
) -> None:
    """Emit inner += the products of a set's weights with the words of each row that they meet."""
    size, form = product.isa.lanes, product.form
    base = group * product.group_words + _SCALE_WORDS + number * (product.set_lines * BLOCK)
    column = group * (product.form.group // 4) + number * product.set_words
    lines = [
        [
            T.Bind(operands.w[operands.block, ramp(base + line * BLOCK + v * size, size)])
            for line in range(product.set_lines)
        ]
        for v in vectors
    ]
    largest = form.levels[-1] + form.zero_point
    for part in range(product.set_words):
        weights = [T.Bind(unpack_part(form, stored, part, size)) for stored in lines]
        for i, row in enumerate(x_rows):
            signed = T.Bind(splat_int(operands.x[row, column + part], size))
            for j, unsigned in enumerate(weights):
                at = [i, j, ramp(0, size)]
                value = dot_bytes(product.isa, inner[*at], unsigned, signed, largest)
                T.buffer_store(inner, value, at)


def unpack_part(form: IntegerFormat, lines: Sequence[Expr], part: int, lanes: int) -> Expr:
    """Return the unsigned levels of the inputs 4 part.. of a set from the lines that store it; see `pack_words`."""
    if form.bits == 8:
        return lines[part]
    low = (high_halves if part % 2 else low_halves)(lines[part // 2], lanes)
    if form.bits == 6:
        distance = 4 - 2 * part  # from where the high bits are to where they belong
        by = splat_int(abs(distance), lanes)
        moved = lines[-1] << by if distance > 0 else lines[-1] >> by
        return low | moved & splat_int(0x30303030, lanes)
    unsigned = [level + form.zero_point for level in form.levels]
    if form.bits == 4:
        return look_up(unsigned, low, lanes)
    bit = int.from_bytes(bytes([1 << part]) * 4, "little", signed=True)
    high_bits = as_bytes(lines[-1] & splat_int(bit, lanes), lanes)
    is_high = high_bits != T.broadcast(T.int8(0), 4 * lanes)
    both = [as_bytes(look_up(half, low, lanes), lanes) for half in (unsigned[16:], unsigned[:16])]
    return T.reinterpret(T.Select(is_high, *both), dtype=f"int32x{lanes}")


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
