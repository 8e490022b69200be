"""Round rows to bf16, nearest even.

    y = the bf16 value nearest to x; of two, the one with an even last bit

Where the instruction set multiplies bf16 pairs, a row becomes its bf16 values, two in a word and zero behind an odd
last one; elsewhere they are kept in f32, so that every product reads the same values (layouts/rows.py). The limit
is the bandwidth of the read. Threads split (row, segment) pairs.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import Family, rounding
from q35c.codegen.cpu.kernels.vectors import Expr, bits, from_bits, ramp, share, splat_int, vector
from q35c.layouts.weights import ceil_div

_SEGMENT = 128  # values of one work item


def round_rows(K: int, isa: Isa, pairs: int = 1) -> PrimFunc:
    """Make the kernel (X f32 [T * pairs, K], Y [T * pairs, ..], T, ld_x, ld_y, tid, nt), strides in words."""
    element, word_elements = bf16_element(isa)
    segments = ceil_div(K, _SEGMENT)

    @T.prim_func(private=True, s_tir=True)
    def round_rows_kernel(
        X: T.handle("float32"),
        Y: T.handle(element),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        rows: T.let[T.int64] = tokens * pairs
        x = T.decl_buffer((rows, ld_x), "float32", data=X)
        y = T.decl_buffer((rows, ld_y * word_elements), element, data=Y)
        first: T.let[T.int64] = share(rows * segments, tid, nt)
        last: T.let[T.int64] = share(rows * segments, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(segments))
            number: T.let[T.int64] = first + item - row * segments
            _round_segment(K, isa, x, y, row, number)
        return T.int32(0)

    return round_rows_kernel


def _round_segment(K: int, isa: Isa, x: Expr, y: Expr, row: Expr, number: Expr) -> None:
    """Emit the rounding of one segment: whole vectors, then single values, then the other half of a last pair."""
    begin = number * _SEGMENT
    width = T.Bind(T.min(T.int64(_SEGMENT), K - begin))
    whole = T.Bind(T.truncdiv(width, isa.lanes))
    with T.serial(whole) as v:
        _round_values(x, y, row, begin + v * isa.lanes, isa.lanes)
    with T.serial(width - whole * isa.lanes) as i:
        _round_values(x, y, row, begin + whole * isa.lanes + i, 1)
    if K % 2 and isa.offers("dot2_bf16"):
        with T.If(number == ceil_div(K, _SEGMENT) - 1), T.Then():
            T.buffer_store(y, T.uint16(0), [row, T.int64(K)])


def _round_values(x: Expr, y: Expr, row: Expr, column: Expr, lanes: int) -> None:
    columns = ramp(column, lanes)
    store_bf16(y, x[row, columns], row, columns, lanes)


def bf16_element(isa: Isa) -> tuple[str, int]:
    """Return the TIR type of an element of rows rounded to bf16, and how many of them a word holds."""
    return ("uint16", 2) if isa.offers("dot2_bf16") else ("float32", 1)


def store_bf16(y: Expr, value: Expr, row: Expr, columns: Expr, lanes: int) -> None:
    """Emit y[row, columns] = values rounded to bf16: halves of words, or in f32 if y is f32."""
    word = T.Bind(_rounded(bits(value, lanes), lanes))
    if y.dtype == "float32":
        T.buffer_store(y, from_bits(word, lanes), [row, columns])
    else:
        half = T.cast(word >> splat_int(16, lanes), vector("uint16", lanes))
        T.buffer_store(y, half, [row, columns])


def _rounded(word: Expr, lanes: int) -> Expr:
    """Return the bits of f32 lanes rounded to bf16, still in f32; a carry must not turn NaN into a number."""
    word = T.Bind(word)
    odd = (word >> splat_int(16, lanes)) & splat_int(1, lanes)
    nearest = (word + splat_int(0x7FFF, lanes) + odd) & splat_int(-65536, lanes)
    is_nan = (word & splat_int(0x7FFFFFFF, lanes)) > splat_int(0x7F800000, lanes)
    return T.Select(is_nan, splat_int(0x7FC00000, lanes), nearest)


ROUND_ROWS = Family(
    round_rows, "x y tokens ld_x ld_y", writes="y", cost=lambda p: rounding(p, "bf16")
)
