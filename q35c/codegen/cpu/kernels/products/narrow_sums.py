"""Sums of products of small levels in 16 bits, for instruction sets without VNNI.

There u8 times s8 gives sums of two products in 16 bits, and adding them to sums of 32 bits takes another two
instructions. Levels of 4 and 5 bits are small enough to put that off: u = w + 32 is at most 64, so two products fit, and
of 16 inputs the levels w themselves are held to 258 in magnitude (formats/integer.py), so that

    sum(q w) = sum(q u) - 32 sum(q)

fits 16 bits for all codes q of a row, up to 127. That sum(q u) does not is no matter, as 16 bits wrap around: a sum starts
with -32 sum(q), which comes with the rows (rows/round_int8.py). The instruction that adds two of 16 bits in 32 multiplies
them, too: by the column's scale, which its 8 bits make an integer up to 3,968 times a power of two that belongs to the
row. Sums of 32 inputs so scaled add up in 32 bits over a group, up to 128 inputs; only the row's scale is left to do
in f32.

A step of 4 inputs takes two instructions instead of two and a half.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.products.integer_weights import Packed, Unpacked, Weights
from q35c.codegen.cpu.kernels.products.narrow_tile_avx2 import Tile
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, ramp, splat, splat_int
from q35c.formats.integer import SUM_INPUTS
from q35c.layouts.rows import IntegerRow
from q35c.layouts.weights import BLOCK

_WORDS = SUM_INPUTS // 4


def add_group_narrowly(
    layout: IntegerRow,
    x: Expr,
    acc: Expr,
    x_rows: Sequence[Expr],
    vectors: Sequence[int],
    weights: Weights,
    group: Expr,
) -> None:
    """Emit acc += the sums of one group of inputs, scaled but for the columns' factors."""
    isa = weights.layout.isa
    lanes = ramp(0, isa.lanes)
    shape = (len(x_rows), len(vectors), isa.lanes)
    narrow, wide = (T.alloc_buffer(shape, "int32", annotations=STACK) for _ in range(2))
    places = [(i, j, lanes) for i in range(len(x_rows)) for j in range(len(vectors))]
    for at in places:
        T.buffer_store(wide, splat_int(0, isa.lanes), at)
    scales = [T.Bind(scale) for scale in weights.scales(group, vectors)]
    with T.serial(layout.starts_in_group) as part:
        for i, row in enumerate(x_rows):
            start = x[row, layout.starts + group * layout.starts_in_group + part]
            for j in range(len(vectors)):
                T.buffer_store(narrow, splat_int(start, isa.lanes), [i, j, lanes])
        _add_levels(isa, x, narrow, x_rows, vectors, weights, group, part)
        for at in places:
            scaled = apply(isa, "dot2_s16", narrow[*at], scales[at[1]])
            T.buffer_store(wide, wide[*at] + scaled, at)
    for i, row in enumerate(x_rows):
        row_scale = T.reinterpret(x[row, layout.scales + group], dtype="float32")
        factor = T.Bind(splat(row_scale, isa.lanes))
        for j in range(len(vectors)):
            value = T.cast(wide[i, j, lanes], f"float32x{isa.lanes}") * factor
            T.buffer_store(acc, acc[i, j, lanes] + value, [i, j, lanes])


def add_panel(
    layout: IntegerRow,
    x: Expr,
    sums: Expr,
    first: Expr,
    x_rows: Sequence[Expr],
    weights: Unpacked,
    groups: Expr,
) -> None:
    """Emit sums += those of the first groups of a panel, for the tile whose first row is `first`; AVX2 alone."""
    group = weights.layout.form.group
    tile = Tile(len(x_rows), group, 0)
    offsets = (
        weights.first * (group // 4),
        layout.scales + weights.first,
        layout.starts + weights.first * layout.starts_in_group,
    )
    for v in range(0, BLOCK // weights.layout.isa.lanes, tile.vectors):
        places = [_address(weights.panel[0, line, v]) for line in (0, weights.words)]
        out = T.address_of(sums[first, v * weights.layout.isa.lanes])
        _call_tile(tile, x, x_rows, [T.Bind(4 * word) for word in offsets], places, out, groups)


def add_block(
    layout: IntegerRow, x: Expr, sums: Expr, x_rows: Sequence[Expr], packed: Packed
) -> None:
    """Emit sums += those of a packed block, for a tile of its own; AVX2 alone."""
    form = packed.layout.form
    tile = Tile(len(x_rows), form.group, form.bits)
    offsets = [T.int64(4 * word) for word in (0, layout.scales, layout.starts)]
    starts = packed.layout.set_start(0, 0), packed.layout.scales_start(0)
    places = [_address(packed.w[packed.block, word]) for word in starts]
    _call_tile(tile, x, x_rows, offsets, places, T.address_of(sums[0, 0]), T.int64(layout.groups))


def _call_tile(
    tile: Tile,
    x: Expr,
    x_rows: Sequence[Expr],
    offsets: Sequence[Expr],
    places: Sequence[Expr],
    out: Expr,
    groups: Expr,
) -> None:
    rows = [T.address_of(x[row, 0]) for row in x_rows]
    arguments = (*rows, *offsets, *places, out, groups)
    with T.attr(T.int32(0), "pragma_import_llvm", tile.ir()):
        T.evaluate(T.call_extern("int32", tile.name, *arguments))


def _address(element: Expr) -> Expr:
    return T.reinterpret(T.address_of(element), dtype="int64")


def _add_levels(
    isa: Isa,
    x: Expr,
    narrow: Expr,
    x_rows: Sequence[Expr],
    vectors: Sequence[int],
    weights: Weights,
    group: Expr,
    part: Expr,
) -> None:
    """Emit narrow += the products of 32 inputs."""
    layout, lanes = weights.layout, ramp(0, isa.lanes)
    sets = _WORDS // layout.set_words
    with T.serial(sets) as at:
        number = part * sets + at
        parts = weights.parts(group, number, vectors)
        column = group * (layout.form.group // 4) + number * layout.set_words
        for word in range(layout.set_words):
            levels = [T.Bind(one) for one in parts(word)]
            for i, row in enumerate(x_rows):
                signed = T.Bind(splat_int(x[row, column + word], isa.lanes))
                for j, level in enumerate(levels):
                    sums = apply(isa, "add2_u8s8", narrow[i, j, lanes], level, signed)
                    T.buffer_store(narrow, sums, [i, j, lanes])
