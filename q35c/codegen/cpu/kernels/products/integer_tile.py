"""The matrix tile of integer weights and int8 rows.

    sums[i, j] = sum over groups g of  scale[row i, g] * scale[column j, g] * sum over k in g of q[i, k] * w[j, k]

w is the level that a code stands for. The instruction multiplies unsigned by signed bytes, so u = w + z takes its place:
codes of 8 bits are u, those of 4 and 5 are looked up in a register (byte shuffle) after they are unpacked. Then
sum(q w) = sum(q u) - z sum(q), and the last sum, times -32, comes ready with the rows (rows/round_int8.py). Without VNNI
products of 4 and 5 bits are added in 16 bits and the column's scale is an integer (narrow_sums.py), for AVX2 in tiles of
assembly (narrow_tile_avx2.py); AVX2 multiplies levels of 8 bits by their magnitude and moves the sign to q (isa/byte_products.py). Inner sums
are exact integers; the outer sum runs over the groups in order, so a row's result depends neither on how many rows are
computed with it nor on the number of threads.

A block of 32 output columns begins with the columns' exponents; then come, for each pair of groups, its scales, a byte
each (formats/integer.py), and lines of 32 words, a word for each column: one stream, which a header with all scales would
break (measured: a w4 model decoded at 55 % of its speed). 16 inputs take 4 lines of 8 bits, or 2 of 4 bits (low halves first); 5 bits are
stored as a line with the high bits of 32 inputs and their low 4 bits (codegen/pack.py). One row reads it as one stream:
the limit is memory bandwidth. Many
rows: the limit is one byte-product instruction a cycle. A tall tile unpacks 4 bits beside its products, at no cost that
shows; for 5 bits, which take more instructions, many tall tiles share what was unpacked once (measured on Zen 4: 4 %
faster with VBMI and 13 % without, while 4 bits would be 5 % slower); so do AVX2's tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.byte_products import dot_bytes, dot_levels
from q35c.codegen.cpu.kernels.products.integer_weights import (
    IntegerLayout,
    Packed,
    Unpacked,
    Weights,
    unpack_groups,
)
from q35c.codegen.cpu.kernels.products.narrow_sums import add_block, add_group_narrowly, add_panel
from q35c.codegen.cpu.kernels.products.narrow_tile_avx2 import TALLEST
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
from q35c.codegen.cpu.kernels.rows.round_int8 import row_layout
from q35c.codegen.cpu.kernels.vectors import Expr, ramp, splat, splat_int
from q35c.formats.integer import IntegerFormat
from q35c.formats.registry import integer_format
from q35c.layouts.rows import SUM_FACTOR, IntegerRow
from q35c.layouts.weights import ceil_div

_SIGN_BITS = -0x7F7F7F80  # 0x80 in every byte: takes 128 from an unsigned one
_SHARING_ROWS = 256  # most rows whose tiles share them; their sums, 32 KiB, pass once a chunk


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
    def rows(self) -> IntegerRow:
        """Where a row of X keeps its codes, scales and sums."""
        return row_layout(self.K, self.form.group, self.isa)

    @property
    def layout(self) -> IntegerLayout:
        """Where a block keeps its groups."""
        return IntegerLayout(self.form, self.K, self.isa)

    @property
    def block_elements(self) -> int:
        return self.layout.block_words

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of a tile: each height takes what the taller ones leave."""
        return tuple(range(TALLEST, 0, -1)) if self.is_assembled else self.isa.tuning.integer_rows

    @property
    def is_assembled(self) -> bool:
        """Whether tiles are those of narrow_tile_avx2.py."""
        return self.layout.has_narrow_sums and self.isa.tuning.has_assembled_tiles

    def passes(self, rows: int) -> tuple[Vectors, ...]:
        """Vectors of a line that one tile takes at a time: its sums must fit the registers."""
        if rows == 1:
            return (self.vectors,)
        return tuple(self.vectors[v : v + 2] for v in range(0, len(self.vectors), 2))

    @property
    def moves_signs(self) -> bool:
        """Whether levels are multiplied as signed bytes: half the products, where there is no VNNI (isa/byte_products.py)."""
        return self.form.bits == 8 and self.isa.offers("move_sign_s8")

    @property
    def unpacks_slowly(self) -> bool:
        """Whether tiles should share what is unpacked."""
        return self.form.bits in self.isa.tuning.slow_bits

    def sweep(self, operands: Operands, begin: Expr, end: Expr) -> None:
        position = begin
        for rows in self.heights:
            count = T.Bind(T.truncdiv(end - position, rows))
            if rows == self.heights[0] and self.unpacks_slowly:
                with T.If(count < self.isa.tuning.sharing_tiles):
                    with T.Then():
                        _tiles(self, operands, position, count, rows)
                    with T.Else():
                        _sharing_tiles(self, operands, position, count, rows)
            else:
                _tiles(self, operands, position, count, rows)
            position = T.Bind(position + count * rows)


def _tiles(
    product: IntegerProduct, operands: Operands, begin: Expr, count: Expr, rows: int
) -> None:
    """Emit tiles that read the packed block, all its groups at once."""
    # One row keeps up with memory by itself where one instruction multiplies bytes.
    runs_ahead = rows > 1 or not product.isa.offers("dot4_u8s8")
    packed = Packed(product.layout, operands.w, operands.block, runs_ahead)
    with T.serial(count) as tile:
        first = T.Bind(begin + tile * rows)
        x_rows = [T.Bind(operands.x_row(first + i)) for i in range(rows)]
        sums = sums_buffer(rows)
        if product.is_assembled:
            _clear_sums(product, sums, T.int64(rows))
            add_block(product.rows, operands.x, sums, x_rows, packed)
        else:
            _add_block(product, operands.x, sums, x_rows, packed)
        _complete_scales(product, packed, sums, T.int64(rows))
        finish(product, operands, sums, first, T.int64(rows))


def _sharing_tiles(
    product: IntegerProduct, operands: Operands, begin: Expr, count: Expr, rows: int
) -> None:
    """Emit tiles that share a chunk of unpacked groups, of up to _SHARING_ROWS rows; their sums wait on the stack."""
    form, together = product.form, _SHARING_ROWS // rows
    packed = Packed(product.layout, operands.w, operands.block, runs_ahead=True)
    most = product.isa.tuning.unpacked_inputs // form.group
    with T.serial(T.truncdiv(count + (together - 1), together)) as turn:
        sums = sums_buffer(together * rows)
        first = T.Bind(begin + turn * (together * rows))
        tiles = T.Bind(T.min(count - turn * together, T.int64(together)))
        _clear_sums(product, sums, tiles * rows)
        with T.serial(T.int64(ceil_div(form.groups(product.K), most))) as chunk:
            start = T.Bind(chunk * most)
            size = T.Bind(T.min(form.groups(product.K) - start, T.int64(most)))
            weights = unpack_groups(packed, start, size, most)
            with T.serial(tiles) as tile:
                x_rows = [T.Bind(operands.x_row(first + tile * rows + i)) for i in range(rows)]
                if product.is_assembled:
                    add_panel(product.rows, operands.x, sums, tile * rows, x_rows, weights, size)
                else:
                    _add_groups(product, operands.x, sums, tile * rows, x_rows, weights, size)
        _complete_scales(product, packed, sums, tiles * rows)
        finish(product, operands, sums, first, tiles * rows)


def _clear_sums(product: IntegerProduct, sums: Expr, rows: Expr) -> None:
    lanes = product.isa.lanes
    with T.serial(rows) as i:
        for v in product.vectors:
            T.buffer_store(sums, splat(0.0, lanes), [i, ramp(v * lanes, lanes)])


def _add_block(
    product: IntegerProduct, x: Expr, sums: Expr, x_rows: Sequence[Expr], packed: Packed
) -> None:
    """Emit sums = those of a packed block, for a tile of its own."""
    for vectors in product.passes(len(x_rows)):
        acc = accumulators(product, len(x_rows), vectors)
        clear(product, acc)
        with T.serial(product.form.groups(product.K)) as group:
            _add_group(product, x, acc, x_rows, vectors, packed, group)
        store_sums(product, acc, sums, T.int64(0), vectors)


def _add_groups(
    product: IntegerProduct,
    x: Expr,
    sums: Expr,
    first: Expr,
    x_rows: Sequence[Expr],
    weights: Unpacked,
    groups: Expr,
) -> None:
    """Emit sums += those of the first groups of a panel, for the tile whose first row is `first`."""
    for vectors in product.passes(len(x_rows)):
        acc = accumulators(product, len(x_rows), vectors)
        load_sums(product, acc, sums, first, vectors)
        with T.serial(groups) as at:
            _add_group(product, x, acc, x_rows, vectors, weights, weights.first + at)
        store_sums(product, acc, sums, first, vectors)


def _complete_scales(product: IntegerProduct, packed: Packed, sums: Expr, rows: Expr) -> None:
    """Emit the product of sums with what integer scales leave."""
    if not packed.layout.has_narrow_sums:
        return
    lanes = product.isa.lanes
    factors = [T.Bind(factor) for factor in packed.factors(product.vectors)]
    with T.serial(rows) as i:
        for v, factor in zip(product.vectors, factors, strict=True):
            at = [i, ramp(v * lanes, lanes)]
            T.buffer_store(sums, sums[*at] * factor, at)


def _add_group(
    product: IntegerProduct,
    x: Expr,
    acc: Expr,
    x_rows: Sequence[Expr],
    vectors: Vectors,
    weights: Weights,
    group: Expr,
) -> None:
    """Emit acc += the scaled sums of one group of inputs."""
    size, rows, form, layout = product.isa.lanes, product.rows, product.form, weights.layout
    if layout.has_narrow_sums:
        add_group_narrowly(rows, x, acc, x_rows, vectors, weights, group)
        return
    lanes = ramp(0, size)
    inner = accumulators(product, len(x_rows), vectors, "int32")
    for i, row in enumerate(x_rows):
        start = _first_sum(product, x, row, group)
        for j in range(len(vectors)):
            T.buffer_store(inner, start, [i, j, lanes])
    with T.serial(layout.sets) as number:
        parts = weights.parts(group, number, vectors)
        column = group * (form.group // 4) + number * layout.set_words
        for part in range(layout.set_words):
            words = [T.Bind(_factor(product, word)) for word in parts(part)]
            for i, row in enumerate(x_rows):
                signed = T.Bind(splat_int(x[row, column + part], size))
                for j, levels in enumerate(words):
                    at = [i, j, lanes]
                    T.buffer_store(inner, _add_products(product, inner[*at], levels, signed), at)
    scales = [T.Bind(scale) for scale in weights.scales(group, vectors)]
    for i, row in enumerate(x_rows):
        scale = T.Bind(splat(T.reinterpret(x[row, rows.scales + group], dtype="float32"), size))
        for j, column_scale in enumerate(scales):
            value = T.cast(inner[i, j, lanes], f"float32x{size}") * scale
            T.buffer_store(acc, acc[i, j, lanes] + value * column_scale, [i, j, lanes])


def _first_sum(product: IntegerProduct, x: Expr, row: Expr, group: Expr) -> Expr:
    """Return what a group's sum starts with: -z times the row's own sum, or 0 where levels are multiplied with their sign."""
    size, factor = product.isa.lanes, product.form.zero_point // -SUM_FACTOR
    if product.moves_signs:
        return splat_int(0, size)
    start = splat_int(x[row, product.rows.sums + group], size)
    return start << splat_int(factor.bit_length() - 1, size) if factor > 1 else start


def _factor(product: IntegerProduct, word: Expr) -> Expr:
    """Return a word of unsigned levels as the product takes it."""
    return word ^ splat_int(_SIGN_BITS, product.isa.lanes) if product.moves_signs else word


def _add_products(product: IntegerProduct, total: Expr, levels: Expr, signed: Expr) -> Expr:
    if product.moves_signs:
        return dot_levels(product.isa, total, levels, signed)
    return dot_bytes(product.isa, total, levels, signed)
